"""What must hold at every tick of every flight: random policies, series with every gap, random people.

`steps` below counts what a rule did from the outside, from one state to the next, not from its own books.
"""

import math
from collections import defaultdict
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from policy_worlds import (
    ALL,
    CALM,
    KNOBS,
    Flown,
    Moment,
    by_key,
    fly,
    followers,
    nervous,
    policies,
    policy_texts,
    probers,
    rivals,
    series,
    walkers,
)

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.arbitrate import Bid, arbitrate, covers
from kvpilot.policy.context import Override
from kvpilot.policy.expr import Expression
from kvpilot.policy.grid import place, protective_first
from kvpilot.policy.lease import OVERRIDE
from kvpilot.policy.load import load_text
from kvpilot.policy.outcome import FROM_ECHOES, VERDICTS, Outcome
from kvpilot.policy.phase import asks_when
from kvpilot.policy.rules import TOP_TENANT, Action, Policy, Rule, Solve
from kvpilot.policy.state import Claim, Phase, RuleState
from kvpilot.signals import Missing

Key = tuple[str, str]
Target = tuple[str, Scope]

flights = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
    # Not the one that explains: it traces every line, and takes minutes here.
    phases=(Stage.explicit, Stage.reuse, Stage.generate, Stage.shrink),
)


def claims_of(state: RuleState | None) -> dict[Target, Claim]:
    return {} if state is None else {(claim.knob, claim.scope): claim for claim in state.claims}


def before(flown: Flown, key: Key) -> RuleState | None:
    """The state that the rule went on from; None where it began afresh."""
    old, new = flown.before.rules.get(key), flown.outcome.state.rules[key]
    return old if old is not None and old.shadow is new.shadow else None


# No rule acts on a missing input.


@settings(flights, max_examples=100)
@given(policies() | probers(), series() | nervous())
def test_no_rule_acts_on_a_missing_input(made: list[Policy], flight: list[Moment]) -> None:
    """Where what it goes by is missing, claims stay as they are, go, end a probe, or are the fallback; and
    they go at once, or when `holdFor` is over.
    """
    known = by_key(made)
    since_ns: dict[Key, int] = {}
    for flown in fly(made, flight):
        now_ns = flown.context.now_ns
        for key, state in flown.outcome.state.rules.items():
            policy, rule = known[key]
            old = before(flown, key)
            if old is None or state.suspended_ns is not None or not is_blind(rule, flown.moment, old):
                since_ns.pop(key, None)
            if state.suspended_ns is not None or not is_blind(rule, flown.moment, old):
                continue
            began_ns = since_ns.setdefault(key, now_ns)
            assert state.missing_since_ns is not None
            assert state.choosing.until_ns is None, "nobody would see what the probe shows"
            if policy.on_missing == "release" or now_ns - began_ns >= policy.hold_for_ns:
                assert state.claims == ()
            was = claims_of(old)
            for target, claim in claims_of(state).items():
                stays = target in was and was[target].value == claim.value
                assert stays or is_fallback(policy, rule, claim) or ends_probe(old, claim)
            assert old is not None or state.phase is Phase.INACTIVE
            assert old is None or not asks_when(old.phase) or state.phase is Phase.INACTIVE


def is_blind(rule: Rule, moment: Moment, old: RuleState | None) -> bool:
    if rule.choose is not None:
        return rule.choose.unless is not None and is_gone(moment.b)
    entering = old is None or asks_when(old.phase)
    condition = rule.when if entering or rule.until is None else rule.until
    amounts = [action.amount for action in rule.actions]
    expressions = [condition, *(amount for amount in amounts if isinstance(amount, Expression))]
    names = {name for expression in expressions if expression is not None for name in expression.names}
    models = [
        moment.credits if amount.klass else moment.chunk for amount in amounts if isinstance(amount, Solve)
    ]
    tops = [moment.top for action in rule.actions if action.scope == TOP_TENANT]
    return any(
        is_gone(value)
        for value in (*(getattr(moment, name) for name in names if len(name) == 1), *models, *tops)
    )


def is_gone(value: object) -> bool:
    return isinstance(value, Missing) or (isinstance(value, float) and math.isnan(value))


