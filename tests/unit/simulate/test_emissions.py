"""Token times in arrays read as the pairs that they stand for."""

from hypothesis import given
from hypothesis import strategies as st

from kvpilot.simulate.emissions import Emissions

PAIRS = st.lists(st.tuples(st.integers(1, 2**62), st.integers(1, 255)), max_size=20)


@given(PAIRS, st.slices(20))
def test_as_a_sequence_of_pairs(pairs: list[tuple[int, int]], some: slice) -> None:
    held = Emissions()
    for pair in pairs:
        held.add(*pair)
    assert list(held) == pairs
    assert len(held) == len(pairs)
    assert held[some] == pairs[some]
    assert [held[i] for i in range(-len(pairs), len(pairs))] == pairs * 2
    assert bool(held) == bool(pairs)


@given(PAIRS, PAIRS)
def test_equal_where_the_pairs_are(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    made = []
    for pairs in (one, other):
        made.append(Emissions())
        for pair in pairs:
            made[-1].add(*pair)
    assert (made[0] == made[1]) == (one == other)
    assert (hash(made[0]) == hash(made[1])) or one != other
