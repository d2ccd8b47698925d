"""Which blocks of one sequence to give up: whole blocks, the same for every head. No torch.

Sizes in tokens become blocks so that the whole is never more than its tokens rounded up to a block: each part
is rounded to the nearest block, and what lies between sink and recent has what remains. The partly filled
last block counts as recent. O(blocks log blocks).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from kvengine.kv.eviction.policy import H2O, STREAMING, Eviction


@dataclass(frozen=True, slots=True)
class Budget:
    """Blocks that a sequence keeps: its first, its last, and all together."""

    sink: int
    recent: int
    total: int


def budget(eviction: Eviction, positions: int, tokens_in_block: int, ratio: float = 1.0) -> Budget | None:
    """What is kept of `positions`; None for all of it. `ratio` is the knob: at 1 only its sizes count."""
    limits = []
    if eviction.kept is not None:
        limits.append(ceil(eviction.kept / tokens_in_block))
    if ratio < 1:
        limits.append(ceil(ratio * positions / tokens_in_block))
    if not limits:
        return None
    sink = sink_blocks(eviction, tokens_in_block)
    total = max(min(limits), sink + 1)
    between = total - sink
    if eviction.policy != H2O:
        return Budget(sink, between, total)
    share = 0.5 if eviction.recent is None else eviction.recent / (eviction.recent + eviction.heavy)
    return Budget(sink, max(1, min(between, round(between * share))), total)


def sink_blocks(eviction: Eviction, tokens_in_block: int) -> int:
    """One at least, where it wants any."""
    return max(1, round(eviction.sink / tokens_in_block)) if eviction.sink else 0


def surplus(
    eviction: Eviction,
    kept: Budget,
    blocks: Sequence[int],
    free_to_go: Callable[[int], bool],
    mass: Sequence[float] = (),
) -> list[int]:
    """Numbers, ascending, of the entries of `blocks` (those that hold tokens) to give up.

    `free_to_go`: whether a block is this sequence's alone. `mass`: attention that each block has drawn; heavy
    hitters stay only where it is known.
    """
    count = len(blocks) - kept.total
    if count <= 0:
        return []
    between = range(kept.sink, len(blocks) - kept.recent)
    if eviction.policy == STREAMING:
        # Sinks move up to what follows them: all of it must be theirs, and nothing may stay in the gap.
        gap = [*range(kept.sink), *between[:count]]
        return list(between[:count]) if all(free_to_go(blocks[number]) for number in gap) else []
    going = [number for number in between if free_to_go(blocks[number])]
    if eviction.policy == H2O:
        if len(mass) < len(blocks) - 1:
            return []
        going.sort(key=lambda number: mass[number])
    return sorted(going[:count])
