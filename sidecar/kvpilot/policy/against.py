"""A policy against one engine that runs: what it lacks of what the policy sees and moves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvpilot.knobs import KNOBS
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.quantity import parse_amount
from kvpilot.policy.rules import Policy
from kvpilot.policy.source import Path, Problem, Source


@dataclass(frozen=True, slots=True)
class EngineHas:
    """What one engine says of itself. `lacking_signals` by name: why it does not have them."""

    name: str
    """For people: kind, version, rank."""
    knobs: Mapping[str, ManifestKnob]
    lacking_knobs: Mapping[str, str] = field(default_factory=dict)
    lacking_signals: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    """Lowest first; empty where it knows none."""
    valves: bool = True
    """Whether a valve lives beside it."""


def against(policy: Policy, source: Source, engine: EngineHas) -> list[Problem]:
    """Every input, knob, bound and class of the policy that this engine does not have.

    `policy` is what was built from `source`.
    """
    data = source.data()
    spec = data.get("spec") if isinstance(data, dict) else None
    rules = spec.get("rules") if isinstance(spec, dict) else None
    problems = [source.at(*found) for found in _inputs(policy, engine)]
    for i, rule in enumerate(rules if isinstance(rules, list) else ()):
        if isinstance(rule, dict):
            problems += [source.at(*found) for found in _rule(("spec", "rules", i), rule, engine)]
    return problems


def _inputs(policy: Policy, engine: EngineHas) -> Iterator[tuple[Path, str]]:
    for name, spec in policy.inputs.items():
        path: Path = ("spec", "inputs", name)
        why = engine.lacking_signals.get(spec.signal)
        if why is not None:
            yield (*path, "signal"), f"signal: {engine.name} has no {spec.signal}: {why}"
        if spec.klass is not None and engine.classes and spec.klass not in engine.classes:
            yield (*path, "class"), f"class: {engine.name} has the classes {', '.join(engine.classes)}"


def _rule(path: Path, rule: Mapping[str, object], engine: EngineHas) -> Iterator[tuple[Path, str]]:
    actions = rule.get("do")
    for i, action in enumerate(actions if isinstance(actions, list) else ()):
        if isinstance(action, dict):
            yield from _action((*path, "do", i), action, engine)
    choose = rule.get("choose")
    if isinstance(choose, dict):
        yield from _action((*path, "choose"), choose, engine)


def _action(path: Path, action: Mapping[str, object], engine: EngineHas) -> Iterator[tuple[Path, str]]:
    name = str(action.get("knob"))
    row, knob = KNOBS.get(name), engine.knobs.get(name)
    if row is None:
        return
    if row.where == "valve" and not engine.valves:
        yield (*path, "knob"), f"knob: no valve lives beside {engine.name}, so nothing moves {name}"
    elif knob is None and row.where == "engine":
        why = engine.lacking_knobs.get(name, "its manifest does not list it")
        yield (*path, "knob"), f"knob: {engine.name} has no {name}: {why}"
    if knob is not None:
        for key in ("set", "min", "max"):
            yield from _bound((*path, key), action.get(key), knob, engine)
        candidates = action.get("candidates")
        for i, candidate in enumerate(candidates if isinstance(candidates, list) else ()):
            yield from _bound((*path, "candidates", i), candidate, knob, engine)
    scope = action.get("scope")
    level = scope.get("classAtMost") if isinstance(scope, dict) else None
    if isinstance(level, int) and engine.classes and level >= len(engine.classes):
        message = f"classAtMost: {engine.name} has the levels 0 to {len(engine.classes) - 1}"
        yield (*path, "scope", "classAtMost"), message


def _bound(path: Path, value: object, knob: ManifestKnob, engine: EngineHas) -> Iterator[tuple[Path, str]]:
    try:
        amount = parse_amount(value)
    except ValueError:
        return
    if isinstance(amount, float) and not knob.minimum <= amount <= knob.maximum:
        limits = f"{knob.minimum:g} to {knob.maximum:g} {knob.unit}"
        named = next(step for step in reversed(path) if isinstance(step, str))
        yield path, f"{named}: {amount:g} is outside what {knob.name} of {engine.name} takes ({limits})"
