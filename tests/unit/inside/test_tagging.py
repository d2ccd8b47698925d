"""Tags on their way through vLLM, with stand-ins for the few classes of vLLM that are touched: what carries a
tag, what never does, and what a vLLM without such a path is told. (The real one: tests/vllm.)"""

import asyncio
import sys
from copy import copy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvpilot.inside.callers import Tag
from kvpilot.inside.valve import CURRENT
from kvpilot.inside.vllm import tagging

ACME = Tag("interactive", 1, "acme")


class CoreRequest:
    """What crosses to the engine core."""

    __struct_fields__ = ("request_id", "trace_headers")
    __struct_config__ = SimpleNamespace(frozen=False)

    def __init__(self, trace_headers: dict[str, str] | None = None) -> None:
        self.trace_headers = trace_headers


class SchedulerRequest:
    """What the scheduler makes of it."""

    def __init__(self, trace_headers: dict[str, str] | None) -> None:
        self.trace_headers = trace_headers

    @classmethod
    def from_engine_core_request(cls, request: Any) -> "SchedulerRequest":
        return cls(request.trace_headers)


def clients() -> dict[str, type]:
    """The engine core's clients, as they inherit from each other."""

    class EngineCoreClient:
        pass

    class Plain(EngineCoreClient):
        def __init__(self) -> None:
            self.sent: list[Any] = []

        async def add_request_async(self, request: Any) -> str:
            self.sent.append(request)
            return "sent"

    class Parallel(Plain):
        async def add_request_async(self, request: Any) -> str:
            self.sent.append(request)
            return "sent in parallel"

    class Balanced(Parallel):
        pass

    class Careful(Plain):
        async def add_request_async(self, request: Any) -> str:
            return await super().add_request_async(request)

    return {each.__name__: each for each in (EngineCoreClient, Plain, Parallel, Balanced, Careful)}


