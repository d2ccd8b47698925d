"""Dashboards as committed: made by their sources, parsed by others, legible without a Grafana."""

import json
import re
from itertools import combinations
from pathlib import Path

import promql_parser
import pytest
from grafana_foundation_sdk.models.dashboard import Dashboard

from kvboards import palette
from kvboards.board import Board, to_json
from kvboards.check import LEGEND, Unknown, load, substitute, targets, variables
from kvboards.generate import BOARDS, FOLDER, stale

ROOT = Path(__file__).resolve().parents[3]
METRIC = re.compile(r"\bkvpilot_\w+")
boards = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)


def known_metrics() -> set[str]:
    """Every name of docs/metrics.md, with the suffixes that a histogram's series have."""
    rows = re.findall(r"^\| `(kvpilot_\w+)` \| (\w+) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    suffixes = {"histogram": ("_bucket", "_count", "_sum")}
    return {name + suffix for name, kind in rows for suffix in suffixes.get(kind, ("",))}


def test_committed_files_are_what_the_sources_make() -> None:
    assert stale() == [], "run `make dashboards`"


def test_a_change_of_a_committed_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in FOLDER.glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "gpu.json").unlink()
    (tmp_path / "fleet.json").write_text("{}")
    (tmp_path / "foreign.json").write_text("{}")
    monkeypatch.setattr("kvboards.generate.FOLDER", tmp_path)
    assert stale() == ["fleet.json", "foreign.json", "gpu.json"]


@boards
def test_grafanas_own_model_reads_all_of_it(board: Board) -> None:
    made = json.loads(to_json(board))
    read = Dashboard.from_json(made)
    assert (read.uid, read.schema_version) == (f"kvpilot-{board.name}", 41)
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])


@boards
def test_every_query_parses_and_names_metrics_that_are_written_down(board: Board) -> None:
    dashboard, known = load(board), known_metrics()
    stand_in = dict.fromkeys(variables(dashboard), "x") | {
        "__rate_interval": "1m",
        "__interval": "15s",
        "__range": "1h",
    }
    queries = [target.expr for target in targets(board, dashboard)]
    queries += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    choices = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    for expr in queries:
        promql_parser.parse(substitute(expr, stand_in))
        assert set(METRIC.findall(expr)) <= known, expr
    for choice in choices:
        assert re.fullmatch(r"label_values\(kvpilot_\w+(\{.*\})?, \w+\)", substitute(choice, stand_in))
        assert set(METRIC.findall(choice)) <= known, choice


@boards
def test_panels_say_what_they_show_and_lie_beside_each_other(board: Board) -> None:
    panels = load(board)["panels"]
    for panel in panels:
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]
    boxes = [panel["gridPos"] for panel in panels]
    for one, other in combinations(boxes, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(box["x"] + box["w"] <= 24 for box in boxes)


@boards
def test_colours_have_meanings(board: Board) -> None:
    """Only those of the palette, and the near-black of a state in which nothing happens."""
    used = set(re.findall(r'"(#[0-9A-Fa-f]{6})"', to_json(board)))
    assert used <= {*palette.MEANINGS.values(), palette.REST}
    for panel in board.panels:
        lines = [query for query in panel.queries if not (query.stack or query.bars)]
        looks = [(query.dash, query.width, query.fill) for query in lines]
        assert panel.kind != "lines" or len(set(looks)) == len(looks), f"{panel.title}: told by colour alone"


def luminance(color: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_lines_are_seen_on_grafanas_dark_panel() -> None:
    background = luminance("#181b1f")
    for meaning, color in palette.MEANINGS.items():
        ratio = (luminance(color) + 0.05) / (background + 0.05)
        assert ratio >= 3, f"{meaning}: {ratio:.1f} to 1; WCAG asks 3 of graphics"


def test_an_unknown_variable_and_a_legend_are_noticed() -> None:
    with pytest.raises(Unknown, match="engnie"):
        substitute('up{engine=~"$engnie"}', {"engine": "x"})
    assert substitute('a{b=~"$b"}[${__interval}]', {"b": "1|2", "__interval": "1s"}) == 'a{b=~"1|2"}[1s]'
    assert LEGEND.findall("{{policy}} / {{ rule }}") == ["policy", "rule"]


def test_the_page_says_what_every_panel_says() -> None:
    page = (ROOT / "docs/dashboards.md").read_text()
    for board in BOARDS:
        assert f"\n## {board.title}\n" in page
        for panel in board.panels:
            row = f"| {panel.title.replace('$', '')} | {panel.says} |"
            assert row in page, f"docs/dashboards.md, {board.title}: should have {row}"
