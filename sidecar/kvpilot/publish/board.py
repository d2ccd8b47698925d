"""The board: the last tick and the pilot's own counters, where HTTP, socket and terminal can read them.

Readers render on demand; a tick only replaces what hangs here. One thread: the event loop's.

The board keeps windows of its own over every signal, so that people see signals that no policy asks for. They
are read twice a second: a person does not need ten, and reading every distribution costs more than the rest
of a tick.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.windows import Key, Reading, Windows
from kvpilot.clock import NS
from kvpilot.forecast.estimate import Estimate
from kvpilot.orders import Off
from kvpilot.policy.context import Context
from kvpilot.policy.evaluate import Inputs
from kvpilot.policy.lease import LeaseWish
from kvpilot.policy.outcome import Outcome
from kvpilot.publish.durations import Durations
from kvpilot.publish.exemplars import Exemplars
from kvpilot.signals import SIGNALS, Missing

REFRESH_NS = NS // 2
SHOWN_WINDOW_S = 10.0
_SHOWN_AGG = {"gauge": "last", "counter": "rate", "ratio": "mean", "distribution": "p95"}


@dataclass(frozen=True, slots=True)
class Tick:
    """Everything one tick saw, decided and did. `outcome` is None while there is no engine to decide for."""

    at_ns: int
    wall_ns: int
    sight: Sight
    armed: bool = False
    arming: str | None = None
    """What is still awaited before rules may act, for people; None once they may."""
    off: Off | None = None
    inputs: Inputs = field(default_factory=dict)
    context: Context | None = None
    outcome: Outcome | None = None
    leases: tuple[LeaseWish, ...] = ()
    bands: Mapping[Key, Estimate] = field(default_factory=dict)
    """Of forecasts: how far they may be off."""
    decided: int | None = None
    """Number of the newest decision of this tick, if it made one."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What people are shown of one signal."""

    signal: str
    klass: str | None
    agg: str
    window_s: float | None
    min_samples: int = 1
    max_age_s: float = 5.0


def shown_views(classes: tuple[str, ...]) -> list[Shown]:
    """One view for each signal, and one for each class where a signal knows classes."""
    views = []
    for name, signal in SIGNALS.items():
        agg = _SHOWN_AGG[signal.kind]
        window_s = None if agg == "last" else SHOWN_WINDOW_S
        views += [
            Shown(name, klass, agg, window_s) for klass in (None, *(classes if signal.per_class else ()))
        ]
    return views


class Board:
    """See the module docstring."""

    def __init__(self, classes: tuple[str, ...], shown: bool = True) -> None:
        """Without `shown` nobody looks, as in virtual time: signals that no policy asks for are not read."""
        self.views = shown_views(classes) if shown else []
        self.tick: Tick | None = None
        self.ticks = 0
        self.missed = 0
        """Ticks whose time passed while another one ran; they are not made up for."""
        self.failures = 0
        """Ticks that ended in a defect of ours; their leases were not renewed."""
        self.durations = Durations()
        self.lateness = Durations()
        self.publishing = Durations()
        """What hanging a tick here took, twice a second with every distribution."""
        self.exemplars = Exemplars()
        self.latest: dict[Key, Reading | Missing] = {}
        self._windows = Windows()
        self._windows.require(self.views)
        self._refresh_ns: int | None = None
        self._decided: int | None = None

    def wanted(self, now_ns: int) -> set[Key]:
        """Signals that should be read this tick for the board's sake."""
        return set(self._windows.wanted) if self._refresh_ns is None or now_ns >= self._refresh_ns else set()

    def hang(self, tick: Tick, readings: dict[Key, Reading | Missing]) -> None:
        """Replace what is shown."""
        self.tick = tick
        self.ticks += 1
        if tick.decided is not None:
            self._decided = tick.decided
        if tick.sight.before is not None:
            self.latest = {}
            self._windows.clear("restarted")
            self.exemplars.clear()
        if self._refresh_ns is None or tick.at_ns >= self._refresh_ns:
            self._refresh_ns = tick.at_ns + REFRESH_NS
            self.latest = readings
            self._windows.take(readings)
            self.exemplars.take(readings, self._decided, tick.sight.nonce, tick.wall_ns)
            self._decided = None

    def value(self, signal: str, klass: str | None = None) -> float | Missing:
        """One signal as of the last tick."""
        if self.tick is not None:
            for view in self.views:
                if (view.signal, view.klass) == (signal, klass):
                    return self._windows.value(view, self.tick.at_ns)
        return Missing("no_samples")

    def values(self) -> list[tuple[Shown, float | Missing]]:
        """Every signal as of the last tick."""
        if self.tick is None:
            return []
        return [(view, self._windows.value(view, self.tick.at_ns)) for view in self.views]
