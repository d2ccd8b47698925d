"""The forecast stage as a whole: what an engine tells becomes signals; what it does not is missing."""

import math
from dataclasses import replace

import pytest
from forecast_plants import Batches, Plant
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.clock import NS
from kvpilot.forecast.forecaster import Forecaster
from kvpilot.forecast.headroom import DeviceHeadroom
from kvpilot.forecast.outlook import FORECAST_SIGNALS, Outlook, missing
from kvpilot.forecast.step_time import LEAST_RESIDUALS, SETTLING_STEPS
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry_page import ClassRow
from kvpilot.signals import SIGNALS, Missing

CLASSES = ("batch", "interactive")
SLO = {
    "ttft": 1.0,
    "itl": 0.05,
    "batch": {"ttft": 8.0, "itl": 0.2},
    "interactive": {"ttft": 1.0, "itl": 0.05},
}
KNOBS = (
    ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 512, 16, "per step"),
    ManifestKnob("speculative_tokens", "tokens", 0, 6, 4, 1, "per step"),
)
TICK_NS = NS // 10
LEAST = SETTLING_STEPS + 2 * LEAST_RESIDUALS
"""Steps after which there is a model, whatever they were."""


def manifest(
    names: tuple[str, ...],
    model: str = "tiny",
    knobs: tuple[ManifestKnob, ...] = KNOBS,
    queue_order: str = "class",
) -> Manifest:
    return Manifest(
        engine="test",
        engine_version="1",
        model=model,
        block_size=16,
        blocks=1000,
        bytes_per_block=1,
        max_model_len=4096,
        device="gpu",
        knobs=knobs,
        fields=tuple(STEP_FIELDS[name] for name in names),
        classes=CLASSES,
        queue_order=queue_order,
        activation_bytes_per_token=1000,
    )


class Engine:
    """Records of a plant, and a forecaster that is fed with them tick by tick."""

    def __init__(self, names: tuple[str, ...] = tuple(STEP_FIELDS), seed: int = 1) -> None:
        self.names = names
        self.plant, self.batches = Plant(seed=seed), Batches(seed=seed)
        self.values = dict.fromkeys(STEP_FIELDS, 0.0)
        self.values |= {"kv_blocks_free": 600.0, "device_free_bytes": 4e6, "waiting": 6, "running": 20}
        self.values |= {"waiting_prompt_tokens": 4000.0}
        for horizon, blocks in ((16, 420), (64, 480), (256, 700), (1024, 1100)):
            for q, share in (("p10", 0.9), ("p50", 1.0), ("p90", 1.1)):
                self.values[f"demand_{horizon}_{q}_blocks"] = blocks * share
        self.rows = (ClassRow("batch", 4, 3000), ClassRow("interactive", 2, 1000))
        self.admitted = dict.fromkeys(CLASSES, 0.0)
        self.at_ns = 1000 * NS
        self.forecaster = Forecaster(SLO)
        self.forecaster.begin(manifest(names))

    def step(self) -> StepRecord:
        step, values = self.plant.step(self.batches.next()), self.values
        work = step.work
        values["steps_total"] += 1
        values["duration_ns"] = step.seconds * NS
        values["time_ns"] += step.seconds * NS
        values["prefill_tokens_total"] += work.prefill
        values["decode_sequences_total"] += work.decodes
        values["decode_tokens_total"] += work.decodes * 2
        values["context_tokens_total"] += work.context
        values["chunk_positions_total"] += work.chunk_positions
        values["drafted_tokens_total"] += work.drafted
        values["accepted_tokens_total"] += work.decodes
        values["rejected_rounds_total"] += work.decodes
        values["finished_total"] += 0.1
        values["demand_step"] = values["steps_total"]
        return StepRecord(
            int(values["steps_total"]),
            tuple(values[name] for name in self.names),
            {name: i for i, name in enumerate(self.names)},
        )

    def tick(self) -> Outlook:
        records, until_ns = [], self.values["time_ns"] + TICK_NS
        while self.values["time_ns"] < until_ns:
            records.append(self.step())
        self.at_ns += TICK_NS
        self.admitted["batch"] += 1
        self.admitted["interactive"] += 1
        rows = self.rows if "waiting_prompt_tokens" in self.names else ()
        self.forecaster.observe(self.at_ns, records, rows, self.admitted)
        return self.forecaster.look()

    def ticks(self, count: int) -> Outlook:
        for _ in range(count - 1):
            self.tick()
        return self.tick()


