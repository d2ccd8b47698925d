"""What NVML says of one GPU, or of one MIG instance: each reading by itself, or why it is not there.

`nvml` is the library `pynvml` or whatever has its functions; a function that fails costs its own reading and
no other. Base units: bytes, watts, hertz, joules, ratios. Which engine's device it is, is `gpu_watch`'s to
find.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Nvml = Any
Handle = Any

THROTTLES = {
    "idle": 0x1,
    "applications_clocks": 0x2,
    "software_power_cap": 0x4,
    "hardware_slowdown": 0x8,
    "sync_boost": 0x10,
    "software_thermal": 0x20,
    "hardware_thermal": 0x40,
    "power_brake": 0x80,
    "display_clocks": 0x100,
}
"""Bits of the reasons for which clocks are held back."""
TROUBLE = ("hardware_slowdown", "software_thermal", "hardware_thermal", "power_brake")
"""Those that mean heat or a failing supply; a power cap at full load is as it should be."""

_NOT_IN_MIG = "not_supported_in_mig"


@dataclass(frozen=True, slots=True)
class Absent:
    """Why there is no reading: NVML's error, as a word."""

    reason: str


Found = float | Absent


@dataclass(frozen=True, slots=True)
class GpuSight:
    """One look at one device. `uuid` is the MIG instance's where `mig`."""

    uuid: str
    at_ns: int
    name: str = ""
    mig: bool = False
    readings: Mapping[str, Found] = field(default_factory=dict)
    """By the name of the metric that shows it, without `gpu_`."""
    throttles: frozenset[str] | Absent = Absent("not_read")
    ecc: Mapping[str, Found] = field(default_factory=dict)
    xids: Mapping[int, int] = field(default_factory=dict)
    """Events since the pilot came, by XID."""
    processes: Mapping[int, int | None] | Absent = Absent("not_read")
    """Bytes that each process holds, by pid as NVML sees it; None where it does not tell."""

    def value(self, name: str) -> float | None:
        """A reading, if it is there."""
        found = self.readings.get(name)
        return None if isinstance(found, Absent) else found


class Gpu:
    """One device, open. Raises the library's NVMLError where it cannot be opened at all."""

    def __init__(self, nvml: Nvml, handle: Handle) -> None:
        self._nvml = nvml
        self._handle = handle
        self.uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        self.mig = self.uuid.startswith("MIG-")
        self._parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if self.mig else handle
        self._xids: Counter[int] = Counter()
        self._events: Any = None
        with contextlib.suppress(nvml.NVMLError):
            self._name = _text(nvml.nvmlDeviceGetName(handle))
        with contextlib.suppress(nvml.NVMLError):
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._parent, nvml.nvmlEventTypeXidCriticalError, events)
            self._events = events

    def look(self, now_ns: int) -> GpuSight:
        """Everything, now. Takes milliseconds to tens of them; never raises NVMLError."""
        nvml, parent = self._nvml, self._parent
        readings: dict[str, Found] = {}
        self._read_memory(readings)
        rates = self._try(lambda: nvml.nvmlDeviceGetUtilizationRates(self._handle))
        for name, part in (("utilisation_ratio", "gpu"), ("memory_utilisation_ratio", "memory")):
            readings[name] = rates if isinstance(rates, Absent) else getattr(rates, part) / 100
        singles: dict[str, tuple[Callable[[], float], float]] = {
            "power_watts": (lambda: nvml.nvmlDeviceGetPowerUsage(parent), 1e-3),
            "power_limit_watts": (lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(parent), 1e-3),
            "energy_joules": (lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(parent), 1e-3),
            "temperature_celsius": (
                lambda: nvml.nvmlDeviceGetTemperature(parent, nvml.NVML_TEMPERATURE_GPU),
                1.0,
            ),
            "sm_clock_hertz": (lambda: nvml.nvmlDeviceGetClockInfo(parent, nvml.NVML_CLOCK_SM), 1e6),
            "memory_clock_hertz": (lambda: nvml.nvmlDeviceGetClockInfo(parent, nvml.NVML_CLOCK_MEM), 1e6),
        }
        for name, (call, scale) in singles.items():
            found = self._try(call)
            readings[name] = found if isinstance(found, Absent) else found * scale
        self._drain_events()
        return GpuSight(
            uuid=self.uuid,
            at_ns=now_ns,
            name=getattr(self, "_name", ""),
            mig=self.mig,
            readings=readings,
            throttles=self._throttles(),
            ecc=self._ecc(),
            xids=dict(self._xids),
            processes=self._processes(),
        )

    def close(self) -> None:
        """Let go of the event set."""
        if self._events is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(self._events)
            self._events = None

    def _read_memory(self, readings: dict[str, Found]) -> None:
        """With the driver's part apart where this driver tells it; older ones count it as used."""
        nvml = self._nvml
        memory = self._try(lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle, version=nvml.nvmlMemory_v2))
        driver: Found = memory if isinstance(memory, Absent) else float(memory.reserved)
        if isinstance(memory, Absent):
            memory = self._try(lambda: nvml.nvmlDeviceGetMemoryInfo(self._handle))
        for name, part in (("memory_total_bytes", "total"), ("memory_used_bytes", "used")):
            readings[name] = memory if isinstance(memory, Absent) else float(getattr(memory, part))
        readings["memory_driver_bytes"] = driver

    def _throttles(self) -> frozenset[str] | Absent:
        nvml = self._nvml
        bits = self._try(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(self._parent))
        if isinstance(bits, Absent):
            # The same under the name that drivers had before 535.
            bits = self._try(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._parent))
        if isinstance(bits, Absent):
            return bits
        return frozenset(name for name, bit in THROTTLES.items() if int(bits) & bit)

    def _ecc(self) -> dict[str, Found]:
        nvml = self._nvml
        kinds = {
            "corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
            "uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        }
        return {
            name: self._try(
                lambda kind=kind: float(  # type: ignore[misc]
                    nvml.nvmlDeviceGetTotalEccErrors(self._parent, kind, nvml.NVML_VOLATILE_ECC)
                )
            )
            for name, kind in kinds.items()
        }

    def _processes(self) -> dict[int, int | None] | Absent:
        found = self._try(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if isinstance(found, Absent):
            return found
        return {each.pid: each.usedGpuMemory for each in found}

    def _drain_events(self) -> None:
        """Count what the driver has told since the last look; waits for nothing."""
        if self._events is None:
            return
        for _ in range(64):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except self._nvml.NVMLError:  # A timeout: there is nothing more.
                return
            self._xids[int(event.eventData)] += 1

    def _try(self, call: Callable[[], Any]) -> Any:
        """What `call` gives, or why it does not."""
        try:
            return call()
        except self._nvml.NVMLError as error:
            return Absent(_NOT_IN_MIG if self.mig and _reason(error) == "not_supported" else _reason(error))


def _reason(error: Exception) -> str:
    """NVML's own words for it, as one word."""
    return "_".join(str(error).lower().split())[:64] or "failed"


def _text(raw: bytes | str) -> str:
    """Older releases of the library give bytes."""
    return raw.decode() if isinstance(raw, bytes) else raw
