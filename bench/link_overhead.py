"""What kvpilot costs the engine and the machine, and how fast it acts: `python bench/link_overhead.py`.

Four measurements:

- the step hook's CPU time (controls read, record, histograms) at batch 1, 8 and 32, while leases are renewed;
- the same as a share of real steps of 4 ms and more, and tokens/s of the reference engine with the link and
  without it, interleaved, beside the noise of two legs that are the same;
- the pilot's CPU share and memory at 10 Hz beside that engine;
- the time from the step record that crosses a threshold (`for: 0s`) to the one that echoes the new value,
  less one tick and one step, with a stand-in engine that steps every 5 ms through the real hook.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from frame import Bar, run

from kvpilot.clock import NS, SystemClock
from kvpilot.demo.processes import free_port
from kvpilot.inside.hook import StepHook
from kvpilot.link.controls import Lease, Scope
from kvpilot.link.fields import HOOK_FIELDS, STEP_FIELDS
from kvpilot.link.files import open_controls
from kvpilot.link.following import newest_telemetry
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.place import LinkPlace

TICK_S = 0.1
STEP_S = 0.005
HERE = Path(__file__).parent
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""The link lives on a memory volume."""
POLICIES = HERE.parent / "policies"

KNOBS = (
    ManifestKnob("step_token_budget", "tokens", 64, 2048, 2048, 1, "per step"),
    ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 2048, 1, "per step"),
    ManifestKnob("speculative_tokens", "tokens", 0, 4, 4, 1, "per sequence"),
    ManifestKnob("max_running", "requests", 1, 64, 64, 1, "drains"),
    ManifestKnob("admission_watermark", "ratio", 0.05, 1.0, 1.0, 0.01, "at admission"),
)
FIELDS = tuple(field for name, field in STEP_FIELDS.items() if name not in HOOK_FIELDS)


def link_environ(folder: Path) -> dict[str, str]:
    for name in ("telemetry", "controls"):
        (folder / name).mkdir(mode=0o750, exist_ok=True)
    return {
        "KVPILOT_TELEMETRY": str(folder / "telemetry"),
        "KVPILOT_CONTROLS": str(folder / "controls"),
        "KVPILOT_ENGINE": "bench",
    }


def manifest() -> Manifest:
    return Manifest(
        "bench", "0", "none", 16, 4096, 98_304, 2048, "cpu", KNOBS, FIELDS, ("batch", "interactive")
    )


# --- the hook's CPU time


