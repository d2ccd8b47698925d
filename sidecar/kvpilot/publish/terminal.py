"""The status for a terminal: from the same plain data that `/status` gives."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render(status: Mapping[str, Any]) -> RenderableType:
    """Engine, knobs, rules, signals and the newest decisions, top to bottom."""
    return Group(_headline(status), _knobs(status), _rules(status), _signals(status), _decisions(status))


def _headline(status: Mapping[str, Any]) -> Text:
    engine, pilot = status["engine"], status["pilot"]
    rank = f" rank {pilot['rank']}" if pilot["rank"] else ""
    line = Text(f"{engine['name']}{rank}: {engine['state']}", style="bold")
    if engine.get("waiting_for"):
        line.append(f", {engine['waiting_for']}")
    if engine.get("model"):
        line.append(f"  {engine['kind']} {engine['version']}, {engine['model']}", style="dim")
    if pilot["off"]:
        line.append(f"  OFF: {pilot['off']['why']} ({pilot['off']['who']})", style="bold red")
    elif not pilot["armed"]:
        awaited = f"arms {pilot['arming']}; until then" if pilot["arming"] else "not armed:"
        line.append(f"  {awaited} rules run shadowed", style="yellow")
    if not pilot["flies_valves"]:
        line.append("  the valves are another pilot's", style="dim")
    for alert in status["alerts"]:
        style = "bold red" if alert["severity"] == "critical" else "yellow"
        line.append(f"\n{alert['name']} for {alert['for_s']:.0f} s: {alert['summary']}", style=style)
        line.append(f"\n  {alert['description']}", style="dim")
    if engine.get("valves_silent"):
        line.append(
            f"\n{engine['valves_silent']} of {engine['valves']} valves do not write their page: "
            "a process that hangs, a callers file that it cannot use, or a server without a lifespan",
            style="yellow",
        )
    for order in status["overrides"]:
        line.append(
            f"\noverride {order['knob']} {order['scope']} = {order['value']:g} for {order['left_s']:.0f} s:"
            f" {order['why']} ({order['who']})",
            style="yellow",
        )
    return line


def _knobs(status: Mapping[str, Any]) -> Table:
    table = Table("knob", "in force", "baseline", "lease", "by", title="Knobs", title_justify="left")
    for name, knob in status["knobs"].items():
        held = [lease for lease in status["leases"] if lease["knob"] == name]
        leases = ", ".join(
            f"{lease['value']:g}{'' if lease['scope'] == 'all' else ' ' + lease['scope']}"
            f"{'' if lease['confirmed'] else ' (unconfirmed)'}"
            for lease in held
        )
        by = ", ".join(f"{lease['policy']}/{lease['rule']}" for lease in held)
        table.add_row(name, _in_force(knob), _number(knob["baseline"]), leases, by)
    return table


def _in_force(knob: Mapping[str, Any]) -> str:
    """The engine's value; of a knob that works by scope, what holds in each, or its baseline."""
    if knob["value"] is not None:
        return _number(knob["value"])
    scopes = [f"{_number(value)} {scope}" for scope, value in knob["scopes"].items()]
    return ", ".join(scopes) or _number(knob["baseline"])


def _rules(status: Mapping[str, Any]) -> Table:
    table = Table("policy", "rule", "state", "since", "claims", title="Rules", title_justify="left")
    for rule in status["rules"]:
        claims = ", ".join(
            f"{claim['knob']} {claim['value']:g}"
            + (f" (overruled by {claim['overruled_by']})" if claim["overruled_by"] else "")
            for claim in rule["claims"]
        )
        state = rule["state"] + (" (shadow)" if rule["shadow"] else "")
        table.add_row(rule["policy"], rule["rule"], state, f"{rule['for_s']:.1f} s", claims)
    return table


def _signals(status: Mapping[str, Any]) -> Table:
    table = Table("signal", "value", "unit", "as", title="Signals", title_justify="left")
    for name, signal in status["signals"].items():
        window = f" {signal['window_s']:g}s" if "window_s" in signal else ""
        value = _number(signal["value"]) if "value" in signal else f"[dim]{signal['missing']}[/dim]"
        table.add_row(name, value, signal["unit"], signal["agg"] + window)
    return table


def _decisions(status: Mapping[str, Any]) -> Table:
    table = Table(
        "#", "rule", "knob", "change", "verdict", "why", title="Newest decisions", title_justify="left"
    )
    for row in status["decisions"][:10]:
        change = f"{_number(row['before'])} -> {_number(row['after'])}"
        rule = f"{row['policy']}/{row['rule']}"
        table.add_row(str(row["number"]), rule, row["knob"], change, row["verdict"], Text(row["reason"]))
    return table


def _number(value: float | str | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"
