"""Token ids for a prompt that has lengths and prefix ids but no text: equal ids where texts would be equal.

Ids are 32-bit and mean nothing; whoever computes with them must not look them up in a vocabulary. Two
prompts agree on exactly the tokens of their equal leading prefix ids, but for a chance of one in millions
that the numbers of different texts overlap, and then only if they overlap at the same place.
"""

import random
from functools import lru_cache

from kvpilot.workload.arrival import Arrival

_SPAN = 1 << 32
_MOST_TOKENS = 1 << 24


def token_ids(arrival: Arrival) -> list[int]:
    """As many as the prompt has tokens: those of its prefix, then its own. O(tokens), in C."""
    ids: list[int] = []
    for block in arrival.prefix:
        ids += _block(block, arrival.prefix_block_tokens)
    # An id may stand for fewer tokens than a block at the prompt's end.
    del ids[arrival.prompt_tokens :]
    own = arrival.prompt_tokens - len(ids)
    first = _first(f"own/{arrival.seed}/{arrival.tenant}")
    ids += range(first, first + own)
    return ids


@lru_cache(maxsize=4096)
def _block(block: int, tokens: int) -> list[int]:
    first = _first(f"block/{block}")
    return list(range(first, first + tokens))


def _first(name: str) -> int:
    return random.Random(name).randrange(_SPAN - _MOST_TOKENS)
