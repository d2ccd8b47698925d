"""`scope: {tenant: ...}`: a tenant by name, and whichever holds most when the rule acts."""

from policy_flight import Flight, policy

from kvpilot.link.controls import Scope
from kvpilot.policy.outcome import Outcome
from kvpilot.policy.state import Phase
from kvpilot.signals import Missing

TOP = """
    - name: hog
      when: load > 10
      cooldown: 500ms
      do: [{knob: shed_fraction, add: 0.25, max: 50%, scope: {tenant: top}}]
      recover: [{knob: shed_fraction, add: -0.25, every: 1s}]
"""


def shares(outcome: Outcome) -> dict[str | int | None, float]:
    return {lease.scope.argument: lease.value for lease in outcome.leases}


def test_a_tenant_by_name() -> None:
    rule = "- {name: one, when: load > 10, do: [{knob: shed_fraction, set: 0.5, scope: {tenant: acme}}]}"
    flight = Flight([policy(rule)])
    assert [lease.scope for lease in flight.fly(20).leases] == [Scope("tenant", "acme")]


def test_the_claim_moves_with_the_top_tenant_and_the_former_one_walks_home() -> None:
    flight = Flight([policy(TOP)])
    flight.fly(20, 6, top_tenant="acme")
    assert shares(flight.fly(20, top_tenant="globex")) == {"acme": 0.5}, "cooldown"
    assert shares(flight.fly(20, 4, top_tenant="globex")) == {"acme": 0.5, "globex": 0.25}
    assert shares(flight.fly(20, 10, top_tenant="globex")) == {"acme": 0.25, "globex": 0.5}
    assert shares(flight.fly(20, 10, top_tenant="globex")) == {"globex": 0.5}
    assert shares(flight.fly(1, 30, top_tenant="globex")) == {}


def test_who_is_top_again_is_claimed_from_where_it_was() -> None:
    flight = Flight([policy(TOP)])
    flight.fly(20, 6, top_tenant="acme")
    flight.fly(20, 5, top_tenant="globex")
    assert shares(flight.fly(20, 7, top_tenant="acme")) == {"acme": 0.5, "globex": 0.25}
    assert shares(flight.fly(20, 10, top_tenant="acme")) == {"acme": 0.5}


def test_leases_have_to_fit_a_page() -> None:
    rule = TOP.replace("cooldown: 500ms", "cooldown: 100ms").replace("every: 1s", "every: 1h")
    flight = Flight([policy(rule)])
    for number in range(20):
        outcome = flight.fly(20, 2, top_tenant=f"t{number:02}")
    assert len(outcome.leases) == 4, "the top one and three before it"
    assert "t19" in shares(outcome)


def test_nobody_on_top_is_nobody_to_act_on() -> None:
    flight = Flight([policy(TOP)])
    assert shares(flight.fly(20, 5, top_tenant=None)) == {}
    assert flight.phase("hog") is Phase.ACTIVE
    assert shares(flight.fly(20, top_tenant="acme")) == {"acme": 0.25}
    assert shares(flight.fly(20, 10, top_tenant=None)) == {"acme": 0.25}, "kept, not stepped"


def test_not_to_know_who_is_on_top_is_a_missing_input() -> None:
    flight = Flight([policy(TOP, spec="onMissing: hold\n  holdFor: 1s")])
    flight.fly(20, 5, top_tenant=Missing("not_provided"))
    assert flight.phase("hog") is Phase.INACTIVE
    flight.fly(20, top_tenant="acme")
    assert shares(flight.fly(20, 10, top_tenant=Missing("not_provided"))) == {"acme": 0.25}
    assert flight.log[-1].reason == "held up to 1s: who holds most KV memory is missing (not_provided)"
    assert shares(flight.fly(20, top_tenant=Missing("not_provided"))) == {}
