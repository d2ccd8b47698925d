"""From a file's shape to a typed policy: names against catalogues, expressions against inputs, and bounds.

Every problem is collected, with its place; a policy comes out only when there is none.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence

from kvpilot.knobs import KNOBS, Knob
from kvpilot.link.controls import Scope
from kvpilot.policy.expr import Expression, ExpressionError, Wanted, compile_expression
from kvpilot.policy.outcome import OVERRIDE
from kvpilot.policy.rules import (
    DEFAULT_COOLDOWN_NS,
    Action,
    ActionKind,
    InputSpec,
    Limits,
    Notify,
    Policy,
    Recover,
    Rule,
    Verify,
)
from kvpilot.policy.schema import Do, Input, PolicyFile, RecoverStep, RuleModel
from kvpilot.policy.schema import Scope as ScopeModel
from kvpilot.policy.source import Path, Problem, Source
from kvpilot.signals import AGGREGATIONS, SIGNALS, Signal

PROTECTIVE_PRIORITY = 1000
LEASE_MIN_NS = 2_000_000_000
LEASE_MAX_NS = 60_000_000_000
ALL = Scope("all")

_RESERVED_WORDS = (
    "slo true false null in as break const continue else for function if import let loop package namespace "
    "return var void while bool bytes double duration dyn int list map string timestamp type uint"
)
_RESERVED = frozenset(_RESERVED_WORDS.split())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


class Builder:
    """Builds one policy from one file; `problems` says what is wrong with it."""

    def __init__(self, source: Source, declared: Iterable[str], classes: Sequence[str] | None) -> None:
        self._source = source
        self._classes = classes
        # An input that is itself wrong still declares its name: one mistake, one message.
        self._signals: dict[str, Signal | None] = dict.fromkeys(declared)
        self.problems: list[Problem] = []

    def build(self, file: PolicyFile) -> Policy:
        """The policy, to be used only if `problems` stays empty."""
        spec = file.spec
        if file.metadata.name == OVERRIDE:
            self._at(("metadata", "name"), f"'{OVERRIDE}' is reserved for people's orders")
        if spec.on_missing != "hold" and "hold_for" in spec.model_fields_set:
            self._at(("spec", "holdFor"), "has no effect without `onMissing: hold`", key=True)
        inputs = {name: self._input(name, given) for name, given in spec.inputs.items()}
        summary = file.metadata.annotations.get("summary", "")
        rules = [
            self._rule(("spec", "rules", i), rule, file, inputs, summary) for i, rule in enumerate(spec.rules)
        ]
        self._unique_rules(spec.rules)
        return Policy(
            name=file.metadata.name,
            path=self._source.path,
            mode=spec.mode,
            priority=spec.priority,
            annotations=dict(file.metadata.annotations),
            labels=dict(file.metadata.labels),
            inputs=inputs,
            on_missing=spec.on_missing,
            hold_for_ns=spec.hold_for,
            limits=None if spec.limits is None else Limits(spec.limits.max_changes, spec.limits.per),
            rules=tuple(rule for rule in rules if rule is not None),
        )

    def _input(self, name: str, given: Input) -> InputSpec:
        path: Path = ("spec", "inputs", name)
        if name in _RESERVED:
            self._at(path, f"'{name}' is a reserved word", key=True)
        signal = SIGNALS.get(given.signal)
        self._signals[name] = signal
        if signal is None:
            hint = did_you_mean(given.signal, SIGNALS)
            self._at((*path, "signal"), f"unknown signal '{given.signal}'{hint}")
        else:
            self._check_window(path, given, signal)
            if given.klass is not None and not signal.per_class:
                self._at((*path, "class"), f"{signal.name} is not measured per class")
        if given.klass is not None and self._classes is not None and given.klass not in self._classes:
            self._at(
                (*path, "class"), f"unknown class '{given.klass}'{did_you_mean(given.klass, self._classes)}"
            )
        return InputSpec(
            name=name,
            signal=given.signal,
            agg=given.agg,
            window_s=None if given.window is None else given.window / 1e9,
            min_samples=given.min_samples,
            max_age_s=given.max_age / 1e9,
            klass=given.klass,
        )

    def _check_window(self, path: Path, given: Input, signal: Signal) -> None:
        fitting = AGGREGATIONS[signal.kind]
        if given.agg not in fitting:
            message = (
                f"agg '{given.agg}' does not fit {signal.name}, a {signal.kind}: use {', '.join(fitting)}"
            )
            self._at((*path, "agg"), message)
        elif given.agg == "last" and given.window is not None:
            self._at((*path, "window"), "agg last is the newest sample: it takes no window", key=True)
        elif given.agg != "last" and not given.window and self._source.complete(path):
            self._at(path, f"agg {given.agg} needs a window, such as `window: 5s`", key=True)

    def _rule(
        self, path: Path, given: RuleModel, file: PolicyFile, inputs: dict[str, InputSpec], summary: str
    ) -> Rule | None:
        if not LEASE_MIN_NS <= given.lease <= LEASE_MAX_NS:
            self._at((*path, "lease"), "must be between 2s and 60s")
        if given.protective and file.spec.priority < PROTECTIVE_PRIORITY:
            message = f"needs spec.priority of {PROTECTIVE_PRIORITY} or more, not {file.spec.priority}"
            self._at((*path, "protective"), message)
        if not given.do and given.notify is None and self._source.complete(path):
            self._at(path, f"rule '{given.name}' does nothing: give it `do` or `notify`")
        when = self._expression((*path, "when"), given.when, "bool")
        until = None if given.until is None else self._expression((*path, "until"), given.until, "bool")
        actions = [self._action((*path, "do", i), do) for i, do in enumerate(given.do)]
        targets = [(action.knob, action.scope) for action in actions if action is not None]
        for i, target in enumerate(targets):
            if target in targets[:i]:
                self._at((*path, "do", i, "knob"), f"a second action on {target[0]} in the same scope")
        recover = [
            self._recover((*path, "recover", i), step, actions) for i, step in enumerate(given.recover)
        ]
        verify = self._verify(path, given, inputs)
        if when is None:
            return None
        amounts = [action.amount for action in actions if action is not None]
        named = {verify.input} if verify is not None else set[str]()
        for expression in (when, until, *amounts):
            if isinstance(expression, Expression):
                named.update(expression.names)
        text = json.dumps(
            [given.model_dump(mode="json"), {n: str(inputs[n]) for n in named if n in inputs}],
            sort_keys=True,
        )
        return Rule(
            name=given.name,
            identity=hashlib.sha256(text.encode()).hexdigest()[:16],
            when=when,
            until=until,
            for_ns=given.for_,
            keep_for_ns=given.keep_for,
            cooldown_ns=_cooldown_ns(given),
            lease_ns=given.lease,
            protective=given.protective == "always",
            actions=tuple(action for action in actions if action is not None),
            recover=tuple(recover),
            verify=verify,
            notify=None
            if given.notify is None
            else Notify(given.notify.receiver, given.notify.severity, given.notify.summary or summary),
        )

    def _expression(self, path: Path, text: str, wanted: Wanted) -> Expression | None:
        try:
            return compile_expression(text, self._signals, wanted, self._classes)
        except ExpressionError as error:
            for fault in error.faults:
                message = f"{path[-1]}: {fault.message}"
                self.problems.append(self._source.inside(path, fault.offset, message))
            return None

    def _action(self, path: Path, given: Do) -> Action | None:
        kinds = [kind for kind in ("set", "add", "multiply") if getattr(given, kind) is not None]
        if len(kinds) != 1:
            if kinds or self._source.complete(path):
                has = " and ".join(kinds) or "none"
                self._at(path, f"needs exactly one of set, add, multiply; has {has}")
            return None
        knob = self._knob((*path, "knob"), given.knob)
        scope = self._scope((*path, "scope"), given.scope, knob)
        kind: ActionKind = kinds[0]  # type: ignore[assignment] # one of the three literals above
        amount: float | Expression | None = getattr(given, kind)
        if isinstance(amount, str):
            amount = self._expression((*path, "set"), amount, "number")
        if amount is None or knob is None:
            return None
        self._check_amount((*path, kind), kind, amount, knob)
        low, high = self._bounds(path, given, knob)
        return Action(given.knob, scope, kind, amount, low, high, given.step)

    def _check_amount(self, path: Path, kind: ActionKind, amount: float | Expression, knob: Knob) -> None:
        if isinstance(amount, Expression):
            return
        if kind == "set":
            self._plausible(path, amount, knob)
        elif kind == "add" and amount == 0:
            self._at(path, "adding 0 does nothing")
        elif kind == "multiply" and (amount <= 0 or amount == 1):
            self._at(path, f"must be above 0 and not 1, not {amount:g}")

    def _bounds(self, path: Path, given: Do, knob: Knob) -> tuple[float, float]:
        low = knob.plausible[0] if given.min is None else given.min
        high = knob.plausible[1] if given.max is None else given.max
        for key, bound in (("min", given.min), ("max", given.max)):
            if bound is not None:
                self._plausible((*path, key), bound, knob)
        if low > high:
            self._at((*path, "min"), f"min {low:g} is above max {high:g}")
        return low, high

    def _plausible(self, path: Path, value: float, knob: Knob) -> None:
        low, high = knob.plausible
        if not low <= value <= high:
            self._at(path, f"{value:g} is outside what {knob.name} can be ({low:g} to {high:g} {knob.unit})")

    def _knob(self, path: Path, name: str) -> Knob | None:
        knob = KNOBS.get(name)
        if knob is None:
            self._at(path, f"unknown knob '{name}'{did_you_mean(name, KNOBS)}")
        return knob

    def _scope(self, path: Path, given: ScopeModel | None, knob: Knob | None) -> Scope:
        if given is None:
            return ALL
        if knob is not None and not knob.scoped:
            self._at(path, f"{knob.name} takes no scope: it holds for all requests", key=True)
        return Scope("class_at_most", given.class_at_most)

    def _recover(self, path: Path, given: RecoverStep, actions: Sequence[Action | None]) -> Recover:
        knob = self._knob((*path, "knob"), given.knob)
        scope = None if given.scope is None else self._scope((*path, "scope"), given.scope, knob)
        mine = [a for a in actions if a is not None and a.knob == given.knob and scope in (None, a.scope)]
        if not mine and None not in actions and self._source.complete((*path[:-2], "do")):
            self._at((*path, "knob"), f"recovers {given.knob}, which this rule's `do` does not move")
        if given.every <= 0:
            self._at((*path, "every"), "must be above 0s")
        if given.add == 0:
            self._at((*path, "add"), "adding 0 never recovers")
        for action in mine:
            if direction(action) * given.add > 0:
                self._at(
                    (*path, "add"), "moves the same way as `do`: recover walks the claim back to baseline"
                )
                break
        return Recover(given.knob, scope, given.add, given.every)

    def _verify(self, path: Path, rule: RuleModel, inputs: dict[str, InputSpec]) -> Verify | None:
        given = rule.verify
        if given is None:
            return None
        path = (*path, "verify")
        if given.input not in inputs:
            if given.input not in self._signals:
                hint = did_you_mean(given.input, self._signals)
                self._at((*path, "input"), f"undeclared input '{given.input}'{hint}")
            return None
        if not rule.do:
            self._at(path, "nothing to verify: the rule has no `do`", key=True)
        if (given.falls is None) == (given.rises is None):
            if given.falls is not None or self._source.complete(path):
                self._at(path, "needs exactly one of falls, rises", key=True)
            return None
        if given.within <= 0:
            self._at((*path, "within"), "must be above 0s")
        if given.falls is not None:
            return Verify(given.input, "falls", given.falls, given.within)
        return Verify(given.input, "rises", given.rises or 0.0, given.within)

    def _unique_rules(self, rules: Sequence[RuleModel]) -> None:
        names = [rule.name for rule in rules]
        for i, name in enumerate(names):
            if name in names[:i]:
                self._at(("spec", "rules", i, "name"), f"a second rule named '{name}'")

    def _at(self, path: Path, message: str, key: bool = False) -> None:
        named = path[-1] if isinstance(path[-1], str) else None
        prefix = f"{named}: " if named is not None and not message.startswith(("agg", named)) else ""
        self.problems.append(self._source.at(path, f"{prefix}{message}", key))


def direction(action: Action) -> int:
    """-1 where the action always lowers its knob, +1 where it always raises it, 0 where it depends."""
    if isinstance(action.amount, Expression) or action.kind == "set":
        return 0
    rises = action.amount > 0 if action.kind == "add" else action.amount > 1
    return 1 if rises else -1


def _cooldown_ns(rule: RuleModel) -> int:
    if rule.cooldown is not None:
        return rule.cooldown
    return 0 if all(do.set is not None for do in rule.do) else DEFAULT_COOLDOWN_NS
