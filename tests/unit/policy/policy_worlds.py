"""Random policies and random flights for properties: every clause of the language, every way to be blind.

Values and bounds are coarse, so that rules meet: few knobs, few thresholds, short times.
"""

import itertools
import math
from dataclasses import dataclass

from hypothesis import strategies as st

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Context, Forecasts, Override
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.expr import Reading
from kvpilot.policy.load import load_text
from kvpilot.policy.outcome import Outcome
from kvpilot.policy.rules import Policy, Rule
from kvpilot.policy.state import State
from kvpilot.signals import REASONS, Missing

ALL = Scope("all")
MS = 1_000_000
TICK_NS = 100 * MS

KNOBS = {
    knob.name: knob
    for knob in (
        ManifestKnob("prefill_chunk_tokens", "tokens", 24, 500, 300, 16, ""),
        ManifestKnob("speculative_tokens", "tokens", 0, 5, 3, 1, ""),
        ManifestKnob("shed_fraction", "ratio", 0, 0.9, 0, 0.05, ""),
        ManifestKnob("admission_credits", "tokens", 0, 900, 900, 1, ""),
    )
}
LACKING = "max_running"
AMOUNTS = {
    "prefill_chunk_tokens": (16, 600),
    "speculative_tokens": (0, 7),
    "shed_fraction": (0, 1),
    "admission_credits": (0, 1000),
    LACKING: (1, 100),
}
SOLVED = {
    "prefill_chunk_tokens": "{stepTime: 0.8 * slo.itl}",
    "admission_credits": "{ttft: 2s, class: lowest}",
}
SLO = {"itl": 0.05, "ttft": 2.0}
DRAFTS = (0, 1, 3, 5, 7)
"""Candidates: the engine takes at most 5."""

durations = st.sampled_from(["0s", "100ms", "300ms", "1s"])


@st.composite
def actions(draw: st.DrawFn) -> tuple[str, str, str]:
    """(knob, an action, how it recovers), as YAML."""
    knob = draw(st.sampled_from([*KNOBS, LACKING]))
    least, most = AMOUNTS[knob]
    low, high = sorted(draw(st.tuples(*[st.integers(0, 20)] * 2)))
    bounds = [round(least + (most - least) * share / 20, 2) for share in (low, high)]
    kinds = ["set", "add", "multiply", "follow", *(["solve"] * 2 if knob in SOLVED else [])]
    way = draw(st.sampled_from([-1, 1]))
    amount = {
        "set": f"set: {bounds[0]}",
        "add": f"add: {way * (most - least) / 7:.3f}",
        "multiply": f"multiply: {0.6 if way < 0 else 1.7}",
        "follow": f"set: a * {most / 10}",
        "solve": f"solve: {SOLVED.get(knob)}",
    }[draw(st.sampled_from(kinds))]
    scope = ""
    if knob in ("shed_fraction", "admission_credits"):
        scopes = ["", ", scope: {classAtMost: 0}", ", scope: {classAtMost: 1}", ", scope: {tenant: top}"]
        scope = draw(st.sampled_from([*scopes, ", scope: {tenant: top}"]))
    step = f", step: {(most - least) / 16:.3f}" if draw(st.booleans()) else ""
    text = f"{{knob: {knob}, {amount}, min: {bounds[0]}, max: {bounds[1]}{step}{scope}}}"
    back = -way * (most - least) / draw(st.sampled_from([3, 9, 40]))
    return (
        knob,
        text,
        f"{{knob: {knob}, add: {back:.4f}, every: {draw(st.sampled_from(['100ms', '500ms']))}}}",
    )


