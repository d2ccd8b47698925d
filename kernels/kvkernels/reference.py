"""What the kernels mean, in plain torch: the spec that every fast path must match. Slow on purpose.

Position p of a sequence lies in block `blocks[p // block_size]`, row `p % block_size`. A new token sees
itself and all before it. Query head h reads KV head h // (heads // kv_heads).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.geometry import Span
from kvkernels.precision import BF16, FINE_STEPS, FP8, FP32, INT4, Precision


def write(pool: Tensor, slots: Sequence[int], kv: Tensor) -> None:
    """Put `kv` [tokens, 2, kv_heads, head_dim] into the pool's token rows `slots`."""
    block_size = pool.shape[1]
    for row, slot in enumerate(slots):
        pool[slot // block_size, slot % block_size] = kv[row]


def gather(pool: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """K and V [context, kv_heads, head_dim] of the span's sequence."""
    block_size = pool.shape[1]
    rows = [pool[span.blocks[p // block_size], p % block_size] for p in range(span.context)]
    kv = torch.stack(rows)
    return kv[:, 0], kv[:, 1]


def attend(query: Tensor, pool: Tensor, spans: Sequence[Span], window: int | None = None) -> Tensor:
    """Causal attention of each span's rows of `query` [rows, heads, head_dim] over its own sequence, or over
    the latest `window` tokens of it.
    """
    out = torch.zeros_like(query)
    group = query.shape[1] // pool.shape[3]
    for span in spans:
        k, v = gather(pool, span)
        for row in range(span.count):
            seen = span.start + row + 1
            for head in range(query.shape[1]):
                q = query[span.first_row + row, head]
                first = 0 if window is None else max(0, seen - window)
                weights = torch.softmax(k[first:seen, head // group] @ q / q.shape[0] ** 0.5, dim=0)
                out[span.first_row + row, head] = weights @ v[first:seen, head // group]
    return out


def fine_factors(steps: Tensor) -> Tensor:
    """What steps multiply their heads' scales by, as exactly as fp32 has it."""
    return torch.exp2(steps.double() / FINE_STEPS).float()


def fine_errors(kv: Tensor, scales: Tensor) -> Tensor:
    """What each vector of `kv` [tokens, 2 * kv_heads, head_dim] loses at each step, [.., FINE_STEPS]: the sum
    of its squared errors.
    """
    lost = []
    for step in range(FINE_STEPS):
        steps = torch.full(kv.shape[:2], step, device=kv.device)
        stored = values(codes(kv, scales, FP8, steps), scales, FP8, kv.shape[2], steps)
        lost.append((stored - kv).square().sum(2))
    return torch.stack(lost, 2)


def codes(kv: Tensor, scales: Tensor | None, precision: Precision, fine: Tensor | None = None) -> Tensor:
    """`kv` [tokens, 2 * kv_heads, head_dim] as it is stored at `precision`, [tokens, elements of a token].

    `scales` [2 * kv_heads, head_dim] are powers of two in tests that ask for equal bits. `fine`
    [tokens, 2 * kv_heads] are steps; rounding is of the product with one over what a step multiplies by.
    """
    if precision is FP32 or precision is BF16:
        return kv.to(torch.float32 if precision is FP32 else torch.bfloat16).flatten(1)
    scaled = kv / scales
    if fine is not None:
        scaled = scaled * torch.exp2(-fine.double() / FINE_STEPS).float().unsqueeze(2)
    scaled = scaled.clamp(-precision.limit, precision.limit)
    if precision is FP8:
        return scaled.to(torch.float8_e4m3fn).view(torch.int8).flatten(1)
    whole = torch.round(scaled).to(torch.int32)
    if precision is INT4:
        low, high = whole.unflatten(2, (2, -1)).unbind(2)
        byte = (low % 16) + 16 * (high % 16)
        whole = torch.where(byte > 127, byte - 256, byte)
    return whole.to(torch.int8).flatten(1)


def values(
    stored: Tensor, scales: Tensor | None, precision: Precision, head_dim: int, fine: Tensor | None = None
) -> Tensor:
    """Inverse of `codes`, up to what rounding lost: fp32 [tokens, 2 * kv_heads, head_dim]."""
    if not precision.scaled:
        return stored.float().unflatten(1, (-1, head_dim))
    if precision is FP8:
        code = stored.view(torch.float8_e4m3fn).float().unflatten(1, (-1, head_dim))
    elif precision is INT4:
        byte = stored.to(torch.int32) % 256
        low, high = byte % 16, byte // 16
        both = torch.stack([part.unflatten(1, (-1, head_dim // 2)) for part in (low, high)], dim=2)
        code = torch.where(both > 7, both - 16, both).flatten(2).float()
    else:
        code = stored.float().unflatten(1, (-1, head_dim))
    return code * scales * (1 if fine is None else fine_factors(fine).unsqueeze(2))


def accumulate(mass: Tensor, query: Tensor, pool: Tensor, spans: Sequence[Span]) -> None:
    """Add each row's softmax weights to the token slots [slots, kv_heads] that it sees."""
    block_size, group = pool.shape[1], query.shape[1] // pool.shape[3]
    for span in spans:
        k, _ = gather(pool, span)
        for row in range(span.count):
            for head in range(query.shape[1]):
                q = query[span.first_row + row, head]
                seen = span.start + row + 1
                weights = torch.softmax(k[:seen, head // group] @ q / q.shape[0] ** 0.5, dim=0)
                for position in range(seen):
                    slot = span.blocks[position // block_size] * block_size + position % block_size
                    mass[slot, head // group] += weights[position]
