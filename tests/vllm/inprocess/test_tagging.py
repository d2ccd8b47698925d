"""Tags on vLLM's own classes: every client sends them, what crosses to the engine core keeps them, and
tracing does not see them."""

import asyncio
import warnings
from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest

from kvpilot.inside.callers import Tag
from kvpilot.inside.valve import CURRENT
from kvpilot.inside.vllm import tagging

with warnings.catch_warnings():
    # What vLLM's own dependencies say while they are imported is not ours to fail on.
    warnings.simplefilter("ignore")
    import msgspec
    from vllm import SamplingParams
    from vllm.tracing import extract_trace_context
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.core_client import (
        AsyncMPClient,
        DPAsyncMPClient,
        DPLBAsyncMPClient,
        EngineCoreClient,
    )
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.request import Request

ACME = Tag("interactive", 1, "acme")


@pytest.fixture(autouse=True)
def installed() -> None:
    assert tagging.supported() is None
    assert tagging.install() is None


def request(**more: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="one",
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=2),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        **more,
    )


def client(kind: type, sent: list[EngineCoreRequest]) -> Any:
    """A client without its sockets: what it would send is kept."""

    async def send(_type: Any, what: EngineCoreRequest, _engine: Any = None) -> None:
        sent.append(what)

    made = kind.__new__(kind)
    made.__dict__.update(
        client_index=0,
        current_wave=0,
        engines_running=True,
        core_engine=b"0",
        _send_input=send,
        _ensure_output_queue_task=lambda: None,
        _ensure_stats_update_task=lambda: None,
        get_core_engine_for_request=lambda what: b"0",
        resources=SimpleNamespace(engine_dead=False),
    )
    return made


@pytest.mark.parametrize("kind", [AsyncMPClient, DPAsyncMPClient, DPLBAsyncMPClient])
def test_every_client_sends_the_tag_of_whoever_asks(kind: type) -> None:
    sent: list[EngineCoreRequest] = []
    sender = client(kind, sent)

    async def run() -> None:
        CURRENT.set(ACME)
        await sender.add_request_async(request())
        CURRENT.set(None)
        await sender.add_request_async(request(trace_headers={"traceparent": "00-1-2-01"}))

    asyncio.run(run())
    crossed = [msgspec.msgpack.decode(msgspec.msgpack.encode(one.trace_headers)) for one in sent]
    assert crossed == [{"kvpilot": "1:acme"}, {"traceparent": "00-1-2-01"}]
    received = [Request.from_engine_core_request(one, None) for one in sent]
    assert [tagging.take(one) for one in received] == [(1, "acme"), None]
    assert [one.trace_headers for one in received] == [None, {"traceparent": "00-1-2-01"}]


def test_children_of_one_request_are_tagged_each() -> None:
    sent: list[EngineCoreRequest] = []
    sender, parent = client(AsyncMPClient, sent), request()

    async def run() -> None:
        CURRENT.set(ACME)
        for _ in range(3):
            await sender.add_request_async(copy(parent))

    asyncio.run(run())
    assert [tagging.read(one) for one in sent] == [(1, "acme")] * 3
    assert parent.trace_headers is None


def test_no_client_is_missed() -> None:
    below = [EngineCoreClient]
    for each in below:
        below += each.__subclasses__()
    senders = [each for each in below[1:] if "add_request_async" in vars(each)]
    assert {AsyncMPClient, DPAsyncMPClient} <= set(senders)
    assert all(vars(each)["add_request_async"]._kvpilot_tags for each in senders)


def test_tracing_finds_the_parents_that_it_finds_without_us() -> None:
    """To vLLM a map without trace headers is not the same as no map: the parent it takes else is lost."""
    output = SimpleNamespace(trace_headers={"kvpilot": "1:acme"})
    assert extract_trace_context(output.trace_headers) is not None
    assert extract_trace_context(None) is None
    # It reads the headers before it misses the times that this request does not have.
    with pytest.raises(AttributeError, match="arrival_time"):
        OutputProcessor.do_tracing(
            SimpleNamespace(), output, SimpleNamespace(stats=SimpleNamespace()), SimpleNamespace()
        )
    assert output.trace_headers is None
