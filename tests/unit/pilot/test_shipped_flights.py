"""Shipped policies, flown: a whole engine in virtual time, with and without them.

What is claimed are ratios against the same engine and arrivals, well inside what was measured; the figures of
a real engine are in bench/.
"""

from statistics import mean

import pytest
from plant import Plant, goodput, shipped

from kvengine.request import Request
from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.generator import generate

SPEED = Speed(15_000, 3_800)
"""Of the plant's law."""
SEEDS = (1, 2)
SECONDS = 12.0
DOMAINS = {"json": 0.85, "python": 0.35}
STATIC = {"prefill_chunk_tokens": 256, "speculative_tokens": 2}
"""The best of a few settings, found with hindsight."""


def flown(load: float, piloted: bool, in_order: bool = True, **config: int) -> float:
    """Goodput by work, the mean over seeds."""
    found = []
    for seed in SEEDS:
        arrivals = generate(seed, SECONDS, load, SPEED)

        def accepted(request: Request, at_s: float, arrivals: list[Arrival] = arrivals) -> float:
            return DOMAINS[arrivals[request.id].domain]

        policies = shipped() if piloted else []
        plant = Plant(*policies, acceptance=accepted, seed=seed, in_order=in_order, **config)
        found.append(goodput(plant.fly(arrivals, SECONDS, piloted)))
    return mean(found)


@pytest.mark.parametrize(
    ("load", "in_order", "vs_off", "vs_static"),
    [(1.1, True, 1.15, 0.97), (1.8, True, 2.0, 1.3), (1.8, False, 2.0, 1.3)],
)
def test_under_overload_more_good_work_is_done_than_by_any_fixed_setting(
    load: float, in_order: bool, vs_off: float, vs_static: float
) -> None:
    on = flown(load, True, in_order)
    off, static = flown(load, False, in_order), flown(load, False, in_order, **STATIC)
    assert on >= vs_off * off, (on, off)
    assert on >= vs_static * static, (on, static)


def test_below_saturation_nothing_is_lost() -> None:
    assert flown(0.5, True) >= 0.99 * flown(0.5, False)


def test_after_a_burst_every_knob_is_at_its_baseline_again() -> None:
    plant = Plant(*shipped())
    plant.fly(generate(1, SECONDS, 1.8, SPEED), SECONDS)
    plant.fly([], 120.0)
    tick = plant.pilot.board.tick
    assert tick is not None
    assert tick.context is not None
    limits = {"admission_watermark", "prefill_chunk_tokens"}
    assert {lease.knob for lease in tick.leases} <= {*limits, "prompt_bytes_per_token", "speculative_tokens"}
    for lease in tick.leases:
        if lease.knob == "prefill_chunk_tokens":
            assert lease.value == tick.context.knobs[lease.knob].baseline


class TestMemoryLadder:
    """Long outputs of many at once: more KV than the pool holds at its own precision."""

    CROWD = tuple(Arrival(0.05 * i, 200, 700, "batch", "hooli", "json", i) for i in range(60))

    def test_newcomers_are_stored_smaller_and_fewer_are_sent_back(self) -> None:
        without, ladder = (
            Plant(speculative_tokens=0),
            Watched(*shipped("memory-ladder"), speculative_tokens=0),
        )
        without.fly(self.CROWD, 30.0, False)
        ladder.fly(self.CROWD, 30.0)
        assert ladder.packings == {1, 4}
        assert ladder.scheduler.preemptions_total < 0.8 * without.scheduler.preemptions_total
        ladder.scheduler.check()


class Watched(Plant):
    """Remembers what running requests have been stored in."""

    packings: frozenset[int] = frozenset()

    def _turn(self, coming: list[Arrival]) -> None:
        super()._turn(coming)
        self.packings |= {request.packing for request in self.scheduler.running}


class TestSpeculation:
    """A steady batch that decodes for a while; only the drafts' luck differs."""

    STEADY = tuple(Arrival(0.001 * i, 64, 900, "batch", "hooli", "json", i) for i in range(10))

    def rate(self, chance: float, *policies: str, **config: int) -> tuple[float, Plant]:
        """Output tokens a second of the engine's busy time."""
        plant = Plant(*policies, acceptance=lambda request, at_s: chance, **config)
        plant.fly(self.STEADY, 4.0, bool(policies))
        return plant.core.totals.decode_tokens / plant.executor.busy_s, plant

    def test_a_draft_that_never_hits_is_off_within_a_second_and_costs_little_after(self) -> None:
        found, plant = self.rate(0.0, *shipped("spec-economics"))
        assert next(at_s for at_s, drafts in plant.drafting if drafts == 0) < 1.0
        without, _ = self.rate(0.0, speculative_tokens=0)
        drafting, _ = self.rate(0.0)
        assert drafting < 0.8 * without, "drafting has to be a mistake here"
        assert found > 0.85 * without, "all that it costs is the first moment"

    def test_probes_cost_less_than_a_twentieth(self) -> None:
        chance = 0.0
        waves = [
            Arrival(3.0 * wave + 0.001 * i, 64, 900, "batch", "hooli", "json", i)
            for wave in range(12)
            for i in range(10)
        ]

        def tokens_a_second(*policies: str, **config: int) -> tuple[float, Plant]:
            plant = Plant(*policies, acceptance=lambda request, at_s: chance, **config)
            plant.fly(waves, 36.0, bool(policies))
            return plant.core.totals.decode_tokens / plant.executor.busy_s, plant

        found, plant = tokens_a_second(*shipped("spec-economics"))
        without, _ = tokens_a_second(speculative_tokens=0)
        settled = [drafts for at_s, drafts in plant.drafting if at_s > 2.0]
        assert any(settled), "it probes"
        assert sum(map(bool, settled)) < 0.05 * len(settled)
        assert found > 0.95 * without

    def test_a_draft_that_hits_is_kept(self) -> None:
        found, plant = self.rate(0.95, *shipped("spec-economics"))
        assert min(drafts for _, drafts in plant.drafting) > 0
        kept, _ = self.rate(0.95)
        assert found > 0.97 * kept

    def test_one_that_begins_to_hit_is_taken_up_again(self) -> None:
        waves = [
            Arrival(3.0 * wave + 0.001 * i, 64, 900, "batch", "hooli", "json", i)
            for wave in range(14)
            for i in range(10)
        ]
        plant = Plant(*shipped("spec-economics"), acceptance=lambda request, at_s: 0.0 if at_s < 12 else 0.95)
        plant.fly(waves, 42.0)
        assert 0 in {drafts for at_s, drafts in plant.drafting if 2.0 < at_s < 12.0}
        assert mean(drafts for at_s, drafts in plant.drafting if at_s > 36.0) > 1.5
