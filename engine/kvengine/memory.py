"""Device memory as a finite thing: who holds how much, and the error a device raises when asked for more.

On a CPU nothing bounds an engine the way a GPU's memory does, so the engine charges every allocation it
makes on its "device" (weights, KV pool, step workspace) to a `DeviceMemory`, before it makes it. A
neighbour on the same device takes from the same account. Each call is O(1).

Invariant: 0 <= allocated, and allocated + external <= limit at every moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """Bytes. `reserved` is what the allocator holds, `allocated` what live tensors do; equal by exact
    accounting.
    """

    free: int
    reserved: int
    allocated: int


class DeviceMemory:
    """The account of one device. Used from the thread that owns the model."""

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes <= 0:
            raise ValueError(f"limit_bytes={limit_bytes}: must be above 0")
        self.limit_bytes = limit_bytes
        self.peak_bytes = 0
        self._allocated_bytes = 0
        self._external_bytes = 0

    @property
    def allocated_bytes(self) -> int:
        return self._allocated_bytes

    @property
    def free_bytes(self) -> int:
        return self.limit_bytes - self._external_bytes - self._allocated_bytes

    def reading(self) -> MemoryReading:
        return MemoryReading(self.free_bytes, self._allocated_bytes, self._allocated_bytes)

    def charge(self, size_bytes: int, purpose: str) -> None:
        """Take `size_bytes`, or raise torch.OutOfMemoryError and take nothing."""
        if size_bytes < 0:
            raise ValueError(f"size_bytes={size_bytes} for {purpose}: must not be negative")
        if size_bytes > self.free_bytes:
            raise self._out_of_memory(size_bytes, purpose)
        self._allocated_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self._allocated_bytes)

    def release(self, size_bytes: int) -> None:
        """Give back what `charge` took."""
        if not 0 <= size_bytes <= self._allocated_bytes:
            raise ValueError(f"release of {size_bytes} bytes with {self._allocated_bytes} allocated")
        self._allocated_bytes -= size_bytes

    @contextmanager
    def held(self, size_bytes: int, purpose: str) -> Iterator[None]:
        """Charge for the length of a block; released however the block ends."""
        self.charge(size_bytes, purpose)
        try:
            yield
        finally:
            self.release(size_bytes)

    def set_external(self, size_bytes: int) -> int:
        """A neighbour now wants `size_bytes` in all; it gets at most what is free, and that is returned."""
        if size_bytes < 0:
            raise ValueError(f"size_bytes={size_bytes} for a neighbour: must not be negative")
        self._external_bytes = min(size_bytes, self.limit_bytes - self._allocated_bytes)
        return self._external_bytes

    def _out_of_memory(self, size_bytes: int, purpose: str) -> Exception:
        import torch  # Only here: the account itself also serves simulations, which have no torch.

        return torch.OutOfMemoryError(
            f"device out of memory: {purpose} needs {size_bytes / MIB:.1f} MiB, "
            f"{self.free_bytes / MIB:.1f} MiB free of {self.limit_bytes / MIB:.1f} MiB "
            f"({self._allocated_bytes / MIB:.1f} MiB allocated, "
            f"{self._external_bytes / MIB:.1f} MiB held by a neighbour)"
        )