@st.composite
def rules(draw: st.DrawFn, index: int, protective: bool) -> str:
    if not protective and draw(st.integers(0, 3)) == 0:
        return draw(choosing(index))
    do = draw(st.lists(actions(), min_size=1, max_size=2, unique_by=lambda action: action[0]))
    lines = [
        f"    - name: rule-{index}",
        f"      when: {draw(st.sampled_from(['a > 5', 'a > 5 || b > 8', 'b > 2']))}",
        f"      for: {draw(durations)}",
        f"      keepFor: {draw(durations)}",
        f"      do: [{', '.join(text for _, text, _ in do)}]",
    ]
    if draw(st.booleans()):
        lines.append(f"      until: {draw(st.sampled_from(['a < 3', 'b < 2', 'a < 3 && b < 5']))}")
    plain = all(
        word not in text for _, text, _ in do for word in ("solve", "set: a", LACKING, "shed", "credits")
    )
    if plain and not protective and draw(st.booleans()):
        lines.append("      cooldown: 300ms")
        lines.append("      verify: {input: b, falls: 10%, within: 300ms, else: undo}")
    elif draw(st.booleans()):
        lines.append(f"      cooldown: {draw(durations)}")
    if draw(st.booleans()):
        lines.append(f"      recover: [{', '.join(text for _, _, text in do)}]")
    if protective:
        lines.append("      protective: always")
    return "\n".join(lines)


@st.composite
def choosing(draw: st.DrawFn, index: int) -> str:
    probe = (
        "\n        probe: {candidate: 1, for: 100ms, every: 500ms, jitter: 20%}"
        if draw(st.booleans())
        else ""
    )
    unless = "\n        unless: b > 8" if draw(st.booleans()) else ""
    return (
        f"    - name: rule-{index}\n      choose:\n        knob: speculative_tokens\n"
        f"        candidates: {list(DRAFTS)}\n        minimise: forecast.seconds_per_token\n"
        f"        hysteresis: 10%\n        dwell: {draw(durations)}{unless}{probe}"
    )


@st.composite
def policy_texts(draw: st.DrawFn, name: str, protective: bool = False) -> str:
    made = [draw(rules(index, protective)) for index in range(draw(st.integers(1, 2)))]
    body = "\n".join(made)
    moved = sorted({knob for knob in AMOUNTS if f"knob: {knob}" in body})
    fallback = ", ".join(f"{knob}: {AMOUNTS[knob][1] / 4:g}" for knob in moved[: draw(st.integers(1, 2))])
    missing = ["release", "hold", f"{{fallback: {{set: {{{fallback}}}}}}}"]
    on_missing = draw(st.sampled_from(missing))
    hold_for = "" if on_missing == "release" else "  holdFor: 500ms\n"
    limits = draw(st.sampled_from(["", "  limits: {maxChanges: 2, per: 2s}\n"]))
    mode = draw(st.sampled_from(["enforce", "enforce", "enforce", "shadow"]))
    priority = 1000 if protective else draw(st.integers(0, 2))
    return (
        f"apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {{name: {name}}}\nspec:\n"
        f"  mode: {mode}\n  priority: {priority}\n{limits}  onMissing: {on_missing}\n{hold_for}"
        "  inputs: {a: {signal: requests_waiting}, b: {signal: requests_running}}\n"
        f"  rules:\n{body}\n"
    )


@st.composite
def policies(draw: st.DrawFn) -> list[Policy]:
    count = draw(st.integers(1, 3))
    return [
        load_text(draw(policy_texts(f"p{number}", number == 0 and draw(st.booleans()))))
        for number in range(count)
    ]


@st.composite
def probers(draw: st.DrawFn) -> list[Policy]:
    """One rule that chooses and probes, with little to spend, and may go blind while it probes."""
    most, every = draw(st.sampled_from([2, 4])), draw(st.sampled_from(["200ms", "500ms"]))
    return [
        load_text(
            "apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {name: p0}\nspec:\n"
            f"  limits: {{maxChanges: {most}, per: 2s}}\n"
            "  inputs: {a: {signal: requests_waiting}, b: {signal: requests_running}}\n"
            "  rules:\n    - name: rule-0\n      choose:\n        knob: speculative_tokens\n"
            f"        candidates: {list(DRAFTS)}\n        minimise: forecast.seconds_per_token\n"
            f"        dwell: {draw(durations)}\n        unless: b > 8\n"
            f"        probe: {{candidate: 1, for: 150ms, every: {every}, backoff: 1}}\n"
        )
    ]


