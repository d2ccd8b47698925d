"""A stand-in at NVML's boundary: `pynvml`'s functions over values that a device of 141 GB gives under load.

`fails` names functions that raise, with the library's error number.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pynvml

UUID = "GPU-5f1c9a52-03a6-7f0e-9d7a-2b9f2f5a7c11"
MIG_UUID = "MIG-0d1b6a3e-52f7-5c1f-9a0e-6f2d9b7f4e10"
GIB = 2**30

VALUES: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=61),
    "nvmlDeviceGetPowerUsage": 643_210,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTotalEnergyConsumption": 9_123_456_789,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x4,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x4,
    "nvmlDeviceGetMigMode": (0, 0),
    "nvmlDeviceGetMaxMigDeviceCount": 0,
}
NOT_SUPPORTED, TIMEOUT, GPU_IS_LOST = 3, 10, 15


class RecordedNvml:
    """What a test may change: `values`, `fails`, `memory`, `processes`, `xids`, `uuids`."""

    NVMLError = pynvml.NVMLError

    def __init__(self, uuids: tuple[str, ...] = (UUID,), **fails: int) -> None:
        self.uuids = uuids
        self.fails = fails
        self.values = dict(VALUES)
        self.memory = SimpleNamespace(total=140 * GIB, reserved=GIB, used=100 * GIB, free=39 * GIB)
        self.processes: list[tuple[int, int | None]] = []
        self.xids: list[int] = []
        self.ecc = {pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED: 3, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED: 0}
        self.clocks = {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml") or not callable(getattr(pynvml, name)):
            return getattr(pynvml, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.asked.append(name)
            if name in self.fails:
                raise pynvml.NVMLError(self.fails[name])
            return getattr(self, f"_{name}", lambda *_: self.values[name])(*arguments, **options)

        return call

    def _nvmlInit(self) -> None: ...

    def _nvmlDeviceGetCount(self) -> int:
        return len([uuid for uuid in self.uuids if uuid.startswith("GPU-")])

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.uuids[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.uuids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, index: int) -> str:
        return [uuid for uuid in self.uuids if uuid.startswith("MIG-")][index]

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return UUID

    def _nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def _nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG-"):
            raise pynvml.NVMLError(NOT_SUPPORTED)
        return self.values["nvmlDeviceGetUtilizationRates"]

    def _nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        if version is None:
            whole = self.memory
            return SimpleNamespace(total=whole.total, used=whole.used + whole.reserved, free=whole.free)
        return self.memory

    def _nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self.clocks[kind]

    def _nvmlDeviceGetTotalEccErrors(self, handle: str, kind: int, counter: int) -> int:
        return self.ecc[kind]

    def _nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in self.processes]

    def _nvmlEventSetCreate(self) -> Iterator[int]:
        return iter(())

    def _nvmlEventSetFree(self, events: Any) -> None: ...

    def _nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: Any) -> None: ...

    def _nvmlEventSetWait_v2(self, events: Any, timeout_ms: int) -> Any:
        assert timeout_ms == 0, "nothing may wait"
        if not self.xids:
            raise pynvml.NVMLError(TIMEOUT)
        return SimpleNamespace(eventData=self.xids.pop(0))