def is_fallback(policy: Policy, rule: Rule, claim: Claim) -> bool:
    action, wish = rule.action_on(claim.knob, claim.scope), policy.fallback.get(claim.knob)
    assert action is not None
    return wish is not None and place(wish, action, KNOBS[claim.knob]).value == claim.value


def ends_probe(old: RuleState | None, claim: Claim) -> bool:
    return old is not None and old.choosing.until_ns is not None and claim.value == old.choosing.back


# No knob leaves its bounds or the manifest's.


@flights
@given(policies(), series())
def test_no_knob_leaves_its_bounds_or_the_manifests(made: list[Policy], flight: list[Moment]) -> None:
    known = by_key(made)
    for flown in fly(made, flight):
        for key, state in flown.outcome.state.rules.items():
            for claim in state.claims:
                action = known[key][1].action_on(claim.knob, claim.scope)
                assert action is not None
                is_on_grid(KNOBS[claim.knob], claim.value)
                if representable(action, KNOBS[claim.knob]):
                    assert action.minimum <= claim.value <= action.maximum
        for lease in (*flown.outcome.leases, *flown.outcome.shadow):
            is_on_grid(KNOBS[lease.knob], lease.value)


def is_on_grid(knob: ManifestKnob, value: float) -> None:
    assert knob.minimum <= value <= knob.maximum
    assert knob.snap(value) == value


def representable(action: Action, knob: ManifestKnob) -> bool:
    multiples = [knob.snap(n * knob.granularity) for n in range(int(knob.maximum / knob.granularity) + 2)]
    return any(
        action.minimum <= value <= action.maximum for value in [*multiples, knob.minimum, knob.maximum]
    )


# No rule changes a knob more often than cooldown and limits allow.


@settings(flights, max_examples=100)
@given(policies() | probers() | rivals() | followers(), series() | nervous())
def test_cooldown_and_limits_hold(made: list[Policy], flight: list[Moment]) -> None:
    known = by_key(made)
    changed_ns: dict[tuple[Key, bool], int] = {}
    spent: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for flown in fly(made, flight):
        now_ns = flown.context.now_ns
        for key, state in flown.outcome.state.rules.items():
            policy, rule = known[key]
            old = before(flown, key)
            taken, probes = steps(rule, old, state)
            if taken:
                assert now_ns - changed_ns.get((key, state.shadow), -(10**18)) >= rule.cooldown_ns
                assert all(claim.overruled_by is None for claim in was_stepped(rule, old, state))
            if taken or comes_to_an_end(rule, old, state):
                changed_ns[key, state.shadow] = now_ns
            if not rule.protective:
                spent[policy.name, state.shadow] += [now_ns] * (taken + 2 * probes)
        for policy in made:
            if policy.limits is not None:
                for shadow in (False, True):
                    recent = [at for at in spent[policy.name, shadow] if now_ns - at < policy.limits.per_ns]
                    assert len(recent) <= policy.limits.max_changes


def steps(rule: Rule, old: RuleState | None, state: RuleState) -> tuple[int, int]:
    """(claims made or moved, probes begun); not recovery, nor following, nor the end of a probe."""
    if state.choosing.until_ns is not None and (old is None or old.choosing.until_ns is None):
        return 0, 1
    return len(was_stepped(rule, old, state)), 0


def was_stepped(rule: Rule, old: RuleState | None, state: RuleState) -> list[Claim]:
    """Claims that were made or moved, as they were before where there was one."""
    was, stepped = claims_of(old), []
    for target, claim in claims_of(state).items():
        action = rule.action_on(*target)
        assert action is not None
        earlier = was.get(target)
        follows = action.tracks and state.missing_since_ns is None
        if claim.recover_at_ns is not None or ends_probe(old, claim):
            continue
        if earlier is None:
            stepped.append(Claim(*target, claim.value))
        elif earlier.value != claim.value and not follows:
            stepped.append(earlier)
    return stepped


def comes_to_an_end(rule: Rule, old: RuleState | None, state: RuleState) -> bool:
    """Of a rule whose value moves all the time, cooldown slows its going as well as its coming."""
    follows = any(action.tracks for action in rule.actions)
    return follows and old is not None and not asks_when(old.phase) and state.phase is Phase.INACTIVE