def test_an_engine_that_tells_everything_leaves_nothing_out() -> None:
    found = Engine().ticks(60)
    expected = {(name, None) for name in FORECAST_SIGNALS}
    expected |= {(name, klass) for name, _ in expected for klass in CLASSES if SIGNALS[name].per_class}
    assert set(found.signals) == expected
    assert not {key for key, value in found.signals.items() if isinstance(value, Missing)}
    for (name, _), value in found.signals.items():
        low, high = SIGNALS[name].plausible
        assert isinstance(value, float | int)
        assert low <= value <= high, name
    for key, band in found.bands.items():
        assert band.p10 <= band.p50 <= band.p90, key
        assert found.signals[key] == band.p50
    assert found.signals["forecast.acceptance_ratio", None] == pytest.approx(0.5)


def test_what_solve_and_choose_ask_is_answered() -> None:
    forecasts = Engine().ticks(60).forecasts
    chunk, small = forecasts.chunk_for(0.025), forecasts.chunk_for(0.005)
    assert isinstance(chunk, float)
    assert 100 < chunk < 1500
    assert small == 16
    batch, interactive = forecasts.credits("batch", 8.0), forecasts.credits("interactive", 8.0)
    assert isinstance(batch, float)
    assert isinstance(interactive, float)
    assert batch < interactive, "the higher class will have taken its part"
    assert forecasts.credits("nobody", 8.0) == Missing("not_provided")
    assert list(forecasts.seconds_per_token) == list(range(7))
    assert all(isinstance(value, float) for value in forecasts.seconds_per_token.values())


def test_what_valves_let_in_and_the_engine_has_not_shown_is_not_granted_again() -> None:
    engine = Engine()
    free = engine.ticks(60).forecasts.credits("interactive", 8.0)
    held = engine.values["running"] + engine.values["waiting"]
    for awaited, taken in ((held, 0.0), (held + 4, 4 * 4000 / 6), (held - 3, 0.0)):
        engine.forecaster.observe(engine.at_ns, [], engine.rows, engine.admitted, int(awaited))
        left = engine.forecaster.look().forecasts.credits("interactive", 8.0)
        assert free - left == pytest.approx(taken, rel=0.01)  # type: ignore[operator]
    engine.forecaster._manifest = replace(manifest(engine.names), world={"dp": 2, "tp": 1, "pp": 1})
    engine.forecaster.observe(engine.at_ns, [], engine.rows, engine.admitted, int(held) + 4)
    assert engine.forecaster.look().forecasts.credits("interactive", 8.0) == free, "others may hold them"


def drafts_cost(full: bool, kv_bound: bool) -> dict[int, object]:
    engine = Engine()
    for _ in range(60):
        engine.values["budget_limited_steps_total"] = engine.values["steps_total"] * full
        engine.values["kv_limited_steps_total"] = engine.values["steps_total"] * kv_bound
        found = engine.tick()
    return dict(found.forecasts.seconds_per_token)


def test_want_of_kv_memory_is_not_taken_for_full_steps() -> None:
    """Taken so, it would drive drafts down, keep requests longer, and with them their memory."""
    whole = drafts_cost(full=False, kv_bound=False)
    assert drafts_cost(full=True, kv_bound=False)[0] < whole[0]  # type: ignore[operator]
    assert drafts_cost(full=True, kv_bound=True) == whole
    assert drafts_cost(full=False, kv_bound=True) == whole


def test_each_class_waits_for_its_own_and_those_above_it_and_no_class_means_the_lowest() -> None:
    signals = Engine().ticks(60).signals
    wait = {klass: signals["forecast.queue_wait_seconds", klass] for klass in (None, *CLASSES)}
    assert wait[None] == wait["batch"]
    assert wait["batch"] > 3 * wait["interactive"] > 0  # type: ignore[operator]
    assert signals["forecast.queue_wait_p90_seconds", "batch"] > wait["batch"]  # type: ignore[operator]


