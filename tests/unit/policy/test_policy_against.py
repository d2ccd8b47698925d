"""`kvpilot check --engine`: what an engine lacks of what a policy sees and moves, each at its place."""

from dataclasses import replace
from pathlib import Path

import pytest
from link_pages import manifest
from typer.testing import CliRunner

from kvpilot.clock import VirtualClock
from kvpilot.commands import app
from kvpilot.inside.hook import StepHook
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.against import EngineHas
from kvpilot.policy.checking import check

FULL = Path(__file__).parent / "every_clause.yaml"
KNOBS = {
    knob.name: knob
    for knob in (
        ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 512, 16, "per step"),
        ManifestKnob("admission_watermark", "ratio", 0.05, 1.0, 1.0, 0.01, "at admission"),
        ManifestKnob("speculative_tokens", "tokens", 0, 8, 4, 1, "per step"),
        ManifestKnob("shed_fraction", "ratio", 0.0, 1.0, 0.0, 0.01, "valve"),
        ManifestKnob("admission_credits", "tokens", 0, 2**20, 2**20, 1, "valve"),
    )
}
ENGINE = EngineHas("toy 1", KNOBS, classes=("batch", "chat"))


def errors(engine: EngineHas, path: Path = FULL) -> list[str]:
    return [error.removeprefix(f"{path}:") for error in check([path], engine).problems]


def test_an_engine_that_has_it_all() -> None:
    assert errors(ENGINE) == []


def test_what_an_engine_lacks_is_told_where_it_is_named_with_the_engines_own_reason() -> None:
    without = {name: knob for name, knob in KNOBS.items() if name != "speculative_tokens"}
    poor = replace(
        ENGINE,
        knobs=without,
        lacking_knobs={"speculative_tokens": "no draft model is loaded"},
        lacking_signals={"spec_acceptance_ratio": "nothing is drafted"},
    )
    assert errors(poor) == [
        "16:24: signal: toy 1 has no spec_acceptance_ratio: nothing is drafted",
        "62:15: knob: toy 1 has no speculative_tokens: no draft model is loaded",
    ]
    silent = replace(poor, lacking_signals={}, lacking_knobs={})
    assert errors(silent) == ["62:15: knob: toy 1 has no speculative_tokens: its manifest does not list it"]


def test_bounds_values_and_candidates_outside_its_limits() -> None:
    small = {
        "prefill_chunk_tokens": replace(KNOBS["prefill_chunk_tokens"], minimum=32, maximum=1024),
        "speculative_tokens": replace(KNOBS["speculative_tokens"], maximum=3, baseline=3),
    }
    assert errors(replace(ENGINE, knobs=KNOBS | small)) == [
        "30:70: max: 2048 is outside what prefill_chunk_tokens of toy 1 takes (32 to 1024 tokens)",
        "38:79: min: 16 is outside what prefill_chunk_tokens of toy 1 takes (32 to 1024 tokens)",
        "63:28: candidates: 4 is outside what speculative_tokens of toy 1 takes (0 to 3 tokens)",
    ]


def test_classes_and_valves() -> None:
    assert errors(replace(ENGINE, classes=("chat",))) == [
        "13:67: class: toy 1 has the classes chat",
    ]
    assert errors(replace(ENGINE, classes=())) == [], "an engine that knows no classes says nothing of them"
    lonely = errors(replace(ENGINE, valves=False))
    assert [error.split(":")[0] for error in lonely] == ["43", "48", "59"]
    assert lonely[1].endswith("no valve lives beside toy 1, so nothing moves shed_fraction")


def test_a_level_that_no_class_has(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(FULL.read_text().replace("classAtMost: 0", "classAtMost: 2"))
    assert errors(ENGINE, path) == ["43:92: classAtMost: toy 1 has the levels 0 to 1"]


@pytest.fixture
def telemetry(tmp_path: Path) -> Path:
    """An engine that was here: rank 0 of `pair`."""
    for name in ("t", "c"):
        (tmp_path / name).mkdir(mode=0o750)
    environ = {"KVPILOT_TELEMETRY": f"{tmp_path}/t", "KVPILOT_CONTROLS": f"{tmp_path}/c"}
    lacking = {"speculative_tokens": "no draft model is loaded"}
    hook = StepHook.open(
        replace(manifest(), unsupported_knobs=lacking), {**environ, "KVPILOT_ENGINE": "pair"}, VirtualClock()
    )
    hook.close()
    return tmp_path / "t"


def run(*arguments: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, ["check", *arguments])
    return done.exit_code, done.output.splitlines()


def test_the_command_reads_the_manifest_from_the_rank_or_the_one_engine_there(telemetry: Path) -> None:
    for directory in (telemetry, telemetry / "pair-0"):
        code, lines = run(str(FULL), "--engine", str(directory))
        assert code == 1
        assert f"{FULL}:62:15: knob: test 1 has no speculative_tokens: no draft model is loaded" in lines
        assert f"{FULL}:14:18: signal: test 1 has no kv_occupancy: its records have no field for it" in lines


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere", "No such file or directory"),
        ("pair-1", "No such file or directory"),
        (".", None),
        ("other-7", "no engine has written here"),
    ],
)
def test_where_there_is_no_engine_it_says_so_in_one_line(
    telemetry: Path, where: str, says: str | None
) -> None:
    (telemetry / "other-7").mkdir(mode=0o750)
    code, lines = run(str(FULL), "--engine", str(telemetry / where))
    assert code == 1
    (line,) = lines
    assert (says or f"{telemetry}: 2 engines write here: name one of other-7, pair-0") in line
