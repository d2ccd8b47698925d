"""Isolation: one tenant is never handed a block that another computed, whatever is tried.

The machine forges what it can: fingerprints that collide (all of them, or most), the same tokens under other
tenants and adapters, token ids that read alike at their boundaries, a hidden token of the user in front,
blocks taken away under the tree's feet and given to somebody else, and a pool so small that everything is
evicted all the time. The ledger of `prefix_world` is the judge.
"""

import logging

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prefix_world import BLOCK, World

WEAK = {
    "strong": hash,
    "constant": lambda _key: 0,
    "two": lambda key: hash(key) % 2,
    "tokens only": lambda key: hash(key[1]),
    "parent only": lambda key: hash(key[0]),
}
TENANTS = st.sampled_from([None, "", "a", "ab"])
ADAPTERS = st.sampled_from(["", "", "", "a"])
# 1, 12, 2 read alike as text, 257 and 1 share a byte, and texts of few ids, most of them equal, meet often.
TOKENS = st.lists(st.sampled_from([1, 1, 1, 12, 257]), min_size=1, max_size=9)
HIDDEN = st.sampled_from([[], [], [], [901]])


class IsolationMachine(RuleBasedStateMachine):
    """Everything that an engine does with a prefix cache, and what only a bug or an attacker does."""

    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.ERROR)
        self.stolen = False
        self.fingerprint = "strong"

    def teardown(self) -> None:
        logging.disable(logging.NOTSET)

    @initialize(fingerprint=st.sampled_from(sorted(WEAK)), blocks=st.sampled_from([6, 12, 30]))
    def begin(self, fingerprint: str, blocks: int) -> None:
        self.fingerprint = fingerprint
        self.world = World(blocks, WEAK[fingerprint], pinned=2)

    @rule(tenant=TENANTS, adapter=ADAPTERS, hidden=HIDDEN, tokens=TOKENS, count=st.integers(0, 12))
    def arrive(
        self, tenant: str | None, adapter: str, hidden: list[int], tokens: list[int], count: int
    ) -> None:
        request = self.world.arrive(tenant, [*hidden, *tokens], adapter)
        self.world.compute(request, count)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), count=st.integers(1, 5), following=st.sampled_from([1, 12]))
    def compute(self, data: st.DataObject, count: int, following: int) -> None:
        self.world.compute(data.draw(st.sampled_from(self.world.running)), count, following)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.world.end(data.draw(st.sampled_from(self.world.running)))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def preempt_and_come_again(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.world.running))
        self.world.tables.clear(request)
        self.world.tables.adopt(request)
        self.world.judge(request)

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.world.fork(data.draw(st.sampled_from(self.world.running)))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.world.running))
        self.world.tree.pin(request.blocks[: request.registered])

    @rule()
    def unpin(self) -> None:
        self.world.tree.unpin()

    @precondition(lambda self: self.world.pool.referenced)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """What eviction inside a sequence does: the block no longer holds its prefix."""
        self.world.tree.drop(data.draw(st.integers(0, self.world.pool.total - 1)))

    @precondition(lambda self: self.world.pool.cached)
    @rule(data=st.data(), tenant=TENANTS, tokens=TOKENS)
    def reuse_behind_the_tree(self, data: st.DataObject, tenant: str | None, tokens: list[int]) -> None:
        """A bug of the engine: a cached block is freed without a word, and somebody else writes to it."""
        self.stolen = True
        pool = self.world.pool
        block = data.draw(st.sampled_from(pool.oldest_cached()))
        assert pool.discard(block)
        # The block freed last is handed out first: this request gets it, unless it finds its own prefix.
        self.world.compute(self.world.arrive(tenant, tokens), BLOCK)

    @invariant()
    def nobody_holds_anything_of_another(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    @invariant()
    def the_tree_is_sound(self) -> None:
        if hasattr(self, "world") and not self.stolen:
            self.world.tree.check()
            if self.fingerprint == "strong":
                assert self.world.tree.mismatches == 0, "an incident that was none"


TestIsolationMachine = IsolationMachine.TestCase
TestIsolationMachine.settings = settings(max_examples=250, stateful_step_count=30, deadline=None)


def cached(world: World, tenant: str | None, tokens: list[int], adapter: str = "") -> int:
    """Tokens of a prompt that this tenant would find, without taking them."""
    namespace = world.tree.namespace(tenant, adapter)
    return len(world.tree.match(namespace, tokens, len(tokens) // BLOCK)[0]) * BLOCK


def remember(world: World, tenant: str | None, tokens: list[int], adapter: str = "") -> list[int]:
    request = world.arrive(tenant, tokens, adapter)
    assert world.compute(request, len(tokens))
    blocks = list(request.blocks)
    world.end(request)
    return blocks


def test_isolation_by_tenant_adapter_and_exact_tokens() -> None:
    """The same text is found by the same tenant, and by nobody else."""
    world = World()
    remember(world, "a", [1, 12, 2, 3])
    assert cached(world, "a", [1, 12, 2, 3]) == 4
    assert cached(world, "a", [1, 12, 2, 4]) == 2
    for tenant, adapter in [("b", ""), (None, ""), ("", ""), ("a", "a"), ("aa", "")]:
        assert cached(world, tenant, [1, 12, 2, 3], adapter) == 0
    remember(world, None, [5, 6])
    assert (cached(world, None, [5, 6]), cached(world, "", [5, 6])) == (2, 0), (
        "no tenant is not an empty name"
    )
    assert cached(world, "a", [112, 2, 3]) == cached(world, "a", [11, 22, 3, 3]) == 0
    assert cached(world, "a", [901, 1, 12, 2, 3]) == 0, "a hidden token in front makes another prompt"


def test_isolation_two_engines_share_no_key() -> None:
    """Each process draws a salt of its own: the fingerprint of a tenant's prompt cannot be prepared."""
    seen: list[object] = []

    def watch(key: object) -> int:
        seen.append(key)
        return hash(key)

    for _ in range(2):
        world = World(fingerprint=watch)
        world.tree._salt = type(world.tree)(world.pool, BLOCK, "model")._salt
        cached(world, "a", [1, 2])
    assert seen[0] != seen[1]


def test_isolation_incident_is_counted_logged_and_drops_the_block(caplog: pytest.LogCaptureFixture) -> None:
    """A fingerprint that leads to another tenant's block: a miss, the block gone, no payload in the log."""
    world = World(fingerprint=lambda _key: 7)
    (block, _tail) = remember(world, "a", [1, 2, 3])
    free = world.pool.free
    assert cached(world, "b", [1, 2]) == 0
    assert world.tree.mismatches == 1
    assert not world.tree.holds(block)
    assert (world.pool.free, world.pool.cached) == (free + 1, 0)
    assert cached(world, "a", [1, 2]) == 0
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"block {block} " in record.getMessage()


def test_isolation_after_reuse() -> None:
    """A block whose life has changed is not what it was labelled, though label and index still say so."""
    world = World()
    (block, *_rest) = remember(world, "a", [1, 2, 3, 4])
    world.pool.discard(block)
    assert world.pool.allocate(1) == [block]
    assert cached(world, "a", [1, 2, 3, 4]) == 0
    assert world.tree.mismatches == 1
    assert world.pool.references[block] == 1, "it is another's now"


def test_isolation_after_a_block_was_freed_that_should_have_been_kept() -> None:
    """Its content is given up the moment it is free, whoever freed it."""
    world = World()
    request = world.arrive("a", [1, 2, 3, 4])
    world.compute(request, 4)
    world.pool.release(request.blocks)
    assert cached(world, "a", [1, 2, 3, 4]) == 0
    assert world.tree.mismatches == 1


@pytest.mark.parametrize("other", [[257, 2], [1, 258], [1 + (1 << 16), 2], [2, 1], [1, 2 + (1 << 31)]])
def test_isolation_tells_ids_apart_at_their_full_width(other: list[int]) -> None:
    world = World()
    remember(world, "a", [1, 2])
    assert cached(world, "a", [1, 2]) == 2
    assert cached(world, "a", other) == 0


def test_isolation_mismatch_drops_all_below() -> None:
    """Who cannot trust a block cannot trust what was computed on top of it."""
    world = World()
    blocks = remember(world, "a", [1, 2, 3, 4, 5, 6])
    world.tree.drop(blocks[1])
    assert cached(world, "a", [1, 2, 3, 4, 5, 6]) == 2
    assert len(world.tree) == 1
    assert (world.pool.cached, world.pool.free) == (1, world.pool.total - 1)


def test_isolation_while_a_holder_of_a_dropped_block_goes_on() -> None:
    """It keeps its KV, which is right for itself, and registers nothing under what has left the tree."""
    world = World()
    request = world.arrive("a", [1, 2, 3, 4, 5, 6])
    world.compute(request, 4)
    world.tree.drop(request.blocks[1])
    world.compute(request, 2)
    assert cached(world, "a", [1, 2, 3, 4, 5, 6]) == 2
    world.tree.check()
    world.end(request)
    assert world.pool.free == world.pool.total - 1
