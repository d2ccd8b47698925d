"""Eviction at a step boundary: from a request, its scores and the knob to blocks that are free. No torch."""

from itertools import takewhile

from kvengine.kv.eviction.choose import budget, surplus
from kvengine.kv.precisions import Precisions
from kvengine.kv.table import BlockTables
from kvengine.request import Request


def relieve(tables: BlockTables, request: Request, ratio: float) -> None:
    """Give up what the request keeps too much of, as far as that is its own. O(its blocks).

    Only full blocks go: the one that is being filled counts as recent.
    """
    eviction = request.eviction
    assert eviction is not None
    if eviction.exact:
        if request.heads is not None:
            tables.trim(request, request.heads.blocks)
        return
    size = tables.tokens_in_block(request)
    kept = budget(eviction, request.computed, size, ratio)
    filled = -(-request.stored // size)
    if kept is None or filled <= kept.total:
        return
    going = surplus(eviction, kept, request.blocks[:filled], tables.alone, request.block_mass)
    if going:
        tables.evict(request, going)


def slide(tables: BlockTables, request: Request, window: int) -> None:
    """Give up blocks that no token to come will see: the model attends to the latest `window` tokens only.

    The token at position i sees i - window + 1 and on, so a block goes when its last position is i - window.
    """
    unseen = (request.computed - window + 1 - request.evicted) // tables.tokens_in_block(request)
    going = list(takewhile(lambda number: tables.alone(request.blocks[number]), range(max(0, unseen))))
    if going:
        tables.evict(request, going, asked=False)


def packing_of(request: Request, precisions: Precisions, bits: float | None) -> int:
    """How it is stored. What is scored or rotated stays at the pool's own precision: see docs/eviction.md."""
    if request.eviction is not None and request.eviction.alone:
        return 1
    return precisions.packing(bits)
