"""What must hold at every tick of every flight: random rules, random inputs with gaps, random people."""

import itertools
from collections import defaultdict
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.arbitrate import Bid, arbitrate, covers
from kvpilot.policy.context import Context, Override
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.expr import Expression, Reading
from kvpilot.policy.grid import protective_first
from kvpilot.policy.load import load_text
from kvpilot.policy.outcome import OVERRIDE, Outcome
from kvpilot.policy.phase import asks_when
from kvpilot.policy.rules import Action, Policy, Rule
from kvpilot.policy.state import Phase, RuleState, State
from kvpilot.signals import Missing

ALL = Scope("all")
MS = 1_000_000
TICK_NS = 100 * MS

KNOBS = {
    knob.name: knob
    for knob in (
        ManifestKnob("prefill_chunk_tokens", "tokens", 24, 500, 300, 16, ""),
        ManifestKnob("speculative_tokens", "tokens", 0, 5, 3, 1, ""),
        ManifestKnob("shed_fraction", "ratio", 0, 0.9, 0, 0.05, ""),
    )
}
AMOUNTS = {"prefill_chunk_tokens": (16, 600), "speculative_tokens": (0, 7), "shed_fraction": (0, 1)}

durations = st.sampled_from(["0s", "100ms", "300ms", "1s"])


@st.composite
def actions(draw: st.DrawFn) -> tuple[str, str]:
    """An action and how it recovers, as YAML."""
    knob = draw(st.sampled_from([*KNOBS, "max_running"]))
    low, high = sorted(draw(st.tuples(*[st.integers(0, 20)] * 2)))
    least, most = AMOUNTS.get(knob, (1, 100))
    bounds = [round(least + (most - least) * share / 20, 2) for share in (low, high)]
    kind = draw(st.sampled_from(["set", "add", "multiply", "follow"]))
    way = draw(st.sampled_from([-1, 1]))
    amount = {
        "set": f"set: {bounds[0]}",
        "add": f"add: {way * (most - least) / 7:.3f}",
        "multiply": f"multiply: {0.6 if way < 0 else 1.7}",
        "follow": f"set: a * {most / 10}",
    }[kind]
    scope = (
        f", scope: {{classAtMost: {draw(st.integers(0, 1))}}}"
        if knob == "shed_fraction" and draw(st.booleans())
        else ""
    )
    step = f", step: {(most - least) / 16:.3f}" if draw(st.booleans()) else ""
    text = f"{{knob: {knob}, {amount}, min: {bounds[0]}, max: {bounds[1]}{step}{scope}}}"
    back = -way * (most - least) / draw(st.sampled_from([3, 9, 40]))
    return text, f"{{knob: {knob}, add: {back:.4f}, every: {draw(st.sampled_from(['100ms', '500ms']))}}}"


@st.composite
def rules(draw: st.DrawFn, index: int, protective: bool) -> str:
    do = draw(st.lists(actions(), min_size=1, max_size=2, unique_by=lambda pair: pair[0].split(",")[0]))
    recover = draw(st.booleans())
    lines = [
        f"    - name: rule-{index}",
        f"      when: {draw(st.sampled_from(['a > 5', 'a > 5 || b > 8', 'b > 2']))}",
        f"      for: {draw(durations)}",
        f"      keepFor: {draw(durations)}",
        f"      do: [{', '.join(text for text, _ in do)}]",
    ]
    if draw(st.booleans()):
        lines.append(f"      until: {draw(st.sampled_from(['a < 3', 'b < 2', 'a < 3 && b < 5']))}")
    if draw(st.booleans()):
        lines.append(f"      cooldown: {draw(durations)}")
    if recover:
        lines.append(f"      recover: [{', '.join(text for _, text in do)}]")
    if protective:
        lines.append("      protective: always")
    return "\n".join(lines)


@st.composite
def policies(draw: st.DrawFn) -> list[Policy]:
    made = []
    for number in range(draw(st.integers(1, 3))):
        protective = draw(st.booleans()) and number == 0
        body = "\n".join(draw(rules(index, protective)) for index in range(draw(st.integers(1, 2))))
        limits = draw(st.sampled_from(["", "  limits: {maxChanges: 2, per: 2s}\n"]))
        missing = draw(st.sampled_from(["  onMissing: release\n", "  onMissing: hold\n  holdFor: 500ms\n"]))
        priority = 1000 if protective else draw(st.integers(0, 2))
        mode = draw(st.sampled_from(["enforce", "enforce", "shadow"]))
        made.append(
            load_text(
                f"apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {{name: p{number}}}\nspec:\n"
                f"  mode: {mode}\n  priority: {priority}\n{limits}{missing}"
                "  inputs: {a: {signal: requests_waiting}, b: {signal: requests_running}}\n"
                f"  rules:\n{body}\n"
            )
        )
    return made


