"""kvpilot.yaml: what it means, and that each mistake is one line with its place."""

import json
from pathlib import Path

import pytest

from kvpilot.config import Config, ConfigError, load

GOOD = """\
engine: {name: lab, telemetry: t, controls: /abs/c}
classes:
  - {name: batch, ttft: 5s, itl: 100ms}
  - {name: interactive, ttft: 0.5, itl: 40ms, ttft_per_prompt_token: 0.5ms}
arm: {after: 0s, finished: 0}
receivers:
  - {name: oncall, url: "http://127.0.0.1:9/hook"}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "kvpilot.yaml"
    path.write_text(text)
    return path


def loaded(folder: Path, text: str, **environ: str) -> Config:
    return load(write(folder, text), environ)


def mistakes(folder: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text, **environ)
    return [line.removeprefix(f"{folder}/") for line in str(caught.value).splitlines()]


def test_durations_are_seconds_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = loaded(tmp_path, GOOD)
    assert config.engine.telemetry == tmp_path / "t"
    assert config.engine.controls == Path("/abs/c")
    assert [each.ttft for each in config.classes] == [5.0, 0.5]
    assert config.classes[1].ttft_per_prompt_token == 0.0005
    assert (config.arm.after, config.arm.finished) == (0.0, 0)


def test_slo_is_the_tightest_over_classes_and_each_class(tmp_path: Path) -> None:
    assert loaded(tmp_path, GOOD).slo == {
        "itl": 0.040,
        "ttft": 0.5,
        "batch": {"itl": 0.100, "ttft": 5.0},
        "interactive": {"itl": 0.040, "ttft": 0.5},
        "lowest": {"itl": 0.100, "ttft": 5.0},
    }


def test_the_environment_names_the_engine_where_the_file_does_not(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        "classes: [{name: all, ttft: 1s, itl: 1s}]",
        KVPILOT_ENGINE="e7",
        KVPILOT_TELEMETRY="/t",
        KVPILOT_CONTROLS="/c",
        XDG_RUNTIME_DIR="/run/me",
        XDG_STATE_HOME="/state",
    )
    assert (config.engine.name, config.engine.telemetry, config.engine.controls) == (
        "e7",
        Path("/t"),
        Path("/c"),
    )
    assert config.socket == Path("/run/me/kvpilot/e7.sock")
    assert config.journal == Path("/state/kvpilot/e7.sqlite")


def test_an_engine_without_directories_is_told_what_to_write(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, "classes: [{name: all, ttft: 1s, itl: 1s}]")
    assert lines == [
        "kvpilot.yaml:1:1: no `telemetry` directory: "
        "write `engine: {telemetry: DIR}` or set KVPILOT_TELEMETRY",
        "kvpilot.yaml:1:1: no `controls` directory: write `engine: {controls: DIR}` or set KVPILOT_CONTROLS",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("ttft: 5s", "ttft: 5"), None),
        (
            ("ttft: 5s", "ttft: 5 seconds"),
            "kvpilot.yaml:3:25: ttft: 5 seconds is not a duration: write 250ms, 5s or 2m",
        ),
        (("ttft: 5s", "ttft: 0s"), "kvpilot.yaml:3:25: ttft: should be above 0"),
        (("ttft: 5s, ", ""), "kvpilot.yaml:3:5: 'ttft' is missing"),
        (("ttft: 5s", "ttft: [5s]"), "kvpilot.yaml:3:25: ttft: should be a duration: write 250ms, 5s or 2m"),
        (
            ("finished: 0", "finishd: 0"),
            "kvpilot.yaml:5:18: unknown key 'finishd' (did you mean 'finished'? known: after, finished)",
        ),
        (
            ("http:", "ftp:"),
            "kvpilot.yaml:7:25: url: 'ftp://127.0.0.1:9/hook' is not an http:// or https:// address",
        ),
        (("name: interactive", "name: batch"), "kvpilot.yaml:4:12: two classes are called 'batch'"),
        (("name: batch", "name: itl"), "kvpilot.yaml:3:12: a class cannot be called 'itl'"),
        (("name: batch", "name: lowest"), "kvpilot.yaml:3:12: a class cannot be called 'lowest'"),
        (("arm: {", "arm: [{"), "kvpilot.yaml:6:1: not YAML: while parsing a flow sequence"),
        (("arm:", "policies: nowhere\narm:"), "kvpilot.yaml:5:11: {folder}/nowhere is not a directory"),
        (("name: batch", "name: no"), None),
        (
            ("arm:", "polcies: p\narm:"),
            "kvpilot.yaml:5:1: unknown key 'polcies' (did you mean 'policies'? ",
        ),
        (("arm:", "rank: 1.5\narm:"), "kvpilot.yaml:5:7: rank: should be a whole number"),
        (("arm:", "rank: -1\narm:"), "kvpilot.yaml:5:7: rank: should be at least 0"),
        (("arm:", "valve: rank0\narm:"), "kvpilot.yaml:5:8: valve: should be true or false"),
        (("{after: 0s, finished: 0}", "5"), "kvpilot.yaml:5:6: arm: should be a mapping"),
        (("name: oncall", "name: ''"), "kvpilot.yaml:7:12: name: should not be empty"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(
    tmp_path: Path, change: tuple[str, str], expected: str | None
) -> None:
    text = GOOD.replace(*change)
    if expected is None:
        loaded(tmp_path, text)
    else:
        lines = mistakes(tmp_path, text)
        assert any(line.startswith(expected.replace("{folder}", str(tmp_path))) for line in lines), lines


def test_a_misspelt_key_is_one_mistake_and_not_also_a_missing_one(tmp_path: Path) -> None:
    (line,) = mistakes(tmp_path, GOOD.replace("itl: 100ms", "itlx: 1s"))
    assert line.startswith("kvpilot.yaml:3:29: unknown key 'itlx' (did you mean 'itl'? ")
    (line,) = mistakes(tmp_path, GOOD.replace("classes:", "clases:"))
    assert "unknown key 'clases' (did you mean 'classes'? " in line


def test_all_mistakes_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, GOOD.replace("5s", "x").replace("finished: 0", "finished: -1"))
    assert [line.split(":")[1] for line in lines] == ["3", "5"]


@pytest.mark.parametrize("text", ["", "  \n", "- 1\n", "just words", "\x00", "classes: []"])
def test_what_is_no_configuration_says_so(tmp_path: Path, text: str) -> None:
    assert len(mistakes(tmp_path, text)) == 1


def test_no_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory: name the configuration with --config"):
        load(tmp_path / "absent.yaml", {})


def test_classes_must_agree_with_the_callers_file(tmp_path: Path) -> None:
    (tmp_path / "callers.json").write_text(json.dumps({"classes": {"interactive": 0, "batch": 1}}))
    text = GOOD + "callers: callers.json\n"
    assert mistakes(tmp_path, text) == [
        "kvpilot.yaml:3:3: classes, lowest first, are batch, interactive here and interactive, batch in "
        f"{tmp_path}/callers.json"
    ]
    (tmp_path / "callers.json").write_text("{")
    assert "not JSON" in mistakes(tmp_path, text)[0]


def test_slo_lowest_is_the_first_class_also_where_it_is_promised_more(tmp_path: Path) -> None:
    text = GOOD.replace("ttft: 5s, itl: 100ms", "ttft: 0.1, itl: 1ms")
    assert loaded(tmp_path, text).slo["lowest"] == {"itl": 0.001, "ttft": 0.1}


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("[1]", ["kvpilot.yaml:2:11: classes: should be a mapping"]),
        ("3", ["kvpilot.yaml:2:10: classes: should be a list"]),
        ("[]", ["kvpilot.yaml:2:10: classes: should have at least 1"]),
        (
            f"[{', '.join(f'{{name: c{i}, ttft: 1, itl: 1}}' for i in range(9))}]",
            ["kvpilot.yaml:2:10: classes: should have at most 8"],
        ),
    ],
)
def test_a_list_that_is_wrong_is_said_once(tmp_path: Path, text: str, lines: list[str]) -> None:
    assert mistakes(tmp_path, f"engine: {{telemetry: t, controls: c}}\nclasses: {text}") == lines


@pytest.mark.parametrize(
    ("change", "rank", "valves"),
    [("", 0, True), ("rank: 3", 3, False), ("rank: 3\nvalve: true", 3, True), ("valve: false", 0, False)],
)
def test_one_pilot_for_each_rank_and_one_of_them_for_the_valves(
    tmp_path: Path, change: str, rank: int, valves: bool
) -> None:
    config = loaded(tmp_path, f"{GOOD}{change}\n", XDG_STATE_HOME="/state", XDG_RUNTIME_DIR="/run")
    assert (config.rank, config.flies_valves) == (rank, valves)
    own = f"lab-{rank}" if rank else "lab"
    assert config.journal == Path(f"/state/kvpilot/{own}.sqlite")
    assert config.socket == Path(f"/run/kvpilot/{own}.sock")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "otlp: {endpoint: collector}",
            "1:18: endpoint: 'collector' is not an http:// or https:// address",
        ),
        ("otlp: {endpoint: http://c, interval: 0}", "1:38: interval: should be above 0"),
        (
            "otlp: {endpint: http://c}",
            "1:8: unknown key 'endpint' (did you mean 'endpoint'? "
            "known: endpoint, headers, interval, timeout, resource, genai)",
        ),
        (
            "gpu: {devices: [foo]}",
            "1:17: 0: 'foo' is not a GPU's UUID: `nvidia-smi -L` lists them, GPU-... or MIG-...",
        ),
    ],
)
def test_what_is_sent_and_looked_at_is_checked(tmp_path: Path, text: str, line: str) -> None:
    file = tmp_path / "kvpilot.yaml"
    file.write_text(
        f"{text}\nengine: {{telemetry: t, controls: c}}\nclasses: [{{name: a, ttft: 1, itl: 1}}]\n"
    )
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert str(caught.value) == f"{file}:{line}"


def test_without_an_endpoint_nothing_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "kvpilot.yaml"
    file.write_text("engine: {telemetry: t, controls: c}\nclasses: [{name: a, ttft: 1, itl: 1}]\n")
    assert load(file, {}).otlp.endpoint is None
