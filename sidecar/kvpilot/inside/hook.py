"""The step hook: what an engine's step loop calls, from one thread.

    hook = StepHook.open(manifest)              once; never raises
    values = hook.begin_step(now_ns)            knob values in force: one bounded read of the controls page,
                                                at most every 20 ms
    hook.itl[class_level].record(duration_ns)   while stepping
    hook.end_step(values)                       one record: the manifest's fields, in order
    hook.last_words(error)                      an exception is about to end the engine
    hook.close()                                the engine ends

Without the link's environment, or after any failure of its own, a hook is disabled: it records nothing,
baselines are in force, and the engine serves on as if no pilot existed. A failure is logged once, and never
raised.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import ParamSpec

from kvpilot.clock import NS, Clock, SystemClock
from kvpilot.inside.host_memory import HostMemory
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import LeaseBook, Scope
from kvpilot.link.ending import Ending, EndingKind, without_message
from kvpilot.link.fields import HOOK_FIELDS, HOST_FIELD, KNOB_PREFIX, STEP_FIELDS, Field, knob_field
from kvpilot.link.files import WritablePage, open_telemetry
from kvpilot.link.following import ControlsFile
from kvpilot.link.histogram import HistogramWriter
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.page import LinkError
from kvpilot.link.place import ENGINE_CONTROLS, LinkPlace
from kvpilot.link.records import PackedStep
from kvpilot.link.requests import EndedRequest
from kvpilot.link.telemetry import TelemetryWriter, TenantRow
from kvpilot.link.telemetry_page import MAX_CLASSES

log = logging.getLogger("kvpilot.link")

Values = Mapping[str, float]
ReadControls = Callable[[int], "bytes | memoryview | None"]
_P = ParamSpec("_P")

ABSENT_NS = 60 * NS
"""How long controls may be missing before that is said."""

HOST_EVERY_NS = NS // 10
"""How old a reading of the machine's memory may be while steps run."""

CONTROLS_EVERY_NS = NS // 50
"""How old a reading of the controls may be while steps run: a fifth of a pilot's tick. A real engine finds
its caches cold at every step, and this read is the dearest thing that a hook does.
"""

_FRACTIONAL_UNITS = ("ratio", "seconds")