@dataclass(frozen=True)
class Moment:
    """What a tick is given from outside."""

    a: Reading
    b: Reading
    armed: bool
    off: bool
    ordered: bool
    gap_ns: int


readings = st.sampled_from([0.0, 4.0, 6.0, 9.0]) | st.just(Missing("no_samples"))
moments = st.builds(
    Moment, readings, readings, st.sampled_from([True] * 9 + [False]), st.sampled_from([False] * 19 + [True]),
    st.sampled_from([False] * 4 + [True]), st.sampled_from([TICK_NS] * 5 + [7 * TICK_NS]),
)  # fmt: skip


@st.composite
def series(draw: st.DrawFn) -> list[Moment]:
    """Stretches of sameness, so that rules get as far as acting."""
    stretches = draw(st.lists(st.tuples(moments, st.integers(1, 15)), min_size=1, max_size=8))
    return list(itertools.chain.from_iterable([moment] * length for moment, length in stretches))


def fly(made: list[Policy], flight: list[Moment]) -> list[tuple[Context, Moment, State, Outcome]]:
    """Each tick with the state before it. The engine obeys at the next tick."""
    state, values, now_ns, ticks = State(), {}, 0, []
    for moment in flight:
        now_ns += moment.gap_ns
        order = Override("prefill_chunk_tokens", ALL, 77, now_ns + 1, "why", "ada")
        context = Context(
            now_ns, KNOBS, values, {}, moment.armed, moment.off, (order,) if moment.ordered else ()
        )
        inputs = {(one.name, name): getattr(moment, name) for one in made for name in ("a", "b")}
        outcome = evaluate(made, state, inputs, context)
        ticks.append((context, moment, state, outcome))
        state = outcome.state
        values = {(lease.knob, lease.scope): lease.value for lease in outcome.leases}
    return ticks


def by_key(made: list[Policy]) -> dict[tuple[str, str], tuple[Policy, Rule]]:
    return {(one.name, rule.name): (one, rule) for one in made for rule in one.rules}


def claims_of(state: RuleState | None) -> dict[tuple[str, Scope], float]:
    return {} if state is None else {(claim.knob, claim.scope): claim.value for claim in state.claims}


def representable(action: Action, knob: ManifestKnob) -> bool:
    multiples = [knob.snap(n * knob.granularity) for n in range(int(knob.maximum / knob.granularity) + 2)]
    return any(
        action.minimum <= value <= action.maximum for value in [*multiples, knob.minimum, knob.maximum]
    )


@settings(max_examples=100, deadline=None)
@given(policies(), series())
def test_what_holds_at_every_tick(made: list[Policy], flight: list[Moment]) -> None:
    known = by_key(made)
    stepped_ns: dict[tuple[str, str], int] = {}
    steps: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for context, moment, before, outcome in fly(made, flight):
        claims_and_leases_agree(known, outcome)
        for key, state in outcome.state.rules.items():
            policy, rule = known[key]
            old = before.rules.get(key)
            values_are_in_bounds(rule, state)
            no_act_on_a_missing_input(rule, moment, old, state)
            changed = changes(rule, old, state)
            if changed:
                assert context.now_ns - stepped_ns.get(key, -(10**18)) >= rule.cooldown_ns
                stepped_ns[key] = context.now_ns
                if not rule.protective:
                    steps[policy.name, state.shadow] += [context.now_ns] * changed
            if state.phase is Phase.INACTIVE:
                assert all(claim.recover_at_ns is not None for claim in state.claims)
        for policy in made:
            if policy.limits is not None:
                for shadow in (False, True):
                    recent = [
                        at for at in steps[policy.name, shadow] if context.now_ns - at < policy.limits.per_ns
                    ]
                    assert len(recent) <= policy.limits.max_changes
        if moment.off:
            assert outcome.leases == ()


