"""Acceptance from counts, and what each number of drafts costs a token."""

import random

import pytest
from forecast_plants import Batches, Plant, ticks
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.forecast.acceptance import LEAST_DRAFTS, Acceptance, expected_tokens
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.speculation import seconds_per_token, with_drafts
from kvpilot.forecast.step_time import StepTime, StepTimeModel
from kvpilot.forecast.work import Work
from kvpilot.signals import Missing


def rounds(dice: random.Random, alpha: float, drafts: int, count: int) -> tuple[int, int]:
    """(accepted drafts, rounds with a rejection) of that many rounds."""
    accepted = rejected = 0
    for _ in range(count):
        for _ in range(drafts):
            if dice.random() >= alpha:
                rejected += 1
                break
            accepted += 1
    return accepted, rejected


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.6, 0.8, 0.97])
def test_the_band_of_acceptance_covers_the_truth(alpha: float, drafts: int) -> None:
    """Whatever is drafted: accepted over drafted would fall with the number of drafts, this does not."""
    dice, inside, middles = random.Random(3), 0, []
    for _ in range(200):
        acceptance = Acceptance()
        for tick in range(60):
            acceptance.add(tick * 0.1, *rounds(dice, alpha, drafts, 20))
        found = acceptance.estimate(6.0)
        assert isinstance(found, Estimate)
        inside += found.p10 <= alpha <= found.p90
        middles.append(found.p50)
    assert inside / 200 > 0.7
    assert sum(middles) / 200 == pytest.approx(alpha, abs=0.01)


def test_it_follows_a_drift_within_seconds() -> None:
    dice, acceptance = random.Random(1), Acceptance()
    for tick in range(200):
        acceptance.add(tick * 0.1, *rounds(dice, 0.8 if tick < 150 else 0.4, 4, 30))
    found = acceptance.estimate(20.0)
    assert isinstance(found, Estimate)
    assert found.p50 == pytest.approx(0.4, abs=0.07)


def test_while_nothing_is_drafted_it_stays_grows_old_and_doubts() -> None:
    acceptance = Acceptance()
    acceptance.add(1.0, 70, 30)
    fresh, later, much_later = (acceptance.estimate(at_s) for at_s in (1.0, 31.0, 601.0))
    assert isinstance(fresh, Estimate)
    assert isinstance(later, Estimate)
    assert isinstance(much_later, Estimate)
    assert fresh.p50 == later.p50 == much_later.p50 == 0.7
    widths = [each.p90 - each.p10 for each in (fresh, later, much_later)]
    assert widths == sorted(widths)
    assert widths[2] > 0.4
    assert acceptance.age_s(31.0) == 30.0


def test_a_probe_after_a_long_silence_counts_but_not_for_everything() -> None:
    acceptance = Acceptance()
    acceptance.add(1.0, 700, 300)
    acceptance.add(100.0, 0, 5)
    found = acceptance.estimate(100.0)
    assert isinstance(found, Estimate)
    assert found.p50 == pytest.approx(0.7 * LEAST_DRAFTS / (LEAST_DRAFTS + 5))


def test_nothing_drafted_is_missing_and_a_few_are_too_few() -> None:
    acceptance = Acceptance()
    assert acceptance.estimate(0.0) == Missing("no_samples")
    acceptance.add(1.0, 3, 1)
    assert acceptance.estimate(2.0) == Missing("too_few_samples", 1.0)


@given(st.floats(0, 1), st.integers(0, 12))
def test_expected_tokens_are_the_geometric_sum(alpha: float, drafts: int) -> None:
    closed = drafts + 1 if alpha == 1 else (1 - alpha ** (drafts + 1)) / (1 - alpha)
    assert expected_tokens(alpha, drafts) == pytest.approx(closed, rel=1e-6)


def trained(decodes: int, prompts: float = 0.15) -> tuple[StepTimeModel, Plant]:
    plant, model = Plant(kind="gpu"), StepTime()
    for batch in ticks(plant, Batches(decodes=decodes, prompts=prompts), 3000):
        model.observe(batch)
    found = model.model()
    assert isinstance(found, StepTimeModel)
    return found, plant


def exactly(alpha: float) -> Estimate:
    return Estimate(alpha, alpha, alpha)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("decodes", [4, 32, 100])
def test_the_best_number_of_drafts_is_that_of_the_true_law(decodes: int, alpha: float) -> None:
    model, plant = trained(decodes)
    true = {
        k: plant.mean_s(with_drafts(model.mean, k)) / (model.mean.decodes * expected_tokens(alpha, k))
        for k in range(6)
    }
    costs = seconds_per_token(model, exactly(alpha), 5, marginal=False)
    said = {k: cost.p50 for k, cost in costs.items() if isinstance(cost, Estimate)}
    assert len(said) == 6
    chosen = min(said, key=said.__getitem__)
    assert true[chosen] < 1.04 * min(true.values())
    assert said[0] == pytest.approx(true[0], rel=0.1)


def test_where_steps_are_full_anyway_drafts_are_charged_what_they_add() -> None:
    model, plant = trained(32, prompts=0.9)
    costs = seconds_per_token(model, exactly(0.5), 4, marginal=True)
    mean = model.mean
    bare = plant.mean_s(Work(mean.prefill, chunk_positions=mean.chunk_positions))
    for drafts, cost in costs.items():
        assert isinstance(cost, Estimate)
        true = (plant.mean_s(with_drafts(mean, drafts)) - bare) / (
            mean.decodes * expected_tokens(0.5, drafts)
        )
        assert cost.p50 == pytest.approx(true, rel=0.35)
    whole = seconds_per_token(model, exactly(0.5), 4, marginal=False)
    assert min(costs, key=lambda k: costs[k].p50) < min(whole, key=lambda k: whole[k].p50)  # type: ignore[union-attr]


def test_doubt_about_acceptance_widens_the_band() -> None:
    model, _ = trained(16)
    sure = seconds_per_token(model, exactly(0.6), 4, marginal=False)[4]
    unsure = seconds_per_token(model, Estimate(0.3, 0.6, 0.9), 4, marginal=False)[4]
    assert isinstance(sure, Estimate)
    assert isinstance(unsure, Estimate)
    assert unsure.p50 == sure.p50
    assert unsure.p10 < sure.p10 < sure.p90 < unsure.p90


def test_without_acceptance_only_off_has_a_price_and_without_a_model_nothing_has() -> None:
    model, _ = trained(16)
    unknown = Missing("no_samples")
    costs = seconds_per_token(model, unknown, 3, marginal=False)
    assert isinstance(costs[0], Estimate)
    assert [costs[k] for k in (1, 2, 3)] == [unknown] * 3
    none = seconds_per_token(Missing("too_few_samples"), exactly(0.5), 2, marginal=False)
    assert none == dict.fromkeys(range(3), Missing("too_few_samples"))


def test_a_batch_without_decodes_has_no_price_a_token() -> None:
    plant, model = Plant(), StepTime()
    for _ in range(20):
        model.observe([plant.step(Work(256, chunk_positions=256 * 300)) for _ in range(10)])
    found = model.model()
    assert seconds_per_token(found, exactly(0.5), 1, marginal=False)[0] == Missing("no_samples")
