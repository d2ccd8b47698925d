"""Head tables: disjoint, as few blocks as the formula says, and the right token makes room."""

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from kvengine.kv.eviction.heads import HeadTables, Share, shares
from kvengine.kv.eviction.policy import Eviction

BLOCK = 4
ALL = Share(0, 0, all=True)
SHARES = st.sampled_from([ALL, Share(2, 1), Share(2, 5), Share(0, 3, 4), Share(3, 2, 6)])


def test_evict_by_head_keeps_first_latest_and_heaviest() -> None:
    mass = [9.0, 1, 5, 2, 8, 3, 0, 0]
    assert Share(1, 2, 2).keeps(mass) == [0, 2, 4, 6, 7]
    assert Share(1, 2).keeps(mass) == [0, 6, 7]
    assert ALL.keeps(mass) == list(range(8))
    assert Share(4, 4, 4).keeps(mass) == list(range(8))
    assert Share(1, 2, 2).victim([0, 2, 4, 6, 7], [9, 1, 8, 0, 0], 8) == 3, "the third latest is one no more"
    assert Share(1, 2, 2).victim([0, 2, 4, 6, 7], [9, 1, 8, 3, 0], 8) == 1
    assert Share(1, 2, 2).victim([0, 2, 4, 7], [9, 1, 8, 3], 8) is None
    assert ALL.victim([0, 1], [0, 0], 2) is None
    assert shares(Eviction("h2o", 4, 8, 4, by_head=True)) == [Share(4, 8, 4)]
    assert [one.limit for one in shares(Eviction("fastgen", 4, 8, 4))[:-1]] == [5, 12, 16]


@given(
    st.integers(1, 3).flatmap(
        lambda kv: st.lists(st.lists(SHARES, min_size=kv, max_size=kv), min_size=1, max_size=3)
    ),
    st.integers(1, 40),
    st.integers(0, 25),
    st.data(),
)
def test_evict_by_head_uses_no_more_blocks_than_its_heads_fill(
    given_shares: list[list[Share]], count: int, more: int, data: st.DataObject
) -> None:
    kv_heads = len(given_shares[0])
    blocks = [7 * i + 3 for i in range(ceil(count / BLOCK) + more + 1)]
    kept = [[(share, share.keeps([1.0] * count)) for share in layer] for layer in given_shares]
    tables = HeadTables.after_prompt(blocks, BLOCK, 1000, kept)
    full = [[list(positions) for _, positions in layer] for layer in kept]
    for position in range(count, count + more):
        tables.take(blocks[tables.blocks : tables.wanted])
        for layer, heads in enumerate(tables.layers):
            drawn = [
                data.draw(st.lists(st.floats(0, 1), min_size=n, max_size=n))
                for n in (len(head.positions) for head in heads)
            ]
            before = [list(head.positions) for head in heads]
            slots = tables.place(layer, position, drawn)
            for head, slot, was, mass, stored in zip(heads, slots, before, drawn, full[layer], strict=True):
                gone = set(was) - set(head.positions)
                assert len(gone) == (len(was) == head.share.limit and not head.share.all)
                assert head.positions[head.slots(BLOCK).index(slot)] == position
                for one in gone:
                    going = [p for p in was if head.share.sink <= p <= position - head.share.recent]
                    assert mass[was.index(one)] == min(mass[was.index(p)] for p in going)
                stored[:] = sorted(head.positions)
    assert tables.blocks <= len(blocks)
    every = [head for heads in tables.layers for head in heads]
    need = sum(ceil(len(head.positions) / BLOCK) for head in every)
    assert tables.blocks == ceil(need / len(every))
    used = [one for head in every for one in head.table] + tables.free
    whole = [
        (layer * 1000 + block) * kv_heads + one
        for layer in range(len(tables.layers))
        for block in blocks[: tables.blocks]
        for one in range(kv_heads)
    ]
    assert sorted(used) == sorted(whole)
    assert all(len(head.table) == ceil(len(head.positions) / BLOCK) for head in every)
    assert all(len(set(head.positions)) == len(head.positions) for head in every)
