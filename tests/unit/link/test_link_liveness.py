"""Silence is classified, not assumed."""

import pytest

from kvpilot.link.liveness import WEDGED_AFTER_S, classify

AT_WORK = {"lock_held": True, "running": 3, "waiting": 1, "seconds_since_step": 0.01, "p99_step_s": 0.05}


@pytest.mark.parametrize(
    ("state", "change"),
    [
        ("live", {}),
        ("dead", {"lock_held": False}),
        ("idle", {"running": 0, "waiting": 0, "seconds_since_step": 3600.0}),
        ("live", {"seconds_since_step": 2.0}),
        ("stalled", {"seconds_since_step": 2.1}),
        ("stalled", {"seconds_since_step": 2.1, "running": 0}),
        ("live", {"seconds_since_step": 2.1, "p99_step_s": 1.0}),
        ("stalled", {"seconds_since_step": 5.1, "p99_step_s": 1.0}),
        ("stalled", {"seconds_since_step": 2.1, "p99_step_s": None}),
        ("live", {"in_flight": 4, "seconds_since_byte": WEDGED_AFTER_S}),
        ("wedged", {"in_flight": 4, "seconds_since_byte": WEDGED_AFTER_S + 1}),
        ("live", {"in_flight": 0, "seconds_since_byte": WEDGED_AFTER_S + 1}),
        ("live", {"in_flight": 4, "seconds_since_byte": None}),
        ("stalled", {"in_flight": 4, "seconds_since_byte": 99.0, "seconds_since_step": 99.0}),
        ("live", {"running": 0, "waiting": 0, "in_flight": 1, "seconds_since_step": 3600.0}),
        ("dead", {"lock_held": False, "running": 0, "waiting": 0}),
    ],
)
def test_states(state: str, change: dict[str, float]) -> None:
    assert classify(**(AT_WORK | change)) == state
