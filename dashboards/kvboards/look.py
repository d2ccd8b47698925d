"""Draw the committed dashboards over a live engine, with Grafana's own panel components, to docs/img/*.png.

For developers: it needs npm, Chromium and Prometheus, fetches 400 MB of Grafana's packages once into the
user's cache, and flies the lab for a minute. `python -m kvboards.look [--seconds N]`.
"""

import argparse
import asyncio
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvboards import check
from kvboards.board import GRID, Board
from kvboards.generate import BOARDS
from kvboards.lab import ROOT, Lab, flying
from kvboards.panels import Panel, letter
from kvpilot.clock import NS

WIDTH = 1280
SOURCE = ROOT / "dashboards" / "look"
IMAGES = ROOT / "docs" / "img"
MOST_BYTES = 300_000
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
BUNDLE = (
    *("--bundle", "--minify", "--define:process.env.NODE_ENV='production'", "--define:global=window"),
    "--alias:react-custom-scrollbars-2=./scrollbars.cjs",
    *("--loader:.svg=dataurl", "--loader:.woff2=dataurl", "--loader:.ttf=dataurl", "--loader:.png=dataurl"),
)
PAGE = """<!doctype html><meta charset="utf-8"><title>look</title>
<style>body {{margin: 0}} .empty {{padding: 40px; text-align: center; opacity: .7}}
.look-table td, .look-table th {{padding: 5px 10px; text-align: left}}</style>
<link rel="stylesheet" href="bundle.css"><div id="root"></div>
<script>window.PAGE = {page};</script><script src="bundle.js"></script>
"""


