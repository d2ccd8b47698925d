"""How a scheduler gets its hook: found when vLLM asks its configuration for the scheduler's class.

That class's constructor is made to end with `attach`, if it is this very class that is being built: a
subclass's constructor is done by then, too. Nothing else of any class is touched.
"""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from kvpilot.clock import Clock, SystemClock
from kvpilot.inside.callers import Callers, CallersError
from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.attachment import MARK, Attachment
from kvpilot.inside.vllm.layout import Layout
from kvpilot.inside.vllm.lives import Lives, tag_reader
from kvpilot.inside.vllm.manifest import build_manifest
from kvpilot.inside.vllm.outlook import Outlook, strange
from kvpilot.inside.vllm.probe import probe_knobs
from kvpilot.inside.vllm.recorder import Recorder

log = logging.getLogger("kvpilot.vllm")

CALLERS = "KVPILOT_CALLERS"


def adopt(kind: Any) -> Any:
    """Make instances of the class `kind` come with a hook. Idempotent; returns `kind`. Never raises."""
    try:
        if isinstance(kind, type) and not hasattr(kind.__dict__.get("__init__"), MARK):
            _wrap_constructor(kind)
    except Exception:
        log.warning("schedulers of %r get no hook", kind, exc_info=True)
    return kind


def _wrap_constructor(kind: Any) -> None:
    original = kind.__init__

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is kind:
            attach(self)

    setattr(construct, MARK, True)
    kind.__init__ = construct


def attach(
    scheduler: Any, environ: Mapping[str, str] = os.environ, clock: Clock | None = None
) -> Attachment | None:
    """Put a hook on `scheduler`; None where the environment asks for none, or the scheduler is strange to us.
    Idempotent. Never raises.
    """
    try:
        known = getattr(scheduler, MARK, None)
        if isinstance(known, Attachment):
            return known
        problem = strange(scheduler)
        if problem is not None:
            log.warning("this vLLM is not known to kvpilot and flies without it: %s", problem)
            return None
        return _attached(scheduler, environ, clock or SystemClock())
    except Exception:
        log.warning("vLLM flies without kvpilot, which failed to attach", exc_info=True)
        return None


def _attached(scheduler: Any, environ: Mapping[str, str], clock: Clock) -> Attachment | None:
    layout = Layout(scheduler)
    read_tag, no_tags = tag_reader()
    outlook = Outlook(scheduler, layout, no_tags)
    probe = probe_knobs(scheduler)
    classes = _classes(environ)
    manifest = build_manifest(
        scheduler, probe, outlook.fields, outlook.unsupported, classes, layout.block_size
    )
    hook = StepHook.open(manifest, environ, clock)
    if not hook.enabled:
        return None
    try:
        lives = Lives(len(classes), read_tag)
        recorder = Recorder(scheduler, hook, layout, lives, clock, outlook.fields, len(classes))
        attachment = Attachment(scheduler, hook, probe.ports, recorder, clock)
        attachment.wrap()
    except Exception:
        hook.fail()
        raise
    moved = ", ".join(knob.name for knob in manifest.knobs) or "nothing"
    log.info("kvpilot is attached to %s and can move %s", type(scheduler).__name__, moved)
    return attachment


def _classes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Class names by level, from the same file that the valve reads."""
    try:
        return Callers.load(environ.get(CALLERS) or None).classes
    except CallersError as error:
        log.warning("requests are of one class: %s", error)
        return Callers.load(None).classes
