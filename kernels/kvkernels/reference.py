"""What paged attention means, in plain torch: the spec that every fast path must match. Slow on purpose.

Position p of a sequence lies in block `blocks[p // block_size]`, row `p % block_size`. A new token sees
itself and all before it. Query head h reads KV head h // (heads // kv_heads).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkernels.geometry import Span


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


def attend(query: Tensor, pool: Tensor, spans: Sequence[Span]) -> Tensor:
    """Causal attention of each span's rows of `query` [rows, heads, head_dim] over its own sequence."""
    out = torch.zeros_like(query)
    group = query.shape[1] // pool.shape[3]
    for span in spans:
        k, v = gather(pool, span)
        for row in range(span.count):
            seen = span.start + row + 1
            for head in range(query.shape[1]):
                q = query[span.first_row + row, head]
                weights = torch.softmax(k[:seen, head // group] @ q / q.shape[0] ** 0.5, dim=0)
                out[span.first_row + row, head] = weights @ v[:seen, head // group]
    return out
