"""A pilot's metrics page as the world meets it: several ranks, promtool, and traces that arrive."""

import subprocess
from typing import Any

import pytest
from otlp_receiver import plain, receiver
from pilot_lab import Lab
from pilot_process import eventually
from prometheus_client.parser import text_string_to_metric_families


def by_rank(lab: Lab, name: str) -> dict[str, float]:
    answer = lab.get("/metrics")
    families: Any = text_string_to_metric_families(answer.text) if answer is not None else ()
    return {
        sample.labels["rank"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def test_ranks_without_a_pilot_are_shown_by_the_one_that_flies_the_valves(lab: Lab) -> None:
    engines = [lab.engine(rank, ranks=2) for rank in (0, 1)]
    engines[1].fields["running"] = 5
    lab.flying()
    eventually(lambda: by_rank(lab, "kvpilot_requests_running") == {"0": 1.0, "1": 5.0})
    assert by_rank(lab, "kvpilot_engine_age_seconds").keys() == {"0", "1"}
    second = lab.beside(rank=1)
    second.flying()
    eventually(lambda: by_rank(lab, "kvpilot_requests_running") == {"0": 1.0})
    eventually(lambda: by_rank(second, "kvpilot_requests_running") == {"1": 5.0})  # type: ignore[arg-type]


@pytest.mark.needs_program("promtool")
def test_promtool_finds_nothing_to_say_about_the_page(lab: Lab) -> None:
    engine = lab.engine()
    lab.flying()
    engine.fields["waiting"] = 11
    eventually(lambda: engine.chunk == 64)
    eventually(lambda: by_rank(lab, "kvpilot_lease_value") == {"0": 64.0})
    page = lab.get("/metrics")
    assert page is not None
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=page.text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_decisions_arrive_as_traces_and_the_page_as_metrics(lab: Lab) -> None:
    with receiver() as (state, endpoint):
        lab.configure(otlp={"endpoint": endpoint, "interval": "300ms"})
        engine = lab.engine()
        lab.flying()
        engine.fields["waiting"] = 11
        eventually(lambda: state.spans())
        said = plain(state.spans()[0].attributes)
        assert (said["kvpilot.rule"], said["kvpilot.verdict"]) == ("act", "applied")
        assert said["kvpilot.input.waiting"] == 11
        eventually(lambda: state.metric("kvpilot_requests_running"))
        eventually(lambda: lab.metric("kvpilot_otlp_exports"))
        assert lab.metric("kvpilot_otlp_dropped") == [0.0, 0.0]


def test_an_endpoint_that_is_not_there_costs_no_tick(lab: Lab) -> None:
    lab.configure(otlp={"endpoint": "http://127.0.0.1:9", "interval": "200ms", "timeout": "300ms"})
    engine = lab.engine()
    lab.flying()
    engine.fields["waiting"] = 11
    eventually(lambda: engine.chunk == 64)
    eventually(lambda: sum(lab.metric("kvpilot_otlp_dropped")) > 0)
    assert lab.metric("kvpilot_control_ticks_failed") == [0.0]
