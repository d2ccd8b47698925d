"""The valve as a middleware: who passes, who is told to come back, what is counted, and what cannot break
it."""

import asyncio
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.clock import NS, SystemClock, VirtualClock
from kvpilot.inside.callers import Tag
from kvpilot.inside.valve import CURRENT, Valve
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, Scope
from kvpilot.link.page import Identity
from kvpilot.link.valve_page import ValvePageReader, ValveSnapshot

KEY = "sk-acme"
CALLERS = {
    "classes": {"batch": 0, "interactive": 1},
    "default": "batch",
    "header": "x-kvpilot-caller",
    "keys": {hashlib.sha256(KEY.encode()).hexdigest(): {"class": "interactive", "tenant": "acme"}},
}
START = {"type": "http.response.start", "status": 200, "headers": []}


class Engine:
    """An ASGI application that streams three chunks, and remembers what reached it."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.gate: asyncio.Event | None = None
        self.fails = False
        self.start = START

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if self.fails:
            raise RuntimeError("engine")
        await send(self.start)
        for chunk in (b"a", b"b"):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        if self.gate is not None:
            await self.gate.wait()
        await send({"type": "http.response.body", "body": b"c"})


class Rig:
    """A valve with real link files and a pilot's hand on its controls."""

    def __init__(self, folder: Path, clock: Any = None, callers: Any = CALLERS) -> None:
        callers_file = folder / "callers.json"
        callers_file.write_text(json.dumps(callers))
        for name in ("telemetry", "controls", "controls/demo"):
            (folder / name).mkdir()
        self.controls = folder / "controls/demo/valve.kvp"
        self.environ = {
            "KVPILOT_TELEMETRY": str(folder / "telemetry"),
            "KVPILOT_CONTROLS": str(folder / "controls"),
            "KVPILOT_ENGINE": "demo",
            "KVPILOT_CALLERS": str(callers_file),
        }
        self.clock = clock or VirtualClock(start_ns=NS)
        self.engine = Engine()
        self.valve = Valve(self.engine, self.environ, self.clock, random.Random(1))
        self._page = bytearray(CONTROLS_BYTES)
        self._writer = ControlsWriter(self._page, Identity("pilot", "", 0, 0))
        self._renewal = 0

    def lease(
        self,
        value: float,
        scope: Scope = Scope("all"),  # noqa: B008
        ttl_s: float = 2.0,
        knob: str = "shed_fraction",
    ) -> None:
        """Renew a lease twice, a poll apart, as a live pilot does."""
        for _ in range(2):
            self.renew(Lease(knob, scope, value, round(ttl_s * NS), self.next_renewal(), 17))
            self.clock.advance(1.1)
            self.valve._poll(self.clock.monotonic_ns())

    def next_renewal(self) -> int:
        self._renewal += 1
        return self._renewal

    def renew(self, lease: Lease) -> None:
        self._writer.write([lease])
        self.controls.write_bytes(self._page)
        self.controls.chmod(0o640)

    def read(self) -> ValveSnapshot:
        """What a pilot would read from the page's file now."""
        if self.valve.enabled:
            self.valve._poll(self.clock.monotonic_ns())
        (path,) = Path(self.environ["KVPILOT_TELEMETRY"]).glob("demo/valve-*.kvp")
        data = path.read_bytes()
        snapshot = ValvePageReader(lambda offset, size: data[offset : offset + size]).read()
        assert snapshot is not None
        return snapshot

    def counts(self) -> dict[tuple[str, str], tuple[int, int, int, int]]:
        rows = self.read().rows
        return {(r.class_name, r.tenant): (r.offered, r.admitted, r.shed, r.in_flight) for r in rows}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.valve.close()


def scope(
    path: str = "/v1/completions", method: str = "POST", caller: str = "batch", **more: Any
) -> dict[str, Any]:
    headers = [(b"x-kvpilot-caller", caller.encode()), (b"content-length", b"120")]
    return {"type": "http", "method": method, "path": path, "headers": headers, **more}


