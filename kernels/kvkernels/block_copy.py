"""Block copy in Triton: one program a pair and a piece of a block. No temporary."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 2048
"""Elements that a program copies."""


@triton.jit
def _kernel(blocks, pairs, block_stride, elements, PIECE: tl.constexpr):
    pair, piece = tl.program_id(0), tl.program_id(1)
    source = tl.load(pairs + pair * 2).to(tl.int64)
    destination = tl.load(pairs + pair * 2 + 1).to(tl.int64)
    at = piece * PIECE + tl.arange(0, PIECE)
    mask = at < elements
    tl.store(
        blocks + destination * block_stride + at,
        tl.load(blocks + source * block_stride + at, mask=mask),
        mask=mask,
    )


def copy(blocks: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    """As `attention.copy`, for sources that are not destinations: programs run in no order."""
    elements = blocks.shape[1]
    _kernel[(len(pairs), triton.cdiv(elements, PIECE))](
        blocks,
        torch.tensor(pairs, dtype=torch.int64, device=blocks.device),
        blocks.stride(0),
        elements,
        PIECE=PIECE,
    )