# With every rule inactive and every recover finished all knobs are at baseline.


@settings(flights, max_examples=15)
@given(policies(), series())
def test_calm_ends_at_baseline(made: list[Policy], flight: list[Moment]) -> None:
    """Without a lease, unless a choosing rule holds baseline, as it does against another rule's claim. One
    that is overruled that way keeps its choice, which is in force nowhere.
    """
    known = by_key(made)
    final = fly(made, [*flight, *[CALM] * 260])[-1].outcome
    for key, state in final.state.rules.items():
        assert state.phase is Phase.INACTIVE or known[key][1].choose is not None
        standing = [claim for claim in state.claims if claim.overruled_by is None]
        assert all(claim.value == KNOBS[claim.knob].baseline for claim in standing)
        assert len(standing) == len(state.claims) or known[key][1].choose is not None
    for lease in (*final.leases, *final.shadow):
        assert known[lease.policy, lease.rule][1].choose is not None
        assert lease.value == KNOBS[lease.knob].baseline


@flights
@given(policies(), series())
def test_inactive_rules_only_walk_home(made: list[Policy], flight: list[Moment]) -> None:
    """Or stand in: for a rule that is blind, for a signal that is probed."""
    for flown in fly(made, flight):
        for key, state in flown.outcome.state.rules.items():
            if state.phase is Phase.INACTIVE and state.missing_since_ns is None:
                probing = state.choosing.until_ns is not None
                assert all(claim.recover_at_ns is not None or probing for claim in state.claims)
            old = claims_of(before(flown, key))
            for target, claim in claims_of(state).items():
                if claim.recover_at_ns is not None and target in old:
                    home = KNOBS[claim.knob].baseline
                    assert abs(claim.value - home) <= abs(old[target].value - home)


@flights
@given(walkers(), series())
def test_recover_takes_one_step_per_every_and_ends_at_baseline(
    made: list[Policy], flight: list[Moment]
) -> None:
    """A step makes the claim nearer to baseline, by no more than was asked or the knob's grid needs; it ends
    where another step would reach baseline.
    """
    ((_, rule),) = by_key(made).values()
    (recover,) = rule.recover
    knob = KNOBS[recover.knob]
    size = max(abs(recover.add), knob.granularity) + knob.granularity
    stepped_ns = 0
    for flown in fly(made, [*flight, *[replace(CALM, a=9.0)] * 3, *[CALM] * 30]):
        now_ns, old, state = flown.context.now_ns, *before_and_after(flown)
        if old is None or is_gone(flown.moment.a) or {old.phase, state.phase} != {Phase.INACTIVE}:
            stepped_ns = now_ns
            continue
        for target, claim in claims_of(old).items():
            left, after = knob.baseline - claim.value, claims_of(state).get(target)
            if now_ns < stepped_ns + recover.every_ns:
                assert after is not None
                assert after.value == claim.value
            elif after is None:
                assert abs(left) <= size
            else:
                step = after.value - claim.value
                assert 0 < step * math.copysign(1, left) < abs(left)
                assert abs(step) <= size
                stepped_ns = now_ns


def before_and_after(flown: Flown) -> tuple[RuleState | None, RuleState]:
    """Of the only rule."""
    ((key, state),) = flown.outcome.state.rules.items()
    return before(flown, key), state


# Claims and leases agree at every tick.


@flights
@given(policies(), series())
def test_claims_and_leases_agree(made: list[Policy], flight: list[Moment]) -> None:
    known = by_key(made)
    for flown in fly(made, flight):
        agree(known, flown.outcome)
        assert {decision.verdict for decision in flown.outcome.decisions} <= VERDICTS.keys() - {*FROM_ECHOES}
        if flown.moment.off:
            assert flown.outcome.leases == ()


