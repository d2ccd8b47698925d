"""The engine's GPUs as signals that policies may use. Pure, save for what the memory book remembers."""

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.gpu import TROUBLE, Absent
from kvpilot.adapters.gpu_memory import MemoryBook, MemoryParts
from kvpilot.adapters.gpu_watch import GpuLook
from kvpilot.adapters.windows import Key, Reading
from kvpilot.clock import NS
from kvpilot.signals import Missing

UNEXPLAINED, THROTTLED, BUSY = "device_unexplained_bytes", "gpu_throttled", "gpu_busy_ratio"
GPU_SIGNALS = (UNEXPLAINED, THROTTLED, BUSY)
OLD_NS = 10 * NS

_NOT_PROVIDED = Missing("not_provided")
_NOTHING: dict[Key, Reading | Missing] = {(name, None): _NOT_PROVIDED for name in GPU_SIGNALS}


class GpuSignals:
    """Turns looks into readings. Memory is divided where the rank has one device: the engine tells its
    allocator's figures of one.
    """

    def __init__(self) -> None:
        self._book = MemoryBook()

    @property
    def parts(self) -> MemoryParts | None:
        """What the memory was last found to be."""
        return self._book.latest

    def readings(self, look: GpuLook | None, sight: Sight) -> dict[Key, Reading | Missing]:
        """Each of GPU_SIGNALS: a reading as of the look, or missing."""
        if look is None or not look.sights:
            return _NOTHING
        if sight.at_ns - look.at_ns > OLD_NS:
            return {key: Missing("too_old", (sight.at_ns - look.at_ns) / NS) for key in _NOTHING}
        parts = self._book.take(look.sights[0], sight) if len(look.sights) == 1 else None
        states = [each.throttles for each in look.sights if not isinstance(each.throttles, Absent)]
        busy = [value for each in look.sights if (value := each.value("utilisation_ratio")) is not None]
        found: dict[str, float | None] = {
            UNEXPLAINED: None if parts is None else parts.unexplained,
            THROTTLED: float(any(state.intersection(TROUBLE) for state in states)) if states else None,
            BUSY: sum(busy) / len(busy) if busy else None,
        }
        return {
            (name, None): _NOT_PROVIDED if value is None else Reading(look.at_ns, value)
            for name, value in found.items()
        }