def cache() -> Path:
    """Where Grafana's packages lie, with `main.jsx` beside them so that it finds them."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "kvpilot" / "dashboards-look"


def bundle() -> Path:
    """Install once, then build; the folder with bundle.js and bundle.css."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = (SOURCE / "package.json").read_text()
    held = folder / "package.json"
    if not (folder / "node_modules").is_dir() or not held.exists() or held.read_text() != wanted:
        held.write_text(wanted)
        _run(["npm", "install", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"], folder)
    for name in ("main.jsx", "scrollbars.cjs"):
        shutil.copy(SOURCE / name, folder / name)
    _run(["npx", "esbuild", "main.jsx", "--outfile=bundle.js", *BUNDLE], folder)
    return folder


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip()[-800:]}")


def placed(
    board: Board, dashboard: Mapping[str, Any], found: Mapping[str, str]
) -> Iterator[tuple[str, Any, dict[str, str]]]:
    """Rows as (title, y, {}), panels as (title, JSON and place, values), repeats unfolded as by Grafana."""
    shown = iter([panel for panel in dashboard["panels"] if panel["type"] != "row"])
    y = 0
    for row in board.rows:
        yield row.title, y, {}
        y, x, tallest, before = y + 1, 0, 0, ""
        for source in row.panels:
            made = next(shown)
            choices = found[source.repeat].split("|") if source.repeat else [""]
            wide = max(GRID // len(choices), source.width) if source.repeat else source.width
            for index, choice in enumerate(choices):
                fresh = index == 0 and x and (source.repeat or before)
                if x + wide > GRID or fresh:
                    x, y, tallest = 0, y + tallest, 0
                here = {**found, source.repeat: choice} if source.repeat else dict(found)
                at = {"x": x, "y": y, "w": wide, "h": source.height}
                yield check.substitute(made["title"], here), (made, source, at), here
                x, tallest = x + wide, max(tallest, source.height)
            before = source.repeat
        y += tallest


async def drawn(lab: Lab, board: Board, begin_s: float, end_s: float, step_s: int) -> dict[str, Any]:
    """The page of one dashboard, as main.jsx takes it."""
    dashboard = check.load(board)
    found = await check.values(lab, dashboard)
    found |= {"__interval": f"{step_s}s", "__range": f"{math.ceil(end_s - begin_s)}s"}
    panels, headings, lowest = [], [], 0
    for title, what, here in placed(board, dashboard, found):
        if isinstance(what, int):
            headings.append({"title": title, "y": what})
            continue
        made, source, at = what
        panel = {"key": f"{made['id']} {title}", "title": title, "json": made, "at": at, "frames": []}
        if source.kind == "table":
            panel["table"] = await _table(lab, source, made, here, end_s)
        else:
            times = _times(source, begin_s, end_s, step_s)
            panel["frames"] = await _frames(lab, made, here, times)
        panels.append(panel)
        lowest = max(lowest, at["y"] + at["h"])
    choices = [
        (one["label"], found[one["name"]].replace("|", " + "))
        for one in dashboard["templating"]["list"]
        if one["type"] in ("query", "custom") and len(found[one["name"]]) < 60
    ]
    return {
        "title": dashboard["title"],
        "choices": choices,
        "panels": panels,
        "headings": headings,
        "rows": lowest,
        "width": WIDTH,
        "from": begin_s * 1000,
        # A tick of the time axis at the very edge would lose half of its label.
        "to": (math.ceil(end_s / 10) * 10 + 4.5) * 1000,
        "step": step_s * 1000,
    }


def _times(source: Panel, begin_s: float, end_s: float, step_s: int) -> list[float]:
    """When to look: Grafana asks for one moment where only the last value is shown."""
    if source.kind in ("stat", "bars"):
        return [end_s]
    return [begin_s + index * step_s for index in range(int((end_s - begin_s) / step_s) + 1)]


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return check.LEGEND.sub(lambda match: labels.get(match[1], ""), legend)


async def _frames(
    lab: Lab, made: Mapping[str, Any], here: Mapping[str, str], times: Sequence[float]
) -> list[dict[str, Any]]:
    frames = []
    for target in made["targets"]:
        expr = check.substitute(target["expr"], here)
        if len(times) == 1:
            # Sorted, as `topk` sorts, unlike a range of one point.
            answer = await lab.query("query", query=expr, time=times[0])
        else:
            span = {"start": times[0], "end": times[-1], "step": times[1] - times[0]}
            answer = await lab.query("query_range", query=expr, **span)
        for one in answer["data"]["result"]:
            seen = one["values"] if "values" in one else [one["value"]]
            points = {round(float(at)): float(value) for at, value in seen}
            values = [points.get(round(at)) for at in times]
            labels = one["metric"]
            name = _named(target["legendFormat"], labels)
            frames.append(
                {
                    "refId": target["refId"],
                    "name": name,
                    "labels": labels,
                    "times": [at * 1000 for at in times],
                    "values": values,
                }
            )
    return frames


async def _table(
    lab: Lab, source: Panel, made: Mapping[str, Any], here: Mapping[str, str], end_s: float
) -> list[dict[str, Any]]:
    """Columns: the queries joined on their labels, named and ordered as the panel's transformations say."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    labels = [name for name, _, _ in source.columns if not name.startswith("Value")]
    for index, target in enumerate(made["targets"]):
        expr = check.substitute(target["expr"], here)
        answer = await lab.query("query", query=expr, time=end_s)
        for one in answer["data"]["result"]:
            key = tuple(one["metric"].get(label, "") for label in labels)
            row = rows.setdefault(key, dict(zip(labels, key, strict=True)))
            row[f"Value #{letter(index)}"] = float(one["value"][1])
    by = next((name for name, heading, _ in source.columns if heading == source.sort), None)
    ordered = sorted(rows.values(), key=lambda row: -(row.get(by) or 0)) if by else list(rows.values())
    return [
        {
            "heading": heading,
            "numeric": name.startswith("Value"),
            "values": [row.get(name) for row in ordered],
        }
        for name, heading, _ in source.columns
    ]


def shoot(page: Mapping[str, Any], folder: Path, target: Path) -> None:
    """Photograph the page; exits where the page complains or the picture is too large."""
    browser = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("chromium is not installed: apt-get install chromium")
    file = folder / f"{target.stem}.html"
    file.write_text(PAGE.format(page=json.dumps(page).replace("<", "\\u003c")))
    height = page["rows"] * 38 + 48
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--disable-dev-shm-usage", "--allow-file-access-from-files", "--enable-logging=stderr"),
                *(
                    f"--user-data-dir={profile}",
                    f"--window-size={WIDTH},{height}",
                    "--virtual-time-budget=6000",
                ),
                *(f"--screenshot={target}", file.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    said = [
        line for line in done.stderr.splitlines() if re.search(r"Uncaught|TypeError|ReferenceError", line)
    ]
    if done.returncode or said:
        sys.exit(f"{target.name}: {(said or [done.stderr[-500:]])[0]}")
    target.write_bytes(_packed(target.read_bytes()))
    if target.stat().st_size > MOST_BYTES:
        print(f"{target.name}: {target.stat().st_size // 1000} kB: more than {MOST_BYTES // 1000}")


def _packed(png: bytes) -> bytes:
    """The same picture, its pixels compressed as well as they can be."""
    head, pixels, tail, at = png[:8], b"", b"", 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        chunk, kind = png[at : at + length + 12], png[at + 4 : at + 8]
        if kind == b"IDAT":
            pixels += chunk[8:-4]
        elif kind == b"IEND":
            tail = chunk
        else:
            head += chunk
        at += length + 12
    data = b"IDAT" + zlib.compress(zlib.decompress(pixels), 9)
    return head + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) + tail


async def look(seconds: float, boards: Sequence[Board], pages: Path) -> None:
    """Fly, and leave each dashboard's page in `pages` as JSON."""
    step_s = 1
    with tempfile.TemporaryDirectory(prefix="kvpilot-look-") as folder:
        async with flying(Path(folder)) as lab:
            begin_s = round(lab.clock.wall_ns() / NS) + 2
            await lab.drive(lab.arrivals(seconds, 1.2), drain_s=0.5)
            end_s = round(lab.clock.wall_ns() / NS)
            for board in boards:
                page = await drawn(lab, board, begin_s, end_s, step_s)
                (pages / f"{board.name}.page.json").write_text(json.dumps(page))


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(description="Draw the dashboards over a live engine to docs/img.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the lab is under load")
    parser.add_argument("--again", action="store_true", help="draw what the last run saw; fly nothing")
    given = parser.parse_args()
    folder = bundle()
    boards = BOARDS
    if not given.again:
        asyncio.run(look(given.seconds, boards, folder))
    IMAGES.mkdir(exist_ok=True)
    for board in boards:
        page = json.loads((folder / f"{board.name}.page.json").read_text())
        if given.again:
            page = _restyled(page, board)
        shoot(page, folder, IMAGES / f"dashboard-{board.name}.png")
        print(f"docs/img/dashboard-{board.name}.png")


def _restyled(page: dict[str, Any], board: Board) -> dict[str, Any]:
    """Yesterday's data in today's styles."""
    made = {panel["id"]: panel for panel in check.load(board)["panels"]}
    for panel in page["panels"]:
        panel["json"] = made[panel["json"]["id"]]
    return page


if __name__ == "__main__":
    main()
