"""Block tables: how the positions of a request map to blocks of the pool.

A table is the request's own list of block ids; block `i` holds positions `i * block_size` and on. It grows on
demand, when a step is about to write a position that no block covers yet. O(blocks added).
"""

from kvengine.kv.pool import BlockPool
from kvengine.request import Request


def blocks_for(positions: int, block_size: int) -> int:
    """Blocks that hold `positions` positions."""
    return -(-positions // block_size)


class BlockTables:
    """Grows and empties the tables of requests over one pool."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size

    def cover(self, request: Request, positions: int) -> bool:
        """Make the table cover `positions` positions; False, and nothing changed, if the pool cannot."""
        missing = -(-positions // self.block_size) - len(request.blocks)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        if blocks is None:
            return False
        request.blocks += blocks
        return True

    def reach(self, request: Request) -> int:
        """The most positions that `cover` could make this table cover now."""
        return (len(request.blocks) + self.pool.available) * self.block_size

    def clear(self, request: Request) -> None:
        """Give every block back: the request has no valid KV any more."""
        self.pool.release(request.blocks)
        request.blocks = []
        request.computed = 0
        request.draft_computed = 0
