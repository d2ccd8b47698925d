"""How much of a device's memory becomes KV blocks. Pure arithmetic in bytes: no torch, no device.

The engine divides its own memory by this, and `kvpilot plan` anybody's.

By default what remains after the weights, the buffers that stay and the worst step is KV: such an engine
cannot run out of memory by itself. With `kv_fraction`, a share of what remains after the weights, the
operator decides, and may leave less than the worst step needs: `Plan.headroom_bytes` then says for how little
there is room.
"""

from dataclasses import dataclass

from kvengine.errors import ConfigError, StartError


@dataclass(frozen=True, slots=True)
class StepSize:
    """What of a step decides how much memory it needs, beside the model."""

    tokens: int
    logits_rows: int
    """Rows that go through the output layer."""
    drawn_rows: int
    """Rows of those that are sampled from a distribution; one under top_p counts twice, a greedy one not at
    all.
    """
    decode_context_tokens: int
    """Positions that single-token sequences look back on."""


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes that one step allocates and gives back, as a linear function of its size."""

    token_bytes: int
    logits_row_bytes: int
    drawn_row_bytes: int
    context_token_bytes: int
    fixed_bytes: int

    def step_bytes(self, size: StepSize) -> int:
        """An upper bound, tight to a few percent."""
        return (
            self.fixed_bytes
            + size.tokens * self.token_bytes
            + size.logits_rows * self.logits_row_bytes
            + size.drawn_rows * self.drawn_row_bytes
            + size.decode_context_tokens * self.context_token_bytes
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What the device's memory is divided into. The last part is what steps, and neighbours, may use."""

    memory_bytes: int
    resident_bytes: int
    block_size: int
    block_bytes: int
    blocks: int
    worst_step_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def kv_tokens(self) -> int:
        return self.blocks * self.block_size

    @property
    def headroom_bytes(self) -> int:
        """Left between steps. Below `worst_step_bytes` the engine is oversubscribed."""
        return self.memory_bytes - self.resident_bytes - self.kv_bytes

    @property
    def oversubscribed(self) -> bool:
        return self.headroom_bytes < self.worst_step_bytes

    @property
    def sentence(self) -> str:
        """The whole of it, for an engine's first line."""
        line = (
            f"{_mib(self.memory_bytes)} of memory = {_mib(self.resident_bytes)} weights and buffers + "
            f"{_mib(self.kv_bytes)} KV ({self.blocks} blocks of {self.block_size} tokens = {self.kv_tokens} "
            f"tokens) + {_mib(self.headroom_bytes)} for steps"
        )
        if self.oversubscribed:
            line += f"; OVERSUBSCRIBED: the largest step needs {_mib(self.worst_step_bytes)}"
        return line


def plan(
    *,
    memory_bytes: int,
    resident_bytes: int,
    kv_bytes_per_token: int,
    block_size: int,
    worst_step_bytes: int,
    kv_fraction: float | None = None,
    kv_bytes: int | None = None,
) -> Plan:
    """Divide `memory_bytes`. `resident_bytes` are weights and buffers that stay. Raises ConfigError or
    StartError.

    `kv_fraction` is a share of what remains after `resident_bytes`: 0.6 of an 80 GB device with 14 GB of
    weights is 39.6 GB. `kv_bytes` says it outright. Either may leave less than the worst step needs.
    """
    check_block_size(block_size)
    if kv_fraction is not None and not 0 < kv_fraction < 1:
        raise ConfigError(
            f"kv_fraction={kv_fraction}: a share of what remains after weights, above 0 and below 1"
        )
    block_bytes = kv_bytes_per_token * block_size
    after_weights_bytes = memory_bytes - resident_bytes
    if kv_bytes is None:
        # Rounded, not floored: 0.6 of 66 GB is 39.6 GB, whatever the float says in its last digit.
        kv_bytes = (
            after_weights_bytes - worst_step_bytes
            if kv_fraction is None
            else round(after_weights_bytes * kv_fraction)
        )
    if kv_bytes > after_weights_bytes:
        raise StartError(
            f"{_mib(kv_bytes)} of KV do not fit into the {_mib(after_weights_bytes)} that weights leave of "
            f"{_mib(memory_bytes)}"
        )
    blocks = kv_bytes // block_bytes
    if blocks < 1:
        raise StartError(
            f"{_mib(memory_bytes)} of device memory: {_mib(resident_bytes)} of weights and "
            f"{_mib(worst_step_bytes)} for the largest step leave no KV block of {_mib(block_bytes)}; "
            "raise the memory or lower the step's tokens"
        )
    return Plan(memory_bytes, resident_bytes, block_size, block_bytes, blocks, worst_step_bytes)


def check_block_size(block_size: int) -> None:
    """Paged attention kernels take powers of two. Raises ConfigError."""
    if block_size < 1 or block_size & (block_size - 1):
        below = 1 << max(block_size.bit_length() - 1, 0)
        near = f"{below} or {2 * below}" if block_size > 1 else "16"
        raise ConfigError(f"block_size={block_size}: a power of two, such as {near}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
