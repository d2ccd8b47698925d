"""kvpilot inside vLLM: a general plugin that vLLM loads in each of its processes.

In the engine core it puts a step hook on the scheduler: leased knobs act at step boundaries, and every step
leaves a record. In API-server processes it lets requests carry the valve's tag. Without the link's
environment it does nothing at all.
"""

import logging
import multiprocessing
import os
from typing import Any

from kvpilot.link.place import ENVIRON_CONTROLS, ENVIRON_ENGINE, ENVIRON_TELEMETRY

__all__ = ["register"]

log = logging.getLogger("kvpilot.vllm")

_INNER = ("EngineCore", "VllmWorker")
"""Names of vLLM's processes that take no request from outside begin with one of these."""


def register() -> None:
    """The entry point. Idempotent; never raises."""
    try:
        if not any(os.environ.get(name) for name in (ENVIRON_TELEMETRY, ENVIRON_CONTROLS, ENVIRON_ENGINE)):
            log.debug("no link in the environment: vLLM flies without kvpilot")
            return
        _speak_where_vllm_speaks()
        _follow_scheduler()
        if not multiprocessing.current_process().name.startswith(_INNER):
            _carry_tags()
    except Exception:
        log.warning("vLLM flies without kvpilot", exc_info=True)


def _speak_where_vllm_speaks() -> None:
    """Our lines go where vLLM's go: its API servers let nothing but errors through to anybody else's."""
    ours, vllms = logging.getLogger("kvpilot"), logging.getLogger("vllm")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
    if ours.handlers or logging.getLogger().handlers:
        return
    for handler in vllms.handlers:
        ours.addHandler(handler)


def _follow_scheduler() -> None:
    """Learn of the scheduler's class when vLLM asks for it."""
    from vllm.config import SchedulerConfig

    original = SchedulerConfig.get_scheduler_cls
    if getattr(original, "_kvpilot", False):
        return

    def get_scheduler_cls(self: Any) -> Any:
        kind = original(self)
        from kvpilot.inside.vllm.attach import adopt

        return adopt(kind)

    get_scheduler_cls._kvpilot = True  # type: ignore[attr-defined]
    SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def _carry_tags() -> None:
    from kvpilot.inside.vllm import tagging

    reason = tagging.install()
    if reason is not None:
        log.info("tenants cannot be told apart: %s", reason)
