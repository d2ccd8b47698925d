"""bench/settings.yaml: as its loader reads it, whole and fair; and mistakes, a line each, at their places."""

from itertools import combinations
from pathlib import Path

import pytest

from kvpilot.simulate.plants.acceptance import Deepening, Drifting
from kvpilot.simulate.staging import leg, machine_pace, promises, stage
from kvpilot.simulate.suite import GROUPS, MOST_POINTS, Settings, SettingsError, load, shipped
from kvpilot.workload.spec import TraceAbsent

TEXT = shipped().read_text()


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load(shipped())


def test_every_group_has_workloads_to_tune_on_and_some_that_nobody_saw(settings: Settings) -> None:
    for group in GROUPS:
        mine = [entry for entry in settings.suite if entry.group == group]
        assert len(mine) >= 4
        assert any(entry.held_out for entry in mine)
        assert sum(not entry.held_out for entry in mine) >= 3
    assert 0.2 < sum(entry.held_out for entry in settings.suite) / len(settings.suite) < 0.4
    assert not any(settings.by_name[name].held_out for name in settings.budget.refined)


def test_what_is_held_out_of_a_trace_was_not_tuned_on(settings: Settings) -> None:
    """No second of a trace belongs to both."""
    parts = [(entry.held_out, part) for entry in settings.suite for part in entry.parts if part.trace]
    for (held, one), (other_held, other) in combinations(parts, 2):
        if held != other_held and one.trace == other.trace:
            early, late = sorted((one, other), key=lambda part: part.start)
            assert early.end is not None
            assert early.end <= late.start


def test_the_grid_fills_its_space_and_holds_the_best_known_point(settings: Settings) -> None:
    grid = settings.grid
    assert len(grid) == MOST_POINTS
    levels = [
        {point.chunk for point in grid},
        {point.drafts for point in grid},
        {point.max_running for point in grid},
        {point.watermark for point in grid},
        {tuple(sorted(point.caps.items())) for point in grid},
    ]
    assert [len(each) for each in levels] == [5, 4, 4, 2, 5]
    for place, each in enumerate(levels):
        rows = [
            (p.chunk, p.drafts, p.max_running, p.watermark, tuple(sorted(p.caps.items())))[place]
            for p in grid
        ]
        assert all(
            len(grid) // len(each) - 1 <= rows.count(level) <= len(grid) // len(each) + 2 for level in each
        )
    assert "c512 k2 r128 w1 q12/24" in {point.name for point in grid}
    for point in grid:
        assert point.in_order
        assert point.engine["step_token_budget"] >= point.chunk + point.max_running


def test_the_defaults_are_vllms(settings: Settings) -> None:
    assert settings.defaults.engine == {
        "step_token_budget": 8192,
        "prefill_chunk_tokens": 8192,
        "speculative_tokens": 0,
        "max_running": 1024,
        "admission_watermark": 1.0,
        "queue_caps": {},
        "in_order": False,
    }


def test_promises_are_relative_to_the_machine(settings: Settings) -> None:
    of = machine_pace(settings)
    made = promises(settings, of)
    assert made.slos["interactive"].itl_s == pytest.approx(0.050, rel=0.05)
    assert made.slos["interactive"].ttft_s == pytest.approx(2.0, rel=0.05)
    assert made.patience["interactive"].retries == 2
    assert made.r == pytest.approx(of.speed.r)
    slower = settings.model_copy(update={"machine": settings.machine.model_copy(update={"device": "a100"})})
    ratio = machine_pace(slower).step_s / of.step_s
    assert ratio > 1.3
    relaxed = promises(slower, machine_pace(slower)).slos["interactive"].itl_s
    assert relaxed == pytest.approx(ratio * made.slos["interactive"].itl_s)


def test_absent_traces_are_said_with_what_they_keep_from_flying(settings: Settings, tmp_path: Path) -> None:
    flown, absent = settings.present(tmp_path)
    assert len(flown) + len({name for names in absent.values() for name in names}) == len(settings.suite)
    assert {group for entry in flown for group in [entry.group]} == set(GROUPS)
    assert "mooncake-1.0" in absent["mooncake_fast25_synthetic.jsonl"]
    with pytest.raises(TraceAbsent, match="mooncake"):
        stage(settings, settings.by_name["mooncake-1.0"], 1, tmp_path)


def test_a_stage_is_the_same_every_time_and_its_own_for_each_seed(settings: Settings) -> None:
    entry = settings.by_name["chat-kv-1.2"]
    one, again, other = (stage(settings, entry, seed) for seed in (1, 1, 2))
    assert one.arrivals == again.arrivals != other.arrivals
    assert one.scene.deployment.pool_tokens == 60_000
    assert one.window_s == settings.budget.slice_s
    assert leg(settings.defaults, "defaults").name == "defaults"
    assert leg(settings.grid[0]).name == settings.grid[0].name
    shared = stage(settings, settings.by_name["document-0.9"], 1)
    assert shared.scene.deployment.prefix_cache
    assert not one.scene.deployment.prefix_cache


def test_acceptance_is_built_as_written(settings: Settings) -> None:
    usual = settings.acceptance.process
    assert isinstance(usual, Deepening)
    assert usual.rate("json", 0, 0) == 0.85
    assert usual.rate("prose", 1, 0) == pytest.approx(0.5 * 0.97)
    drifting = settings.by_name["drift-1.1"].acceptance
    assert drifting is not None
    assert isinstance(drifting.process, Drifting)
    assert drifting.process.rate("prose", 0, 90) == pytest.approx(0.85 * 0.2)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version: 1", "version: 2", "version"),
        ("  draft: llama-3.2-1b", "  drafts: llama-3.2-1b", "did you mean 'draft'?"),
        ("itl_steps: 3.2", "itl_steps: 0", "itl_steps: should be above 0"),
        ("shares: {easy: 0.2", "shares: {easy: 0.3", "1 together"),
        ("group: easy", "group: simple", "group"),
        ("load: 0.5, mix: chat", "load: 0.5, mix: chats", "mix chats: known are"),
        ("load: 0.5, mix: chat", "load: 0.5, mix: chat, trace: a.csv", "either a mix or a trace"),
        ("name: chat-0.75", "name: chat-0.5", "chat-0.5 more than once"),
        ("refined: [chat-1.2", "refined: [chat-9", "no workload is called chat-9"),
        ("caps: {interactive: 32, batch: 64}", "caps: {online: 32}", "no class is called online"),
        (
            "watermark: 1.0, caps: {interactive: 12, batch: 24}",
            "watermark: 1.5",
            "watermark: should be at most 1",
        ),
        ("chunk_tokens: 8192", "chunk_tokens: 64", "above machine.chunk_tokens"),
        ("slice_s: 150", "slice_s: 100", "lasts longer than budget.slice_s"),
        ("retries: 2", "retries: 5", "retries"),
        ("drift: [[0, 1], [40", "drift: [[0, 1], [0", "seconds must ascend"),
    ],
)
def test_a_mistake_is_one_line_at_its_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in TEXT
    path = tmp_path / "settings.yaml"
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(SettingsError) as caught:
        load(path)
    lines = str(caught.value).splitlines()
    assert any(says in line for line in lines), lines
    assert all(line.startswith(f"{path}:") for line in lines)
    assert len(lines) == 1


@pytest.mark.parametrize("text", ["", "[]", "a: [", "version: 1\nversion: 1\n"])
def test_what_is_no_settings_file_is_said(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"settings\.yaml"):
        load(path)
    with pytest.raises(SettingsError, match="No such file"):
        load(tmp_path / "none.yaml")