def test_where_requests_are_served_as_they_came_everybody_waits_for_everybody() -> None:
    engine = Engine()
    in_order = engine.ticks(60).signals
    engine.forecaster.begin(manifest(engine.names, queue_order="arrival"))
    as_they_came = engine.ticks(60).signals
    wait = {klass: as_they_came["forecast.queue_wait_seconds", klass] for klass in CLASSES}
    assert wait["batch"] == wait["interactive"] > 0  # type: ignore[operator]
    # Whoever was promised most is hit hardest, and was not while classes went first.
    ratios = [found["forecast.ttft_ratio", None] for found in (as_they_came, in_order)]
    assert ratios[0] > 0.8 * wait["interactive"] / 1.0  # type: ignore[operator]
    assert ratios[0] > ratios[1]  # type: ignore[operator]


def test_a_queue_that_memory_holds_up_takes_what_becomes_free_up_to_the_watermark() -> None:
    engine = Engine()
    engine.batches.prompts = 0.005  # Hardly anything is taken in: there is no room.
    engine.values |= {"waiting_prompt_tokens": 1e6, "kv_blocks_free": 20.0}
    for horizon in (16, 64, 256, 1024):
        engine.values |= {f"demand_{horizon}_{q}_blocks": 900.0 for q in ("p10", "p50", "p90")}
    engine.names = (*engine.names, "knob.admission_watermark")
    engine.values["knob.admission_watermark"] = 1.0
    for _ in range(60):
        engine.values["kv_limited_steps_total"] = engine.values["steps_total"]
        found = engine.tick()
    assert found.signals["forecast.kv_exhaustion_seconds", None] < 3.0  # type: ignore[operator]
    engine.values["knob.admission_watermark"] = 0.9
    engine.values["kv_limited_steps_total"] = engine.values["steps_total"]
    held_back = engine.tick()
    assert held_back.signals["forecast.kv_exhaustion_seconds", None] == math.inf


def test_before_anything_was_seen_everything_is_missing() -> None:
    forecaster = Forecaster(SLO)
    assert set(forecaster.look().signals.values()) == {Missing("no_samples")}
    forecaster.begin(manifest(tuple(STEP_FIELDS)))
    found = forecaster.look()
    assert set(found.signals.values()) == {Missing("no_samples")}
    assert ("forecast.ttft_miss_ratio", "batch") in found.signals
    assert found.forecasts.chunk_for(0.05) == Missing("no_samples")
    assert found.forecasts.credits("batch", 1.0) == Missing("no_samples")


def test_a_few_steps_are_too_few() -> None:
    found = Engine().tick()
    assert found.signals["forecast.step_seconds", None] == Missing("too_few_samples")
    assert found.forecasts.chunk_for(0.05) == Missing("too_few_samples")
    assert found.forecasts.seconds_per_token[0] == Missing("too_few_samples")


