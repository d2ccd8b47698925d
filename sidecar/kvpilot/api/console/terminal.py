"""The console at a glance, for a terminal: from the same frames as the page."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvpilot.api.console.answers import TARGETS
from kvpilot.api.console.words import number, reason, seconds, value_of
from kvpilot.policy.source import printable

BAR_WIDTH = 28
MOST_TENANTS = 6
MOST_DECISIONS = 8
_MARKS = {
    "good": ("●", "green"),
    "acts": ("◆", "cyan"),
    "caution": ("▲", "yellow"),
    "bad": ("■", "bold red"),
    "quiet": ("○", "dim"),
}
_TITLES = {"state": "State", "doing": "Pilot", "next": "Next"}

Frame = Mapping[str, Any]


def render(frame: Frame, silent_s: float | None = None) -> RenderableType:
    """One frame. `silent_s`: for how long no newer one has come, where that is too long."""
    parts: list[RenderableType] = [_headline(frame)]
    if silent_s is not None:
        parts.append(_silent(frame, silent_s))
    parts += [_answers(frame), Text(), _memory(frame), Text(), _latency(frame), Text(), _knobs(frame)]
    return Group(*parts, Text(), _decisions(frame))


def _headline(frame: Frame) -> Text:
    engine, pilot = frame["engine"], frame["pilot"]
    rank = f" rank {pilot['rank']}" if pilot["rank"] else ""
    line = Text(f"{engine['name']}{rank}", style="bold")
    if engine.get("model"):
        line.append(
            f"  {engine['kind']} {engine['version']}, {engine['model']}, {engine['device']}", style="dim"
        )
    return line


def _silent(frame: Frame, silent_s: float) -> Text:
    ttl_s = max((lease["ttl_s"] for lease in frame["leases"]), default=None)
    text = f"The pilot has not answered for {seconds(silent_s)}; this is as it was."
    if ttl_s is not None:
        left_s = ttl_s - silent_s
        text += f" Leases run out in {seconds(left_s)}." if left_s > 0 else " Leases have run out: baseline."
    return Text(text, style="bold red")


def _answers(frame: Frame) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, answer in frame["answers"].items():
        mark, style = _MARKS[answer["level"]]
        grid.add_row(
            Text(f"{mark} {_TITLES[name]}", style=style), Text(printable(answer["title"]), style="bold")
        )
        for line in answer["lines"]:
            grid.add_row("", Text(printable(line), style="dim"))
    return grid


def _memory(frame: Frame) -> RenderableType:
    memory = frame["memory"]
    if "missing" in memory:
        return Text(f"KV memory: {memory['missing']}", style="dim")
    blocks = memory["blocks"]
    grid = Table.grid(padding=(0, 2))
    cached = memory["cached"]
    held, spare = memory["held"] / blocks, (cached or 0) / blocks
    grid.add_row("KV memory", _bar(held, spare), f"{held:.0%} held, {memory['free'] / blocks:.0%} free")
    for tenant in memory["tenants"][:MOST_TENANTS]:
        share = tenant["blocks"] / blocks
        load = f"{share:.0%}, {tenant['running']} running, {tenant['waiting']} waiting"
        grid.add_row(Text(f"  {printable(tenant['name'])}"), _bar(share), load)
    return grid


def _bar(ratio: float, spare: float = 0.0) -> Text:
    filled = round(min(max(ratio, 0.0), 1.0) * BAR_WIDTH)
    lesser = min(round(max(spare, 0.0) * BAR_WIDTH), BAR_WIDTH - filled)
    rest = BAR_WIDTH - filled - lesser
    return Text.assemble(("█" * filled, "blue"), ("▒" * lesser, "white"), ("·" * rest, "dim"))


def _latency(frame: Frame) -> Table:
    table = Table("class", "ITL p95", "target", "TTFT p95", "target", box=None, pad_edge=False)
    for klass, targets in reversed(frame["slo"].items()):
        row: list[Text] = [Text(printable(klass))]
        for name, (key, _) in TARGETS.items():
            signal = frame["signals"].get(name, {}).get("classes", {}).get(klass)
            value, target = value_of(signal), targets[key]
            if value is None:
                row.append(Text(reason(signal), style="dim"))
            else:
                late = value > target
                row.append(
                    Text(f"{seconds(value)}{' over' if late else ''}", style="bold red" if late else "")
                )
            row.append(Text(seconds(target), style="dim"))
        table.add_row(*row)
    return table


def _knobs(frame: Frame) -> Table:
    table = Table("knob", "now", "baseline", "lease", "by", box=None, pad_edge=False)
    for name, knob in frame["knobs"].items():
        leases = [lease for lease in frame["leases"] if lease["knob"] == name]
        values = ", ".join(_values(knob, leases))
        lease = seconds(max(each["ttl_s"] for each in leases)) if leases else ""
        by = ", ".join(f"{each['policy']}/{each['rule']}" for each in leases)
        table.add_row(name, values, number(knob["baseline"]), lease, Text(by), style="" if leases else "dim")
    return table


def _values(knob: Mapping[str, Any], leases: list[Mapping[str, Any]]) -> Iterator[str]:
    if knob["value"] is not None:
        yield number(knob["value"])
    elif not knob["scopes"] and not leases:
        yield number(knob["baseline"])
    else:
        scopes = knob["scopes"] or {lease["scope"]: lease["value"] for lease in leases}
        yield from (f"{number(value)} {printable(scope)}" for scope, value in scopes.items())


def _decisions(frame: Frame) -> Table:
    table = Table("#", "decision", "verdict", "why", box=None, pad_edge=False, expand=True)
    for row in frame["decisions"][:MOST_DECISIONS]:
        scope = "" if row["scope"] == "all" else f" {printable(row['scope'])}"
        change = f"{row['knob']}{scope} {_end(row['before'])} → {_end(row['after'])}"
        why = f"{row['policy']}/{row['rule']}: {printable(row['reason'])}"
        style = "magenta" if row["verdict"] == "shadowed" else ""
        table.add_row(
            str(row["number"]), Text(change), Text(row["verdict"], style=style), Text(why, style="dim")
        )
    return table


def _end(value: float | str | None) -> str:
    return "baseline" if value is None else value if isinstance(value, str) else number(value)
