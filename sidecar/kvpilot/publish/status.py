"""The status: everything the board holds, as plain data for JSON.

A signal without a value has its reason instead, never a zero. Infinity, which JSON lacks, is the text `+Inf`.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from kvpilot.adapters.actuator import Actuator
from kvpilot.alerts.watch import Alarm, describe
from kvpilot.clock import NS
from kvpilot.flight import Flight
from kvpilot.journal.records import format_scope
from kvpilot.policy.rules import PolicySet
from kvpilot.publish.board import Board, Tick
from kvpilot.signals import SIGNALS, Missing
from kvpilot.version import version

RECENT = 20


def status(flight: Flight) -> dict[str, Any]:
    """What `/status` and `kvpilot status` show."""
    pilot, name = flight.pilot, flight.engine_name
    board, ledger, tick = pilot.board, pilot.ledger, pilot.board.tick
    described: dict[str, Any] = {
        "pilot": {
            "version": version(),
            "ticks": board.ticks,
            "missed_ticks": board.missed,
            "failed_ticks": board.failures,
            "armed": tick.armed if tick else False,
            "arming": tick.arming if tick else None,
            "off": {"why": tick.off.why, "who": tick.off.who} if tick and tick.off else None,
            "rank": flight.rank,
            "flies_valves": pilot.actuator.flies_valves,
        },
        "engine": {"name": name, "state": "waiting"},
        "alerts": [],
        "actions": ledger.actions,
        "signals": _signals(board),
        "rules": [],
        "leases": [],
        "knobs": {},
        "overrides": [],
        "decisions": [_decision(row) for row in list(ledger.recent)[: -RECENT - 1 : -1]],
        "effects": [_plain(_fields(row)) for row in list(ledger.effects)[: -RECENT - 1 : -1]],
    }
    if tick is not None:
        described["at_wall_ns"] = tick.wall_ns
        described["engine"] = _engine(tick, name)
        described["alerts"] = _alerts([*pilot.watch.firing.values(), *pilot.devices.firing.values()], tick)
        described["inputs"] = _inputs(tick)
        described["rules"] = _rules(tick, pilot.policies)
        described["leases"] = _leases(tick, pilot.actuator)
        described["knobs"] = _knobs(tick)
        described["overrides"] = _overrides(tick)
    return described


class StatusPage:
    """The status as JSON, made once for each tick however many ask."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._kept: tuple[Tick | None, int, bytes] | None = None

    def body(self) -> bytes:
        """The newest. A tick that failed shows nothing new but its count."""
        board = self._flight.pilot.board
        kept = self._kept
        if kept is None or kept[0] is not board.tick or kept[1] != board.failures:
            text = json.dumps(status(self._flight), ensure_ascii=False, separators=(",", ":"))
            kept = self._kept = (board.tick, board.failures, text.encode())
        return kept[2]


def _engine(tick: Tick, name: str) -> dict[str, Any]:
    sight = tick.sight
    if sight.manifest is None:
        return {"name": name, "state": "waiting", "waiting_for": sight.waiting_for}
    manifest = sight.manifest
    return {
        "name": name,
        "state": sight.liveness,
        "nonce": f"{sight.nonce:016x}",
        "age_s": sight.age_s,
        "kind": manifest.engine,
        "version": manifest.engine_version,
        "model": manifest.model,
        "device": manifest.device,
        "blocks": manifest.blocks,
        "block_size": manifest.block_size,
        "classes": list(manifest.classes),
        "step": sight.record.sequence if sight.record else None,
        "valves": sight.valve.processes if sight.valve else 0,
        "valves_silent": sight.valve.silent if sight.valve else 0,
        "credits_left": dict(sight.valve.credits_left) if sight.valve else {},
        "ended": describe(sight.ended) if sight.ended else None,
        "unsupported_knobs": manifest.unsupported_knobs,
        "unsupported_signals": manifest.unsupported_signals,
    }


