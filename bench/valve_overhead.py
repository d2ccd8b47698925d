"""What the valve costs each request: `python bench/valve_overhead.py`.

CPU time of a request through the valve (classified by its key, judged, counted in the page, its answer of two
messages watched), less the same request without it, while a process of its own renews leases ten times a
second. Reads of the controls page are in it, once in 20 ms as in service. Measured without leases, with one,
and with as many as a page holds, of fractions and credits, on classes and tenants. A refusal is measured too;
and once a second, beside the requests, what it costs to look at sibling processes.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frame import Bar, run

from kvpilot.clock import NS, SystemClock
from kvpilot.inside.valve import Valve
from kvpilot.link.controls import MAX_LEASES, Lease, Scope
from kvpilot.link.files import open_controls
from kvpilot.link.place import LinkPlace

HERE = Path(__file__).parent
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
TICK_S = 0.1
SIBLINGS = 3
KEY = "sk-bench"
START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"x"}


@contextlib.contextmanager
def renewed(leases: str, environ: Mapping[str, str]) -> Iterator[None]:
    """Leases held by another process, until the valve had time to see them renewed."""
    command = [sys.executable, str(HERE / "valve_overhead.py"), "--renew", leases]
    with subprocess.Popen(command, env={**os.environ, **environ}) as child:
        try:
            yield
        finally:
            child.terminate()


def renew(leases: str) -> None:
    place = LinkPlace.from_environ(os.environ)
    assert place is not None
    writer, _page = open_controls(place, None, SystemClock())
    scopes = [Scope("class_at_most", level) for level in range(8)]
    scopes += [Scope("tenant", f"tenant-{number}") for number in range(7)]
    wishes = {
        "none": [],
        "one": [("shed_fraction", Scope(), 0.0)],
        # Nothing is turned away, but every lease is asked.
        "all": [
            ("shed_fraction" if number % 2 else "admission_credits", scope, 0.0 if number % 2 else 1e9)
            for number, scope in enumerate(scopes)
        ]
        + [("prompt_bytes_per_token", Scope(), 4.0)],
        "refuse": [("admission_credits", Scope(), 0.0)],
    }[leases]
    for renewal in range(1, 1_000_000):
        writer.write([Lease(*wish, 5 * NS, renewal) for wish in wishes[:MAX_LEASES]])
        time.sleep(TICK_S)


def sibling() -> None:
    """Another API-server process that does nothing but watch."""

    async def watch() -> None:
        stopping = asyncio.Event()

        async def receive() -> dict[str, Any]:
            print("ready", flush=True)
            await stopping.wait()
            return {"type": "lifespan.shutdown"}

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()

        await Valve(app)({"type": "lifespan"}, receive, None)  # type: ignore[arg-type]

    asyncio.run(watch())


def scope() -> dict[str, Any]:
    headers = [
        *((b"host", b"localhost"), (b"user-agent", b"bench"), (b"content-type", b"application/json")),
        *((b"authorization", b"Bearer " + KEY.encode()), (b"content-length", b"1200")),
    ]
    return {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send(START)
    await send(END)


async def drop(_message: Any) -> None:
    pass


async def nothing() -> Any:
    return {"type": "http.request", "body": b"", "more_body": False}


async def costs_us(app: Any, requests: int) -> list[float]:
    """CPU microseconds of each request."""
    request, costs = scope(), []
    for number in range(requests):
        begin = time.thread_time_ns()
        await app(request, nothing, drop)
        costs.append((time.thread_time_ns() - begin) / 1e3)
        if number % 100 == 0:
            await asyncio.sleep(0.002)
    return costs


def through_valve(leases: str, environ: Mapping[str, str], requests: int) -> tuple[list[float], list[float]]:
    """(costs of requests less those without a valve, costs of looking at siblings), in microseconds."""
    with renewed(leases, environ):
        valve = Valve(answer, environ, SystemClock(), random.Random(1))
        try:
            _settle(valve, leases)
            bare = statistics.median(asyncio.run(costs_us(answer, requests)))
            costs = [cost - bare for cost in asyncio.run(costs_us(valve, requests))]
            looks = []
            for _ in range(200):
                begin = time.thread_time_ns()
                valve._look(time.monotonic_ns())
                looks.append((time.thread_time_ns() - begin) / 1e3)
            assert valve.enabled
        finally:
            valve.close()
    return costs, looks


def _settle(valve: Valve, leases: str) -> None:
    """Until leases are in force, and this process, new beside its siblings, has claimed its share."""
    deadline = time.monotonic() + 10
    while leases != "none":
        now_ns = time.monotonic_ns()
        valve._poll(now_ns)
        admitted = valve._law.admit(0, "tenant-0", 1200, now_ns).admitted
        if valve._law.echoes(now_ns) and admitted == (leases != "refuse"):
            return
        time.sleep(0.02)
        assert time.monotonic() < deadline, "no lease came into force"


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    requests = 5_000 if arguments.quick else 30_000
    with tempfile.TemporaryDirectory(dir=MEMORY) as name, contextlib.ExitStack() as siblings:
        folder = Path(name)
        for part in ("telemetry", "controls"):
            (folder / part).mkdir(mode=0o750)
        callers = folder / "callers.json"
        classes = {f"class-{level}": level for level in range(8)}
        keys = {hashlib.sha256(KEY.encode()).hexdigest(): {"class": "class-0", "tenant": "tenant-0"}}
        callers.write_text(json.dumps({"classes": classes, "keys": keys}))
        environ = {
            "KVPILOT_TELEMETRY": str(folder / "telemetry"),
            "KVPILOT_CONTROLS": str(folder / "controls"),
            "KVPILOT_ENGINE": "bench",
            "KVPILOT_CALLERS": str(callers),
        }
        for _ in range(SIBLINGS):
            command = [sys.executable, str(HERE / "valve_overhead.py"), "--sibling"]
            child = subprocess.Popen(
                command, env={**os.environ, **environ}, stdout=subprocess.PIPE, text=True
            )
            siblings.callback(child.wait)
            siblings.callback(child.kill)
            assert child.stdout is not None
            assert child.stdout.readline().strip() == "ready"
        measured = {
            leases: through_valve(leases, environ, requests) for leases in ("none", "one", "all", "refuse")
        }
    medians = {leases: statistics.median(costs) for leases, (costs, _) in measured.items()}
    worst = sorted(measured["all"][0])
    looks = measured["all"][1]
    results = {
        "valve_us_p50_by_leases": medians,
        "valve_us_mean_all_leases": statistics.fmean(worst),
        "valve_us_p99_all_leases": worst[int(0.99 * len(worst))],
        "look_us_p50": statistics.median(looks),
    }
    bars = [
        Bar("valve_us_p50", medians["all"], at_most=50),
        Bar("valve_us_mean", statistics.fmean(worst), at_most=50),
        Bar("refusal_us_p50", medians["refuse"], at_most=50),
    ]
    settings = {"requests": requests, "leases": MAX_LEASES, "siblings": SIBLINGS, "tick_s": TICK_S}
    return settings, results, bars


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--renew", help=argparse.SUPPRESS)
    parser.add_argument("--sibling", action="store_true", help=argparse.SUPPRESS)


if __name__ == "__main__":
    if "--renew" in sys.argv:
        renew(sys.argv[-1])
    elif "--sibling" in sys.argv:
        sibling()
    else:
        run("valve_overhead", 1, measure, __doc__ or "", add_arguments)