def agree(known: dict[Key, tuple[Policy, Rule]], outcome: Outcome) -> None:
    """Every real claim's target is leased at some claim's value, and there is no other lease."""
    values: dict[Target, list[tuple[str, str, float]]] = defaultdict(list)
    for (policy, rule), state in outcome.state.rules.items():
        for claim in () if state.shadow else state.claims:
            values[claim.knob, claim.scope].append((policy, rule, claim.value))
    ordered = {(lease.knob, lease.scope) for lease in outcome.leases if lease.policy == OVERRIDE}
    leased = {(lease.knob, lease.scope) for lease in outcome.leases}
    assert len(leased) == len(outcome.leases)
    covered = {
        (knob, scope) for knob, scope in values if any(k == knob and covers(s, scope) for k, s in ordered)
    }
    assert leased == (set(values) - covered) | ordered
    for lease in outcome.leases:
        if lease.policy != OVERRIDE:
            mine = [v for p, r, v in values[lease.knob, lease.scope] if (p, r) == (lease.policy, lease.rule)]
            limit = known[lease.policy, lease.rule][1].protective
            assert lease.value in mine or (limit and lease.value == KNOBS[lease.knob].baseline)
    holds = {(lease.knob, lease.scope): lease for lease in outcome.leases}
    for (policy, rule), state in outcome.state.rules.items():
        for target, claim in claims_of(state).items():
            if state.shadow or claim.overruled_by is not None:
                continue
            assert target not in covered - ordered
            mine = holds[target].value == claim.value
            assert mine or known[policy, rule][1].protective, "whoever is not overruled has its way"


# Arbitration is total and independent of order.

bids = st.builds(
    Bid,
    policy=st.sampled_from(["p", "q", "r"]),
    rule=st.sampled_from(["x", "y"]),
    priority=st.integers(0, 1),
    limit=st.booleans(),
    # Few of everything, so that claims meet, and meet as equals.
    knob=st.sampled_from(["prefill_chunk_tokens", "shed_fraction", "max_running"]),
    scope=st.sampled_from([ALL, Scope("class_at_most", 1)]),
    value=st.sampled_from([24.0, 304.0, 0.5]),
    ttl_ns=st.just(2_000_000_000),
)
contests = st.lists(bids, max_size=8, unique_by=lambda bid: (bid.policy, bid.rule, bid.knob, bid.scope))


@given(contests, st.randoms(use_true_random=False))
def test_arbitration_is_total_and_independent_of_order(given_bids: list[Bid], random) -> None:
    ruling = arbitrate(given_bids, KNOBS)
    shuffled = [*given_bids]
    random.shuffle(shuffled)
    again = arbitrate(shuffled, KNOBS)
    assert (again.leases, again.overruled) == (ruling.leases, ruling.overruled)
    assert set(ruling.leases) == {(bid.knob, bid.scope) for bid in given_bids if bid.knob in KNOBS}


@given(contests)
def test_who_wins(given_bids: list[Bid]) -> None:
    """Among ordinary claims the highest priority, then the most protective; limits only ever tighten that."""
    for (knob, scope), lease in arbitrate(given_bids, KNOBS).leases.items():
        rivals = [bid for bid in given_bids if (bid.knob, bid.scope) == (knob, scope)]
        ordinary = [bid for bid in rivals if not bid.limit]
        limits = [protective_first(knob, bid.value) for bid in rivals if bid.limit]
        without = KNOBS[knob].baseline
        if ordinary:
            top = max(bid.priority for bid in ordinary)
            without = min(
                (b.value for b in ordinary if b.priority == top), key=lambda v: protective_first(knob, v)
            )
        assert protective_first(knob, lease.value) == min([protective_first(knob, without), *limits])


@given(contests)
def test_a_person_is_never_overruled(given_bids: list[Bid]) -> None:
    order = Override("shed_fraction", ALL, 0.0, 5, "why", "ada")
    ruling = arbitrate(given_bids, KNOBS, [order])
    shed = [lease for lease in ruling.leases.values() if lease.knob == "shed_fraction"]
    assert [(lease.policy, lease.value) for lease in shed] == [(OVERRIDE, 0.0)]


# Reload keeps, clamps or withdraws exactly as written.


