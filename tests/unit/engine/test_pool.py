"""The block pool's conservation law, under any sequence of operations, and what it refuses."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvengine.errors import PoolError
from kvengine.kv.pool import BlockPool
from kvengine.kv.table import BlockTables, blocks_for
from kvengine.request import Request, SamplingParams


class PoolMachine(RuleBasedStateMachine):
    """Tables that allocate, share, release and keep; the pool must agree with them after every step."""

    TOTAL = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.TOTAL)
        self.tables: list[list[int]] = []
        self.kept: list[int] = []

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        fitted = count <= self.pool.available
        free = self.pool.free
        blocks = self.pool.allocate(count)
        assert (blocks is not None) == fitted
        if blocks is not None:
            assert len(set(blocks)) == count
            reclaimed = self.kept[: max(0, count - free)]
            assert set(reclaimed) <= set(blocks), "the block kept longest is reclaimed first"
            self.kept = self.kept[len(reclaimed) :]
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        table = list(data.draw(st.sampled_from(self.tables)))
        self.pool.retain(table)
        self.tables.append(table)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.kept))
        self.pool.retain([block])
        self.kept.remove(block)
        self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table, keep=keep)
        held = {block for other in self.tables for block in other}
        if keep:
            self.kept += [block for block in table if block not in held]

    @invariant()
    def conserved(self) -> None:
        pool = self.pool
        assert pool.free + pool.cached + pool.referenced == pool.total == self.TOTAL
        assert pool.referenced == len({block for table in self.tables for block in table})
        assert pool.cached == len(self.kept)
        pool.check(block for table in self.tables for block in table)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_what_does_not_fit_takes_nothing() -> None:
    """All or none: a refused allocation leaves the pool as it was."""
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.free == 3


def test_releasing_twice_names_the_block() -> None:
    """A double release is a bug and says which block."""
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or []
    pool.release([block])
    with pytest.raises(PoolError, match=str(block)) as caught:
        pool.release([block])
    assert caught.value.blocks == (block,)


def test_retaining_a_free_block_is_refused() -> None:
    """A free block's content is gone: nobody may take hold of it without allocating it."""
    with pytest.raises(PoolError, match="holds nothing"):
        BlockPool(2).retain([0])


def test_check_sees_a_lost_and_a_doubled_block() -> None:
    """`check` fails for a block that two tables hold by mistake, and for one that none does."""
    pool = BlockPool(4)
    blocks = pool.allocate(2) or []
    with pytest.raises(PoolError, match="differ from the tables"):
        pool.check([blocks[0]])
    with pytest.raises(PoolError, match="differ from the tables"):
        pool.check([*blocks, blocks[0]])
    pool._free.append(blocks[0])
    with pytest.raises(PoolError, match="two states"):
        pool.check()


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (200, 13)])
def test_blocks_for(positions: int, blocks: int) -> None:
    assert blocks_for(positions, 16) == blocks


def test_tables_grow_on_demand_and_only_then() -> None:
    """A table covers exactly what was asked for, rounded up to blocks; a refusal changes nothing."""
    pool = BlockPool(3)
    tables = BlockTables(pool, 16)
    request = Request(1, [0] * 20, SamplingParams(4))
    assert tables.cover(request, 16)
    assert len(request.blocks) == 1
    assert tables.cover(request, 16)
    assert len(request.blocks) == 1
    assert tables.reach(request) == 48
    assert not tables.cover(request, 49)
    assert len(request.blocks) == 1
    assert tables.cover(request, 48)
    tables.clear(request)
    assert request.blocks == []
    assert pool.free == 3