def hook_us(batch: int, steps: int) -> list[float]:
    """CPU microseconds of each step's hook calls: knobs in, a latency a sequence, record out."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        environ = link_environ(Path(folder))
        hook = StepHook.open(manifest(), environ=environ, clock=SystemClock())
        assert hook.enabled
        values = [float(i) if field.type == "f64" else i for i, field in enumerate(FIELDS)]
        command = [sys.executable, str(HERE / "link_overhead.py"), "--renew"]
        with subprocess.Popen(command, env={**os.environ, **environ}) as renewing:
            costs = []
            for _ in range(steps):
                time.sleep(0.0005)
                begin = time.thread_time_ns()
                hook.begin_step(time.monotonic_ns())
                record = hook.itl[1].record
                for sequence in range(batch):
                    record(5_000_000 + sequence)
                hook.end_step(values)
                costs.append((time.thread_time_ns() - begin) / 1e3)
            renewing.terminate()
        assert hook.enabled
        hook.close()
    return costs


def renew() -> None:
    """A writer of leases at 10 Hz, in a process of its own as the pilot is."""
    clock = SystemClock()
    place = LinkPlace.from_environ(os.environ)
    assert place is not None
    page = newest_telemetry(place.telemetry_directory(0), place.uids)
    assert page is not None
    writer, _page = open_controls(place, 0, clock)
    for renewal in range(1, 1_000_000):
        writer.write([Lease("speculative_tokens", Scope(), 2.0, 5 * NS, renewal)], page.header.nonce)
        time.sleep(TICK_S)


# --- reaction, with a stand-in engine


def stand_in(crossings: int) -> None:
    """Steps every 5 ms; `running` crosses 5 and returns; prints the time to each echo in seconds, as JSON."""
    hook = StepHook.open(manifest(), environ=os.environ, clock=SystemClock())
    assert hook.enabled
    values: dict[str, float] = {field.name: 0 for field in FIELDS} | {"kv_blocks_free": 4096}
    reactions: list[float] = []
    high, since_ns, steps, hold = False, time.monotonic_ns(), 0, 0.4
    next_ns = time.monotonic_ns()
    print("ready", flush=True)
    # The first crossing waits for the pilot to start; it is not a reaction.
    while len(reactions) < crossings + 1:
        next_ns += round(STEP_S * NS)
        time.sleep(max(0, next_ns - time.monotonic_ns()) / NS)
        now_ns = time.monotonic_ns()
        moved = hook.begin_step(now_ns)["speculative_tokens"] == 0
        steps += 1
        if high and moved and values["running"] == 9:
            reactions.append((now_ns - since_ns) / NS)
            # Not a multiple of the tick, so that crossings fall anywhere between two ticks.
            high, since_ns, hold = False, now_ns, 0.25 + 0.0137 * (len(reactions) % 8)
        elif not high and not moved and now_ns - since_ns > hold * NS:
            high, since_ns = True, now_ns
        values |= {"time_ns": now_ns, "duration_ns": round(STEP_S * NS), "steps_total": steps}
        values["running"] = 9 if high else 1
        values["finished_total"] = steps
        hook.end_step(list(values.values()))
    print(json.dumps(reactions[1:]), flush=True)
    hook.close()


REACTION_POLICY = """
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: reaction}
spec:
  mode: enforce
  limits: {maxChanges: 100000, per: 60s}
  inputs:
    running: {signal: requests_running, agg: last, maxAge: 2s}
  rules:
    - name: react
      when: running > 5
      until: running <= 5
      for: 0s
      keepFor: 0s
      cooldown: 0s
      do: [{knob: speculative_tokens, set: 0}]
"""


def reaction_ms(crossings: int) -> list[float]:
    """Milliseconds beyond one tick and one step, for each crossing. Negative: faster than the worst phase."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        environ = link_environ(folder)
        (folder / "policies").mkdir()
        (folder / "policies/reaction.yaml").write_text(REACTION_POLICY)
        command = [sys.executable, str(HERE / "link_overhead.py"), "--stand-in", str(crossings)]
        with subprocess.Popen(
            command, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True
        ) as engine:
            assert engine.stdout is not None
            assert engine.stdout.readline().strip() == "ready"
            with pilot(folder, environ, folder / "policies"):
                reactions = json.loads(engine.stdout.readline())
    return [(seconds - TICK_S - STEP_S) * 1e3 for seconds in reactions]


# --- the real engine and the real pilot


@contextlib.contextmanager
def pilot(folder: Path, environ: Mapping[str, str], policies: Path) -> Iterator[psutil.Process]:
    port = free_port()
    config = {
        "engine": {"name": "bench"},
        "classes": [
            {"name": "batch", "ttft": "30s", "itl": "200ms"},
            {"name": "interactive", "ttft": "2s", "itl": "50ms"},
        ],
        "policies": str(policies),
        "arm": {"after": 0, "finished": 0},
        "api": {"host": "127.0.0.1", "port": port},
        "journal": str(folder / "journal.db"),
        "socket": str(folder / "pilot.sock"),
    }
    path = folder / "kvpilot.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "kvpilot", "run", "--config", str(path)]
    with (folder / "pilot.log").open("wb") as log:
        child = subprocess.Popen(command, env={**os.environ, **environ}, stdout=log, stderr=log)
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/healthz", child, folder / "pilot.log")
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(15)


