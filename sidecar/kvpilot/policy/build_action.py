"""From the shape of `do` and `recover` to actions: amounts, models, bounds and scopes."""

from collections.abc import Sequence

from kvpilot.knobs import Knob
from kvpilot.link.controls import Scope
from kvpilot.policy.expr import Expression
from kvpilot.policy.findings import Findings
from kvpilot.policy.rules import TOP_TENANT, Action, ActionKind, Recover, Solve
from kvpilot.policy.schema import Do, RecoverStep, SolveModel
from kvpilot.policy.schema import Scope as ScopeModel
from kvpilot.policy.source import Path

ALL = Scope("all")
TOP = "top"
SOLVED = {"prefill_chunk_tokens": "stepTime", "admission_credits": "ttft"}
"""Which model gives which knob."""

_KINDS: tuple[ActionKind, ...] = ("set", "add", "multiply", "solve")


def build_action(findings: Findings, path: Path, given: Do) -> Action | None:
    """The action; None after a mistake that leaves nothing to go on with."""
    kinds = [kind for kind in _KINDS if getattr(given, kind) is not None]
    if len(kinds) != 1:
        if kinds or findings.source.complete(path):
            has = " and ".join(kinds) or "none"
            findings.at(path, f"needs exactly one of set, add, multiply, solve; has {has}")
        return None
    kind = kinds[0]
    knob = findings.knob((*path, "knob"), given.knob)
    scope = build_scope(findings, (*path, "scope"), given.scope, knob)
    amount: float | Expression | Solve | None
    if given.solve is not None:
        amount = _solve(findings, (*path, "solve"), given.solve, knob)
    elif isinstance(given.set, str):
        amount = findings.expression((*path, "set"), given.set, "number")
    else:
        amount = getattr(given, kind)
    if amount is None or knob is None:
        return None
    if isinstance(amount, float):
        _check_amount(findings, (*path, kind), kind, amount, knob)
    low, high = _bounds(findings, path, given, knob)
    return Action(given.knob, scope, kind, amount, low, high, given.step)


def build_recover(
    findings: Findings, path: Path, given: RecoverStep, actions: Sequence[Action | None]
) -> Recover:
    """How claims of `actions` walk home."""
    knob = findings.knob((*path, "knob"), given.knob)
    scope = None if given.scope is None else build_scope(findings, (*path, "scope"), given.scope, knob)
    mine = [a for a in actions if a is not None and a.knob == given.knob and scope in (None, a.scope)]
    if not mine and None not in actions and findings.source.complete((*path[:-2], "do")):
        findings.at((*path, "knob"), f"recovers {given.knob}, which this rule's `do` does not move")
    if given.every <= 0:
        findings.at((*path, "every"), "must be above 0s")
    if given.add == 0:
        findings.at((*path, "add"), "adding 0 never recovers")
    if any(direction(action) * given.add > 0 for action in mine):
        findings.at((*path, "add"), "moves the same way as `do`: recover walks the claim back to baseline")
    return Recover(given.knob, scope, given.add, given.every)


def build_scope(findings: Findings, path: Path, given: ScopeModel | None, knob: Knob | None) -> Scope:
    """Whom it is about: everybody, where nothing is said."""
    if given is None:
        return ALL
    if knob is not None and not knob.scoped:
        findings.at(path, f"{knob.name} takes no scope: it holds for all requests", key=True)
    if (given.class_at_most is None) == (given.tenant is None):
        if given.tenant is not None or findings.source.complete(path):
            findings.at(path, "needs exactly one of classAtMost, tenant", key=True)
        return ALL
    if given.tenant is not None:
        return TOP_TENANT if given.tenant == TOP else Scope("tenant", given.tenant)
    return Scope("class_at_most", given.class_at_most)


def direction(action: Action) -> int:
    """-1 where the action always lowers its knob, +1 where it always raises it, 0 where it depends."""
    if not isinstance(action.amount, float | int) or action.kind not in ("add", "multiply"):
        return 0
    rises = action.amount > 0 if action.kind == "add" else action.amount > 1
    return 1 if rises else -1


def _solve(findings: Findings, path: Path, given: SolveModel, knob: Knob | None) -> Solve | None:
    wanted = SOLVED.get(knob.name) if knob is not None else None
    if knob is not None and wanted is None:
        findings.at(path, f"no model gives {knob.name}: only {' and '.join(SOLVED)}", key=True)
        return None
    targets = {"stepTime": given.step_time, "ttft": given.ttft}
    named = [name for name, target in targets.items() if target is not None]
    if len(named) != 1 or (wanted is not None and named != [wanted]):
        if named or findings.source.complete(path):
            needs = f"{knob.name} is solved for {wanted}" if knob else "needs exactly one of stepTime, ttft"
            findings.at(path, f"{needs}; has {' and '.join(named) or 'neither'}", key=True)
        return None
    name = named[0]
    if (name == "ttft") != (given.klass is not None):
        if given.klass is not None:
            findings.at((*path, "class"), "only with `ttft`: a step is no class's", key=True)
        elif findings.source.complete(path):
            findings.at(path, "ttft needs a `class`, such as `class: lowest`", key=True)
        return None
    if given.klass is not None:
        findings.klass((*path, "class"), given.klass, ends=True)
    target = targets[name]
    if isinstance(target, str):
        expression = findings.expression((*path, name), target, "number", fixed=True)
        return None if expression is None else Solve(expression, given.klass)
    if target is None or target <= 0:
        findings.at((*path, name), "must be above 0")
        return None
    return Solve(target, given.klass)


def _check_amount(findings: Findings, path: Path, kind: ActionKind, amount: float, knob: Knob) -> None:
    if kind == "set":
        findings.plausible(path, amount, knob)
    elif kind == "add" and amount == 0:
        findings.at(path, "adding 0 does nothing")
    elif kind == "multiply" and (amount <= 0 or amount == 1):
        findings.at(path, f"must be above 0 and not 1, not {amount:g}")


def _bounds(findings: Findings, path: Path, given: Do, knob: Knob) -> tuple[float, float]:
    low = knob.plausible[0] if given.min is None else given.min
    high = knob.plausible[1] if given.max is None else given.max
    for key, bound in (("min", given.min), ("max", given.max)):
        if bound is not None:
            findings.plausible((*path, key), bound, knob)
    if low > high:
        findings.at((*path, "min"), f"min {low:g} is above max {high:g}")
    return low, high
