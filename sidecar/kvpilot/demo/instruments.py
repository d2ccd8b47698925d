"""What the demo reads from the engine's telemetry page, as any onlooker could: no writing, no locking."""

from collections import deque
from dataclasses import dataclass
from typing import Any

from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.following import newest_telemetry
from kvpilot.link.histogram import HistogramSnapshot
from kvpilot.link.place import LinkPlace
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryReader

ITL_READINGS = 20
"""Readings over which the shown ITL p95 is taken: two seconds at 10 Hz."""


@dataclass
class Extremes:
    """What a leg keeps of all steps it saw, not only of those it showed."""

    kv_occupancy_max: float = 0.0
    waste_sum: float = 0.0
    steps: int = 0

    @property
    def tail_waste_ratio(self) -> float | None:
        """Mean over steps of waste over allocated tokens; None before any step held blocks."""
        return self.waste_sum / self.steps if self.steps else None


class Instruments:
    """One engine start's page, read as often as somebody looks."""

    def __init__(self, place: LinkPlace) -> None:
        page = newest_telemetry(place.telemetry_directory(0), place.uids)
        if page is None:
            raise FileNotFoundError(f"no telemetry of a live engine in {place.telemetry_directory(0)}")
        self._page = page
        self._reader = TelemetryReader(page.read_at)
        self.manifest = self._reader.manifest
        self.nonce = self._reader.nonce
        self.latest: StepRecord | None = None
        self.extremes = Extremes()
        self._itl: deque[HistogramSnapshot] = deque(maxlen=ITL_READINGS)

    def begin_leg(self) -> None:
        """Forget earlier extremes."""
        self.poll()
        self.extremes = Extremes()
        self._itl.clear()

    def poll(self) -> None:
        """Take in every step since the last look."""
        block_size, blocks = self.manifest.block_size, self.manifest.blocks
        for record in self._reader.poll(limit=4_096):
            self.latest = record
            used = blocks - record["kv_blocks_free"] - (record.get("kv_blocks_cached") or 0)
            self.extremes.kv_occupancy_max = max(self.extremes.kv_occupancy_max, used / blocks)
            if used > 0:
                self.extremes.waste_sum += record["tail_waste_tokens"] / (used * block_size)
                self.extremes.steps += 1

    def count(self, field: str) -> int:
        """A cumulative field now; 0 before the first step."""
        return int(self.latest[field]) if self.latest else 0

    def idle(self) -> bool:
        """Whether nothing ran or waited at the newest step."""
        return self.latest is not None and self.latest["running"] == 0 and self.latest["waiting"] == 0

    def moved_knobs(self) -> dict[str, float]:
        """Engine knobs whose value in force is not their baseline, at the newest step."""
        if self.latest is None:
            return {}
        values = {knob.name: self.latest.get(KNOB_PREFIX + knob.name) for knob in self.manifest.knobs}
        return {
            knob.name: value
            for knob in self.manifest.knobs
            if (value := values[knob.name]) is not None and value != knob.baseline
        }

    def state(self) -> dict[str, Any]:
        """For the screen."""
        record = self.latest
        itl = self._reader.histogram("itl")
        if itl is not None:
            self._itl.append(itl)
        window = self._itl[-1].minus(self._itl[0]) if len(self._itl) > 1 else None
        blocks = self.manifest.blocks
        free = record["kv_blocks_free"] + (record.get("kv_blocks_cached") or 0) if record else blocks
        echoed = {
            knob.name: value
            for knob in self.manifest.knobs
            if record is not None and (value := record.get(KNOB_PREFIX + knob.name)) is not None
        }
        return {
            "kv_occupancy": (blocks - free) / blocks,
            "running": record["running"] if record else 0,
            "waiting": record["waiting"] if record else 0,
            "preemptions": record["preemptions_total"] if record else 0,
            "oom": record["oom_total"] if record else 0,
            "itl_p95_s": window.quantile(0.95) if window is not None and window.count else None,
            "knobs": echoed,
            "baselines": {knob.name: knob.baseline for knob in self.manifest.knobs},
        }

    def close(self) -> None:
        self._page.close()
