"""What being watched costs: `python bench/publish.py`.

A real pilot process flies rank 0 of an engine of eight ranks with 50 tenants, two classes and the shipped
policies; the ranks are a child process that writes their pages twenty times a second.

- `scrape_p99_ms`: ten clients that scrape twice a second each, alternating between the two formats. A page
  holds all eight ranks. Each format is rendered twice a second, between ticks; scrapes share it. In each
  window the first scrapes wait for a page. `lateness_while_scraped_ms` is what ticks bear meanwhile.
- `publish_ms_per_tick`: what a tick pays so that signals can be shown which no policy asks for: reading them
  twice a second, their windows, and hanging the tick. CPU time, over the same pages, in this process.
- `lateness_with_20_viewers_ratio`: mean lateness of ticks while 20 viewers keep the console's stream open
  (without one: poll `/status` twice a second), over lateness without; windows alternate, the median of pairs.
"""

import argparse
import asyncio
import json
import os
import random
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from frame import Bar, median_bar, run
from prometheus_client.parser import text_string_to_metric_families

from kvpilot.adapters.engine import EngineAdapter
from kvpilot.adapters.pages import LinkFiles
from kvpilot.clock import NS, SystemClock
from kvpilot.inside.hook import StepHook
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.place import LinkPlace
from kvpilot.link.trust import trusted_uids
from kvpilot.publish.board import Board, Tick

RANKS, TENANTS, CLASSES = 8, 50, ("batch", "interactive")
CLIENTS, VIEWERS, PER_S = 10, 20, 2.0
STEP_S = 0.05
PATIENCE_S = 30.0
SCRAPE_WINDOWS = 3
FIELDS = tuple(name for name in STEP_FIELDS if not name.startswith(("knob.", "controls_", "host_")))
ENGINE = "bench"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def manifest(rank: int) -> Manifest:
    """An engine that tells everything."""
    knobs = (
        ManifestKnob("prefill_chunk_tokens", "tokens", 16, 4096, 2048, 16, "per step"),
        ManifestKnob("max_running", "requests", 1, 256, 64, 1, "drains"),
    )
    fields = tuple(STEP_FIELDS[name] for name in FIELDS)
    world = {"dp": RANKS, "tp": 1, "pp": 1}
    return Manifest(
        *("bench", "1", "bench-model", 16, 20_000, 1 << 20, 8192, "cpu", knobs, fields),
        classes=CLASSES,
        rank=rank,
        world=world,
    )


