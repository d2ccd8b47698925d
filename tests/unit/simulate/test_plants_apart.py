"""The pilot learns its own step-time model and never sees the plant's: neither side imports the other."""

import ast
from pathlib import Path

SIDECAR = Path(__file__).parents[3] / "sidecar/kvpilot"


def imported(folder: str) -> set[str]:
    found: set[str] = set()
    for path in sorted((SIDECAR / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
    return found


def test_plant_and_pilot_share_names_of_the_step_record_and_nothing_else() -> None:
    plants = {name for name in imported("simulate/plants") if name.startswith("kvpilot")}
    allowed = (
        *("kvpilot.simulate.plants", "kvpilot.link", "kvpilot.clock"),
        *("kvpilot.incident.recording", "kvpilot.workload.arrival"),
    )
    assert all(name.startswith(allowed) for name in plants), plants
    for folder in ("forecast", "policy", "adapters"):
        assert not any(name.startswith("kvpilot.simulate") for name in imported(folder))
