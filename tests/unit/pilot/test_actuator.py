"""Verdicts come from echoes: what the engine has read, and what it then reports."""

from dataclasses import replace

import pytest
from pilot_world import IDENTITY, KNOBS, manifest

from kvpilot.adapters.actuator import Actuator
from kvpilot.adapters.engine import Sight
from kvpilot.adapters.pages import Controls
from kvpilot.adapters.valves import ValveSight
from kvpilot.clock import NS
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter, Scope, newest_slot
from kvpilot.link.records import StepRecord
from kvpilot.policy.lease import OVERRIDE, LeaseWish

CHUNK = ("prefill_chunk_tokens", Scope("all"))
SHED = ("shed_fraction", Scope("class_at_most", 1))
CREDITS = ("admission_credits", Scope("class_at_most", 0))


class Bench:
    """An actuator over two buffers, and sights made by hand."""

    def __init__(self) -> None:
        self.engine = bytearray(CONTROLS_BYTES)
        self.valve = bytearray(CONTROLS_BYTES)
        self.actuator = Actuator(
            Controls(ControlsWriter(self.engine, IDENTITY), ControlsWriter(self.valve, IDENTITY)), renewal=1
        )

    def write(self, *wishes: LeaseWish, numbers: dict | None = None) -> None:  # type: ignore[type-arg]
        self.actuator.write(wishes, numbers or {}, nonce=9, at_ns=0)

    def sight(self, sequence: int, value: float = 512.0, valve: ValveSight | None = None) -> Sight:
        names = {"controls_sequence": 0, "knob.prefill_chunk_tokens": 1}
        record = StepRecord(1, (sequence, value), names)
        return Sight(NS, manifest=manifest(knobs=KNOBS), nonce=9, record=record, liveness="live", valve=valve)

    def verdicts(self, sight: Sight) -> list[str]:
        return [echo.verdict for echo in self.actuator.confirm(sight)]


def wish(value: float, target: tuple[str, Scope] = CHUNK) -> LeaseWish:
    return LeaseWish(*target, value, 15 * NS, "p", "r")


def valve(sequence: int, obeyed: dict[tuple[str, Scope], float] | None = None) -> ValveSight:
    return ValveSight(1, {}, 0, sequence, {}, obeyed=obeyed or {})


def test_a_write_that_no_step_has_read_is_unconfirmed_whatever_the_echo() -> None:
    bench = Bench()
    bench.write(wish(64), numbers={CHUNK: 5})
    assert bench.verdicts(bench.sight(sequence=0, value=64)) == []
    assert bench.verdicts(bench.sight(sequence=1, value=64)) == ["applied"]
    assert bench.verdicts(bench.sight(sequence=2, value=64)) == []


def test_the_engine_snaps_to_its_grid_and_that_is_applied() -> None:
    bench = Bench()
    bench.write(wish(70), numbers={CHUNK: 5})
    assert bench.verdicts(bench.sight(sequence=1, value=64)) == ["applied"]


def test_another_value_is_a_refusal_only_after_several_renewals() -> None:
    """An engine that comes from a pause reads its first table as history, and obeys from the next on."""
    bench = Bench()
    bench.write(wish(64), numbers={CHUNK: 5})
    assert bench.verdicts(bench.sight(sequence=1, value=512)) == []
    assert bench.verdicts(bench.sight(sequence=10, value=512)) == []
    assert bench.verdicts(bench.sight(sequence=11, value=512)) == ["rejected_by_engine"]


@pytest.mark.parametrize("target", [SHED, ("shed_fraction", Scope("tenant", "acme")), CREDITS])
def test_a_valves_knob_is_applied_when_every_valve_says_so(target: tuple[str, Scope]) -> None:
    bench = Bench()
    bench.write(wish(0.5, target), numbers={target: 5})
    assert bench.verdicts(bench.sight(0, valve=valve(0, {target: 0.5}))) == []
    assert bench.verdicts(bench.sight(0, valve=valve(1))) == []
    assert bench.verdicts(bench.sight(0, valve=valve(1, {target: 0.25}))) == []
    assert bench.verdicts(bench.sight(0, valve=valve(1, {target: 0.5}))) == ["applied"]