def write_ranks(environ: Mapping[str, str]) -> None:
    """The child: all ranks' pages, until stdin ends."""
    clock, chance = SystemClock(), random.Random(1)
    hooks = [StepHook.open(manifest(rank), environ, clock=clock) for rank in range(RANKS)]
    print("ready", flush=True)
    values = dict.fromkeys(FIELDS, 0.0)
    # Whoever started this ends it by closing the pipe.
    while not select.select([sys.stdin], [], [], STEP_S)[0]:
        now_ns = clock.monotonic_ns()
        for rank, hook in enumerate(hooks):
            hook.begin_step(now_ns)
            values |= {"time_ns": now_ns, "duration_ns": 20_000_000, "kv_blocks_free": 9_000 + 100 * rank}
            for name in ("steps_total", "decode_tokens_total", "finished_total", "prefill_tokens_total"):
                values[name] += 1
            values |= {"running": 40 + rank, "waiting": 3, "waiting_prompt_tokens": 900}
            for level in range(len(CLASSES)):
                for _ in range(20):
                    hook.itl[level].record(round(chance.lognormvariate(-3.5, 0.4) * NS))
                hook.ttft[level].record(round(chance.lognormvariate(-1.0, 0.6) * NS))
                hook.set_class(level, 2, 400)
            for tenant in range(TENANTS):
                hook.set_tenant(f"tenant-{tenant}", 1, 0, 5 + tenant, now_ns, now_ns // 1000)
            hook.end_step(
                tuple(values[n] if STEP_FIELDS[n].type == "f64" else int(values[n]) for n in FIELDS)
            )


@contextmanager
def lab() -> Iterator[tuple[int, LinkPlace, int]]:
    """The ranks and a pilot beside them; gives the pilot's port, where the pages are, and its process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("t", "c"):
            (folder / each).mkdir(mode=0o750)
        environ = {
            "KVPILOT_TELEMETRY": str(folder / "t"),
            "KVPILOT_CONTROLS": str(folder / "c"),
            "KVPILOT_ENGINE": ENGINE,
        }
        whole = {**os.environ, **environ}
        ranks = subprocess.Popen(
            [sys.executable, __file__, "--write-ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=whole,
        )
        assert ranks.stdout is not None
        assert ranks.stdout.readline() == b"ready\n"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = {
            "classes": [{"name": each, "ttft": 2.0, "itl": 0.1} for each in CLASSES],
            "arm": {"after": 0, "finished": 0},
            "api": {"port": port},
            "journal": "journal.sqlite",
            "socket": "pilot.sock",
        }
        (folder / "kvpilot.yaml").write_text(json.dumps(config))
        command = [sys.executable, "-m", "kvpilot", "run", "--config", str(folder / "kvpilot.yaml")]
        with (folder / "pilot.log").open("wb") as log:
            pilot = subprocess.Popen(command, env=whole, stderr=log)
        try:
            _await_ranks(port, pilot, folder / "pilot.log")
            yield port, LinkPlace(folder / "t", folder / "c", ENGINE, trusted_uids(environ)), pilot.pid
        finally:
            for child in (pilot, ranks):
                child.terminate()
                child.wait(PATIENCE_S)


def _await_ranks(port: int, pilot: subprocess.Popen[bytes], log: Path) -> None:
    """Until the page shows all of them."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and pilot.poll() is None:
        try:
            text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        except httpx.HTTPError:
            text = ""
        if text.count("kvpilot_requests_running{") == RANKS:
            return
        time.sleep(0.2)
    raise SystemExit(f"the pilot did not show all ranks; its log ends: {log.read_text()[-2000:]}")


async def scrape(port: int, seconds: float) -> tuple[list[float], int]:
    """Milliseconds that each scrape of all clients took, and the size of a page in bytes."""
    took_ms: list[float] = []
    size = 0

    async def client(index: int) -> None:
        nonlocal size
        headers = {"Accept": OPENMETRICS} if index % 2 else {}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            await http.get("/healthz")
            await asyncio.sleep(index / CLIENTS / PER_S)
            due = time.monotonic()
            while due < ends:
                began = time.perf_counter()
                answer = await http.get("/metrics", headers=headers)
                took_ms.append(1e3 * (time.perf_counter() - began))
                answer.raise_for_status()
                size = len(answer.content)
                due += 1 / PER_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    ends = time.monotonic() + seconds
    await asyncio.gather(*(client(index) for index in range(CLIENTS)))
    return took_ms, size


def metrics(port: int) -> dict[str, float]:
    """Series of rank 0, by name alone."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("rank") == "0"
    }


def lateness_ms(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    name = "kvpilot_control_tick_lateness_seconds"
    ticks = after[f"{name}_count"] - before[f"{name}_count"]
    return 1e3 * (after[f"{name}_sum"] - before[f"{name}_sum"]) / ticks


async def view(port: int, seconds: float, path: str) -> int:
    """`VIEWERS` viewers for so long; how many updates they saw in all."""
    seen = 0

    async def viewer(index: int) -> None:
        nonlocal seen
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            await asyncio.sleep(index / VIEWERS / PER_S)
            if path == "/status":
                while True:
                    (await http.get(path)).raise_for_status()
                    seen += 1
                    await asyncio.sleep(1 / PER_S)
            async with http.stream("GET", path, timeout=PATIENCE_S) as stream:
                async for line in stream.aiter_lines():
                    seen += line.startswith("data:")

    tasks = [asyncio.create_task(viewer(index)) for index in range(VIEWERS)]
    await asyncio.sleep(seconds)
    failed = [task.exception() for task in tasks if task.done()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if failed:
        raise SystemExit(f"a viewer failed: {failed[0]!r}")
    return seen


def viewed_path(port: int) -> str:
    """The console's stream, where this pilot has one."""
    try:
        with httpx.stream("GET", f"http://127.0.0.1:{port}/console/stream", timeout=5, trust_env=False) as it:
            if it.status_code == 200:
                return "/console/stream"
    except httpx.HTTPError:
        pass
    return "/status"


def cpu_s(pid: int) -> float:
    """CPU seconds that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lateness_windows(port: int, pid: int, pairs: int, seconds: float) -> tuple[list[float], dict[str, Any]]:
    """Of each pair of windows: lateness with viewers over lateness without."""
    path, alone, watched, seen = viewed_path(port), [], [], 0
    cpu_alone_s, cpu_watched_s = 0.0, 0.0
    for _ in range(pairs):
        start, began_s = metrics(port), cpu_s(pid)
        time.sleep(seconds)
        middle, between_s = metrics(port), cpu_s(pid)
        seen += asyncio.run(view(port, seconds, path))
        cpu_alone_s += between_s - began_s
        cpu_watched_s += cpu_s(pid) - between_s
        end = metrics(port)
        alone.append(lateness_ms(start, middle))
        watched.append(lateness_ms(middle, end))
    results = {
        "viewed": path,
        "updates_per_viewer_s": seen / VIEWERS / (pairs * seconds),
        "lateness_ms": statistics.median(alone),
        "lateness_with_viewers_ms": statistics.median(watched),
        "pilot_cpu_ratio": cpu_alone_s / (pairs * seconds),
        "pilot_cpu_with_viewers_ratio": cpu_watched_s / (pairs * seconds),
    }
    return [with_ / without for with_, without in zip(watched, alone, strict=True)], results


def publish_ms(place: LinkPlace, ticks: int) -> float:
    """Milliseconds of CPU that showing costs a tick, on average."""
    engine = EngineAdapter(LinkFiles(place, 0), "bench")
    board, clock = Board(CLASSES), SystemClock()
    now_ns, spent_s, plain_s = clock.monotonic_ns(), 0.0, 0.0
    for index in range(ticks):
        at_ns = now_ns + index * NS // 10
        began = time.process_time()
        engine.observe(at_ns, ())
        between = time.process_time()
        sight = engine.observe(at_ns, board.wanted(at_ns))
        board.hang(Tick(at_ns, at_ns, sight), sight.readings)
        plain_s += between - began
        spent_s += time.process_time() - between
    engine.close()
    return 1e3 * (spent_s - plain_s) / ticks


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


def measure(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Mapping[str, Any], list[Bar]]:
    quick = arguments.quick
    scrape_s, pairs, window_s, ticks = (2.5, 4, 3.0, 200) if quick else (10.0, 7, 8.0, 600)
    with lab() as (port, place, pid):
        asyncio.run(scrape(port, 1.0))
        before, began_s = metrics(port), cpu_s(pid)
        scraped = [asyncio.run(scrape(port, scrape_s)) for _ in range(SCRAPE_WINDOWS)]
        scraped_ratio = (cpu_s(pid) - began_s) / scrape_s / SCRAPE_WINDOWS
        after = metrics(port)
        ratios, lateness = lateness_windows(port, pid, pairs, window_s)
        costs = [publish_ms(place, ticks) for _ in range(3)]
    took_ms = sorted(each for window, _ in scraped for each in window)
    size = scraped[-1][1]
    renders = after["kvpilot_page_renders_total"] - before["kvpilot_page_renders_total"]
    rendering = "kvpilot_page_render_duration_seconds_sum"
    settings = {
        "ranks": RANKS,
        "tenants": TENANTS,
        "classes": len(CLASSES),
        "scrapers": CLIENTS,
        "viewers": VIEWERS,
        "scrape_s": scrape_s * SCRAPE_WINDOWS,
        "windows": pairs,
        "window_s": window_s,
    }
    results = {
        "scrapes": len(took_ms),
        "scrape_p50_ms": took_ms[len(took_ms) // 2],
        "renders": renders,
        "render_ms": 1e3 * (after[rendering] - before[rendering]) / max(1.0, renders),
        "page_kilobytes": size / 1e3,
        "pilot_cpu_scraped_ratio": scraped_ratio,
        "lateness_while_scraped_ms": lateness_ms(before, after),
        "ticks_missed_while_scraped": after["kvpilot_control_ticks_missed_total"]
        - before["kvpilot_control_ticks_missed_total"],
        **lateness,
    }
    bars = [
        median_bar("scrape_p99_ms", [_p99(window) for window, _ in scraped], at_most=20.0),
        median_bar("publish_ms_per_tick", costs, at_most=0.5),
        median_bar("lateness_with_20_viewers_ratio", ratios, at_most=1.2),
    ]
    return settings, results, bars


if __name__ == "__main__":
    if "--write-ranks" in sys.argv:
        write_ranks(os.environ)
    else:
        run("publish", 1, measure, __doc__ or "")