@flights
@given(policies(), series(), policy_texts("p0"), st.data())
def test_reload(made: list[Policy], flight: list[Moment], other: str, data: st.DataObject) -> None:
    """After a flight one policy gets another text, one goes, one stays; the tick after is calm."""
    kept = [policy for policy in made[1:] if data.draw(st.booleans())]
    reloads(made, flight, load_text(other), kept)


@flights
@given(walkers(), series(), walkers())
def test_reload_of_a_rule_that_holds_a_claim(
    made: list[Policy], flight: list[Moment], other: list[Policy]
) -> None:
    reloads(made, [*flight, *[replace(CALM, a=9.0)] * 2], other[0], [])


def reloads(made: list[Policy], flight: list[Moment], other: Policy, kept: list[Policy]) -> None:
    flown = fly(made, flight)[-1]
    state, now_ns = flown.outcome.state, flown.context.now_ns
    (swapped,) = fly([other, *kept], [CALM], state, now_ns)
    (unchanged,) = fly(made, [CALM], state, now_ns)
    for policy in kept:
        for rule in policy.rules:
            key = (policy.name, rule.name)
            assert without_rivals(swapped, key) == without_rivals(unchanged, key), "unchanged keeps its state"
    present = by_key([other, *kept])
    assert swapped.outcome.state.rules.keys() <= present.keys()
    for key, old in state.rules.items():
        if key not in present:
            assert withdrawn(swapped, key) == set(claims_of(old)), "removed: withdrawn"
        elif key[0] == "p0" and old.identity != present[key][1].identity:
            is_changed(present[key][1], old, swapped, key)


def without_rivals(flown: Flown, key: Key) -> RuleState:
    state = flown.outcome.state.rules[key]
    return replace(state, claims=tuple(replace(claim, overruled_by=None) for claim in state.claims))


def withdrawn(flown: Flown, key: Key) -> set[Target]:
    mine = [d for d in flown.outcome.decisions if (d.policy, d.rule) == key]
    return {(d.knob, d.scope) for d in mine if d.after is None and d.before is not None}


def is_changed(rule: Rule, old: RuleState, flown: Flown, key: Key) -> None:
    """Inactive; what the new text walks home is clamped and begins to, the rest is withdrawn."""
    new, now_ns = flown.outcome.state.rules[key], flown.context.now_ns
    if rule.choose is not None:
        # It has no `recover`, and may choose at once.
        assert withdrawn(flown, key) == set(claims_of(old))
        return
    assert asks_when(new.phase)
    if old.shadow is not new.shadow:
        assert new.claims == ()
        assert withdrawn(flown, key) == set(claims_of(old))
        return
    expected = {}
    for target, claim in claims_of(old).items():
        action, recover = rule.action_on(*target), rule.recover_of(*target)
        if action is not None and recover is not None:
            value = place(claim.value, action, KNOBS[claim.knob]).value
            expected[target] = (value, now_ns + recover.every_ns)
    found = {target: (claim.value, claim.recover_at_ns) for target, claim in claims_of(new).items()}
    assert found == expected
    assert withdrawn(flown, key) == claims_of(old).keys() - expected.keys()


# The same series twice gives the same decisions.


@flights
@given(policies(), series(), st.randoms(use_true_random=False))
def test_the_same_series_twice_in_any_order_of_policies(
    made: list[Policy], flight: list[Moment], random
) -> None:
    again = [load_text_of(policy) for policy in made]
    random.shuffle(again)
    assert [flown.outcome for flown in fly(made, flight)] == [flown.outcome for flown in fly(again, flight)]


def load_text_of(policy: Policy) -> Policy:
    """The same policy as another object: nothing may hang on which."""
    return replace(policy, rules=tuple(replace(rule) for rule in policy.rules), inputs=dict(policy.inputs))


@flights
@given(policies(), series(), st.integers(1, 30))
def test_a_flight_goes_on_from_its_state_alone(made: list[Policy], flight: list[Moment], cut: int) -> None:
    """Nothing is remembered anywhere else: cut in two, it is the same flight."""
    whole = [flown.outcome for flown in fly(made, flight)]
    first = fly(made, flight[:cut])
    rest = fly(made, flight[cut:], first[-1].outcome.state, first[-1].context.now_ns)
    assert [flown.outcome for flown in (*first, *rest)] == whole