def test_a_valve_that_does_not_obey_after_several_renewals_refuses() -> None:
    bench = Bench()
    bench.write(wish(0.5, SHED), numbers={SHED: 5})
    assert bench.verdicts(bench.sight(0, valve=valve(10))) == []
    assert bench.verdicts(bench.sight(0, valve=valve(11))) == ["rejected_by_engine"]


def test_a_valves_lease_is_withdrawn_once_every_valve_has_read_that() -> None:
    bench = Bench()
    bench.write(wish(0.5, SHED))
    bench.write(numbers={SHED: 6})
    assert bench.verdicts(bench.sight(0, valve=valve(1, {SHED: 0.5}))) == []
    assert bench.verdicts(bench.sight(0, valve=valve(2))) == ["applied"]


def test_only_an_override_is_an_order() -> None:
    bench = Bench()
    bench.write(wish(0.5, SHED), replace(wish(0.1, CREDITS), policy=OVERRIDE))
    slot = newest_slot(bench.valve)
    assert slot is not None
    assert [(lease.knob, lease.order) for lease in slot.leases] == [
        ("shed_fraction", False),
        ("admission_credits", True),
    ]


def test_what_valves_do_not_obey_is_not_in_force() -> None:
    bench = Bench()
    bench.write(wish(0.5, SHED))
    assert bench.actuator.values_in_force(bench.sight(0, valve=valve(0)))[SHED] == 0.5
    assert SHED not in bench.actuator.values_in_force(bench.sight(0, valve=valve(1)))
    assert bench.actuator.values_in_force(bench.sight(0, valve=valve(1, {SHED: 0.4})))[SHED] == 0.4


def test_leases_go_to_the_page_of_whoever_applies_the_knob() -> None:
    bench = Bench()
    bench.write(wish(64), wish(0.5, SHED))
    engine, shed = newest_slot(bench.engine), newest_slot(bench.valve)
    assert engine is not None
    assert shed is not None
    assert [lease.knob for lease in engine.leases] == ["prefill_chunk_tokens"]
    assert [lease.knob for lease in shed.leases] == ["shed_fraction"]
    assert (engine.nonce, shed.nonce) == (9, 0)


def test_every_write_renews_and_no_leases_are_written_once() -> None:
    bench = Bench()
    seen = []
    for wishes in ([wish(64)], [wish(64)], [], [], []):
        bench.write(*wishes)
        slot = newest_slot(bench.engine)
        assert slot is not None
        seen.append((slot.sequence, [lease.renewal for lease in slot.leases]))
    assert seen == [(1, [2]), (2, [3]), (3, []), (3, []), (3, [])]


def test_a_leases_decision_id_is_that_of_the_decision_it_carries() -> None:
    bench = Bench()
    bench.write(wish(64), numbers={CHUNK: 41})
    bench.write(wish(64))
    slot = newest_slot(bench.engine)
    assert slot is not None
    assert slot.leases[0].decision_id == 41


def test_a_value_in_force_is_the_echo_once_the_write_was_read_and_the_write_until_then() -> None:
    bench = Bench()
    bench.write(wish(64))
    assert bench.actuator.values_in_force(bench.sight(sequence=0, value=512))[CHUNK] == 64
    assert bench.actuator.values_in_force(bench.sight(sequence=1, value=80))[CHUNK] == 80
    bench.write()
    assert CHUNK not in bench.actuator.values_in_force(bench.sight(sequence=1, value=80))


def test_a_lease_that_was_renewed_too_late_has_expired_and_is_confirmed_again() -> None:
    bench = Bench()
    bench.write(wish(64), numbers={CHUNK: 5})
    assert bench.verdicts(bench.sight(sequence=1, value=64)) == ["applied"]
    late = replace(bench.sight(sequence=1, value=512), at_ns=15 * NS)
    assert bench.verdicts(late) == [], "its last moment"
    late = replace(late, at_ns=15 * NS + 1)
    assert [(echo.number, echo.verdict) for echo in bench.actuator.confirm(late)] == [(5, "lease_expired")]
    assert bench.verdicts(late) == [], "once"
    bench.actuator.write((wish(64),), {}, nonce=9, at_ns=16 * NS)
    assert bench.actuator.unconfirmed.keys() == {CHUNK}
    assert bench.verdicts(replace(bench.sight(sequence=1, value=512), at_ns=17 * NS)) == []
    assert bench.verdicts(replace(bench.sight(sequence=2, value=64), at_ns=17 * NS)) == ["applied"]
