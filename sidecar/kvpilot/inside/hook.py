"""The step hook: what an engine's step loop calls, from one thread.

    hook = StepHook.open(manifest)              once; never raises
    values = hook.begin_step(now_ns)            knob values in force: one bounded read of the controls page
    hook.itl[class_level].record(duration_ns)   while stepping
    hook.end_step(values)                       one record: the manifest's fields, in order

Without the link's environment, or after any failure of its own, a hook is disabled: it records nothing,
baselines are in force, and the engine serves on as if no pilot existed. A failure is logged once, and never
raised.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ParamSpec

from kvpilot.clock import Clock, SystemClock
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import LeaseBook, Scope
from kvpilot.link.fields import HOOK_FIELDS, KNOB_PREFIX, STEP_FIELDS, Field, knob_field
from kvpilot.link.files import WritablePage, open_telemetry
from kvpilot.link.following import ControlsFile
from kvpilot.link.histogram import HistogramWriter
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.page import LinkError
from kvpilot.link.place import ENGINE_CONTROLS, LinkPlace
from kvpilot.link.telemetry import TelemetryWriter, TenantRow
from kvpilot.link.telemetry_page import MAX_CLASSES

log = logging.getLogger("kvpilot.link")

Values = Mapping[str, float]
ReadControls = Callable[[int], "bytes | memoryview | None"]
_P = ParamSpec("_P")

_FRACTIONAL_UNITS = ("ratio", "seconds")


def with_hook_fields(manifest: Manifest) -> Manifest:
    """`manifest` with the fields that the hook fills by itself at the end of the record."""
    engine = [field for field in manifest.fields if not _is_hooks(field)]
    own = [STEP_FIELDS[name] for name in HOOK_FIELDS]
    echoes = [knob_field(knob.name, knob.unit) for knob in _engines_knobs(manifest)]
    return replace(manifest, fields=(*engine, *own, *echoes))


def _engines_knobs(manifest: Manifest) -> list[ManifestKnob]:
    """Without those that the valve puts in force: an engine cannot say what is in force there."""
    return [knob for knob in manifest.knobs if knob.name not in KNOBS or KNOBS[knob.name].where == "engine"]


def _is_hooks(field: Field) -> bool:
    return field.name in HOOK_FIELDS or field.name.startswith(KNOB_PREFIX)


def value_in_force(knob: ManifestKnob, wish: float) -> float:
    """`wish` within this knob's limits and on its grid; a whole number where the unit is a count."""
    floor = KNOBS[knob.name].plausible[0] if knob.name in KNOBS else knob.minimum
    value = max(knob.snap(wish), floor)
    return _as_counted(knob, value)


def _as_counted(knob: ManifestKnob, value: float) -> float:
    return value if knob.unit in _FRACTIONAL_UNITS else round(value)


def _warn(message: str, *args: object, exc_info: bool = False) -> None:
    """Log; a handler that fails must not reach the engine either."""
    with suppress(Exception):
        log.warning(message, *args, exc_info=exc_info)