async def silent() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def ask(valve: Valve, request: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await valve(request, silent, send)
    return sent


def answer(valve: Valve, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    start, *bodies = asyncio.run(ask(valve, request))
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(body["body"] for body in bodies)


class TestPassing:
    def test_an_admitted_request_reaches_the_engine_with_its_tag(self, rig: Rig) -> None:
        request = scope(caller="interactive/acme", state={"other": 1})
        assert answer(rig.valve, request)[::2] == (200, b"abc")
        (reached,) = rig.engine.scopes
        assert reached["state"] == {"other": 1, "kvpilot": Tag("interactive", 1, "acme")}
        assert request["state"] == {"other": 1}  # the server's own scope is left as it was

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/health"),
            ("GET", "/metrics"),
            ("GET", "/v1/models"),
            ("POST", "/tokenize"),
            ("OPTIONS", "/v1/completions"),
            ("GET", "/v1/responses/resp_1"),
            ("POST", "/v1/responses/resp_1/cancel"),
            ("POST", "/v1/messages/count_tokens"),
            ("POST", "/v1/chat/completions/render"),
        ],
    )
    def test_everything_else_passes_untouched_and_uncounted(self, rig: Rig, method: str, path: str) -> None:
        rig.lease(1.0)
        request = scope(path, method)
        assert answer(rig.valve, request)[0] == 200
        assert rig.engine.scopes[0] is request
        assert rig.counts() == {}

    def test_websockets_pass(self, rig: Rig) -> None:
        rig.lease(1.0)
        asyncio.run(ask(rig.valve, {"type": "websocket", "path": "/v1/completions", "headers": []}))
        assert rig.engine.scopes[0]["type"] == "websocket"

    def test_a_stream_is_handed_on_message_by_message(self, rig: Rig) -> None:
        """Each message leaves before the engine makes the next one, and is the very same object."""

        async def run() -> None:
            rig.engine.gate = asyncio.Event()
            sent: list[dict[str, Any]] = []
            arrived = asyncio.Event()

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)
                if len(sent) == 3:
                    arrived.set()

            request = asyncio.create_task(rig.valve(scope(), silent, send))
            await asyncio.wait_for(arrived.wait(), 5)
            assert sent[0] is START
            assert [m["body"] for m in sent[1:]] == [b"a", b"b"]
            assert rig.counts()["batch", ""] == (1, 1, 0, 1)
            rig.engine.gate.set()
            await request

        asyncio.run(run())
        assert rig.counts()["batch", ""] == (1, 1, 0, 0)


class TestCurrentTag:
    """`CURRENT` says whose request is being served, in all that runs for it and nowhere else."""

    def test_it_is_there_until_the_end_of_a_stream_and_in_tasks_of_the_request(self, rig: Rig) -> None:
        seen: list[Tag | None] = []

        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            async def look() -> None:
                await asyncio.sleep(0)
                seen.append(CURRENT.get())

            seen.append(CURRENT.get())
            await send(START)
            for _ in range(2):
                await asyncio.create_task(look())
            await send({"type": "http.response.body", "body": b""})
            seen.append(CURRENT.get())

        valve = Valve(app, rig.environ, rig.clock)
        asyncio.run(ask(valve, scope(caller="interactive/acme")))
        valve.close()
        assert len({tag for tag in seen if tag}) == 1
        assert seen == [Tag("interactive", 1, seen[0].tenant if seen[0] else "")] * 4

    def test_requests_at_once_have_each_their_own(self, rig: Rig) -> None:
        seen: dict[str, list[str]] = {"batch": [], "interactive": []}

        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            for _ in range(3):
                await asyncio.sleep(0)
                tag = CURRENT.get()
                assert tag is not None
                seen[scope["state"]["kvpilot"].class_name].append(tag.class_name)
            await send(START)
            await send({"type": "http.response.body", "body": b""})

        valve = Valve(app, rig.environ, rig.clock)

        async def run() -> None:
            await asyncio.gather(*(ask(valve, scope(caller=name)) for name in list(seen) * 2))
            assert CURRENT.get() is None

        asyncio.run(run())
        valve.close()
        assert seen == {name: [name] * 6 for name in seen}

    def test_it_is_gone_after_a_failure(self, rig: Rig) -> None:
        async def run() -> None:
            rig.engine.fails = True
            with pytest.raises(RuntimeError, match="engine"):
                await ask(rig.valve, scope())
            assert CURRENT.get() is None

        asyncio.run(run())

    @pytest.mark.parametrize("path", ["/tokenize", "/health"])
    def test_what_passes_has_none_even_when_started_while_another_is_answered(
        self, rig: Rig, path: str
    ) -> None:
        """A server starts the next pipelined request's task from within the last `send` of the one before."""
        seen: list[Tag | None] = []

        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            if scope["path"] == path:
                seen.append(CURRENT.get())
            await send(START)
            await send({"type": "http.response.body", "body": b""})

        valve = Valve(app, rig.environ, rig.clock)

        async def run() -> None:
            nexts: list[asyncio.Task[Any]] = []

            async def send(message: dict[str, Any]) -> None:
                if message["type"] == "http.response.body":
                    nexts.append(asyncio.create_task(ask(valve, scope(path))))

            await valve(scope(), silent, send)
            await asyncio.gather(*nexts)

        asyncio.run(run())
        valve.close()
        assert seen == [None]


