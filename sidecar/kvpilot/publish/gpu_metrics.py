"""Metrics of the engine's GPUs: what NVML told, and of each reading that it did not, why."""

from kvpilot.adapters.gpu import THROTTLES, Absent, GpuSight
from kvpilot.adapters.gpu_memory import MemoryParts
from kvpilot.adapters.gpu_watch import GpuLook
from kvpilot.publish.sheet import Sheet

_NO_DEVICE = ""


def add_gpus(sheet: Sheet, look: GpuLook, parts: MemoryParts | None) -> None:
    """All devices of the newest look. `parts` divides the memory of a single one."""
    if look.why is not None:
        sheet.add("gpu_missing", 1.0, _NO_DEVICE, "all", look.why[:100])
    for gpu in look.sights:
        _add_gpu(sheet, gpu)
        if parts is not None and len(look.sights) == 1:
            for part, value in parts.parts.items():
                sheet.add("gpu_memory_part_bytes", value, gpu.uuid, part)


def _add_gpu(sheet: Sheet, gpu: GpuSight) -> None:
    sheet.add("gpu_info", 1.0, gpu.uuid, gpu.name, "true" if gpu.mig else "false")
    for name, found in gpu.readings.items():
        if isinstance(found, Absent):
            sheet.add("gpu_missing", 1.0, gpu.uuid, name, found.reason)
        else:
            sheet.add(f"gpu_{name}", found, gpu.uuid)
    if isinstance(gpu.throttles, Absent):
        sheet.add("gpu_missing", 1.0, gpu.uuid, "throttle", gpu.throttles.reason)
    else:
        for reason in THROTTLES:
            sheet.add("gpu_throttle", float(reason in gpu.throttles), gpu.uuid, reason)
    for kind, found in gpu.ecc.items():
        if isinstance(found, Absent):
            sheet.add("gpu_missing", 1.0, gpu.uuid, f"ecc_{kind}", found.reason)
        else:
            sheet.add("gpu_ecc_errors", found, gpu.uuid, kind)
    for xid, count in gpu.xids.items():
        sheet.add("gpu_xid_events", count, gpu.uuid, str(xid))
