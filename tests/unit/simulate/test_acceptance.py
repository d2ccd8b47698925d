"""How many drafts stand: rates as asked for, and the same luck in every leg."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.simulate.plants.acceptance import (
    Acceptance,
    ByDomain,
    Deepening,
    Drifting,
    Fixed,
    accepted,
    uniform,
)


def mean_accepted(process: Acceptance, domain: str = "", drafts: int = 1, at_s: float = 0.0) -> float:
    dice = random.Random(1)
    rounds = 4000
    return (
        sum(accepted(process, domain, dice.getrandbits(31), 0, drafts, at_s) for _ in range(rounds)) / rounds
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_one_draft_stands_as_often_as_the_rate_says(alpha: float) -> None:
    assert mean_accepted(Fixed(alpha)) == pytest.approx(alpha, abs=0.025)


def test_the_first_rejection_ends_a_round() -> None:
    """Expected drafts that stand out of k: the sum of alpha^i for i in 1..k."""
    assert mean_accepted(Fixed(0.7), drafts=4) == pytest.approx(sum(0.7**i for i in range(1, 5)), abs=0.05)


def test_domains_drift_and_depth() -> None:
    domains = ByDomain({"json": 0.9, "prose": 0.4}, otherwise=0.6)
    assert [domains.rate(name, 3, 0.0) for name in ("json", "prose", "other")] == [0.9, 0.4, 0.6]
    drifting = Drifting(domains, ((10.0, 1.0), (20.0, 0.5)))
    assert [drifting.rate("prose", 0, at_s) for at_s in (0, 10, 15, 20, 99)] == pytest.approx(
        [0.4, 0.4, 0.3, 0.2, 0.2]
    )
    assert Drifting(domains, ((0.0, 2.0),)).rate("json", 0, 5.0) == 1.0
    deepening = Deepening(Fixed(0.8), 0.5)
    assert [deepening.rate("", depth, 0.0) for depth in (0, 1, 2)] == pytest.approx([0.8, 0.4, 0.2])


@given(st.integers(0, 2**63), st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 8))
def test_more_drafts_change_nothing_about_the_first_ones(
    seed: int, position: int, few: int, more: int
) -> None:
    """So that legs that draft differently share their luck."""
    process = Fixed(0.6)
    stood = accepted(process, "", seed, position, few + more)
    assert accepted(process, "", seed, position, few) == min(few, stood)
    if stood:
        assert accepted(process, "", seed, position + 1, few + more - 1) == stood - 1


def test_draws_are_uniform_and_differ_between_requests() -> None:
    drawn = sorted(uniform(seed, index) for seed in range(60) for index in range(60))
    assert all(abs(one - rank / 3600) < 0.03 for rank, one in enumerate(drawn))
    assert [uniform(1, i) for i in range(9)] != [uniform(2, i) for i in range(9)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Fixed(1.5),
        lambda: ByDomain({"json": -0.1}, 0.5),
        lambda: Deepening(Fixed(0.5), 2.0),
        lambda: Drifting(Fixed(0.5), ()),
        lambda: Drifting(Fixed(0.5), ((5.0, 1.0), (1.0, 1.0))),
    ],
)
def test_what_is_no_probability_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"="):
        wrong()
