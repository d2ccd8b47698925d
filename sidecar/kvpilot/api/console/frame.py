"""One frame of the page: the status, and what the page shows beyond it."""

from collections.abc import Mapping
from typing import Any

from kvpilot.api.console.answers import answers
from kvpilot.api.console.memory import memory
from kvpilot.flight import Flight
from kvpilot.knobs import KNOBS
from kvpilot.policy.rules import PolicySet
from kvpilot.publish.status import status

_LEFT_OUT = ("inputs",)


def frame(flight: Flight) -> dict[str, Any]:
    """As plain data."""
    shown = {key: value for key, value in status(flight).items() if key not in _LEFT_OUT}
    slo = slo_by_class(flight)
    tick = flight.pilot.board.tick
    shown["slo"] = slo
    shown["memory"] = (
        memory(tick.sight, flight.pilot.engine.tenants()) if tick is not None else {"missing": "no tick yet"}
    )
    shown["policies"] = policies(flight.pilot.policies, flight.directory.good)
    shown["answers"] = answers(shown, slo)
    shown["operate"] = {"config": None if flight.config_path is None else str(flight.config_path)}
    for name, knob in shown["knobs"].items():
        known = KNOBS.get(name)
        knob["meaning"] = known.meaning if known is not None else ""
    return shown


def slo_by_class(flight: Flight) -> dict[str, dict[str, float]]:
    """Targets in seconds, lowest class first."""
    return {
        name: dict(targets)
        for name, targets in flight.pilot.slo.items()
        if isinstance(targets, Mapping) and name != "lowest"
    }


def policies(loaded: PolicySet, good: bool) -> dict[str, Any]:
    """What is flown. `current` is False where a newer set was rejected."""
    return {
        "current": good,
        "all": [
            {
                "name": policy.name,
                "mode": policy.mode,
                "priority": policy.priority,
                "summary": policy.annotations.get("summary"),
                "runbook_url": policy.annotations.get("runbook_url"),
                "rules": [rule.name for rule in policy.rules],
            }
            for policy in loaded.policies
        ],
    }
