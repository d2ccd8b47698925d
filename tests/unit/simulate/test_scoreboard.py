"""`kvpilot simulate --compare`: the figures of a comparison, scenario bounds, scores of forecasts; end to end
over a grid of two points.
"""

import json
import pickle
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from kvpilot.commands import app
from kvpilot.forecast.estimate import Estimate
from kvpilot.journal.records import DecisionRecord, RuleRecord
from kvpilot.simulate.bounds import Held, measured, measured_ranks
from kvpilot.simulate.faults import Fault
from kvpilot.simulate.foresight import Look, exhaustions, judged, protective_on_lost
from kvpilot.simulate.grounds import OfScenario, OfSuite
from kvpilot.simulate.legs import Leg
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.scenarios import SCENARIOS, Bound, Scenario
from kvpilot.simulate.scoreboard import _unharmed
from kvpilot.simulate.suite import load, shipped
from kvpilot.simulate.sweep import Order, Row
from kvpilot.simulate.watch import Seen
from kvpilot.workload.spec import Part, Workload

POLICIES = Path(__file__).parents[3] / "policies"
CALM = Workload(name="one", parts=(Part(seconds=10, load=0.5, mix="chat"),))


def row(leg: str = "pilot", seed: int = 1, recovery_s: float | None = None, lost: int = 0, **score) -> Row:
    seen = Seen((), 1.0, (), {}, (), recovery_s, None, lost)
    base = {"goodput_work": 0.8, "oom": 0, "preemptions": 0, "tenants": {"a": 0.9, "hog": 0.1}}
    return Row("one", seed, leg, {**base, **score}, 1.0, 5.0, seen)


def scenario(*holds: Bound, **more) -> Scenario:
    return Scenario("one", "something", "nobody", CALM, holds, **more)


def held(bound: Bound, pilot: list[Row], others: dict | None = None, **more) -> Held:
    return measured(scenario(bound, **more), pilot, others or {})[0]


# Bounds


def test_a_count_is_judged_by_the_seed_that_fares_worst() -> None:
    pilot = [row(), row(seed=2, oom=3)]
    found = held(Bound("oom", at_most=0), pilot)
    assert (found.value, found.holds, found.said) == (3, False, "MISSED")
    assert held(Bound("goodput_work", at_least=0.7), [row(), row(seed=2, goodput_work=0.6)]).value == 0.6


def test_a_ratio_is_of_means_over_the_seeds_of_both() -> None:
    bound = Bound("goodput_work", at_least=0.97, against="best_static")
    pilot = [row(goodput_work=0.8), row(seed=2, goodput_work=0.2)]
    found = held(bound, pilot, {"best_static": [row("x", goodput_work=0.8)]})
    assert (found.value, found.holds) == (1.0, True)
    assert found.asked == "goodput by work at least 0.97 of the best static setting's"


@pytest.mark.parametrize(
    ("ours", "theirs", "value", "holds"), [(0, 0, 1, False), (2, 0, inf, False), (0, 5, 0, True)]
)
def test_a_ratio_to_nothing(ours: int, theirs: int, value: float, holds: bool) -> None:
    bound = Bound("preemptions", at_most=0.2, against="defaults")
    found = held(bound, [row(preemptions=ours)], {"defaults": [row("d", preemptions=theirs)]})
    assert (found.value, found.holds) == (value, holds)


def test_recovery_that_never_came_is_a_miss_and_no_burst_is_no_measurement() -> None:
    bound = Bound("recovery_s", at_most=60)
    assert held(bound, [row(recovery_s=12.0)]).holds is True
    never = held(bound, [row(recovery_s=inf)])
    assert (never.holds, never.as_dict()["value"]) == (False, None)
    nothing = held(bound, [row()])
    assert nothing.holds is None
    assert nothing.said.startswith("not measured")


def test_the_worst_tenant_leaves_out_whoever_caused_it() -> None:
    bound = Bound("worst_tenant", at_least=0.5)
    assert held(bound, [row()], culprit="hog").value == 0.9
    assert held(bound, [row()]).value == 0.1


def test_a_leg_that_was_not_flown_is_said() -> None:
    found = held(Bound("goodput_work", at_least=0.9, against="unharmed"), [row()])
    assert found.holds is None
    assert "not flown" in found.said


