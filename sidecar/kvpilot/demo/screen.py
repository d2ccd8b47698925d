"""What the demo shows: a live panel while a leg flies, and the scoreboard at the end."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

BAR_WIDTH = 30
LOG_WIDTH = 150


class Screen:
    """A live terminal view on a terminal; a plain line a second elsewhere, so that a log stays readable.

    Everything goes to stderr when the result is JSON, so that stdout holds one object and nothing else.
    """

    def __init__(self, as_json: bool) -> None:
        self.console = Console(stderr=as_json, highlight=False)
        if not self.console.is_terminal:
            # A log has no width of its own; the scoreboard needs this much to keep a row on one line.
            self.console.width = LOG_WIDTH
        self._live: Live | None = None
        self._last_second = -1

    def say(self, line: str) -> None:
        self.console.print(line)

    def begin_leg(self) -> None:
        self._last_second = -1
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()

    def end_leg(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, leg: str, elapsed_s: float, seconds: float, state: Mapping[str, Any]) -> None:
        """`state` as `demo.instruments.Instruments.read` returns it."""
        if self._live is not None:
            self._live.update(_panel(leg, elapsed_s, seconds, state))
        elif int(elapsed_s) != self._last_second and int(elapsed_s) % 5 == 0:
            self._last_second = int(elapsed_s)
            knobs = state["knobs"]
            self.console.print(
                f"  {leg}: {elapsed_s:4.0f} s  KV {state['kv_occupancy']:4.0%}  "
                f"running {state['running']:.0f}  waiting {state['waiting']:.0f}  "
                f"chunk {knobs.get('prefill_chunk_tokens', 0):.0f}  "
                f"drafts {knobs.get('speculative_tokens', 0):.0f}"
            )


def _panel(leg: str, elapsed_s: float, seconds: float, state: Mapping[str, Any]) -> Group:
    head = Text.assemble((f" {leg} ", "bold reverse"), f"  {elapsed_s:4.1f} s of {seconds:g}")
    rows = Table.grid(padding=(0, 2))
    rows.add_row("KV in use", _bar(state["kv_occupancy"]), f"{state['kv_occupancy']:.0%}")
    rows.add_row("running / waiting", "", f"{state['running']:.0f} / {state['waiting']:.0f}")
    itl_p95_s = state.get("itl_p95_s")
    rows.add_row("ITL p95", "", "-" if itl_p95_s is None else f"{itl_p95_s * 1000:.0f} ms")
    rows.add_row("preempted / out of memory", "", f"{state['preemptions']:.0f} / {state['oom']:.0f}")
    knobs = Table.grid(padding=(0, 2))
    for name, value in state["knobs"].items():
        baseline = state["baselines"][name]
        moved = value != baseline
        knobs.add_row(name, f"{value:g}", f"(baseline {baseline:g})", style="yellow" if moved else "dim")
    if not state["why"]:
        return Group(head, rows, knobs)
    return Group(head, rows, knobs, Text("the pilot holds", style="bold"), *map(Text, state["why"]))


def _bar(ratio: float) -> Text:
    filled = round(min(max(ratio, 0.0), 1.0) * BAR_WIDTH)
    colour = "green" if ratio < 0.7 else "yellow" if ratio < 0.9 else "red"
    return Text.assemble(("━" * filled, colour), ("━" * (BAR_WIDTH - filled), "grey37"))


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("goodput_work", "goodput (work)", "{:.3f}"),
    ("finished", "finished", "{:d}"),
    ("shed", "shed", "{:d}"),
    ("failed", "failed", "{:d}"),
    ("oom", "OOM", "{:d}"),
    ("preemptions", "preempted", "{:d}"),
    ("ttft_p95_s", "TTFT p95", "{:.2f} s"),
    ("itl_p95_s", "ITL p95", "{:.3f} s"),
    ("tokens_per_s", "tokens/s", "{:.0f}"),
    ("kv_occupancy_max", "KV max", "{:.0%}"),
    ("actions", "actions", "{:d}"),
)


def scoreboard(console: Console, legs: Sequence[tuple[str, Mapping[str, Any]]], best: str) -> None:
    """One row a leg, the best goodput in bold."""
    table = Table(title="Same workload, same engine process, one leg after another", title_justify="left")
    table.add_column("leg")
    for _, title, _ in COLUMNS:
        table.add_column(title, justify="right")
    for name, result in legs:
        cells = [form.format(result[key]) if result[key] is not None else "-" for key, _, form in COLUMNS]
        table.add_row(name, *cells, style="bold" if name == best else "")
    console.print(table)


def fail(message: str) -> None:
    """One line on stderr, exit status 1."""
    print(f"kvpilot demo: {message}", file=sys.stderr)
    raise SystemExit(1)