@pytest.mark.parametrize(
    ("lacks", "missing_signals"),
    [
        (
            ("decode_sequences_total",),
            {
                "forecast.step_seconds",
                "forecast.step_p97_seconds",
                "forecast.step_residual_ratio",
                "forecast.seconds_per_token",
            },
        ),
        (("rejected_rounds_total",), {"forecast.acceptance_ratio", "forecast.seconds_per_token"}),
        (("device_free_bytes",), {"forecast.device_headroom_bytes"}),
        (("demand_64_p10_blocks",), set()),
        (
            ("waiting_prompt_tokens",),
            {
                "forecast.queue_wait_seconds",
                "forecast.queue_wait_p90_seconds",
                "forecast.ttft_miss_ratio",
                "forecast.ttft_ratio",
                "forecast.wait_ratio",
                "forecast.service_tokens_per_second",
            },
        ),
        (
            ("kv_blocks_free",),
            {
                "forecast.kv_exhaustion_seconds",
                "forecast.kv_exhaustion_p10_seconds",
                "forecast.kv_exhaustion_p90_seconds",
            },
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_field_that_an_engine_lacks_makes_its_forecasts_missing_and_no_others(
    lacks: tuple[str, ...], missing_signals: set[str]
) -> None:
    engine = Engine(tuple(name for name in STEP_FIELDS if name not in lacks))
    engine.values["knob.speculative_tokens"] = 4.0
    engine.names = (*engine.names, "knob.speculative_tokens")
    found = engine.ticks(60)
    absent = {name for (name, _), value in found.signals.items() if isinstance(value, Missing)}
    assert absent == missing_signals


def test_another_start_of_a_like_engine_begins_with_what_was_learnt_and_offers_it_only_once_seen() -> None:
    engine = Engine()
    engine.ticks(60)
    learnt = engine.forecaster._steps
    engine.forecaster.begin(manifest(tuple(STEP_FIELDS)))
    assert engine.forecaster._steps is not learnt
    assert any(engine.forecaster._steps._regression.coefficients)
    assert set(engine.forecaster.look().signals.values()) == {Missing("no_samples")}
    engine.values |= {name: 0.0 for name in engine.values if name.endswith("_total")}
    found = engine.tick()
    assert found.signals["forecast.step_seconds", None] == Missing("too_few_samples")
    assert isinstance(found.signals["forecast.service_tokens_per_second", None], Missing)
    steps = int(engine.values["steps_total"])
    while steps < LEAST + 40:
        found = engine.tick()
        steps = int(engine.values["steps_total"])
    assert isinstance(found.signals["forecast.step_seconds", None], float)


def test_an_engine_of_another_kind_begins_from_nothing() -> None:
    engine = Engine()
    engine.ticks(60)
    engine.forecaster.begin(manifest(tuple(STEP_FIELDS), model="huge"))
    assert not any(engine.forecaster._steps._regression.coefficients)


def test_an_engine_without_a_chunk_knob_has_no_chunk_to_solve_for() -> None:
    engine = Engine()
    engine.forecaster.begin(manifest(tuple(STEP_FIELDS), knobs=()))
    found = engine.ticks(60)
    assert found.forecasts.chunk_for(0.05) == Missing("not_provided")
    assert list(found.forecasts.seconds_per_token) == [0]


def test_a_tick_without_records_forgets_nothing() -> None:
    engine = Engine()
    before = engine.ticks(60).signals["forecast.step_seconds", None]
    engine.forecaster.observe(engine.at_ns + TICK_NS, [], engine.rows, engine.admitted)
    assert engine.forecaster.look().signals["forecast.step_seconds", None] == before


def test_headroom_is_what_the_least_free_memory_of_late_leaves() -> None:
    headroom = DeviceHeadroom(1000)
    assert headroom.after(10) == Missing("no_samples")
    for tick, free in enumerate([9e6, 5e6, 8e6]):
        headroom.observe(tick * TICK_NS, free)
    assert headroom.after(2000) == (3e6, 6e6, 7e6)
    headroom.observe(40 * TICK_NS, 8e6)
    assert headroom.after(2000) == (6e6, 6e6, 6e6)
    assert DeviceHeadroom(None).after(1) == Missing("not_provided")


def test_all_missing_names_every_signal() -> None:
    found = missing("too_old", CLASSES)
    assert {name for name, _ in found.signals} == set(FORECAST_SIGNALS)
    assert set(found.signals.values()) == {Missing("too_old")}
    assert not math.isfinite(SIGNALS["forecast.kv_exhaustion_seconds"].plausible[1])


count = st.one_of(st.just(0.0), st.integers(0, 2**63).map(float), st.floats(0, 1e6))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, len(STEP_FIELDS) - 1), count), max_size=8), max_size=30),
    st.sets(st.sampled_from(sorted(STEP_FIELDS)), max_size=12),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), min_size=2, max_size=2),
    st.integers(0, 1000),
)
def test_whatever_an_engine_tells_no_tick_fails(
    changes: list[list[tuple[int, float]]],
    lacks: set[str],
    queues: list[tuple[int, int]],
    awaited: int,
) -> None:
    """Counts that jump, fall and stand still, in any order, of an engine that lacks any fields."""
    names = tuple(name for name in STEP_FIELDS if name not in lacks)
    index, every = {name: i for i, name in enumerate(names)}, list(STEP_FIELDS)
    values = dict.fromkeys(STEP_FIELDS, 0.0)
    forecaster = Forecaster(SLO)
    forecaster.begin(manifest(names))
    rows = [ClassRow(name, *queue) for name, queue in zip(CLASSES, queues, strict=True)]
    for number, changed in enumerate(changes):
        values["steps_total"] += 1
        values["duration_ns"] += 1e6
        values["decode_sequences_total"] += number
        values |= {every[i]: value for i, value in changed}
        record = StepRecord(number, tuple(values[name] for name in names), index)
        forecaster.observe(number * TICK_NS, [record], rows, {"batch": float(awaited)}, awaited)
        found = forecaster.look()
        for key, band in found.bands.items():
            assert band.p10 <= band.p50 <= band.p90, key
        for target_s in (0.0, 1e-3, 1.0, math.inf):
            found.forecasts.chunk_for(target_s)
            found.forecasts.credits("batch", target_s)
