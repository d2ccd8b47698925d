"""Eviction against the pool and the tree: real blocks come free, shared ones stay, the tree is true.

The machine is that of the isolation tests with requests that evict among the others: the ledger knows what KV
each stored slot should hold.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvengine.kv.eviction.policy import Eviction
from kvengine.kv.eviction.relieve import packing_of, relieve
from kvengine.kv.pool import BlockPool
from kvengine.kv.precisions import FULL
from kvengine.kv.table import BlockTables
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request, SamplingParams

BLOCK = 2


class World:
    """One pool with a tree, requests that evict and requests that do not, and what each slot must hold."""

    def __init__(self, blocks: int = 24) -> None:
        self.pool = BlockPool(blocks)
        self.tree = PrefixTree(self.pool, BLOCK, "model", max_pinned_blocks=2)
        self.tables = BlockTables(self.pool, BLOCK, self.tree)
        self.running: list[Request] = []
        self.stored: dict[Request, list[int]] = {}
        """Positions that a request still stores, in the order of its table."""
        self.ledger: dict[int, tuple[object, ...]] = {}
        """Slot -> the text up to its token, and whose, where it is no plain prefix any more."""
        self.made = 0

    def arrive(self, tokens: list[int], eviction: Eviction | None = None) -> Request:
        self.made += 1
        request = Request(self.made, tokens, SamplingParams(99), eviction=eviction)
        self.tables.adopt(request)
        self.running.append(request)
        self.stored[request] = list(range(request.computed))
        return request

    def compute(self, request: Request, count: int) -> bool:
        while len(request.tokens) < request.computed + count:
            request.tokens.append(1)
        if not self.tables.cover(request, request.computed + count):
            return False
        before = dict(self.ledger)
        for source, destination in self.tables.take_copies():
            for i in range(BLOCK):
                if source * BLOCK + i in before:
                    self.ledger[destination * BLOCK + i] = before[source * BLOCK + i]
        for _ in range(count):
            place = request.computed - request.evicted
            slot = request.blocks[place // BLOCK] * BLOCK + place % BLOCK
            self.ledger[slot] = self.meaning(request, request.computed)
            self.stored[request].append(request.computed)
            request.computed += 1
        self.tables.register(request)
        return True

    def relieve(self, request: Request, ratio: float, mass: list[float]) -> None:
        if request.eviction is None:
            return
        request.block_mass = mass[: -(-request.stored // BLOCK)]
        before, referenced = list(request.blocks), self.pool.referenced
        references = list(self.pool.references)
        relieve(self.tables, request, ratio)
        gone = [block for block in before if block not in request.blocks]
        assert self.pool.referenced == referenced - len(gone), "every block given up is really given up"
        assert all(references[block] == 1 for block in gone), "a shared block was evicted"
        assert not any(self.tree.holds(block) for block in gone), "evicted, and still in the tree"
        for block in gone:
            number = before.index(block)
            at = len([one for one in before[:number] if one not in gone]) * BLOCK
            del self.stored[request][at : at + BLOCK]

    def meaning(self, request: Request, position: int) -> tuple[object, ...]:
        text = tuple(request.tokens[: position + 1])
        return (text, request.id) if request.evicted or request.anchor is None else (text,)

    def judge(self) -> None:
        held = [block for request in self.running for block in request.blocks]
        self.pool.check([*held, *self.tree.pinned])
        self.tree.check()
        assert self.tree.mismatches == 0
        for request in self.running:
            assert request.evicted == request.computed - len(self.stored[request])
            assert request.evicted % BLOCK == 0
            for place, position in enumerate(self.stored[request]):
                slot = request.blocks[place // BLOCK] * BLOCK + place % BLOCK
                assert self.ledger[slot][0] == tuple(request.tokens[: position + 1])
            for block in request.blocks[: request.registered]:
                if self.tree.holds(block):
                    slots = range(block * BLOCK, (block + 1) * BLOCK)
                    assert all(len(self.ledger[slot]) == 1 for slot in slots), "lossy KV in the tree"


EVICTIONS = st.sampled_from(
    [
        None,
        Eviction("window", sink=2, recent=4),
        Eviction("window", sink=0),
        Eviction("streaming", sink=2, recent=2),
        Eviction("h2o", sink=2, recent=4, heavy=4),
    ]
)


class EvictionMachine(RuleBasedStateMachine):
    """Requests of one tenant with few texts, so that they share much, evict, fork, end and come again."""

    @initialize(blocks=st.sampled_from([12, 24, 60]))
    def begin(self, blocks: int) -> None:
        self.world = World(blocks)

    @rule(eviction=EVICTIONS, tokens=st.lists(st.just(1), min_size=1, max_size=14), count=st.integers(1, 14))
    def arrive(self, eviction: Eviction | None, tokens: list[int], count: int) -> None:
        request = self.world.arrive(tokens, eviction)
        left = len(tokens) - request.computed
        self.world.compute(request, min(count, left))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), count=st.integers(1, 5))
    def compute(self, data: st.DataObject, count: int) -> None:
        self.world.compute(data.draw(st.sampled_from(self.world.running)), count)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), ratio=st.sampled_from([1.0, 0.7, 0.3, 0.05]))
    def relieve(self, data: st.DataObject, ratio: float) -> None:
        request = data.draw(st.sampled_from(self.world.running))
        mass = data.draw(st.lists(st.integers(0, 9), min_size=60, max_size=60))
        self.world.relieve(request, ratio, [float(one) for one in mass])

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.world.running))
        self.world.made += 1
        other = Request(self.world.made, request.prompt, request.sampling, eviction=request.eviction)
        other.tokens = list(request.tokens)
        self.world.tables.fork(request, other)
        self.world.running.append(other)
        self.world.stored[other] = list(self.world.stored[request])

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.world.running))
        self.world.running.remove(request)
        self.world.tables.clear(request)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.world.running))
        self.world.tree.pin(request.blocks[: request.registered])

    @rule()
    def unpin(self) -> None:
        self.world.tree.unpin()

    @invariant()
    def all_is_accounted_for(self) -> None:
        if hasattr(self, "world"):
            self.world.judge()


TestEvictionMachine = EvictionMachine.TestCase
TestEvictionMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_evict_frees_exactly_what_it_says_and_takes_it_out_of_the_tree() -> None:
    world = World()
    request = world.arrive([1] * 16, Eviction("window", sink=2, recent=4))
    world.compute(request, 16)
    assert (len(world.tree), world.pool.free) == (8, 16)
    world.relieve(request, 1.0, [])
    assert (len(request.blocks), request.evicted, world.pool.free) == (3, 10, 21)
    assert len(world.tree) == 1, "the sink; all that followed it followed what is gone"
    assert world.tables.evicted_tokens_total == 10
    world.compute(request, 6)
    assert len(world.tree) == 1, "nothing computed after an eviction is anybody's prefix"
    world.judge()


def test_evict_lets_shared_blocks_alone_until_they_are_not_shared() -> None:
    world = World()
    plain = world.arrive([1] * 16)
    world.compute(plain, 16)
    request = world.arrive([1] * 16, Eviction("window", sink=2, recent=4))
    assert request.computed == 14
    world.compute(request, 2)
    held = list(request.blocks)
    world.relieve(request, 1.0, [])
    assert (request.blocks, request.evicted) == (held, 0)
    world.running.remove(plain)
    world.tables.clear(plain)
    world.relieve(request, 1.0, [])
    assert (len(request.blocks), request.evicted) == (3, 10)
    world.judge()


def test_evict_never_touches_a_pinned_block() -> None:
    world = World()
    request = world.arrive([1] * 12, Eviction("window", sink=0))
    world.compute(request, 12)
    assert world.tree.pin(request.blocks[:2])
    world.relieve(request, 0.05, [])
    assert len(request.blocks) == 3, "two pinned, one recent"
    world.judge()


@pytest.mark.parametrize("policy", ["streaming", "h2o"])
def test_evict_by_scores_or_with_rotation_stays_out_of_the_tree(policy: str) -> None:
    """What is scored must see its whole prompt; what is rotated is no prefix."""
    world = World()
    plain = world.arrive([1] * 16)
    world.compute(plain, 16)
    request = world.arrive([1] * 16, Eviction(policy, sink=2, recent=4))
    assert request.computed == 0
    world.compute(request, 16)
    assert request.registered == 0
    assert not set(request.blocks) & set(plain.blocks)
    assert packing_of(request, FULL, 8) == 1
    assert packing_of(plain, FULL, 8) == 4
