"""Device memory on CUDA: the device keeps the account itself, and refuses for real.

Bounded by torch's per-process fraction. The same calls as `kvengine.memory.DeviceMemory`; what that one
charges before an allocation, the device here accounts for in the allocation.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvengine.errors import ConfigError
from kvengine.memory import MIB, MemoryReading


class CudaMemory:
    """`limit_bytes` of `device` for this process; O(1) a call."""

    def __init__(self, limit_bytes: int, device: torch.device) -> None:
        _free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        if not 0 < limit_bytes <= total_bytes:
            raise ConfigError(
                f"memory={limit_bytes / MIB:.0f} MiB: {device} has {total_bytes / MIB:.0f} MiB; ask for less"
            )
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total_bytes, device)
        self.limit_bytes = limit_bytes
        self._device = device

    def reading(self) -> MemoryReading:
        """What this process may still take: of its share, and of what neighbours leave."""
        reserved = torch.cuda.memory_reserved(self._device)
        allocated = torch.cuda.memory_allocated(self._device)
        device_free, _total = torch.cuda.mem_get_info(self._device)
        free = min(self.limit_bytes - allocated, device_free + reserved - allocated)
        return MemoryReading(max(0, free), reserved, allocated)

    def charge(self, size_bytes: int, purpose: str) -> None:
        """The allocation that follows is the charge."""

    @contextmanager
    def held(self, size_bytes: int, purpose: str) -> Iterator[None]:
        yield

    def set_external(self, size_bytes: int) -> int:
        raise ConfigError("external memory on CUDA is another process; start one instead")
