"""One invariant over a device's memory: used = weights + KV + activations + fragmentation + context + others,
and what is left of it is unexplained.

The engine's allocator says what it reserved and what of that is in live tensors; the manifest says what
weights and the KV pool take; NVML says what is in use at all and, where it may, what other processes hold.
What the engine's own process holds outside its allocator (the CUDA context, libraries' workspaces) nobody
says: it is taken to be the least that was seen since this engine started, at most `CONTEXT_MOST_BYTES`. So
what grows beside the allocator is unexplained, and so is memory of processes that NVML does not show.

NVML and the engine are read at different moments: memory is only divided while the allocator's figure stood
still between two looks.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.gpu import Absent, GpuSight

CONTEXT_MOST_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What the used memory is, in bytes; the parts add up to `used`."""

    used: float
    parts: Mapping[str, float]

    @property
    def unexplained(self) -> float:
        return self.parts["unexplained"]


class MemoryBook:
    """Divides one device's memory, look by look; keeps what it learnt of one engine start."""

    def __init__(self) -> None:
        self._nonce = 0
        self._at_ns = 0
        self._reserved: float | None = None
        self._context: float | None = None
        self.latest: MemoryParts | None = None

    def take(self, gpu: GpuSight, sight: Sight, pid: int | None = None) -> MemoryParts | None:
        """The newest division; None where the engine's allocator or NVML does not tell. `pid`: the engine's,
        as NVML sees it, where that is known.
        """
        record, manifest = sight.record, sight.manifest
        if sight.nonce != self._nonce:
            self._nonce, self._context, self._reserved, self.latest = sight.nonce, None, None, None
        used = gpu.value("memory_used_bytes")
        reserved = record.get("device_reserved_bytes") if record is not None else None
        allocated = record.get("device_allocated_bytes") if record is not None else None
        if used is None or reserved is None or allocated is None or manifest is None:
            self.latest = None
            return None
        if gpu.at_ns == self._at_ns:
            return self.latest
        steady = reserved == self._reserved
        self._at_ns, self._reserved = gpu.at_ns, reserved
        if not steady:
            return self.latest
        others = _others(gpu, pid, reserved)
        outside = max(0.0, used - reserved - others)
        least = CONTEXT_MOST_BYTES if self._context is None else self._context
        self._context = min(outside, least)
        kv = float(min(manifest.blocks * manifest.bytes_per_block, allocated))
        weights = float(min(manifest.weights_bytes or 0, allocated - kv))
        parts = {
            "weights": weights,
            "kv": kv,
            "activations": allocated - kv - weights,
            "fragmentation": max(0.0, reserved - allocated),
            "context": self._context,
            "others": others,
        }
        parts["unexplained"] = used - sum(parts.values())
        self.latest = MemoryParts(used, parts)
        return self.latest


def _others(gpu: GpuSight, pid: int | None, reserved: float) -> float:
    """What processes beside the engine hold, as far as NVML shows it. Without a pid the engine is taken to be
    the process that holds most, if that can be it at all.
    """
    if isinstance(gpu.processes, Absent):
        return 0.0
    held = {
        each: bytes_ for each, bytes_ in gpu.processes.items() if bytes_ is not None and each != os.getpid()
    }
    if not held:
        return 0.0
    own = pid if pid in held else max(held, key=lambda each: held[each])
    if held[own] < reserved * 0.9:
        # None of these holds what the allocator has: the engine is not among those that are shown.
        return float(sum(held.values()))
    return float(sum(bytes_ for each, bytes_ in held.items() if each != own))
