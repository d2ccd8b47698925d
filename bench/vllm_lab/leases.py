"""Leases written by hand, and what the engine says it obeyed.

with Hold(server.place) as hold:          a pilot's half of the link: renews ten times a second
    hold.set(max_running=3, speculative_tokens=0)
    ...
    hold.clear()

records = Records(server.place)           every step since the last look
records.poll()
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from kvpilot.clock import NS, SystemClock
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import ENGINE_ANY, Lease, Scope
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.files import open_controls
from kvpilot.link.following import newest_telemetry
from kvpilot.link.place import LinkPlace
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryReader
from kvpilot.link.telemetry_page import RING_RECORDS

RENEW_S = 0.1


def until(condition: Callable[[], Any], within_s: float, what: str) -> float:
    """Seconds until `condition` held. Raises AssertionError, naming `what`, after `within_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"{what}: not within {within_s:g} s")
        time.sleep(0.01)
    return time.monotonic() - began


def page_of(place: LinkPlace, rank: int = 0, within_s: float = 30.0) -> TelemetryReader:
    """A reader of the living engine's page; waits for it to appear."""
    found = []

    def look() -> bool:
        page = newest_telemetry(place.telemetry_directory(rank), place.uids)
        found[:] = [page] if page is not None else []
        return bool(found)

    until(look, within_s, f"a page of a live engine in {place.telemetry_directory(rank)}")
    return TelemetryReader(found[0].read_at)


class Records:
    """Every step of one engine start, as far as its ring still holds them. O(new records) a look."""

    def __init__(self, place: LinkPlace, rank: int = 0) -> None:
        self.reader = page_of(place, rank)
        self.manifest = self.reader.manifest
        self.seen: list[StepRecord] = []

    def poll(self) -> list[StepRecord]:
        """Those since the last look; `seen` keeps all."""
        new = self.reader.poll(limit=RING_RECORDS)
        self.seen += new
        return new

    @property
    def latest(self) -> StepRecord | None:
        """The newest one seen so far."""
        return self.seen[-1] if self.seen else None

    def knobs(self) -> dict[str, float]:
        """Values in force at the newest step; empty before the first."""
        self.poll()
        return self.knobs_of(self.latest) if self.latest is not None else {}

    def knobs_of(self, record: StepRecord) -> dict[str, float]:
        """Values in force at that step."""
        values = {knob.name: record.get(KNOB_PREFIX + knob.name) for knob in self.manifest.knobs}
        return {name: value for name, value in values.items() if value is not None}

    def baselines(self) -> dict[str, float]:
        """The manifest's baselines of the knobs that records echo."""
        return {
            knob.name: knob.baseline
            for knob in self.manifest.knobs
            if knob.name not in KNOBS or KNOBS[knob.name].where == "engine"
        }

    def moved(self) -> dict[str, float]:
        """Knobs that the newest step did not have at their baseline."""
        return {name: value for name, value in self.knobs().items() if value != self.baselines()[name]}


class Hold:
    """Holds leases on an engine rank's knobs and on the valves', for as long as its context lasts."""

    def __init__(self, place: LinkPlace, rank: int = 0, ttl_s: float = 2.0) -> None:
        self._place, self._rank, self._ttl_ns = place, rank, round(ttl_s * NS)
        self._wanted: dict[tuple[str, Scope], float] = {}
        self._renewal = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._nonce = ENGINE_ANY

    def __enter__(self) -> "Hold":
        self._nonce = page_of(self._place, self._rank).nonce
        self._engine, self._engine_page = open_controls(self._place, self._rank, SystemClock())
        self._valve, self._valve_page = open_controls(self._place, None, SystemClock())
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()
        self._stopping.set()
        self._thread.join()
        for one in (self._engine, self._valve, self._engine_page, self._valve_page):
            one.close()

    def set(self, scope: Scope = Scope(), **knobs: float) -> None:  # noqa: B008  (an immutable value)
        """Hold these too, from now on; written at once."""
        with self._lock:
            self._wanted |= {(knob, scope): value for knob, value in knobs.items()}
        self._write()

    def clear(self) -> None:
        """Withdraw all of them; written at once."""
        with self._lock:
            self._wanted.clear()
        self._write()

    def freeze(self) -> None:
        """Renew nothing more, and leave the leases where they are: a writer that died."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(RENEW_S):
            self._write()

    def _write(self) -> None:
        with self._lock:
            self._renewal += 1
            leases = [
                Lease(knob, scope, value, self._ttl_ns, self._renewal)
                for (knob, scope), value in self._wanted.items()
            ]
            self._engine.write([one for one in leases if not _is_valves(one)], self._nonce)
            self._valve.write([one for one in leases if _is_valves(one)])


def _is_valves(lease: Lease) -> bool:
    return lease.knob in KNOBS and KNOBS[lease.knob].where == "valve"
