"""The HTTP server over a fake executor: answers, refusals, clients that leave, failing steps, a dead core."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from beam_reference import beam_search
from fake_engine import MODEL, FakeEngine, eventually, fake_engine
from fake_executor import expected_output, log_probabilities

from kvengine.errors import DeviceOutOfMemory


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeEngine]:
    """For tests that leave it as they found it."""
    with fake_engine() as engine:
        yield engine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with fake_engine() as one:
        yield one


def text_after(prompt: str, tokens: int) -> str:
    return bytes(expected_output(prompt.encode(), tokens)).decode()


def post(engine: FakeEngine, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    with engine.http() as http:
        return http.post(path, json=body)


def events(response: httpx.Response) -> list[Any]:
    """What a stream said, `[DONE]` included."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


class InBackground:
    """A request that another thread makes; `result()` is its response or exception."""

    def __init__(self, engine: FakeEngine, headers: dict[str, str] | None = None, **body: Any) -> None:
        self._outcome: httpx.Response | Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(engine, headers, body))
        self._thread.start()

    def _run(self, engine: FakeEngine, headers: dict[str, str] | None, body: Any) -> None:
        try:
            with engine.http() as http:
                self._outcome = http.post("/v1/completions", json=body, headers=headers)
        except httpx.HTTPError as error:
            self._outcome = error

    def result(self) -> httpx.Response:
        self._thread.join(20)
        assert not self._thread.is_alive(), "a client hangs"
        assert isinstance(self._outcome, httpx.Response), self._outcome
        return self._outcome


def test_a_completion_holds_exactly_what_was_generated(shared: FakeEngine) -> None:
    answer = post(shared, model=MODEL, prompt="once", max_tokens=30).json()
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text_after("once", 30), "length")
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 30, "total_tokens": 34}


def choices_of(prompt: str, tokens: int, first_id: int, count: int) -> list[str]:
    """What the fake says for each of a family: a first token that its id decides, then what follows."""
    texts = [text_after(prompt, tokens)]
    for number in range(first_id + 1, first_id + count):
        begun = [*prompt.encode(), 97 + (ord(text_after(prompt, 1)) + number) % 26]
        texts.append(bytes([begun[-1], *expected_output(begun, tokens - 1)]).decode())
    return texts


def test_cow_choices_share_a_prompt_that_is_computed_once(engine: FakeEngine) -> None:
    """n: as many choices, in order; the prompt counts once in usage, and went through the model once."""
    answer = post(engine, prompt="once upon", max_tokens=9, n=3).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in answer["choices"]] == choices_of("once upon", 9, 1, 3)
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 27, "total_tokens": 36}
    assert engine.core.totals.prefill_tokens == 9
    eventually(engine.all_blocks_free)


def test_a_stream_of_several_choices_adds_up_to_each(engine: FakeEngine) -> None:
    body = {"prompt": "once", "max_tokens": 7, "n": 2, "stream": True}
    *chunks, usage, done = events(post(engine, **body, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 14, "total_tokens": 18}
    texts, ends = ["", ""], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert texts == choices_of("once", 7, 1, 2)
    assert sorted(ends) == [0, 1]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 2, "stream": True}
    with engine.http() as http:
        opening = events(http.post("/v1/chat/completions", json=chat))[:2]
    assert [chunk["choices"][0]["index"] for chunk in opening] == [0, 1]


def test_best_of_returns_the_likeliest_a_token(engine: FakeEngine) -> None:
    """The fake gives request i a log-probability of -(i mod 7) for its first token; usage counts all."""
    for _ in range(5):
        post(engine, prompt="x", max_tokens=1)
    answer = post(engine, prompt="once", max_tokens=1, n=2, best_of=4).json()
    texts = choices_of("once", 1, 6, 4)
    assert [choice["text"] for choice in answer["choices"]] == [texts[1], texts[2]], "ids 7 and 8: 0 and -1"
    assert answer["usage"]["completion_tokens"] == 4
    assert post(engine, prompt="x", best_of=2, stream=True).status_code == 400