class TestShedding:
    def test_429_says_which_class_and_why_and_when_to_return(self, rig: Rig) -> None:
        rig.lease(1.0)
        status, headers, body = answer(rig.valve, scope())
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        error = json.loads(body)["error"]
        assert error["class"] == "batch"
        assert "'batch'" in error["message"]
        assert "decision 17" in error["reason"]
        assert {"message", "type", "param", "code"} <= set(error)
        assert int(headers["content-length"]) == len(body)
        assert rig.engine.scopes == []

    def test_only_classes_up_to_the_one_named(self, rig: Rig) -> None:
        rig.lease(1.0, Scope("class_at_most", 0))
        assert answer(rig.valve, scope(caller="batch"))[0] == 429
        assert answer(rig.valve, scope(caller="interactive"))[0] == 200
        assert rig.read().fractions == {"batch": 1.0, "interactive": 0.0}

    @pytest.mark.parametrize(
        "path",
        [
            *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"),
            *("/v1/messages", "/v1/audio/transcriptions", "/v1/audio/translations", "/v1/systemone"),
            *("/cohere/v2/chat", "/generate", "/inference/v1/generate", "/generative_scoring"),
            *("/invocations", "/behind/a/prefix/v1/completions"),
        ],
    )
    def test_every_path_that_generates_is_gated(self, rig: Rig, path: str) -> None:
        rig.lease(1.0)
        assert answer(rig.valve, scope(path))[0] == 429

    def test_a_fraction_is_counted_out(self, rig: Rig) -> None:
        rig.lease(0.25)
        statuses = [answer(rig.valve, scope())[0] for _ in range(40)]
        assert statuses.count(429) == 10

    def test_a_lapsed_lease_opens_over_ten_seconds(self, rig: Rig) -> None:
        rig.lease(1.0, ttl_s=2.0)
        rig.clock.advance(2.0 + 5.0)
        statuses = [answer(rig.valve, scope())[0] for _ in range(40)]
        assert statuses.count(429) == pytest.approx(20, abs=1)
        rig.clock.advance(5.0)
        assert answer(rig.valve, scope())[0] == 200

    def test_a_vanished_page_opens_at_once_though_the_lease_is_long(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        rig.lease(1.0, ttl_s=60.0)
        rig.controls.write_bytes(b"torn")
        rig.clock.advance(0.02)
        assert answer(rig.valve, scope())[0] == 429
        rig.clock.advance(10.0)
        assert answer(rig.valve, scope())[0] == 200
        assert rig.read().controls_unreadable == 1
        assert [r.message for r in caplog.records if "not obeyed" in r.message] == [
            "shed leases not obeyed: a controls page that is cut short"
        ]

    def test_credits_are_spent_by_content_length(self, rig: Rig) -> None:
        rig.lease(100.0, Scope("class_at_most", 0), knob="admission_credits")
        statuses = [answer(rig.valve, scope())[0] for _ in range(6)]  # 120 bytes are 30 tokens
        assert statuses == [200] * 4 + [429] * 2
        assert answer(rig.valve, scope(caller="interactive"))[0] == 200
        snapshot = rig.read()
        assert snapshot.credits_left == {"batch": -20.0}
        row = next(row for row in snapshot.rows if row.class_name == "batch")
        assert row.shed_by == {"fraction": 0, "credits": 2, "draining": 0}
        assert (row.offered_bytes, row.admitted_bytes) == (720, 480)
        assert (row.offered_tokens, row.admitted_tokens) == (180, 120)

    def test_a_429_for_want_of_credits_says_so(self, rig: Rig) -> None:
        rig.lease(0.0, knob="admission_credits")
        status, headers, body = answer(rig.valve, scope())
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (429, "shed")
        assert "no credits are left" in error["message"]
        assert "decision 17" in error["reason"]
        assert 1 <= int(headers["retry-after"]) <= 60

    @pytest.mark.parametrize("length", [[], [(b"content-length", b"-5")], [(b"content-length", b"9" * 30)]])
    def test_a_body_of_unknown_length_is_charged_as_the_median(self, rig: Rig, length: list[Any]) -> None:
        rig.lease(1000.0, knob="admission_credits")
        for _ in range(3):
            answer(rig.valve, scope())
        answer(rig.valve, {**scope(), "headers": [(b"x-kvpilot-caller", b"batch"), *length]})
        assert rig.read().credits_left["batch"] == 1000.0 - 4 * 30

    def test_the_page_echoes_every_lease_as_it_is_obeyed(self, rig: Rig) -> None:
        rig.lease(0.5, Scope("tenant", "acme"))
        (echo,) = rig.read().leases
        assert (echo.knob, echo.scope, echo.value) == ("shed_fraction", Scope("tenant", "acme"), 0.5)
        assert rig.read().bytes_per_token == 4.0
        rig.lease(2.0, knob="prompt_bytes_per_token")
        assert rig.read().bytes_per_token == 2.0

    def test_the_page_is_read_at_most_every_20_ms(self, rig: Rig) -> None:
        rig.lease(0.0)
        rig.lease(1.0)
        rig.controls.write_bytes(b"torn")
        rig.clock.advance(0.019)
        answer(rig.valve, scope())
        assert rig.valve._law.page_error is None
        rig.clock.advance(0.001)
        answer(rig.valve, scope())
        assert rig.valve._law.page_error

    def test_without_the_link_it_classifies_and_counts_and_sheds_nothing(self) -> None:
        engine = Engine()
        valve = Valve(engine, {}, VirtualClock())
        assert answer(valve, scope())[0] == 200
        assert engine.scopes[0]["state"]["kvpilot"] == Tag("default", 0, "")


class TestCounting:
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.tuples(st.sampled_from(["batch", "interactive/acme", "batch/x"]), st.floats(0, 1)), max_size=30
        )
    )
    def test_offered_is_admitted_plus_shed(
        self, tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[str, float]]
    ) -> None:
        rig = Rig(tmp_path_factory.mktemp("rig"))
        try:
            rig.lease(0.4)
            for number, (caller, wait_s) in enumerate(requests):
                rig.engine.fails = number % 7 == 6
                rig.clock.advance(wait_s / 10)
                try:
                    asyncio.run(ask(rig.valve, scope(caller=caller)))
                except RuntimeError:
                    assert rig.engine.fails
            counts = rig.counts().values()
            assert all(offered == admitted + shed for offered, admitted, shed, _ in counts)
            assert sum(offered for offered, *_ in counts) == len(requests)
            assert all(in_flight == 0 for *_, in_flight in counts)
        finally:
            rig.valve.close()

    def test_a_client_that_goes_away_is_counted_out_once(self, rig: Rig) -> None:
        async def run() -> None:
            rig.engine.gate = asyncio.Event()
            requests = [asyncio.create_task(ask(rig.valve, scope())) for _ in range(3)]
            while len(rig.engine.scopes) < 3:
                await asyncio.sleep(0)
            assert rig.counts()["batch", ""][3] == 3
            requests[0].cancel()
            await asyncio.wait([requests[0]])
            assert rig.counts()["batch", ""][3] == 2
            rig.engine.gate.set()
            await asyncio.gather(*requests[1:])

        asyncio.run(run())
        assert rig.counts()["batch", ""] == (3, 3, 0, 0)

    def test_a_connection_that_breaks_while_sending_is_counted_out(self, rig: Rig) -> None:
        async def broken(message: dict[str, Any]) -> None:
            raise ConnectionResetError

        with pytest.raises(ConnectionResetError):
            asyncio.run(rig.valve(scope(), silent, broken))
        assert rig.counts()["batch", ""] == (1, 1, 0, 0)
        assert rig.read().taking == 0

    def test_an_engine_that_fails_is_counted_out_and_its_error_is_its_own(self, rig: Rig) -> None:
        rig.engine.fails = True
        with pytest.raises(RuntimeError, match="engine"):
            asyncio.run(ask(rig.valve, scope()))
        assert rig.counts()["batch", ""] == (1, 1, 0, 0)
        assert rig.valve.enabled

    def test_silence_after_admission_can_be_seen(self, rig: Rig) -> None:
        async def run() -> None:
            rig.engine.gate = asyncio.Event()
            request = asyncio.create_task(ask(rig.valve, scope()))
            while len(rig.engine.scopes) < 1:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            rig.clock.advance(7.0)
            assert rig.read().seconds_since_byte == pytest.approx(7.0)
            rig.engine.gate.set()
            await request
            assert rig.read().seconds_since_byte is None

        asyncio.run(run())

    def test_a_client_that_is_slow_to_take_its_answer_is_told_apart_from_an_engine_that_is_silent(
        self, rig: Rig
    ) -> None:
        async def run() -> None:
            taken = asyncio.Event()

            async def slow(message: dict[str, Any]) -> None:
                await taken.wait()

            request = asyncio.create_task(rig.valve(scope(), silent, slow))
            while len(rig.engine.scopes) < 1:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert (rig.read().in_flight, rig.read().taking) == (1, 1)
            taken.set()
            await request
            assert (rig.read().in_flight, rig.read().taking) == (0, 0)
            assert rig.read().last_byte_ns

        asyncio.run(run())

    def test_an_error_is_no_answer(self, rig: Rig) -> None:
        rig.engine.start = {**START, "status": 500}
        asyncio.run(ask(rig.valve, scope()))
        assert (rig.read().last_byte_ns, rig.read().first_byte_ns) == (0, 0)
        rig.engine.start = START
        asyncio.run(ask(rig.valve, scope()))
        assert rig.read().last_byte_ns


