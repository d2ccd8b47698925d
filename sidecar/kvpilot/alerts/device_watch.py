"""The watch over the engine's GPUs: what of them a person must hear.

| alert | severity | fires when | is over |
|---|---|---|---|
| KvpilotDeviceMemoryUnexplained | warning | more than 512 MiB and 2 % of the device is unexplained for 60 s | when it is less for 5 s |
| KvpilotGpuXid | critical | the driver tells an XID error | 5 minutes after the last one |

Pure: readings in, changes out.
"""  # noqa: E501

from collections.abc import Sequence

from kvpilot.adapters.gpu import GpuSight
from kvpilot.alerts.watch import Alarm, Change
from kvpilot.clock import NS

UNEXPLAINED, XID = "KvpilotDeviceMemoryUnexplained", "KvpilotGpuXid"
LEAST_BYTES, LEAST_RATIO = 512 << 20, 0.02
FIRES_AFTER_NS, OVER_AFTER_NS = 60 * NS, 5 * NS
XID_FOR_NS = 300 * NS

_MEMORY = (
    "Memory is in use that neither the engine's allocator nor another process accounts for: something leaks"
    " beside it, or a process that NVML does not show shares the device. `nvidia-smi` on the node tells more."
)
_XID = (
    "The driver met an error on this device. What the number means is in NVIDIA's XID catalogue; many need"
    " the process or the node restarted. The kernel's log has the line."
)


class DeviceWatch:
    """See the module docstring. Looks in order of time."""

    def __init__(self) -> None:
        self.firing: dict[str, Alarm] = {}
        self._since_ns: int | None = None
        self._last_ns: dict[str, int] = {}
        self._xids: dict[str, dict[int, int]] = {}

    def observe(self, at_ns: int, gpus: Sequence[GpuSight], unexplained_bytes: float | None) -> list[Change]:
        """What this look changes. `unexplained_bytes` None: nobody can say."""
        changes = self._memory(at_ns, gpus, unexplained_bytes)
        for gpu in gpus:
            before = self._xids.get(gpu.uuid, {})
            fresh = [xid for xid, count in gpu.xids.items() if count > before.get(xid, 0)]
            self._xids[gpu.uuid] = dict(gpu.xids)
            if fresh:
                self._last_ns[XID] = at_ns
                numbers = ", ".join(map(str, sorted(fresh)))
                changes.append(self._fire(XID, "critical", f"XID {numbers} on {gpu.uuid}", _XID, at_ns))
        limits = {UNEXPLAINED: OVER_AFTER_NS, XID: XID_FOR_NS}
        over = [name for name in self.firing if at_ns - self._last_ns[name] >= limits[name]]
        return changes + [Change(self.firing.pop(name), False) for name in over]

    def _memory(self, at_ns: int, gpus: Sequence[GpuSight], unexplained: float | None) -> list[Change]:
        total = gpus[0].value("memory_total_bytes") if gpus else None
        least = max(LEAST_BYTES, LEAST_RATIO * (total or 0))
        if unexplained is None or unexplained <= least:
            self._since_ns = None
            return []
        self._since_ns = at_ns if self._since_ns is None else self._since_ns
        self._last_ns[UNEXPLAINED] = at_ns
        if UNEXPLAINED in self.firing or at_ns - self._since_ns < FIRES_AFTER_NS:
            return []
        summary = f"{unexplained / 2**20:,.0f} MiB of device memory are unexplained"
        return [self._fire(UNEXPLAINED, "warning", summary, _MEMORY, at_ns)]

    def _fire(self, name: str, severity: str, summary: str, what_to_do: str, at_ns: int) -> Change:
        since_ns = self.firing[name].since_ns if name in self.firing else at_ns
        self.firing[name] = Alarm(name, severity, summary, what_to_do, since_ns)
        return Change(self.firing[name], True)
