"""Fleets: every arrival goes to one replica and ends once; balancers keep their laws."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import PROMISES, SHIPPED, Linear, arrivals, small

from kvpilot.simulate.balancers import LEAST_FULL, MOST_OVER_MEAN, NAMES, balancer_named
from kvpilot.simulate.fleet import Fleet, fly_fleet
from kvpilot.simulate.legs import Leg, Scene, fly_leg
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.outcome import Fate

POOL_TOKENS = 6400


def plant(seed: int = 0) -> Linear:
    return Linear(step_s=0.002 + 1e-6 * (seed % 7))


def scene(**changes: object) -> Scene:
    return replace(Scene(small(), plant, PROMISES, drain_s=5.0), **changes)


def request(number: int, tenant: str = "acme", prompt: int = 100, prefix: tuple[int, ...] = ()) -> Arrival:
    return Arrival(
        0.1 * number, prompt, 10, "interactive", tenant, "json", number, prefix, 16 if prefix else 0
    )


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    per_s=st.floats(1.0, 60.0),
    replicas=st.integers(1, 5),
    balancer=st.sampled_from(NAMES),
    piloted=st.booleans(),
)
def test_every_arrival_ends_exactly_once_somewhere(
    seed: int, per_s: float, replicas: int, balancer: str, piloted: bool
) -> None:
    coming = arrivals(seed, 2.0, per_s)
    leg = Leg("leg", policies=SHIPPED if piloted else None)
    result = fly_fleet(scene(), leg, coming, 2.0, Fleet(replicas, balancer, 1))
    assert [each.number for each in result.landed] == list(range(replicas))
    scores = [each.score for each in result.landed]
    assert sum(each.offered for each in scores) == len(coming)
    assert sum(getattr(each, str(fate)) for each in scores for fate in Fate) == len(coming)
    offered = sum(one.work(PROMISES.r) for one in coming)
    assert sum(each.work for each in result.landed) == pytest.approx(offered)


def test_one_replica_is_a_leg() -> None:
    coming = arrivals(3, 4.0, 10.0)
    fleet = fly_fleet(scene(plant=lambda seed=0: Linear()), Leg("x"), coming, 4.0, Fleet(1, "least_kv", 1))
    alone = fly_leg(scene(plant=lambda seed=0: Linear()), Leg("x"), coming, 4.0)
    said = fleet.landed[0].score
    assert (said.good, said.finished, said.goodput_work) == (
        alone.score.good,
        alone.score.finished,
        alone.score.goodput_work,
    )
    assert fleet.goodput_work == alone.score.goodput_work


def test_the_fleets_sums_are_those_of_its_replicas() -> None:
    coming = arrivals(5, 4.0, 60.0)
    result = fly_fleet(scene(), Leg("x"), coming, 4.0, Fleet(3, "by_tenant", 1))
    said = result.as_dict()
    assert said["offered"] == len(coming) == sum(each["offered"] for each in said["each"])
    assert said["goodput_work_worst"] <= said["goodput_work"] <= said["goodput_work_best"]
    assert said["offered_least"] < said["offered_most"]


def test_replicas_are_not_each_others_copies() -> None:
    """Each has a plant of its own: the same requests take another time elsewhere."""
    twice = [replace(one, at_s=one.at_s) for one in arrivals(7, 3.0, 5.0) for _ in range(2)]
    result = fly_fleet(scene(), Leg("x"), twice, 3.0, Fleet(2, "round_robin", 1))
    first, second = (each.score for each in result.landed)
    assert first.offered == second.offered
    assert first.itl_p50_s != second.itl_p50_s


@pytest.mark.parametrize("name", NAMES)
def test_a_balancer_always_names_a_replica_and_repeats_itself(name: str) -> None:
    asked = [request(n, f"tenant-{n % 5}", prefix=(n % 3,) if n % 2 else ()) for n in range(200)]
    chosen = []
    for _ in range(2):
        balancer = balancer_named(name, 7, POOL_TOKENS)
        balancer.scraped([0.1 * n for n in range(7)])
        chosen.append([balancer.choose(one) for one in asked])
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) <= set(range(7))


def test_round_robin_gives_each_as_many() -> None:
    balancer = balancer_named("round_robin", 4, POOL_TOKENS)
    counts = Counter(balancer.choose(request(n)) for n in range(42))
    assert max(counts.values()) - min(counts.values()) == 1


def test_a_tenant_stays_where_it_is() -> None:
    balancer = balancer_named("by_tenant", 4, POOL_TOKENS)
    for tenant in ("acme", "globex", "hooli", "hog"):
        assert len({balancer.choose(request(n, tenant)) for n in range(20)}) == 1


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=8))
def test_least_kv_goes_where_least_was_at_the_last_scrape(occupancies: list[float]) -> None:
    balancer = balancer_named("least_kv", len(occupancies), POOL_TOKENS)
    balancer.scraped(occupancies)
    assert occupancies[balancer.choose(request(0))] == min(occupancies)


def test_least_kv_counts_what_it_sent_since_the_scrape() -> None:
    """Or all of a second's requests would go to one replica."""
    balancer = balancer_named("least_kv", 8, POOL_TOKENS)
    balancer.scraped([0.3] * 8)
    counts = Counter(balancer.choose(request(n)) for n in range(80))
    assert set(counts.values()) == {10}
    balancer.scraped([0.9] * 7 + [0.1])
    assert {balancer.choose(request(n)) for n in range(5)} == {7}
    balancer.scraped([0.3] * 7 + [0.25])
    assert Counter(balancer.choose(request(n)) for n in range(12))[7] < 6


def test_prompts_that_begin_alike_meet_unless_their_replica_is_too_full() -> None:
    balancer = balancer_named("prefix_affine", 8, POOL_TOKENS)
    balancer.scraped([0.1] * 8)
    homes = {balancer.choose(request(n, f"tenant-{n}", 1, prefix=(42,))) for n in range(6)}
    assert len(homes) == 1
    home = homes.pop()
    occupancies = [0.3] * 8
    occupancies[home] = MOST_OVER_MEAN * 0.45
    assert occupancies[home] > LEAST_FULL
    balancer.scraped(occupancies)
    elsewhere = balancer.choose(request(9, prefix=(42,)))
    assert elsewhere != home
    balancer.scraped([0.1] * 8)
    assert balancer.choose(request(10, prefix=(42,))) == home


def test_keys_spread_over_the_ring_and_few_move_when_a_replica_comes() -> None:
    def homes(replicas: int) -> list[int]:
        balancer = balancer_named("prefix_affine", replicas, 10**9)
        return [balancer.choose(request(n, prefix=(n,))) for n in range(2000)]

    eight, nine = homes(8), homes(9)
    assert min(Counter(eight).values()) > 2000 / 8 / 2
    moved = sum(one != other for one, other in zip(eight, nine, strict=True))
    assert moved < 2000 / 4
    assert all(other == 8 for one, other in zip(eight, nine, strict=True) if one != other)


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(ValueError, match="--replicas 0: must be at least 1"):
        Fleet(0)
    with pytest.raises(ValueError, match="--balancer random: known are round_robin"):
        balancer_named("random", 2, POOL_TOKENS)
