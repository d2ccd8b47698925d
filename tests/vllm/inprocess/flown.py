"""A plane with our hook on its scheduler, and both ends of the link in the test's hands."""

import inspect
import os
from pathlib import Path
from typing import Any

from plane import Make, Plane

from kvpilot.clock import NS, VirtualClock
from kvpilot.inside.vllm.attach import attach
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Lease, Scope
from kvpilot.link.page import Identity
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryReader

STEP_S = 0.004
KNOB_ATTRIBUTES = ("max_num_scheduled_tokens", "max_num_active_reqs", "dynamic_sd_lookup")


class Flown(Plane):
    """Every step takes STEP_S of a clock that stands still otherwise."""

    def __init__(self, make: Make, folder: Path, seed: int = 0, callers: str | None = None) -> None:
        super().__init__(make, folder, seed)
        self.clock = VirtualClock(NS)
        self.environ = {"KVPILOT_ENGINE": "e"}
        for name in ("TELEMETRY", "CONTROLS"):
            (folder / name).mkdir()
            self.environ[f"KVPILOT_{name}"] = str(folder / name)
        if callers is not None:
            (folder / "callers.json").write_text(callers)
            self.environ["KVPILOT_CALLERS"] = str(folder / "callers.json")
        attachment = attach(self.scheduler, self.environ, self.clock)
        assert attachment is not None
        self.attachment = attachment
        self.hook = attachment.hook
        self._controls = bytearray(CONTROLS_BYTES)
        self._writer = ControlsWriter(self._controls, Identity("host", "", 0, 0))
        self._renewal = 0
        # A process refuses to read a controls page that it writes itself.
        self.hook._read_controls = lambda _now_ns: self._controls
        # The clock stands still between steps.
        self.hook.controls_every_ns = 0
        page = self.hook._page
        assert page is not None
        # A descriptor of its own, so that the page can be read when the hook has let go of it.
        file = os.open(page.path, os.O_RDONLY)
        self.reader = TelemetryReader(lambda offset, size: os.pread(file, size, offset))
        self.nonce = self.reader.nonce
        self.records: list[StepRecord] = []

    def _land(self, scheduled: Any, output: Any) -> None:
        self.clock.advance(STEP_S)
        super()._land(scheduled, output)
        self.records += self.reader.poll()

    @property
    def last(self) -> StepRecord:
        """The latest record."""
        self.records += self.reader.poll()
        return self.records[-1]

    def renew(self, ttl_s: float = 2.0, **knobs: float) -> None:
        """Write leases, as a pilot does ten times a second."""
        self._renewal += 1
        ttl_ns = int(ttl_s * NS)
        leases = [Lease(knob, Scope(), value, ttl_ns, self._renewal) for knob, value in knobs.items()]
        self._writer.write(leases, self.nonce)

    def hold(self, ttl_s: float = 2.0, **knobs: float) -> None:
        """Leases that are in force from the next step on: a reader has to see them renewed once."""
        self.renew(ttl_s, **knobs)
        self.hook.begin_step(self.clock.monotonic_ns())
        self.renew(ttl_s, **knobs)

    def release(self) -> None:
        """Withdraw all leases."""
        self.renew()

    def knob_state(self) -> dict[str, object]:
        """All that knobs may touch, as it is."""
        scheduler = self.scheduler
        return {
            **{name: getattr(scheduler, name) for name in KNOB_ATTRIBUTES},
            "threshold": scheduler.scheduler_config.long_prefill_token_threshold,
            "adaptive": scheduler.adaptive_long_prefill_threshold,
            "watermark": scheduler.kv_cache_manager.watermark_blocks,
        }

    def is_as_found(self, found: dict[str, object]) -> bool:
        """Whether knobs stand as `knob_state` found them: the same objects."""
        return all(value is found[name] for name, value in self.knob_state().items())

    @property
    def wrapped(self) -> set[str]:
        """Methods that the scheduler has of its own, beside its class's."""
        return {name for name, value in vars(self.scheduler).items() if inspect.isfunction(value)}
