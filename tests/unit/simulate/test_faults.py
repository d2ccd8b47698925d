"""Faults: they reach the pilot or the memory when they should, and nothing else ever changes."""

import pytest
from worlds import PROMISES, SHIPPED, Linear, arrivals, small

from kvpilot.simulate.faults import Fault, usable_share
from kvpilot.simulate.legs import load_policies
from kvpilot.simulate.replica import Replica
from kvpilot.workload.outcome import Fate

CLASSES = ("batch", "interactive")
FIELDS = ("kv_blocks_free", "kv_blocks_cached")


def flown(*faults: Fault, seconds: float = 12.0, piloted: bool = True, **changes: object) -> Replica:
    policies = load_policies(SHIPPED, CLASSES) if piloted else None
    plant = Linear(position_bytes=10.0)
    replica = Replica(small(**changes), plant, PROMISES, policies, faults=faults)
    for arrival in arrivals(1, seconds, 8.0):
        replica.offer(arrival)
    return replica


def sees(replica: Replica, at_s: float):
    """What the pilot's adapter sees at that second."""
    replica.fly_to(at_s)
    assert replica.cockpit is not None
    return replica.cockpit.pilot.engine.observe(replica.clock.monotonic_ns(), [("kv_occupancy", None)])


def test_a_lost_field_is_missing_while_the_fault_lasts_and_so_is_what_follows_from_it() -> None:
    replica = flown(Fault("signal_missing", 4, 4, signals=FIELDS))
    before, during, after = (sees(replica, at_s) for at_s in (3.5, 6, 9))
    for sight in (before, after):
        assert FIELDS[0] in sight.record
        assert isinstance(sight.readings["kv_occupancy", None].value, float)
    assert FIELDS[0] not in during.record
    assert during.record["steps_total"] > before.record["steps_total"]
    assert during.readings["kv_occupancy", None].reason == "not_provided"


def test_telemetry_that_stands_still_grows_old_and_comes_back() -> None:
    replica = flown(Fault("telemetry_frozen", 4, 4))
    before, early, late, after = (sees(replica, at_s) for at_s in (3.9, 4.5, 7.5, 9))
    assert early.record["steps_total"] == late.record["steps_total"]
    assert after.record["steps_total"] > late.record["steps_total"] >= before.record["steps_total"]
    assert late.readings["kv_occupancy", None].at_ns == early.readings["kv_occupancy", None].at_ns


@pytest.mark.parametrize("kind", ["fragmentation", "neighbour_memory"])
def test_memory_that_is_not_there_fails_steps_and_only_a_neighbour_shows(kind: str) -> None:
    """Every step fits in all of the headroom; in a hundredth of it prompts do not."""
    sizes = {"headroom_bytes": 60_000_000, "prefill_chunk_tokens": 512}
    calm, harmed = flown(piloted=False, **sizes), flown(Fault(kind, 4, 4, 0.99), piloted=False, **sizes)
    for replica in (calm, harmed):
        replica.fly_to(5.0)
    free = [replica.engine.executor.memory().free for replica in (calm, harmed)]
    assert free[1] == pytest.approx(free[0] * (0.01 if kind == "neighbour_memory" else 1.0))
    for replica in (calm, harmed):
        replica.fly_to(40.0)
        replica.land()
    assert calm.totals.oom == 0
    assert harmed.totals.oom > 0
    failed = [one for one in harmed.outcomes if one.fate is Fate.FAILED]
    assert failed
    assert all(3.9 < one.ended_at_s < 12 for one in failed)


def test_a_fault_that_never_comes_changes_nothing() -> None:
    later = (
        Fault("signal_missing", 999, 1, signals=FIELDS),
        Fault("telemetry_frozen", 999, 1),
        Fault("fragmentation", 999, 1, 0.5),
    )
    runs = [flown(*faults, seconds=6.0) for faults in ((), later)]
    for replica in runs:
        replica.fly_to(20.0)
        replica.land()
    assert runs[0].outcomes == runs[1].outcomes
    assert runs[0].cockpit.flown.leases == runs[1].cockpit.flown.leases


def test_shares_multiply_and_wrong_faults_are_refused() -> None:
    faults = (Fault("fragmentation", 0, 10, 0.5), Fault("neighbour_memory", 5, 10, 0.2))
    assert [usable_share(faults, at_s) for at_s in (1, 7, 12, 20)] == pytest.approx([0.5, 0.4, 0.8, 1.0])
    for wrong in (
        {"kind": "fragmentation", "value": 1.0},
        {"kind": "signal_missing"},
        {"kind": "telemetry_frozen", "signals": ("running",)},
        {"kind": "telemetry_frozen", "for_s": 0},
    ):
        with pytest.raises(ValueError, match=":"):
            Fault(**{"at_s": 0, "for_s": 1, **wrong})