class TestCannotBeBroken:
    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([b"authorization", b"content-length", b"x-kvpilot-caller"])
                | st.binary(max_size=9),
                st.binary(max_size=60) | st.sampled_from([b"9" * 19, b"9" * 4000, b"-1", b"\xb2", b"1e9"]),
            ),
            max_size=6,
        )
    )
    def test_hostile_headers(self, headers: list[tuple[bytes, bytes]]) -> None:
        valve = Valve(Engine(), {}, VirtualClock())
        for _ in range(3):
            status, _, _ = answer(
                valve, {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
            )
            assert status == 200
        assert valve.enabled

    @pytest.mark.parametrize(
        "broken", [{"headers": None}, {"path": None}, {"state": 7}, {"headers": [(b"a",)]}]
    )
    def test_a_server_that_breaks_the_rules_disables_it_and_is_served(
        self, rig: Rig, broken: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(3):
            assert answer(rig.valve, scope() | broken)[0] == 200
        assert not rig.valve.enabled
        assert len([r for r in caplog.records if "disabled" in r.message]) == 1

    def test_a_failure_is_counted_in_the_page(self, rig: Rig) -> None:
        answer(rig.valve, scope() | {"headers": None})
        assert rig.read().failures == 1

    @pytest.mark.parametrize(
        ("name", "value", "says"),
        [
            ("KVPILOT_CALLERS", "/nonexistent", "No such file"),
            ("KVPILOT_TELEMETRY", "", "KVPILOT_TELEMETRY not set"),
            ("KVPILOT_TELEMETRY", "/proc/nonexistent/x", "does not exist"),
            ("KVPILOT_ENGINE", "../x", "engine name"),
        ],
    )
    def test_a_bad_environment_is_one_warning_and_everybody_passes(
        self, rig: Rig, name: str, value: str, says: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.clear()
        valve = Valve(rig.engine, {**rig.environ, name: value}, rig.clock)
        assert answer(valve, scope())[0] == 200
        assert [r.message for r in caplog.records if says in r.message]
        assert len(caplog.records) == 1
        valve.close()

    def test_a_bad_callers_file_is_seen_in_the_page(self, tmp_path: Path) -> None:
        rig = Rig(tmp_path, callers={"classes": {}})
        assert not rig.valve.enabled
        assert rig.read().failures == 1
        assert answer(rig.valve, scope())[0] == 200
        rig.valve.close()


class TestLifespan:
    def test_start_and_stop_pass_through_and_the_page_is_given_up(self, rig: Rig) -> None:
        async def run() -> list[dict[str, Any]]:
            inbox = asyncio.Queue[dict[str, Any]]()
            sent: list[dict[str, Any]] = []

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)
                if message["type"] == "lifespan.startup.complete":
                    inbox.put_nowait({"type": "lifespan.shutdown"})

            inbox.put_nowait({"type": "lifespan.startup"})
            await rig.valve({"type": "lifespan"}, inbox.get, send)
            return sent

        sent = asyncio.run(run())
        assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert not rig.valve.enabled

    def test_a_lease_is_honoured_though_no_request_came_for_long(self, rig: Rig) -> None:
        """The watch reads the page between requests: renewals seen too far apart would be history."""

        async def run() -> int:
            started = asyncio.Event()

            async def receive() -> dict[str, Any]:
                await started.wait()
                return {"type": "lifespan.startup"}

            async def send(_message: dict[str, Any]) -> None:
                pass

            life = asyncio.create_task(rig.valve({"type": "lifespan"}, receive, send))
            # The virtual clock runs ahead with the watch alone; the pilot renews every half second, ttl 2 s.
            renewed_ns = 0
            for _ in range(10_000):
                await asyncio.sleep(0)
                if rig.clock.monotonic_ns() - renewed_ns > NS // 2:
                    renewed_ns = rig.clock.monotonic_ns()
                    rig.renew(Lease("shed_fraction", Scope("all"), 1.0, 2 * NS, rig.next_renewal(), 17))
                if rig.clock.monotonic_ns() > 20 * NS:
                    break
            start, _ = await ask(rig.valve, scope())
            life.cancel()
            await asyncio.wait([life])
            return start["status"]

        assert asyncio.run(run()) == 429

    def test_a_page_beside_ours_that_cannot_be_believed_is_said_once(
        self, rig: Rig, caplog: pytest.LogCaptureFixture
    ) -> None:
        foreign = Path(rig.environ["KVPILOT_TELEMETRY"]) / "demo/valve-0123456789abcdef.kvp"
        foreign.write_bytes(b"rubbish")
        foreign.chmod(0o666)
        for _ in range(3):
            rig.clock.advance(1.1)
            assert answer(rig.valve, scope())[0] == 200
        (said,) = [r.message for r in caplog.records if "cannot be seen" in r.message]
        assert "writable by others" in said
        assert rig.valve.enabled
        foreign.unlink()

    def test_an_application_without_lifespan_is_served_all_the_same(self, rig: Rig) -> None:
        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                raise RuntimeError("no lifespan here")
            await rig.engine(scope, receive, send)

        valve = Valve(app, {}, rig.clock)
        with pytest.raises(RuntimeError):
            asyncio.run(ask(valve, {"type": "lifespan"}))
        assert answer(valve, scope())[0] == 200
        assert valve.enabled


def test_a_request_costs_at_most_50_us(tmp_path: Path) -> None:
    """CPU of the valve alone, page reads included, beside the same calls without it. The best of several
    runs."""
    rig = Rig(tmp_path, SystemClock())
    rig.controls.write_bytes(rig._page)
    os.chmod(rig.controls, 0o640)
    requests = [scope(caller="interactive/acme") for _ in range(300)]

    async def nothing(scope: dict[str, Any], receive: Any, send: Any) -> None:
        for message in (START, {"type": "http.response.body", "body": b"x"}):
            await send(message)

    async def drop(_message: dict[str, Any]) -> None:
        pass

    async def cost(app: Any) -> float:
        began = time.thread_time()
        for request in requests:
            await app(request, silent, drop)
        return (time.thread_time() - began) / len(requests)

    valve = Valve(nothing, rig.environ, SystemClock())
    best = min(asyncio.run(cost(valve)) - asyncio.run(cost(nothing)) for _ in range(10))
    valve.close()
    rig.valve.close()
    assert best < 50e-6