def test_beams_come_whole_and_in_order(engine: FakeEngine) -> None:
    """What vLLM's former API means by the fields: best_of beams, of which the best n are told."""
    search = {"use_beam_search": True, "best_of": 4, "length_penalty": 0.5, "early_stopping": "never"}
    answer = post(engine, prompt="once", max_tokens=6, n=2, temperature=0, **search).json()
    best = beam_search(log_probabilities, list(b"once"), 4, 6, length_penalty=0.5, early_stopping="never")
    assert [choice["text"] for choice in answer["choices"]] == [
        bytes(one.output).decode() for one in best[:2]
    ]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}
    eventually(engine.all_blocks_free)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 3, "use_beam_search": True}
    with engine.http() as http:
        choices = http.post("/v1/chat/completions", json=chat).json()["choices"]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    assert engine.core.totals.finished == engine.core.totals.arrivals == 7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2, "stream": True}, "use_beam_search cannot be streamed"),
        ({}, "set best_of (or n) to 2 or more"),
        ({"n": 2, "temperature": 0.7}, "use_beam_search draws nothing"),
        ({"n": 2, "top_p": 0.9}, "use_beam_search draws nothing"),
        ({"n": 2, "stop": "x"}, "stop with use_beam_search is not supported"),
        ({"n": 2, "kvpilot_evict": {"policy": "h2o"}}, "beams keep all of their KV"),
        ({"n": 2, "length_penalty": 99}, "length_penalty"),
        ({"n": 2, "early_stopping": "soon"}, "early_stopping"),
        ({"n": 3, "best_of": 2}, "best_of=2 is less than n=3"),
        ({"n": 40, "max_tokens": 400}, "40 beams of 4 prompt tokens and 400 more need up to 4001 KV blocks"),
    ],
)
def test_beams_that_cannot_be_served_are_refused_in_one_line(
    shared: FakeEngine, fields: dict[str, Any], words: str
) -> None:
    response = post(shared, prompt="once", use_beam_search=True, **{"max_tokens": 8} | fields)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_all_beams_are_cancelled_when_the_client_leaves(engine: FakeEngine) -> None:
    engine.hold()
    body = {"prompt": "once", "max_tokens": 100, "n": 3, "use_beam_search": True}
    with engine.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body, timeout=2.0)
    eventually(lambda: engine.open_requests() == 0)
    engine.free()
    eventually(engine.all_blocks_free)
    assert engine.core.totals.cancelled == 3


def test_every_choice_is_cancelled_when_the_client_leaves(engine: FakeEngine) -> None:
    engine.hold()
    engine.let(3)
    with (
        engine.http() as http,
        http.stream(
            "POST", "/v1/completions", json={"prompt": "once", "max_tokens": 500, "n": 3, "stream": True}
        ) as response,
    ):
        next(response.iter_lines())
    eventually(lambda: engine.open_requests() == 0)
    engine.free()
    eventually(engine.all_blocks_free)
    assert engine.core.totals.cancelled == 3


def test_a_prompt_may_be_token_ids(shared: FakeEngine) -> None:
    by_text = post(shared, prompt="abc", max_tokens=5).json()["choices"][0]["text"]
    assert post(shared, prompt=[97, 98, 99], max_tokens=5).json()["choices"][0]["text"] == by_text


def test_a_stream_adds_up_to_the_whole(shared: FakeEngine) -> None:
    response = post(shared, prompt="once", max_tokens=30, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_after("once", 30)
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 30)