@contextlib.contextmanager
def engine(environ: Mapping[str, str], log: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "kvengine", "serve", "--port", str(port), "--speculative-tokens", "0"]
    with log.open("wb") as output:
        child = subprocess.Popen(command, env={**os.environ, **environ}, stdout=output, stderr=output)
    try:
        wait_until_answers(f"http://127.0.0.1:{port}/health", child, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait(15)


def wait_until_answers(url: str, child: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        if child.poll() is not None:
            sys.exit(f"{child.args!r} ended: {log.read_text()[-500:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.1)
    sys.exit(f"{url} does not answer: {log.read_text()[-500:]}")


def decode(url: str, batch: int, tokens: int) -> tuple[float, float]:
    """(tokens/s, median seconds a step) of `batch` requests decoding together, by the engine's own times."""
    times: list[list[list[int]]] = []

    def one(seed: int) -> None:
        body = {
            "model": "kvpilot-tiny",
            "prompt": "{" * 64,
            "max_tokens": tokens,
            "ignore_eos": True,
            "seed": seed,
            "kvpilot_times": True,
        }
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            times.append(json.load(answer)["kvpilot"]["emitted"])

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(t[0][0] for t in times), min(t[-1][0] for t in times)
    emitted = sum(m for t in times for at, m in t if begin < at <= end)
    gaps = [b[0] - a[0] for a, b in zip(times[0], times[0][1:], strict=False)]
    return emitted * NS / (end - begin), statistics.median(gaps) / NS


def beside_an_engine(quick: bool) -> dict[str, Any]:
    """Tokens/s with and without the link; the pilot's CPU and memory while the engine decodes."""
    rounds, tokens, seconds = (3, 150, 6.0) if quick else (9, 300, 20.0)
    rates: dict[str, list[float]] = {"with": [], "without": [], "without again": []}
    steps: list[float] = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        environ = link_environ(folder)
        with (
            engine(environ, folder / "a.log") as linked,
            engine({}, folder / "b.log") as bare,
            pilot(folder, environ, POLICIES) as process,
        ):
            for _ in range(rounds):
                for leg, url in (("with", linked), ("without", bare), ("without again", bare)):
                    rate, step = decode(url, 32, tokens)
                    rates[leg].append(rate)
                    if leg == "with":
                        steps.append(step)
            stop = threading.Event()
            load = threading.Thread(target=_keep_busy, args=(linked, stop))
            load.start()
            before, began = process.cpu_times(), time.monotonic()
            time.sleep(seconds)
            after, ended = process.cpu_times(), time.monotonic()
            uss_mb = process.memory_full_info().uss / 1e6
            stop.set()
            load.join()
    ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
    noise = [a / b for a, b in zip(rates["without again"], rates["without"], strict=True)]
    cpu_s = after.user + after.system - before.user - before.system
    return {
        "step_s": statistics.median(steps),
        "with_over_without": statistics.median(ratios),
        "with_over_without_range": [min(ratios), max(ratios)],
        "same_over_same_range": [min(noise), max(noise)],
        "tokens_per_s_with": statistics.median(rates["with"]),
        "pilot_cpu_share": cpu_s / (ended - began),
        "pilot_uss_mb": uss_mb,
    }


def _keep_busy(url: str, stop: threading.Event) -> None:
    while not stop.is_set():
        decode(url, 8, 100)


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    steps, crossings = (1_500, 30) if arguments.quick else (10_000, 200)
    hook = {batch: statistics.median(hook_us(batch, steps)) for batch in (1, 8, 32)}
    beside = beside_an_engine(arguments.quick)
    reactions = sorted(reaction_ms(crossings))
    p99 = reactions[min(len(reactions) - 1, int(0.99 * len(reactions)))]
    results = {
        "hook_us_p50_by_batch": {str(batch): us for batch, us in hook.items()},
        "hook_us_per_sequence": (hook[32] - hook[1]) / 31,
        **beside,
        "reaction_ms_p50": statistics.median(reactions),
    }
    bars = [
        Bar("hook_us_p50", hook[1], at_most=10),
        Bar("hook_share_of_step", hook[32] / 1e6 / max(beside["step_s"], 0.004), at_most=0.005),
        Bar("pilot_cpu_share", beside["pilot_cpu_share"], at_most=0.03),
        Bar("pilot_uss_mb", beside["pilot_uss_mb"], at_most=100),
        Bar("reaction_ms_p99", p99, at_most=20, spread=(reactions[0], reactions[-1])),
    ]
    settings = {
        "steps": steps,
        "crossings": crossings,
        "tick_s": TICK_S,
        "step_s": STEP_S,
        "share_at_batch": 32,
    }
    return settings, results, bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--renew", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stand-in", type=int, help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "--renew" in sys.argv:
        renew()
    elif "--stand-in" in sys.argv:
        stand_in(int(sys.argv[-1]))
    else:
        run("link_overhead", 1, measure, __doc__ or "", add_arguments)
