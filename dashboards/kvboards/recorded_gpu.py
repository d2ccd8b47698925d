"""`kvpilot` beside a GPU that is recorded readings at NVML's boundary, for machines that have none.

All of the pilot's own code runs, from the library's functions to the metrics; only the library is the tests'
stand-in. Its memory is that of a device in which the lab's small engine just fits.
"""

import random
import sys
from types import SimpleNamespace
from typing import Any

from recorded_nvml import RecordedNvml

from kvpilot.cli import main

MIB = 2**20
TOTAL_BYTES, DRIVER_BYTES, CONTEXT_BYTES = 64 * MIB, 2 * MIB, 5 * MIB
ENGINE_BYTES = 41_392_136
"""Weights and KV of the lab's engine."""
LEAK_BYTES = 15_000
"""Lost at each look, so that the unexplained part has something to show."""


class Lively(RecordedNvml):
    """Readings that move, as a device's do; memory is what the engine holds, a context, and a slow leak."""

    def __init__(self) -> None:
        super().__init__()
        self._used = ENGINE_BYTES + CONTEXT_BYTES
        self._rng = random.Random("gpu")
        self._looks = 0

    def _nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        self._used += LEAK_BYTES
        free = TOTAL_BYTES - DRIVER_BYTES - self._used
        return SimpleNamespace(total=TOTAL_BYTES, reserved=DRIVER_BYTES, used=self._used, free=free)

    def _nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return round(self._rng.uniform(520_000, 700_000))

    def _nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self._rng.randint(80, 100), memory=self._rng.randint(45, 65))

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        self._looks += 1
        return 0x4 if self._looks % 6 in (1, 2) else 0x0


if __name__ == "__main__":
    sys.modules["pynvml"] = Lively()  # type: ignore[assignment]
    main()