def processor() -> type:
    class OutputProcessor:
        def __init__(self) -> None:
            self.traced: list[Any] = []

        def do_tracing(self, output: Any, state: Any, stats: Any) -> None:
            self.traced.append((output.trace_headers, state, stats))

    return OutputProcessor


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A vLLM in `sys.modules`; its classes can be changed before anything is installed."""
    made = SimpleNamespace(clients=clients(), processor=processor(), request=CoreRequest)
    modules = {
        "vllm": {},
        "vllm.v1": {},
        "vllm.v1.engine": {"EngineCoreRequest": CoreRequest},
        "vllm.v1.engine.core_client": made.clients,
        "vllm.v1.engine.output_processor": {"OutputProcessor": made.processor},
        "vllm.v1.request": {"Request": SchedulerRequest},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    return made


def send(client: Any, request: Any, tag: Tag | None = ACME) -> str:
    async def run() -> str:
        CURRENT.set(tag)
        return await client.add_request_async(request)

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["Plain", "Parallel", "Balanced", "Careful"])
def test_every_client_sends_the_tag_to_where_the_scheduler_reads_it(vllm: SimpleNamespace, name: str) -> None:
    assert tagging.install() is None
    client = vllm.clients[name]()
    send(client, CoreRequest())
    arrived = SchedulerRequest.from_engine_core_request(client.sent[0])
    assert tagging.read(arrived) == (1, "acme")


def test_what_the_client_returns_and_raises_is_its_own(vllm: SimpleNamespace) -> None:
    async def failing(self: Any, request: Any) -> None:
        raise ConnectionError("gone")

    vllm.clients["Parallel"].add_request_async = failing
    tagging.install()
    assert send(vllm.clients["Plain"](), CoreRequest()) == "sent"
    with pytest.raises(ConnectionError, match="gone"):
        send(vllm.clients["Balanced"](), CoreRequest())


def test_without_a_valve_nothing_is_touched(vllm: SimpleNamespace) -> None:
    tagging.install()
    client = vllm.clients["Plain"]()
    request = CoreRequest()
    send(client, request, tag=None)
    assert request.trace_headers is None
    assert tagging.read(request) is None


def test_trace_headers_of_the_request_stay(vllm: SimpleNamespace) -> None:
    tagging.install()
    ours = {"traceparent": "00-1-2-01"}
    request = CoreRequest(ours)
    send(vllm.clients["Plain"](), request)
    assert request.trace_headers == {"traceparent": "00-1-2-01", "kvpilot": "1:acme"}
    assert ours == {"traceparent": "00-1-2-01"}  # the map may belong to someone else
    assert tagging.take(request) == (1, "acme")
    assert request.trace_headers == ours


def test_children_of_one_request_are_tagged_each_once(vllm: SimpleNamespace) -> None:
    tagging.install()
    parent = CoreRequest()
    client = vllm.clients["Plain"]()
    for _ in range(3):
        send(client, copy(parent))
    assert [tagging.take(child) for child in client.sent] == [(1, "acme")] * 3
    assert parent.trace_headers is None
    assert [child.trace_headers for child in client.sent] == [None] * 3


def test_installing_again_wraps_nothing_again(vllm: SimpleNamespace) -> None:
    tagging.install()
    first = {name: vars(client).get("add_request_async") for name, client in vllm.clients.items()}
    tracing = vllm.processor.do_tracing
    assert tagging.install() is None
    assert {name: vars(client).get("add_request_async") for name, client in vllm.clients.items()} == first
    assert vllm.processor.do_tracing is tracing
    assert "add_request_async" not in vars(vllm.clients["Balanced"])


@pytest.mark.parametrize(
    ("headers", "seen"),
    [(None, None), ({"kvpilot": "1:acme"}, None), ({"a": "b", "kvpilot": "1:acme"}, {"a": "b"}), ({}, {})],
)
def test_vllms_tracing_never_sees_a_tag(vllm: SimpleNamespace, headers: Any, seen: Any) -> None:
    tagging.install()
    tracer = vllm.processor()
    tracer.do_tracing(SimpleNamespace(trace_headers=headers), "state", "stats")
    assert tracer.traced == [(seen, "state", "stats")]


def test_a_request_that_cannot_be_tagged_is_sent_all_the_same(vllm: SimpleNamespace) -> None:
    class Frozen:
        @property
        def trace_headers(self) -> None:
            return None

    tagging.install()
    client = vllm.clients["Plain"]()
    assert send(client, Frozen()) == "sent"
    assert len(client.sent) == 1


@pytest.mark.parametrize(
    "text", ["", "acme", ":acme", "x:acme", "-1:acme", "8:acme", "1" * 5000 + ":a", "1:" + "a" * 33, None, 7]
)
def test_what_is_no_tag_is_none(text: Any) -> None:
    request = SimpleNamespace(trace_headers={"kvpilot": text})
    assert tagging.read(request) is None
    assert tagging.take(request) is None
    assert request.trace_headers is None


@pytest.mark.parametrize(("text", "tag"), [("0:", (0, "")), ("7:a:b", (7, "a:b")), ("1:é", (1, "é"))])
def test_what_is_a_tag(text: str, tag: tuple[int, str]) -> None:
    assert tagging.read(SimpleNamespace(trace_headers={"kvpilot": text})) == tag


@pytest.mark.parametrize("request_", [None, object(), SimpleNamespace(trace_headers=5)])
def test_what_is_no_request_has_no_tag(request_: Any) -> None:
    assert tagging.read(request_) is None
    assert tagging.take(request_) is None


class TestUnsupported:
    def test_no_vllm(self) -> None:
        assert "vllm" in (tagging.supported() or "")
        assert "vllm" in (tagging.install() or "")

    def test_requests_without_trace_headers(
        self, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(CoreRequest, "__struct_fields__", ("request_id",))
        assert "no trace headers" in (tagging.supported() or "")
        self._nothing_was_wrapped(vllm)

    def test_requests_that_cannot_be_changed(
        self, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(CoreRequest, "__struct_config__", SimpleNamespace(frozen=True))
        assert "cannot be changed" in (tagging.supported() or "")
        self._nothing_was_wrapped(vllm)

    def test_a_scheduler_that_drops_them(
        self, vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            SchedulerRequest, "from_engine_core_request", classmethod(lambda cls, request: cls(None))
        )
        assert "does not get" in (tagging.supported() or "")
        self._nothing_was_wrapped(vllm)

    def test_no_client_to_wrap(self, vllm: SimpleNamespace) -> None:
        for client in vllm.clients.values():
            if "add_request_async" in vars(client):
                del client.add_request_async
        assert "no client" in (tagging.supported() or "")

    def test_a_client_of_another_shape(self, vllm: SimpleNamespace) -> None:
        async def add_request_async(self: Any, batch: Any) -> None: ...

        vllm.clients["Parallel"].add_request_async = add_request_async
        assert "Parallel" in (tagging.supported() or "")
        tagging.install()
        assert vllm.clients["Parallel"].add_request_async is add_request_async

    def _nothing_was_wrapped(self, vllm: SimpleNamespace) -> None:
        before = vars(vllm.clients["Plain"])["add_request_async"]
        assert tagging.install() is not None
        assert vars(vllm.clients["Plain"])["add_request_async"] is before


def test_a_probe_after_installing_finds_the_same(vllm: SimpleNamespace) -> None:
    assert tagging.install() is None
    assert tagging.supported() is None