def claims_and_leases_agree(known: dict[tuple[str, str], tuple[Policy, Rule]], outcome: Outcome) -> None:
    """Every real claim's target is leased at some claim's value, and there is no other lease."""
    values: dict[tuple[str, Scope], list[tuple[str, str, float]]] = defaultdict(list)
    for (policy, rule), state in outcome.state.rules.items():
        for claim in () if state.shadow else state.claims:
            if claim.knob in KNOBS:
                values[claim.knob, claim.scope].append((policy, rule, claim.value))
    ordered = {(lease.knob, lease.scope) for lease in outcome.leases if lease.policy == OVERRIDE}
    leased = {(lease.knob, lease.scope) for lease in outcome.leases}
    assert len(leased) == len(outcome.leases)
    covered = {
        (knob, scope) for knob, scope in values if any(k == knob and covers(s, scope) for k, s in ordered)
    }
    assert leased == (set(values) - covered) | ordered
    for lease in outcome.leases:
        knob = KNOBS[lease.knob]
        assert knob.minimum <= lease.value <= knob.maximum
        assert knob.snap(lease.value) == lease.value
        if lease.policy != OVERRIDE:
            mine = [v for p, r, v in values[lease.knob, lease.scope] if (p, r) == (lease.policy, lease.rule)]
            limit = known[lease.policy, lease.rule][1].protective
            assert lease.value in mine or (limit and lease.value == knob.baseline)


def values_are_in_bounds(rule: Rule, state: RuleState) -> None:
    for claim in state.claims:
        knob = KNOBS[claim.knob]
        action = next(a for a in rule.actions if (a.knob, a.scope) == (claim.knob, claim.scope))
        assert knob.minimum <= claim.value <= knob.maximum
        assert knob.snap(claim.value) == claim.value
        if representable(action, knob):
            assert action.minimum <= claim.value <= action.maximum


def no_act_on_a_missing_input(rule: Rule, moment: Moment, old: RuleState | None, state: RuleState) -> None:
    """Where what the phase consults is missing, claims can only stay as they are or go."""
    entering = old is None or asks_when(old.phase) or old.shadow != state.shadow
    condition = rule.when if entering or rule.until is None else rule.until
    expressions = [condition, *(a.amount for a in rule.actions if isinstance(a.amount, Expression))]
    names = {name for expression in expressions for name in expression.names}
    if any(isinstance(getattr(moment, name), Missing) for name in names):
        was = claims_of(old)
        assert all(was.get(target) == value for target, value in claims_of(state).items())
        assert not (entering and state.phase is not Phase.INACTIVE)


def changes(rule: Rule, old: RuleState | None, state: RuleState) -> int:
    """Steps taken: claims made, and values moved while active by anything but following an expression."""
    if state.phase is not Phase.ACTIVE:
        return 0
    was = claims_of(old) if old is not None and old.shadow == state.shadow else {}
    tracking = {(action.knob, action.scope) for action in rule.actions if action.tracks}
    return sum(
        target not in was or (was[target] != value and target not in tracking)
        for target, value in claims_of(state).items()
    )


@settings(max_examples=30, deadline=None)
@given(policies(), series())
def test_calm_ends_at_baseline(made: list[Policy], flight: list[Moment]) -> None:
    """Every rule inactive and recovery finished: no claim, so no lease."""
    calm = Moment(0.0, 0.0, True, False, False, TICK_NS)
    final = fly(made, [*flight, *[calm] * 400])[-1][3]
    assert all(state.phase is Phase.INACTIVE and not state.claims for state in final.state.rules.values())
    assert final.leases == ()


@settings(max_examples=60, deadline=None)
@given(policies(), series(), st.randoms(use_true_random=False))
def test_the_same_series_twice_in_any_order_of_policies(
    made: list[Policy], flight: list[Moment], random
) -> None:
    shuffled = [*made]
    random.shuffle(shuffled)
    assert [tick[3] for tick in fly(made, flight)] == [tick[3] for tick in fly(shuffled, flight)]


bids = st.builds(
    Bid,
    policy=st.sampled_from(["p", "q", "r"]),
    rule=st.sampled_from(["x", "y"]),
    priority=st.integers(0, 2),
    limit=st.booleans(),
    knob=st.sampled_from([*KNOBS, "max_running"]),
    scope=st.sampled_from([ALL, Scope("class_at_most", 0), Scope("class_at_most", 1)]),
    value=st.sampled_from([0.0, 24.0, 160.0, 304.0, 0.5, 3.0]),
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
