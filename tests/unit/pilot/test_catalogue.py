"""The catalogues, shown: complete, one source, and the pages in docs/ as the commands print them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from link_pages import manifest
from typer.testing import CliRunner

from kvpilot.adapters.condition import CONDITION_SIGNALS
from kvpilot.adapters.gpu_signals import GPU_SIGNALS
from kvpilot.adapters.known_engines import KNOWN
from kvpilot.commands import app
from kvpilot.forecast.forecaster import Forecaster
from kvpilot.knobs import KNOBS
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.records import StepRecord
from kvpilot.publish.catalogue import FORECAST_NEEDS, knob_rows, signal_rows
from kvpilot.signals import AGGREGATIONS, SIGNALS, Missing

DOCS = Path(__file__).parents[3] / "docs"


def run(*arguments: str, columns: int = 120) -> str:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": str(columns)})
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", ["signals", "knobs"])
def test_the_page_in_docs_is_what_the_command_prints(name: str) -> None:
    how = f"kvpilot {name} --markdown > docs/{name}.md"
    assert (DOCS / f"{name}.md").read_text() == run(name, "--markdown"), how


def test_every_row_says_unit_range_provider_and_which_engines_have_it() -> None:
    told = {row["name"]: row for row in json.loads(run("signals", "--json"))}
    assert list(told) == list(SIGNALS)
    kv = told["kv_occupancy"]
    assert (kv["unit"], kv["plausible"], kv["provider"], kv["kind"]) == ("ratio", [0, 1], "engine", "gauge")
    assert kv["aggregations"] == list(AGGREGATIONS["gauge"])
    assert {kind: has["supported"] for kind, has in kv["engines"].items()} == {"kvengine": True, "vllm": True}
    assert told["oom"]["engines"]["vllm"]["supported"] is False
    assert told["forecast.kv_exhaustion_seconds"]["plausible"] == [0, "+Inf"]
    knobs = {row["name"]: row for row in json.loads(run("knobs", "--json"))}
    assert list(knobs) == list(KNOBS)
    assert knobs["max_running"]["engines"]["vllm"]["since"] == "0.32.0"
    for row in (*told.values(), *knobs.values()):
        assert set(row["engines"]) == set(KNOWN)
        assert row["meaning"].endswith(".")


@pytest.mark.parametrize("columns", [80, 120])
def test_every_row_reads_in_a_terminal(columns: int) -> None:
    for name, rows in (("signals", signal_rows()), ("knobs", knob_rows())):
        lines = [line.rstrip() for line in run(name, columns=columns).splitlines()]
        assert {row.name for row in rows} <= set(lines)
        assert max(map(len, lines)) <= columns
        shown = " ".join(" ".join(lines).split())
        assert all(row.meaning in shown for row in rows), "nothing is cut off"


def test_a_forecast_is_an_engines_where_all_that_it_is_made_of_is() -> None:
    assert {*FORECAST_NEEDS, *CONDITION_SIGNALS, *GPU_SIGNALS} == {
        name for name, signal in SIGNALS.items() if signal.provider == "pilot"
    }
    rows = {row.name: row for row in signal_rows()}
    headroom = rows["forecast.device_headroom_bytes"].engines
    assert headroom["kvengine"].supported
    assert not headroom["vllm"].supported
    assert "worker processes" in headroom["vllm"].how


FIELDS_OF = {
    "kv_free_blocks": ("kv_blocks_free",),
    "waiting_prompt_tokens": ("waiting_prompt_tokens",),
    "prefill_tokens": ("prefill_tokens_total",),
    "steps": ("steps_total",),
    "spec_acceptance_ratio": ("accepted_tokens_total",),
    "device_free_bytes": ("device_free_bytes",),
}


@pytest.mark.parametrize("name", FORECAST_NEEDS)
def test_without_what_it_needs_a_forecast_is_not_provided(name: str) -> None:
    """The table is true to the forecaster: with all fields it may come, without one of these it cannot."""
    for need in FORECAST_NEEDS[name]:
        fields = tuple(field for field in STEP_FIELDS if field not in FIELDS_OF[need])
        poor = replace(manifest(*fields), activation_bytes_per_token=1)
        forecaster = Forecaster({"ttft": 1.0, **{name: {"ttft": 1.0} for name in ("batch", "interactive")}})
        forecaster.begin(poor)
        places = {field.name: i for i, field in enumerate(poor.fields)}
        record = StepRecord(1, tuple(float(i + 1) for i in range(len(fields))), places)
        forecaster.observe(1, [record])
        # A rate of service is measured: without its count there is never a sample.
        why = "no_samples" if name == "forecast.service_tokens_per_second" else "not_provided"
        assert forecaster.look().signals[name, None] == Missing(why), need
