"""What moved between two looks, as rates and shares; what an engine does not count stays unknown."""

import pytest

from kvpilot.clock import NS
from kvpilot.forecast.flow import Flow, served_tokens
from kvpilot.link.records import StepRecord
from kvpilot.signals import Missing


def record(**values: float) -> StepRecord:
    return StepRecord(1, tuple(values.values()), {name: i for i, name in enumerate(values)})


def fed(*records: StepRecord) -> Flow:
    flow = Flow()
    for each in records:
        flow.observe(each, (), None)
    return flow


def steps(count: float, at_s: float, running: float = 4, **values: float) -> StepRecord:
    return record(steps_total=count, time_ns=at_s * NS, running=running, **values)


def test_an_engine_that_counts_no_rejections_has_no_acceptance() -> None:
    flow = fed(steps(0, 0, accepted_tokens_total=0), steps(10, 1, accepted_tokens_total=90))
    assert flow.acceptance.estimate(1.0) == Missing("no_samples")


def test_an_idle_stretch_makes_no_step_look_slow() -> None:
    counts = {"decode_tokens_total": 0.0, "decode_sequences_total": 0.0}
    busy = [
        steps(n, 0.02 * n, decode_tokens_total=8.0 * n, decode_sequences_total=4.0 * n) for n in range(51)
    ]
    assert fed(*busy).token_s == pytest.approx(0.01), "two tokens a step of 20 ms"
    last = {**counts, "decode_tokens_total": 400.0, "decode_sequences_total": 200.0}
    idle = steps(50, 1.05, 0, **last)
    late = steps(51, 61.0, 4, **{**last, "decode_tokens_total": 408.0, "decode_sequences_total": 204.0})
    assert fed(*busy, idle, late).token_s == pytest.approx(0.01)


def test_shares_of_limited_steps_follow_within_a_second() -> None:
    rows = [
        steps(n, 0.1 * n, budget_limited_steps_total=max(0, n - 30), kv_limited_steps_total=0)
        for n in range(50)
    ]
    flow = fed(*rows)
    assert flow.budget_limited.share == pytest.approx(1.0, abs=0.05)
    assert flow.kv_limited.share == 0.0


def test_outputs_are_tokens_over_those_that_finished() -> None:
    rows = [
        steps(n, 0.1 * n, decode_tokens_total=50.0 * n, finished_total=float(n // 10)) for n in range(200)
    ]
    assert fed(*rows).output_tokens == pytest.approx(500)
    assert fed(*rows[:5]).output_tokens is None


def test_what_the_prefix_cache_had_is_served_too() -> None:
    assert served_tokens(record(prefill_tokens_total=100, prefix_tokens_hit_total=40)) == 140
    assert served_tokens(record(prefill_tokens_total=100)) == 100
    assert served_tokens(record(steps_total=1)) is None
