"""One scheduler with our hook on it.

The scheduler's methods are wrapped on the instance, whatever its class: other schedulers, and other people's
wraps, compose. Every wrap calls what it wraps exactly once and hands back what that returned or raised. An
exception of our own ends the attachment: everything is put back as it was found, and serving goes on.
"""

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from kvpilot.clock import Clock
from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.port import Port
from kvpilot.inside.vllm.recorder import Recorder

log = logging.getLogger("kvpilot.vllm")

MARK = "_kvpilot"

Method = Callable[..., Any]


class Attachment:
    """Between one scheduler and one step hook. Used from the engine core's thread."""

    def __init__(
        self, scheduler: Any, hook: StepHook, ports: list[Port], recorder: Recorder, clock: Clock
    ) -> None:
        self.scheduler = scheduler
        self.hook = hook
        self.ports = ports
        self.recorder = recorder
        self.failures = 0
        """Exceptions of our own kept from the engine."""
        self._clock = clock
        self._on = True
        self._values = hook.baselines
        self._away: list[Port] = []
        """Ports away from baseline."""
        self._given_up = False
        self._stepping = False
        self._wraps: dict[str, Method] = {}

    def wrap(self) -> None:
        """Put the wraps in place."""
        self._put("schedule", self._around_schedule)
        self._put("update_from_output", self._around_update)
        self._put("add_request", self._around(self._before_add, _nothing))
        self._put("finish_requests", self._around(_nothing, self._after_finish))
        self._put("_free_request", self._around(_nothing, self._after_free))
        self._put("_preempt_request", self._around(self._before_preempt, _nothing))
        self._put("shutdown", self._around(self._before_shutdown, _nothing))
        setattr(self.scheduler, MARK, self)

    def _put(self, name: str, around: Callable[[str, Method], Method]) -> None:
        original = getattr(self.scheduler, name, None)
        if original is None:
            return
        wrapped = around(name, original)
        with suppress(AttributeError):
            functools.update_wrapper(wrapped, original)
        self._wraps[name] = wrapped
        setattr(self.scheduler, name, wrapped)

    def _around(self, before: Method, after: Method) -> Callable[[str, Method], Method]:
        def around(name: str, original: Method) -> Method:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if self._on:
                    try:
                        before(*args, **kwargs)
                    except Exception:
                        self._fail(name)
                result = original(*args, **kwargs)
                if self._on:
                    try:
                        after(*args, **kwargs)
                    except Exception:
                        self._fail(name)
                return result

            return wrapped

        return around

    def _around_schedule(self, name: str, original: Method) -> Method:
        def schedule(*args: Any, **kwargs: Any) -> Any:
            started_ns = 0
            if self._on:
                try:
                    started_ns = self._before_schedule()
                except Exception:
                    self._fail(name)
            try:
                output = original(*args, **kwargs)
            except BaseException as error:
                self._last_words(error)
                raise
            if started_ns and self._on:
                try:
                    throttled = args[0] if args else kwargs.get("throttle_prefills", False)
                    self.recorder.scheduled(output, started_ns, throttled)
                except Exception:
                    self._fail(name)
            return output

        return schedule

    def _around_update(self, name: str, original: Method) -> Method:
        def update_from_output(
            scheduler_output: Any, model_runner_output: Any, *args: Any, **kwargs: Any
        ) -> Any:
            counts: list[int] | None = None
            if self._on:
                try:
                    if scheduler_output.scheduled_spec_decode_tokens:
                        counts = self.recorder.counts(model_runner_output)
                except Exception:
                    self._fail(name)
            self._stepping = True
            try:
                result = original(scheduler_output, model_runner_output, *args, **kwargs)
            except BaseException as error:
                self._last_words(error)
                raise
            self._stepping = False
            if self._on:
                try:
                    self.recorder.updated(scheduler_output, model_runner_output, counts, result)
                    if not self.hook.enabled:
                        # It gave up by itself, and said so.
                        self.detach()
                except Exception:
                    self._fail(name)
            return result

        return update_from_output

    # Knobs.

    def _before_schedule(self) -> int:
        now_ns = self._clock.monotonic_ns()
        values = self.hook.begin_step(now_ns)
        if values is not self._values:
            self._values = values
            for port in self.ports:
                value = values[port.name]
                if value != port.value:
                    self._apply(port, value)
        for port in self._away:
            try:
                port.each_step()
            except Exception:
                self._give_up(port)
        if self._given_up:
            # So that this step's record says already what is in force.
            self._given_up = False
            self._values = self.hook.begin_step(now_ns)
        return now_ns

    def _apply(self, port: Port, value: float) -> None:
        try:
            port.apply(value)
        except Exception:
            self._give_up(port)
        self._away = [port for port in self.ports if port.value != port.baseline]

    def _give_up(self, port: Port) -> None:
        """A knob that cannot be moved after all: it stays at baseline from now on, and serving goes on."""
        self.failures += 1
        self._given_up = True
        self.ports = [other for other in self.ports if other is not port]
        self._away = [other for other in self._away if other is not port]
        _log("knob %s failed and is disabled; its baseline is in force", port.name)
        self.hook.disable_knob(port.name)
        port.restore()

    # The record.

    def _before_add(self, request: Any, *_args: Any, **_kwargs: Any) -> None:
        self.recorder.added(request)

    def _after_finish(self, *_args: Any, **_kwargs: Any) -> None:
        if not self._stepping:
            self.recorder.left()

    def _after_free(self, request: Any, *_args: Any, **_kwargs: Any) -> None:
        self.recorder.freed(request)

    def _before_preempt(self, request: Any, *_args: Any, **_kwargs: Any) -> None:
        self.recorder.preempted(request)

    # The end.

    def _last_words(self, error: BaseException | None) -> None:
        """An exception of vLLM's own is about to end the engine core; leaving in order raises SystemExit."""
        if error is not None and not isinstance(error, SystemExit):
            self.hook.last_words(error)

    def _before_shutdown(self, *_args: Any, **_kwargs: Any) -> None:
        # Whatever ended the engine core's loop is under way while it tears down.
        self._last_words(sys.exception())
        self.detach()
        self.hook.close()

    def _fail(self, where: str) -> None:
        """Called while handling an exception of ours."""
        self.failures += 1
        self.detach()
        self.hook.fail(f"the hook around {where}")

    def detach(self) -> None:
        """Put everything back. What somebody else wrapped around us stays, and passes through us."""
        self._on = False
        for port in self.ports:
            try:
                port.restore()
            except Exception:
                _log("knob %s could not be restored", port.name)
        self._away = []
        owned = getattr(self.scheduler, "__dict__", {})
        for name, wrapped in self._wraps.items():
            if owned.get(name) is wrapped:
                del owned[name]


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """For a wrap that has nothing to do on this side."""


def _log(message: str, *args: object) -> None:
    with suppress(Exception):
        log.warning(message, *args, exc_info=True)