class StepHook:
    """See the module docstring. `telemetry` None is a disabled hook; virtual time passes a writer over a
    bytearray and a `read_controls` of its own.
    """

    def __init__(
        self,
        manifest: Manifest,
        telemetry: TelemetryWriter | None = None,
        read_controls: ReadControls | None = None,
        page: WritablePage | None = None,
        controls_file: ControlsFile | None = None,
    ) -> None:
        self._knobs = {knob.name: knob for knob in _engines_knobs(manifest)}
        self.baselines: Values = {
            name: _as_counted(knob, knob.baseline) for name, knob in self._knobs.items()
        }
        self._telemetry = telemetry
        self._read_controls = read_controls
        self._page = page
        self._controls_file = controls_file
        self.enabled = telemetry is not None
        self.failures = 0
        """Exceptions of our own kept from the engine: 0 or 1, since the first one disables the hook."""
        self._book = LeaseBook(telemetry.nonce) if telemetry else None
        self._warned: str | None = None
        self._invalid: frozenset[tuple[str, Scope, float]] = frozenset()
        self._invalid_total = 0
        self._values = self.baselines
        self._echo = (0, 0, *self.baselines.values())
        engines = [f.name for f in manifest.fields if not _is_hooks(f)]
        self._duration = engines.index("duration_ns") if "duration_ns" in engines else None
        self._set_recorders()
        levels = range(max(1, min(len(manifest.classes), MAX_CLASSES)))
        used = (self.itl, self.ttft, self.queue_wait)
        self._flushed = (self.step, *(per_class[level] for per_class in used for level in levels))

    def _set_recorders(self) -> None:
        def per_class(name: str) -> tuple[HistogramWriter, ...]:
            return tuple(self._histogram(name, level) for level in range(MAX_CLASSES))

        self.itl, self.ttft, self.queue_wait = per_class("itl"), per_class("ttft"), per_class("queue_wait")
        self.step = self._histogram("step", 0)

    def _histogram(self, name: str, level: int) -> HistogramWriter:
        return self._telemetry.histogram(name, level) if self._telemetry else HistogramWriter(None, 0)

    @classmethod
    def open(
        cls, manifest: Manifest, environ: Mapping[str, str] = os.environ, clock: Clock | None = None
    ) -> "StepHook":
        """The hook that the environment asks for. Never raises: one warning, and a disabled hook."""
        try:
            place = LinkPlace.from_environ(environ)
            if place is None:
                return cls(manifest)
            return cls._opened(place, manifest, clock or SystemClock())
        except LinkError as error:
            _warn("running without telemetry: %s", error)
        except Exception:
            _warn("running without telemetry: a failure inside kvpilot", exc_info=True)
        return cls(manifest)

    @classmethod
    def _opened(cls, place: LinkPlace, manifest: Manifest, clock: Clock) -> "StepHook":
        file = ControlsFile(place.controls_directory(manifest.rank) / ENGINE_CONTROLS, place.uids)
        telemetry, page = open_telemetry(place, manifest.rank, with_hook_fields(manifest), clock)
        try:
            return cls(manifest, telemetry, file.read, page, file)
        except BaseException:
            # A page that stays locked would tell readers of an engine that lives and never steps.
            telemetry.close()
            page.close()
            raise

    def begin_step(self, now_ns: int) -> Values:
        """Values in force for the step that begins at `now_ns` (any monotonic clock, always the same one)."""
        book = self._book
        if book is None:
            return self.baselines
        try:
            page = self._read_controls(now_ns) if self._read_controls else None
            changed = page is not None and book.observe(page, now_ns)
            expiry_ns = book.next_expiry_ns
            if changed or (expiry_ns is not None and now_ns >= expiry_ns):
                self._apply(book, now_ns)
            if page is None or book.error:
                self._warn_once(book.error)
            return self._values
        except Exception:
            self._disable()
            return self.baselines

    def end_step(self, values: Sequence[float]) -> None:
        """Write the step's record: values of the manifest's fields, in order, without the hook's own."""
        telemetry = self._telemetry
        if telemetry is None:
            return
        try:
            # A record without a duration tells what moved between steps: it is no step.
            if self._duration is not None and values[self._duration]:
                self.step.record(int(values[self._duration]))
            for histogram in self._flushed:
                if histogram.pending:
                    histogram.flush()
            telemetry.write_step(values, self._echo)
        except Exception:
            self._disable()

    def set_class(self, class_level: int, waiting: int, waiting_prompt_tokens: int) -> None:
        """What waits in one class."""
        if self._telemetry:
            self._guarded(self._telemetry.set_class, class_level, waiting, waiting_prompt_tokens)

    def set_tenant(
        self, name: str, running: int, waiting: int, kv_blocks: int, block_ns_total: int, tokens_total: int
    ) -> None:
        """What one tenant holds; a table full of busy tenants takes no more."""
        if self._telemetry:
            row = TenantRow(name, running, waiting, kv_blocks, block_ns_total, tokens_total)
            self._guarded(self._telemetry.set_tenant, row)

    def next_expiry_ns(self) -> int | None:
        """When the first lease in force runs out: an engine whose work cannot run wakes then."""
        return self._book.next_expiry_ns if self._book else None

    def close(self) -> None:
        """Give up page and lock; baselines from here on. The page stays for the flight recorder."""
        self.enabled = False
        try:
            for histogram in self._flushed:
                histogram.flush()
            self._release()
        except Exception:
            _warn("closing the telemetry page failed", exc_info=True)

    def _apply(self, book: LeaseBook, now_ns: int) -> None:
        """Leases in force become values in force."""
        values = dict(self.baselines)
        invalid = set()
        for lease in book.in_force(now_ns):
            knob = self._knobs.get(lease.knob)
            if knob is None or lease.scope.kind != "all":
                invalid.add((lease.knob, lease.scope, lease.value))
            else:
                values[lease.knob] = value_in_force(knob, lease.value)
        if invalid or self._invalid:
            # Counted when it appears or changes: renewals, many a second, say nothing new.
            self._invalid_total += len(invalid - self._invalid)
            self._invalid = frozenset(invalid)
        self._values = values
        self._echo = (book.sequence, book.ignored.total() + self._invalid_total, *values.values())

    def _guarded(self, call: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> None:
        if not self.enabled:
            return
        try:
            call(*args, **kwargs)
        except Exception:
            self._disable()

    def _warn_once(self, problem: str | None) -> None:
        """Say it when controls become unreadable, once for each reason."""
        problem = (self._controls_file.error if self._controls_file else None) or problem
        if problem and problem != self._warned:
            self._warned = problem
            _warn("controls not obeyed: %s", problem)

    def _disable(self) -> None:
        """Called while handling an exception of ours: baseline returns, the engine never notices."""
        self.enabled = False
        self.failures += 1
        _warn("the step hook failed and is disabled; baselines are in force", exc_info=True)
        try:
            self._release()
        except Exception:
            _warn("closing the telemetry page failed", exc_info=True)

    def _release(self) -> None:
        for histogram in self._flushed:
            histogram.disable()
        telemetry, page, file = self._telemetry, self._page, self._controls_file
        self._book = self._telemetry = self._read_controls = self._page = self._controls_file = None
        if telemetry is not None:
            telemetry.close()
        if page is not None:
            page.close()
        if file is not None:
            file.close()