def _alerts(firing: Iterable[Alarm], tick: Tick) -> list[dict[str, Any]]:
    return [
        {
            "name": alarm.name,
            "severity": alarm.severity,
            "summary": alarm.summary,
            "description": alarm.description,
            "for_s": (tick.at_ns - alarm.since_ns) / NS,
        }
        for alarm in firing
    ]


def _signals(board: Board) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for view, value in board.values():
        shown = _value(value)
        band = board.tick.bands.get((view.signal, view.klass)) if board.tick is not None else None
        if band is not None and "value" in shown:
            shown |= {"p10": number(band.p10), "p90": number(band.p90)}
        if view.klass is not None:
            described[view.signal].setdefault("classes", {})[view.klass] = shown
            continue
        window = {} if view.window_s is None else {"window_s": view.window_s}
        described[view.signal] = {**shown, "agg": view.agg, **window, "unit": SIGNALS[view.signal].unit}
    return described


def _inputs(tick: Tick) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for (policy, name), value in tick.inputs.items():
        described.setdefault(policy, {})[name] = _value(value)
    return described


def _rules(tick: Tick, policies: PolicySet) -> list[dict[str, Any]]:
    if tick.outcome is None:
        return []
    described = []
    for policy in policies.policies:
        for rule in policy.rules:
            state = tick.outcome.state.rules.get((policy.name, rule.name))
            if state is None:
                continue
            described.append(
                {
                    "policy": policy.name,
                    "rule": rule.name,
                    "mode": policy.mode,
                    "shadow": state.shadow,
                    "state": state.phase.value,
                    "for_s": (tick.at_ns - state.since_ns) / NS,
                    "claims": [
                        {
                            "knob": claim.knob,
                            "scope": format_scope(claim.scope),
                            "value": claim.value,
                            "overruled_by": claim.overruled_by,
                        }
                        for claim in state.claims
                    ],
                }
            )
    return described


def _leases(tick: Tick, actuator: Actuator) -> list[dict[str, Any]]:
    unconfirmed = actuator.unconfirmed
    return [
        {
            "knob": lease.knob,
            "scope": format_scope(lease.scope),
            "value": lease.value,
            "ttl_s": lease.ttl_ns / NS,
            "policy": lease.policy,
            "rule": lease.rule,
            "confirmed": (lease.knob, lease.scope) not in unconfirmed,
        }
        for lease in tick.leases
    ]


def _knobs(tick: Tick) -> dict[str, Any]:
    if tick.context is None:
        return {}
    record, values = tick.sight.record, tick.context.values
    return {
        knob.name: {
            "value": (record.get(f"knob.{knob.name}") if record is not None else None),
            "scopes": {
                format_scope(scope): value for (name, scope), value in values.items() if name == knob.name
            },
            "baseline": knob.baseline,
            "minimum": knob.minimum,
            "maximum": knob.maximum,
            "unit": knob.unit,
        }
        for knob in tick.context.knobs.values()
    }


def _overrides(tick: Tick) -> list[dict[str, Any]]:
    if tick.context is None:
        return []
    return [
        {
            "knob": order.knob,
            "scope": format_scope(order.scope),
            "value": order.value,
            "left_s": (order.until_ns - tick.at_ns) / NS,
            "why": order.why,
            "who": order.who,
        }
        for order in tick.context.overrides
    ]


def _decision(row: Any) -> dict[str, Any]:
    fields = _fields(row)
    fields["engine_nonce"] = f"{row.engine_nonce:016x}"
    fields["inputs"] = _plain(row.inputs)
    return _plain(fields)


def _fields(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def _value(value: float | Missing) -> dict[str, Any]:
    if isinstance(value, Missing):
        age = {} if value.age_s is None else {"age_s": value.age_s}
        return {"missing": value.reason, **age}
    return {"value": number(value)}


def _plain(values: Any) -> dict[str, Any]:
    return {name: number(value) if isinstance(value, float) else value for name, value in values.items()}


def number(value: float) -> float | str:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf" if value < 0 else "NaN")