def test_a_chat_stream_opens_with_the_role(shared: FakeEngine) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    whole = post(shared, "/v1/chat/completions", **body).json()
    *chunks, done = events(post(shared, "/v1/chat/completions", stream=True, **body))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "usage" not in chunks[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_the_request_in_the_core(
    engine: FakeEngine, stream: bool
) -> None:
    """Nothing of the stop string is shown, the request ends at once in the core, and counts as finished."""
    whole = text_after("once", 400)
    stop = whole[10:14]
    response = post(engine, prompt="once", max_tokens=400, stop=["nowhere!", stop], stream=stream)
    if stream:
        *chunks, _done = events(response)
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        text, finish = choice["text"], choice["finish_reason"]
    assert (text, finish) == (whole[: whole.find(stop)], "stop")
    eventually(engine.all_blocks_free)
    assert engine.core.totals.finished == 1
    assert engine.core.totals.cancelled == 0


def test_the_end_token_is_no_text() -> None:
    """It ends the answer with `stop`; special tokens are not shown, but count."""
    output = expected_output(b"once", 30)
    with fake_engine(eos=frozenset([output[4]])) as engine:
        answer = post(engine, prompt="once", max_tokens=30).json()
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == output.index(output[4]) + 1
        ignored = post(engine, prompt="once", max_tokens=30, ignore_eos=True).json()
        assert ignored["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("stream", [False, True])
def test_token_times_are_told_on_request(shared: FakeEngine, stream: bool) -> None:
    """Monotonic times of the core: received, first scheduled, and each emission with its tokens."""
    before_ns = shared.clock.monotonic_ns()
    body: dict[str, Any] = {"prompt": "once", "max_tokens": 20, "kvpilot_times": True}
    if stream:
        *_, last, _done = events(post(shared, stream=True, stream_options={"include_usage": True}, **body))
    else:
        last = post(shared, **body).json()
    times = last["kvpilot"]
    moments = [at_ns for at_ns, _ in times["emitted"]]
    ordered = [before_ns, times["received_ns"], times["first_scheduled_ns"], *moments]
    assert ordered == sorted(ordered)
    assert moments[-1] <= shared.clock.monotonic_ns()
    assert sum(count for _, count in times["emitted"]) == 20
    assert times["preemptions"] == 0


def test_times_are_told_to_nobody_else(shared: FakeEngine) -> None:
    assert "kvpilot" not in post(shared, prompt="once").json()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": 5}, "prompt: give one text or one list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt: give one text"),
        ({"prompt": [1, 256]}, "token ids go from 0 to 255"),
        ({"prompt": [True]}, "prompt: give one text"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x", "n": 0}, "n: Input should be greater"),
        ({"prompt": "x", "n": 65}, "n=65: this engine runs 64 at once"),
        ({"prompt": "x", "n": 3, "best_of": 2}, "best_of=2 is less than n=3"),
        ({"prompt": "x", "n": 2, "kvpilot_times": True}, "leave out n and best_of"),
        ({"prompt": "x", "length_penalty": 2.0}, "length_penalty and early_stopping need use_beam_search"),
        ({"prompt": "x", "logprobs": 5}, "logprobs=5 is not supported"),
        ({"prompt": "x", "kvpilot_evict": {"policy": "lru"}}, "policy 'lru' is unknown: choose one of"),
        (
            {"prompt": "x", "kvpilot_evict": {"policy": "window", "recent": 3}},
            "recent is 3 tokens and a block holds 4",
        ),
        ({"prompt": "x", "kvpilot_evict": {"policy": "h2o"}}, "start it with --heavy-hitters"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}, "at most 4"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "needs stream: true"),
        ({"prompt": "x" * 512}, "maximum context length is 512"),
        ({"prompt": "x", "max_tokens": 512}, "at most 511"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_in_one_line(
    shared: FakeEngine, body: dict[str, Any], words: str, stream: bool
) -> None:
    """400 in OpenAI's form, also for streams: nothing is streamed before the core has begun."""
    if stream and "stream_options" in body:
        return
    response = post(shared, **body, **({"stream": True} if stream else {}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"null"])
def test_a_malformed_body_is_refused_in_one_line(shared: FakeEngine, data: bytes) -> None:
    with shared.http() as http:
        response = http.post("/v1/completions", content=data)
    assert response.status_code == 400
    assert "\n" not in response.json()["error"]["message"]


def test_a_body_of_megabytes_is_refused(shared: FakeEngine) -> None:
    assert post(shared, prompt="x" * (5 << 20)).status_code == 413


def test_wrong_model_path_and_method_are_json_errors(shared: FakeEngine) -> None:
    wrong = post(shared, model="gpt-9", prompt="x")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
    with shared.http() as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
        assert http.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
        assert http.get("/v1/models/gpt-9").status_code == 404
        assert "/v2" in http.get("/v2").json()["error"]["message"]
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/health").json() == {"status": "ok"}


def test_a_request_larger_than_the_whole_pool_is_refused_at_the_door() -> None:
    """Not queued for ever: it is told why, and counted; who fits is served."""
    with fake_engine(blocks=8) as engine:
        response = post(engine, prompt="x" * 32)
        assert response.status_code == 400
        assert "whole KV memory is 32" in response.json()["error"]["message"]
        eventually(lambda: engine.core.totals.rejected == 1)
        assert post(engine, prompt="x" * 16, max_tokens=16).status_code == 200


def test_class_and_tenant_come_from_the_valves_tag_alone(tmp_path: Path) -> None:
    """What a body says about itself changes nothing."""
    callers = tmp_path / "callers.json"
    callers.write_text(
        '{"classes": {"batch": 0, "interactive": 1}, "header": "x-caller", "tenants": ["acme"]}'
    )
    with fake_engine(environ={"KVPILOT_CALLERS": str(callers)}) as engine:
        engine.hold()
        plain = InBackground(engine, prompt="x", user="acme", priority=1)
        eventually(lambda: len(engine.core.requests) == 1)
        tagged = InBackground(engine, {"x-caller": "interactive/acme"}, prompt="x")
        eventually(lambda: engine.client._last_id == 2)
        engine.let()
        eventually(lambda: len(engine.core.requests) == 2)
        asked = [(request.klass, request.tenant) for request in engine.core.requests.values()]
        assert asked == [(0, None), (1, "acme")]
        engine.free()
        assert {plain.result().status_code, tagged.result().status_code} == {200}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_blocks(engine: FakeEngine, stream: bool) -> None:
    """The connection is really dropped while generating: cancelled, and every block free again."""
    engine.hold()
    http = engine.http()
    request = http.build_request(
        "POST", "/v1/completions", json={"prompt": "once", "max_tokens": 500, "stream": stream}
    )
    if stream:
        engine.let(3)
        response = http.send(request, stream=True)
        next(response.iter_lines())
        response.close()
    else:
        left = threading.Thread(target=_send_and_fail, args=(http, request))
        left.start()
        eventually(lambda: bool(engine.scheduler.running))
        for connection in http._transport._pool.connections:
            connection._connection._network_stream._sock.shutdown(2)
        left.join(20)
    http.close()
    eventually(lambda: engine.core.totals.cancelled == 1, meanwhile=engine.let)
    eventually(engine.all_blocks_free)
    engine.free()
    assert post(engine, prompt="once", max_tokens=5).status_code == 200


def _send_and_fail(http: httpx.Client, request: httpx.Request) -> None:
    with pytest.raises(httpx.HTTPError):
        http.send(request)


def test_a_client_that_goes_away_while_waiting_is_forgotten(engine: FakeEngine) -> None:
    """It never ran; it does not run later for nobody."""
    engine.hold()
    first = InBackground(engine, prompt="first", max_tokens=3)
    eventually(lambda: bool(engine.scheduler.running))
    with pytest.raises(httpx.ReadTimeout), engine.http() as http:
        http.post("/v1/completions", json={"prompt": "second"}, timeout=1.0)
    # Only once the server has seen it leave: an engine let go earlier would serve it, and rightly.
    eventually(lambda: engine.open_requests() == 1)
    engine.free()
    assert first.result().status_code == 200
    eventually(lambda: engine.core.totals.cancelled == 1)
    eventually(engine.all_blocks_free)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (DeviceOutOfMemory("2 MiB needed, 1 MiB free"), 503, "out of device memory"),
        (RuntimeError("secret detail"), 500, "failed computing this request: RuntimeError"),
    ],
)
def test_a_step_that_fails_is_a_clear_error_and_the_engine_goes_on(
    engine: FakeEngine, error: Exception, status: int, words: str
) -> None:
    """Before the first token it is a status code."""
    engine.error = error
    response = post(engine, prompt="once", stream=True)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert post(engine, prompt="once").status_code == 200
    assert engine.core.totals.failed == 1


def test_a_stream_that_fails_midway_gets_an_error_event_and_ends(engine: FakeEngine) -> None:
    engine.hold()
    engine.let(2)
    body = {"prompt": "once", "max_tokens": 50, "stream": True}
    with engine.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert "choices" in json.loads(next(lines).removeprefix("data: "))
        engine.error = DeviceOutOfMemory("full")
        engine.free()
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "data: [DONE]" not in rest
    eventually(engine.all_blocks_free)


def test_when_the_core_dies_nobody_hangs(engine: FakeEngine) -> None:
    """Pending clients get an error, health turns 503, new requests are turned away."""
    engine.hold()
    waiting = InBackground(engine, prompt="once", max_tokens=50)
    eventually(lambda: bool(engine.scheduler.running))
    engine.core_channel._socket.shutdown(2)
    assert waiting.result().status_code == 503
    with engine.http() as http:
        eventually(lambda: http.get("/health").status_code == 503)
        response = http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert "has stopped" in response.json()["error"]["message"]
