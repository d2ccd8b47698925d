"""The valve's tag on its way through vLLM, from the API-server process to the scheduler.

vLLM hands no HTTP header to its scheduler, but every request to the engine core carries `trace_headers`, a
map of text that the engine core keeps and never reads. `install()`, in the API-server process, wraps the one
method through which requests go to the engine core, so that this map gets one more entry:

    "kvpilot": "<level>:<tenant>"

In the engine core `read(request)` gives it back, and `take(request)` also removes it, so that it does not
travel back with every output. Whatever comes back all the same is removed before vLLM's own tracing looks at
the map: spans keep the parents that they have without us.

Nothing here raises, and without a valve in front nothing is tagged. A vLLM without this path is told by
`supported()`, in any of its processes, in one line.
"""

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import Any

from kvpilot.inside.callers import MAX_CLASSES, MAX_NAME_BYTES, Tag
from kvpilot.inside.valve import CURRENT

__all__ = ["KEY", "install", "read", "supported", "take"]

log = logging.getLogger("kvpilot.vllm")

KEY = "kvpilot"
_MARK = "_kvpilot_tags"
_SEND = "add_request_async"
_TRACE = "do_tracing"


def supported() -> str | None:
    """Why this vLLM cannot carry tags, in one line; None where it can."""
    try:
        return _missing()
    except Exception as error:
        return f"this vLLM has no path for tags that kvpilot knows: {error!r}"


def install() -> str | None:
    """Make requests to the engine core carry the tag of whoever asked. Idempotent.

    Returns what `supported` does.
    """
    reason = supported()
    if reason is not None:
        return reason
    try:
        for client in _clients():
            if _SEND in vars(client):
                _replace(client, _SEND, _tagging(vars(client)[_SEND]))
        from vllm.v1.engine import output_processor

        processor = output_processor.OutputProcessor
        if _TRACE in vars(processor):
            _replace(processor, _TRACE, _untagging(vars(processor)[_TRACE]))
    except Exception as error:
        log.warning("requests cannot be tagged", exc_info=True)
        return f"requests cannot be tagged: {error!r}"
    return None


def read(request: Any) -> tuple[int, str] | None:
    """(class level, tenant) of an engine core's request; None where it carries no tag. Never raises."""
    try:
        headers = request.trace_headers
        return _parse(headers[KEY]) if headers and KEY in headers else None
    except Exception:
        return None


def take(request: Any) -> tuple[int, str] | None:
    """`read`, and leave the request as it would have been without us. Never raises."""
    tag = read(request)
    try:
        request.trace_headers = _without(request.trace_headers)
    except Exception:
        log.debug("a tag could not be removed", exc_info=True)
    return tag


def _parse(text: str) -> tuple[int, str] | None:
    level, separator, tenant = text.partition(":")
    # Only a valve writes this entry, but what comes from another process is checked all the same.
    if not separator or not level.isdecimal() or len(tenant.encode()) > MAX_NAME_BYTES:
        return None
    return (int(level), tenant) if int(level) < MAX_CLASSES else None


def _without(headers: Any) -> Any:
    """`headers` as they were before the tag: None where it was their only entry."""
    if not headers or KEY not in headers:
        return headers
    return {name: value for name, value in headers.items() if name != KEY} or None


def _missing() -> str | None:
    """The probe: every link of the chain, by inspection."""
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    if "trace_headers" not in EngineCoreRequest.__struct_fields__:
        return "requests to this vLLM's engine core have no trace headers"
    if EngineCoreRequest.__struct_config__.frozen:
        return "requests to this vLLM's engine core cannot be changed"
    received = inspect.unwrap(Request.from_engine_core_request)
    if "trace_headers" not in received.__code__.co_names:
        return "this vLLM's scheduler does not get trace headers"
    senders = [client for client in _clients() if _SEND in vars(client)]
    if not senders:
        return f"no client of this vLLM's engine core has {_SEND}"
    for client in senders:
        method = inspect.unwrap(vars(client)[_SEND])
        parameters = list(inspect.signature(method).parameters)
        if not inspect.iscoroutinefunction(method) or parameters[1:2] != ["request"]:
            return f"{client.__name__}.{_SEND} of this vLLM takes no request"
    return None


def _clients() -> Iterator[type]:
    """All asynchronous clients of the engine core: every class below the abstract one."""
    from vllm.v1.engine.core_client import EngineCoreClient

    found = [EngineCoreClient]
    while found:
        for client in found.pop().__subclasses__():
            found.append(client)
            yield client


def _replace(owner: type, name: str, wrapper: Any) -> None:
    if not getattr(vars(owner)[name], _MARK, False):
        setattr(wrapper, _MARK, True)
        setattr(owner, name, wrapper)


def _tagging(method: Any) -> Any:
    """`add_request_async`, with the tag of the request that is being served."""

    @functools.wraps(method)
    async def add_request_async(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        tag = CURRENT.get()
        if tag is not None:
            _add(request, tag)
        return await method(self, request, *args, **kwargs)

    return add_request_async


def _add(request: Any, tag: Tag) -> None:
    try:
        # A new map: children of one request (n > 1) are shallow copies that share the old one.
        request.trace_headers = {**(request.trace_headers or {}), KEY: f"{tag.level}:{tag.tenant}"}
    except Exception:
        log.debug("a request could not be tagged", exc_info=True)


def _untagging(method: Any) -> Any:
    """`do_tracing`, without our entry: in a map that is not empty vLLM would look for a parent span."""

    @functools.wraps(method)
    def do_tracing(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output.trace_headers = _without(output.trace_headers)
        except Exception:
            log.debug("a tag could not be removed", exc_info=True)
        return method(self, output, *args, **kwargs)

    return do_tracing