def test_bounds_of_ranks_are_of_the_rank_that_fares_worst() -> None:
    one = scenario(Bound("worst_rank", at_least=1.0, against="defaults"), Bound("oom", at_most=0))
    found = measured_ranks(one, {"goodput_work_worst": 0.5, "oom": 0}, {"goodput_work_worst": 0.4})
    assert [each.holds for each in found] == [True, True]
    assert found[0].value == pytest.approx(1.25)


def test_every_bound_of_every_scenario_has_a_figure_and_a_name() -> None:
    from kvpilot.simulate.bounds import METRICS

    assert {bound.metric for each in SCENARIOS.values() for bound in each.holds} <= METRICS.keys()


@pytest.mark.parametrize(
    ("name", "burst"), [("metastable-burst", (300, 900)), ("stale-metric", (40, 60)), ("lost-metric", None)]
)
def test_the_burst_of_a_scenario_is_its_part_with_most_load(name: str, burst: tuple | None) -> None:
    assert SCENARIOS[name].burst == burst


# Forecasts


def looks(exhausted: range, said: float = 5.0, until: int = 60) -> list[Look]:
    band = Estimate(said / 2, said, said * 2)
    return [
        Look(float(at), band if at not in exhausted else None, at in exhausted, {}) for at in range(until)
    ]


def test_a_spell_of_exhaustion_is_one_event() -> None:
    flickering = [replace(look, exhausted=look.at_s in (10, 12, 14, 40)) for look in looks(range(0))]
    assert exhaustions(flickering) == [10.0, 40.0]


def test_an_alarm_that_nothing_followed_is_false() -> None:
    told = judged(
        [
            *looks(range(30, 33), until=33),
            *[Look(33.0 + i, Estimate(50, 99, 200), False, {}) for i in range(9)],
        ],
        [],
        {},
    )
    assert (told.events, told.warned, told.lead_s) == (1, 1, 15.0), "a pilot learns for 15 s"
    assert told.false_alarms_per_h == 0
    quiet = [
        Look(float(at), Estimate(1, 2, 3) if 20 < at < 29 else Estimate(50, 99, 200), False, {})
        for at in range(60)
    ]
    told = judged(quiet, [], {})
    assert (told.events, told.lead_s) == (0, None)
    assert told.false_alarms_per_h == pytest.approx(3600 / 59)


def decision(at_s: float, after: float, **inputs) -> DecisionRecord:
    at_ns = round(at_s * 1e9)
    more = {"inputs": inputs, "text": "key"}
    return DecisionRecord(
        1, at_ns, 1, "p", "r", "max_running", "all", 100.0, after, "unconfirmed", "", **more
    )


def test_only_protective_moves_on_an_input_that_was_hidden_count() -> None:
    rule = RuleRecord("key", 0, "p", "r", {"inputs": {"kv": "kv_occupancy"}})
    fault = Fault("telemetry_frozen", 10, 10)
    hidden = {"kv": "missing: too_old", "other": 1.0}

    def count(row: DecisionRecord) -> int:
        return protective_on_lost([rule, row], [fault])

    assert count(decision(15, 50.0, **hidden)) == 1
    assert count(decision(15, 200.0, **hidden)) == 0, "it let go"
    assert count(decision(25, 50.0, **hidden)) == 0, "the fault was over"
    assert count(decision(15, 50.0, kv=0.9, other="missing: too_old")) == 0, "its own input was there"
    assert protective_on_lost([rule, decision(15, 50.0, **hidden)], []) == 0


# Grounds


def test_grounds_are_compared_by_value() -> None:
    settings = load(shipped())
    entry = settings.by_name["chat-0.5"]
    assert OfSuite(settings, entry, 1) == OfSuite(load(shipped()), entry, 1)
    assert OfSuite(settings, entry, 1) != OfSuite(settings, entry, 2)
    one = OfScenario(SCENARIOS["stale-metric"], Machine(), POLICIES, settings, 1)
    assert one != replace(one, scenario=replace(one.scenario, faults=()))