def with_hook_fields(manifest: Manifest, host: bool = False) -> Manifest:
    """`manifest` with the fields that the hook fills by itself at the end of the record; `host`: memory of
    the machine among them.
    """
    engine = [field for field in manifest.fields if not _is_hooks(field)]
    own = [STEP_FIELDS[name] for name in HOOK_FIELDS if name != HOST_FIELD]
    echoes = [knob_field(knob.name, knob.unit) for knob in _engines_knobs(manifest)]
    machine = [STEP_FIELDS[HOST_FIELD]] if host else []
    return replace(manifest, fields=(*engine, *own, *echoes, *machine))


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
        clock: Clock | None = None,
        host: HostMemory | None = None,
    ) -> None:
        self._knobs = {knob.name: knob for knob in _engines_knobs(manifest)}
        self.baselines: Values = {
            name: _as_counted(knob, knob.baseline) for name, knob in self._knobs.items()
        }
        self._telemetry = telemetry
        self._read_controls = read_controls
        self._page = page
        self._controls_file = controls_file
        self._clock = clock
        self._host = host
        self._host_bytes = (host.available_bytes() or 0,) if host else ()
        self._host_ns = 0
        self.controls_every_ns = CONTROLS_EVERY_NS
        """Leases run out at each step boundary, however long this is."""
        self._look_ns = 0
        """When controls are due to be read."""
        self.enabled = telemetry is not None
        self.failures = 0
        """Exceptions of our own kept from the engine: 0 or 1, since the first one disables the hook."""
        self._book = LeaseBook(telemetry.nonce) if telemetry else None
        self._warned: str | None = None
        self._invalid: frozenset[tuple[str, Scope, float]] = frozenset()
        self._invalid_total = 0
        self._stale = False
        """Whether values have to be worked out anew though no lease changed."""
        self._values = self.baselines
        self._set_echo(0, 0)
        engines = [f.name for f in manifest.fields if not _is_hooks(f)]
        self._duration = engines.index("duration_ns") if "duration_ns" in engines else None
        self._packed_echo: Sequence[float] | None = None
        """What the packed record holds of ours."""
        self._set_packed_echo: Callable[..., None] | None = None
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
        host = HostMemory.open()
        try:
            full = with_hook_fields(manifest, host=host is not None)
            telemetry, page = open_telemetry(place, manifest.rank, full, clock)
            try:
                return cls(manifest, telemetry, file.read, page, file, clock, host)
            except BaseException:
                # A page that stays locked would tell readers of an engine that lives and never steps.
                telemetry.close()
                page.close()
                raise
        except BaseException:
            if host is not None:
                host.close()
            raise

    def begin_step(self, now_ns: int) -> Values:
        """Values in force for the step that begins at `now_ns` (any monotonic clock, always the same one)."""
        book, telemetry = self._book, self._telemetry
        if book is None or telemetry is None:
            return self.baselines
        try:
            telemetry.mark_boundary(now_ns)
            if self._host is not None and now_ns >= self._host_ns:
                self._look_at_host(self._host, now_ns)
            changed = now_ns >= self._look_ns and self._look_at_controls(book, now_ns)
            expiry_ns = book.next_expiry_ns
            if changed or self._stale or (expiry_ns is not None and now_ns >= expiry_ns):
                self._apply(book, now_ns)
            return self._values
        except Exception:
            self._disable()
            return self.baselines

    @property
    def echo(self) -> Sequence[float]:
        """What records say now about controls: for an engine that has the next step under way when one ends,
        to keep from the step's own begin to its end.
        """
        return self._echo

    def end_step(self, values: Sequence[float], echo: Sequence[float] | None = None) -> None:
        """Write the step's record: values of the manifest's fields, in order, without the hook's own. `echo`:
        what the hook's `echo` was when the step began, where other steps have begun since.
        """
        telemetry = self._telemetry
        if telemetry is None:
            return
        try:
            # A record without a duration tells what moved between steps: it is no step.
            if self._duration is not None and values[self._duration]:
                self.step.record(int(values[self._duration]))
            self._flush()
            telemetry.write_step(values, self._echo if echo is None else echo)
        except Exception:
            self._disable()

    def packed_step(self) -> PackedStep | None:
        """A record for `end_packed`, all zero; None for a hook that is disabled."""
        return self._telemetry.packed_step() if self._telemetry else None

    def end_packed(
        self, step: PackedStep, duration_ns: int, echo: Sequence[float] | None = None, flush: bool = True
    ) -> None:
        """`end_step` for an engine whose record is kept in packed form. Without `flush` histograms wait for a
        later call: their memory is cold by the next step, and they are read ten times a second.
        """
        telemetry = self._telemetry
        if telemetry is None:
            return
        try:
            if echo is None:
                echo = self._echo
            if echo is not self._packed_echo:
                self._pack_echo(step, echo)
            if duration_ns:
                self.step.record(duration_ns)
            if flush:
                self._flush()
            telemetry.write_packed(step)
        except Exception:
            self._disable()

    def _pack_echo(self, step: PackedStep, echo: Sequence[float]) -> None:
        if self._set_packed_echo is None:
            self._set_packed_echo = step.setter(*(field.name for field in step.fields if _is_hooks(field)))
        self._set_packed_echo(*echo)
        self._packed_echo = echo

    def _flush(self) -> None:
        for histogram in self._flushed:
            if histogram.pending or histogram.shared:
                histogram.flush()

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

    def set_tenant_counts(self, name: str, values: Sequence[int]) -> None:
        """What the manifest's `tenant_columns` count of a tenant that has a row."""
        if self._telemetry:
            self._guarded(self._telemetry.set_tenant_counts, name, values)

    def end_request(self, request: EndedRequest) -> None:
        """One that has ended, where the manifest has `request_columns`."""
        if self._telemetry:
            self._guarded(self._telemetry.add_request, request)

    def disable_knob(self, name: str) -> None:
        """The engine cannot move this knob after all: its baseline is in force, leases on it are ignored."""
        self._knobs.pop(name, None)
        self._stale = True

    def fail(self, what: str = "the step hook") -> None:
        """The engine's own side of the hook raised; call it while handling that. The hook is disabled, and
        one line says that `what` failed.
        """
        if self.enabled:
            self._disable(what)

    def next_expiry_ns(self) -> int | None:
        """When the first lease in force runs out: an engine whose work cannot run wakes then."""
        return self._book.next_expiry_ns if self._book else None

    def last_words(self, error: BaseException) -> None:
        """Leave word that this exception ends the engine: its type and where it was raised, never what it
        said. From any thread; `close` still has to follow. A disabled hook has nowhere to write.
        """
        self._leave_word("exception", error)

    def close(self, ending: Ending | None = None) -> None:
        """Give up page and lock; baselines from here on. The page stays for the flight recorder and says how
        the engine ended: by its `last_words`, else as `ending` says, else closed.
        """
        self.enabled = False
        try:
            self._leave_word("closed", given=ending)
            for histogram in self._flushed:
                histogram.flush()
            self._release()
        except Exception:
            _warn("closing the telemetry page failed", exc_info=True)

    def _leave_word(
        self, kind: EndingKind, error: BaseException | None = None, given: Ending | None = None
    ) -> None:
        telemetry, clock, what = self._telemetry, self._clock, ""
        if telemetry is None:
            return
        # Whatever ends an engine may leave too little to render it with: then the kind has to do.
        with suppress(Exception):
            what = without_message(error) if error is not None else ""
        with suppress(Exception):
            now_ns, wall_ns = (clock.monotonic_ns(), clock.wall_ns()) if clock else (0, 0)
            telemetry.write_ending(given or Ending(kind, now_ns, wall_ns, what))

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
        self._stale = False
        self._values = values
        self._set_echo(book.sequence, book.ignored.total() + self._invalid_total)

    def _set_echo(self, sequence: int, ignored: int) -> None:
        """What the hook itself adds to each record."""
        self._echo = (sequence, ignored, *self._values.values(), *self._host_bytes)

    def _look_at_controls(self, book: LeaseBook, now_ns: int) -> bool:
        """One bounded read; whether leases may have changed."""
        self._look_ns = now_ns + self.controls_every_ns
        page = self._read_controls(now_ns) if self._read_controls else None
        changed = page is not None and book.observe(page, now_ns)
        if page is None or book.error:
            self._warn_once(book.error, now_ns)
        return changed

    def _look_at_host(self, host: HostMemory, now_ns: int) -> None:
        self._host_ns = now_ns + HOST_EVERY_NS
        available = host.available_bytes()
        # Files that cannot be read for a moment are no news: the value before stands.
        if available is not None:
            self._host_bytes = (available,)
            self._set_echo(int(self._echo[0]), int(self._echo[1]))

    def _guarded(self, call: Callable[_P, object], *args: _P.args, **kwargs: _P.kwargs) -> None:
        if not self.enabled:
            return
        try:
            call(*args, **kwargs)
        except Exception:
            self._disable()

    def _warn_once(self, problem: str | None, now_ns: int) -> None:
        """Say it when controls become unreadable, once for each reason."""
        file = self._controls_file
        if file is not None:
            since_ns = file.absent_since_ns
            # Engines start before their pilots: only one that stays away is worth a line.
            if since_ns is not None and now_ns - since_ns >= ABSENT_NS:
                problem = (
                    f"{file.path}: not there for a minute: start a pilot, or mount the same volume in both"
                )
            problem = file.error or problem
        if problem and problem != self._warned:
            self._warned = problem
            _warn("controls not obeyed: %s", problem)

    def _disable(self, what: str = "the step hook") -> None:
        """Called while handling an exception of ours: baseline returns, the engine never notices."""
        self.enabled = False
        self.failures += 1
        _warn("%s failed and is disabled; baselines are in force", what, exc_info=True)
        self._leave_word("hook_failed", sys.exception())
        try:
            self._release()
        except Exception:
            _warn("closing the telemetry page failed", exc_info=True)

    def _release(self) -> None:
        for histogram in self._flushed:
            histogram.disable()
        telemetry, page, file, host = self._telemetry, self._page, self._controls_file, self._host
        self._book = self._telemetry = self._read_controls = self._page = self._controls_file = None
        self._host = None
        if telemetry is not None:
            telemetry.close()
        if page is not None:
            page.close()
        if file is not None:
            file.close()
        if host is not None:
            host.close()