@st.composite
def rivals(draw: st.DrawFn) -> list[Policy]:
    """One policy that steps and chooses, and one that overrules it now and then."""
    wait = draw(durations)
    steps = (
        "  rules:\n    - name: rule-0\n      choose:\n        knob: speculative_tokens\n"
        f"        candidates: {list(DRAFTS)}\n        minimise: forecast.seconds_per_token\n"
        f"        dwell: {wait}\n"
        f"    - name: rule-1\n      when: a > 2\n      until: a < 2\n      cooldown: {wait}\n"
        "      do: [{knob: prefill_chunk_tokens, add: -16}]\n"
        "      recover: [{knob: prefill_chunk_tokens, add: 16, every: 300ms}]\n"
    )
    overrules = (
        "  priority: 200\n  rules:\n    - name: rule-0\n      when: b > 5\n"
        "      do: [{knob: prefill_chunk_tokens, set: 64}, {knob: speculative_tokens, set: 2}]\n"
    )
    return [
        load_text(
            f"apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {{name: p{number}}}\nspec:\n"
            f"  inputs: {{a: {{signal: requests_waiting}}, b: {{signal: requests_running}}}}\n{rest}"
        )
        for number, rest in enumerate((steps, overrules))
    ]


@st.composite
def followers(draw: st.DrawFn) -> list[Policy]:
    """One rule whose value moves all the time, so that only its coming and going can cool down."""
    return [
        load_text(
            "apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {name: p0}\nspec:\n"
            "  inputs: {a: {signal: requests_waiting}, b: {signal: requests_running}}\n"
            "  rules:\n    - name: rule-0\n      when: b > 5\n"
            f"      cooldown: {draw(st.sampled_from(['1s', '2s']))}\n"
            "      do: [{knob: prefill_chunk_tokens, set: a * 30}]\n"
        )
    ]


@st.composite
def walkers(draw: st.DrawFn) -> list[Policy]:
    """One rule that acts at once and walks home, from either side, in steps of any size."""
    knob, steps = draw(
        st.sampled_from([("prefill_chunk_tokens", (7, 16, 90)), ("shed_fraction", (0.01, 0.2))])
    )
    least, most = AMOUNTS[knob]
    value = round(least + (most - least) * draw(st.integers(0, 20)) / 20, 2)
    size = draw(st.sampled_from(steps)) * (1 if value < KNOBS[knob].baseline else -1)
    every = draw(st.sampled_from(["100ms", "250ms", "600ms"]))
    return [
        load_text(
            "apiVersion: kvpilot.dev/v1alpha1\nkind: Policy\nmetadata: {name: p0}\nspec:\n"
            "  inputs: {a: {signal: requests_waiting}, b: {signal: requests_running}}\n"
            f"  rules:\n    - name: rule-0\n      when: a > 5\n      do: [{{knob: {knob}, set: {value}}}]\n"
            f"      recover: [{{knob: {knob}, add: {size}, every: {every}}}]\n"
        )
    ]


@dataclass(frozen=True)
class Moment:
    """What a tick is given from outside."""

    a: Reading = 0.0
    b: Reading = 0.0
    chunk: Reading = 200.0
    credits: Reading = 400.0
    prices: tuple[Reading, ...] = (9.0, 9.0, 1.0, 9.0, 9.0)
    """At each of DRAFTS; by default baseline is best by far."""
    top: str | Missing | None = "acme"
    offered: Reading = 10.0
    armed: bool = True
    off: bool = False
    ordered: bool = False
    gap_ns: int = TICK_NS

    @property
    def forecasts(self) -> Forecasts:
        return Forecasts(
            chunk_for=lambda step_seconds: self.chunk,
            credits=lambda class_name, ttft_seconds: self.credits,
            seconds_per_token=dict(zip(DRAFTS, self.prices, strict=True)),
        )


CALM = Moment()
RESTART = Moment(
    *[Missing("restarted")] * 4, prices=(Missing("restarted"),) * 5, top=Missing("restarted"), off=True
)
"""As the pilot hands a new start of the engine over: blind, and nothing may be held for one tick."""