def test_an_order_can_be_sent_to_a_process_with_all_that_it_needs() -> None:
    settings = load(shipped())
    for ground in (
        OfSuite(settings, settings.by_name["chat-0.5"], 1),
        OfScenario(SCENARIOS["stale-metric"], Machine(), POLICIES, settings, 1),
    ):
        order = Order(ground, Leg("pilot", settings.pilot.engine, POLICIES), watched=True)
        assert pickle.loads(pickle.dumps(order)) == order


def test_the_unharmed_leg_lacks_what_hides_signals_and_nothing_else() -> None:
    settings = load(shipped())

    def without(name: str) -> OfScenario | None:
        return _unharmed(OfScenario(SCENARIOS[name], Machine(), POLICIES, settings, 1))

    stale = without("stale-metric")
    assert stale is not None
    assert stale.scenario.faults == ()
    assert without("allocator-fragmentation") is None
    assert without("metastable-burst") is None


# End to end


@pytest.fixture
def field(tmp_path: Path) -> Path:
    """A trace with a hostile name, and a grid of two points."""
    lines = [f"2023-11-16 18:17:{at // 4:02},{300 + 50 * (at % 9)},{5 + at % 17}" for at in range(40)]
    (tmp_path / "<script>x.csv").write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n"
    )
    settings = yaml.safe_load(shipped().read_text())
    settings["grid"] = [point for point in settings["grid"] if point["chunk"] == 512][1:3]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["simulate", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_comparison_end_to_end(field: Path) -> None:
    asked = ("--trace", field / "<script>x.csv", "--seconds", 10, "--compare", "--grid", field / "grid.yaml")
    more = ("--seeds", 2, "--processes", 1, "--report", field / "r.html", "--plots", field / "plots")
    said = json.loads(run(*asked, *more, "--json"))
    assert list(said["legs"])[:3] == ["pilot", "defaults", "best static"]
    assert len(said["grid"]) == 2
    assert said["best_static"] == max(said["grid"], key=lambda name: said["grid"][name])
    assert said["legs"]["pilot"]["seeds"] == said["legs"]["defaults"]["seeds"] == 2
    assert said["regret"] == pytest.approx(
        said["legs"]["best static"]["goodput"] - said["legs"]["pilot"]["goodput"], abs=1e-9
    )
    assert said["ratios"]["vs_best_static"] > 0
    assert said["command"].endswith(f"--grid {field / 'grid.yaml'} --seed 1 --seeds 2 --compare")
    assert set(said["floors"]) <= {"count", "class", "longest_fifth", "tenant", "smooth"}
    assert said["forecasts"]["hands_off"]["events"] == 0

    page = (field / "r.html").read_text()
    assert page.startswith("<!doctype html>")
    for outside in ("http:", "https:", "//", "src=", "url(", "@import", "<link", "<script"):
        assert outside not in page.replace("<!doctype", ""), f"{outside} in the page"
    assert "&lt;script&gt;x.csv" in page
    assert "--seeds 2 --compare" in page, "the command that repeats it"
    names = {path.name for path in (field / "plots").iterdir()}
    assert {"goodput.svg", "floors.svg", "kv-over-time.svg", "latency-interactive-ttft.svg"} <= names

    text = run(*asked, "--seeds", 1, "--processes", 1, "--slice", "0:4")
    for word in ("best static", "regret", "floors", "reversals/min", "forecasts"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--report", "r.html"], "give --compare as well"),
        (["--compare", "--replicas", "2"], "of one engine"),
        (["--compare", "--drafts", "2"], "leave it out"),
        (["--compare", "--seeds", "0"], "at least 1"),
        (["--compare", "--report", "nowhere/r.html"], "a directory that exists"),
        (["--compare", "--plots", "grid.yaml"], "is no directory"),
        (["--compare", "--grid", "none.yaml"], "none.yaml"),
        (["--compare", "--seconds", "0"], "above 0"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    field: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(field)
    done = CliRunner().invoke(app, ["simulate", "--trace", "<script>x.csv", *arguments])
    assert done.exit_code == 1
    assert says in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_ranks_have_no_page() -> None:
    done = CliRunner().invoke(
        app, ["simulate", "--scenario", "rank-imbalance", "--compare", "--report", "r.html"]
    )
    assert done.exit_code == 1
    assert "it has 4 ranks" in done.output
    assert len(done.output.strip().splitlines()) == 1