GONE = tuple(Missing(reason) for reason in REASONS)
ODD = (math.nan, math.inf, -math.inf)


def mostly(values: list[object], rarely: tuple[object, ...], times: int = 5) -> st.SearchStrategy:  # type: ignore[type-arg]
    """One of `values`, now and then one of `rarely`. Blindness is the exception, or no rule gets anywhere."""
    return st.integers(0, times).flatmap(lambda n: st.sampled_from(values) if n else st.sampled_from(rarely))


moments = st.builds(
    Moment,
    a=mostly([0.0, 4.0, 6.0, 9.0, 9.0], GONE + ODD),
    b=mostly([0.0, 4.0, 6.0, 9.0], GONE + ODD),
    chunk=mostly([0.0, 37.0, 200.0, 1e9], (*GONE, math.nan, math.inf)),
    credits=mostly([0.0, 37.0, 400.0, 1e12], (*GONE, math.nan, math.inf)),
    prices=st.tuples(*[mostly([1.0, 2.0, 3.0], (*GONE, math.nan, math.inf), 3)] * 5),
    top=mostly(["acme", "globex", "initech", "hooli", "umbrella"], (*GONE, None)),
    offered=mostly([10.0, 10.0, 12.0], GONE),
    armed=mostly([True], (False,), 9),
    off=mostly([False], (True,), 19),
    ordered=mostly([False], (True,), 5),
    gap_ns=mostly([TICK_NS], (7 * TICK_NS, 1), 5),
)


@st.composite
def series(draw: st.DrawFn) -> list[Moment]:
    """Stretches of sameness, so that rules get as far as acting; a restart of the engine now and then."""
    stretch = mostly([False], (True,), 9).flatmap(lambda ends: st.just(RESTART) if ends else moments)
    stretches = draw(st.lists(st.tuples(stretch, st.integers(1, 15)), min_size=2, max_size=10))
    return list(itertools.chain.from_iterable([moment] * length for moment, length in stretches))


@st.composite
def nervous(draw: st.DrawFn) -> list[Moment]:
    """What rules go by comes, goes and is missing within moments; all else stays as it is."""
    prices = draw(st.sampled_from([CALM.prices, (1.0, 2.0, 3.0, 3.0, 3.0)]))
    values = st.sampled_from([0.0, 6.0, 6.0, 9.0, GONE[0], math.nan])
    stretches = draw(st.lists(st.tuples(values, st.integers(1, 6)), min_size=4, max_size=14))
    return [Moment(a=value, b=value, prices=prices) for value, length in stretches for _ in range(length)]


@dataclass(frozen=True)
class Flown:
    """One tick: what it was given, the state before it, and what came of it."""

    context: Context
    moment: Moment
    before: State
    outcome: Outcome


def fly(made: list[Policy], flight: list[Moment], state: State | None = None, now_ns: int = 0) -> list[Flown]:
    """The engine obeys at the next tick."""
    state = state or State()
    ticks: list[Flown] = []
    for moment in flight:
        now_ns += moment.gap_ns
        values = {(lease.knob, lease.scope): lease.value for lease in state.leases.values()}
        order = Override("prefill_chunk_tokens", ALL, 77, now_ns + 1, "why", "ada")
        context = Context(
            now_ns,
            KNOBS,
            values,
            SLO,
            moment.armed,
            moment.off,
            (order,) if moment.ordered else (),
            moment.forecasts,
            ("batch", "chat"),
            moment.top,
            moment.offered,
        )
        inputs = {(one.name, name): getattr(moment, name) for one in made for name in ("a", "b")}
        outcome = evaluate(made, state, inputs, context)
        ticks.append(Flown(context, moment, state, outcome))
        state = outcome.state
    return ticks


def by_key(made: list[Policy]) -> dict[tuple[str, str], tuple[Policy, Rule]]:
    """Every rule with its policy."""
    return {(one.name, rule.name): (one, rule) for one in made for rule in one.rules}
