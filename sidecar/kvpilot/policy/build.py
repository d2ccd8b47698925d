"""From a file's shape to a typed policy: names against catalogues, expressions against inputs, and bounds.

Every problem is collected, with its place; a policy comes out only when there is none.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet

from kvpilot.knobs import KNOBS
from kvpilot.policy.build_action import build_action, build_recover
from kvpilot.policy.build_choose import build_choose
from kvpilot.policy.expr import Expression
from kvpilot.policy.findings import Findings, did_you_mean
from kvpilot.policy.lease import OVERRIDE
from kvpilot.policy.quantity import format_duration
from kvpilot.policy.rules import (
    DEFAULT_COOLDOWN_NS,
    Action,
    Choose,
    InputSpec,
    Limits,
    Notify,
    OnMissing,
    Policy,
    Recover,
    Rule,
    Solve,
    Verify,
)
from kvpilot.policy.schema import Input, OnMissingModel, PolicyFile, RuleModel, Spec
from kvpilot.policy.source import Path, Problem, Source
from kvpilot.policy.tokens import RESERVED
from kvpilot.signals import AGGREGATIONS, SIGNALS, Signal

PROTECTIVE_PRIORITY = 1000
LEASE_MIN_NS = 2_000_000_000
LEASE_MAX_NS = 60_000_000_000
UNDOABLE = ("prefill_chunk_tokens", "step_token_budget", "speculative_tokens")
"""Knobs that a rule may undo by itself. Not those that shed, admit or guard KV memory: there a missing effect
is no sign that the protection can go."""
_OF_WHEN = ("until", "for", "keepFor", "cooldown", "do", "recover", "protective")
"""Keys of a rule that mean nothing beside `choose`."""


class Builder:
    """Builds one policy from one file; `problems` says what is wrong with it."""

    def __init__(self, source: Source, declared: Iterable[str], classes: Sequence[str] | None) -> None:
        self._source = source
        self._findings = Findings(source, declared, classes)
        self._at = self._findings.at

    @property
    def problems(self) -> list[Problem]:
        """What was found wrong so far."""
        return self._findings.problems

    def build(self, file: PolicyFile) -> Policy:
        """The policy, to be used only if `problems` stays empty."""
        spec = file.spec
        if file.metadata.name == OVERRIDE:
            self._at(("metadata", "name"), f"'{OVERRIDE}' is reserved for people's orders")
        if spec.on_missing == "release" and "hold_for" in spec.model_fields_set:
            self._at(("spec", "holdFor"), "has no effect without `onMissing: hold` or a fallback", key=True)
        inputs = {name: self._input(name, given) for name, given in spec.inputs.items()}
        rules = [self._rule(("spec", "rules", i), rule, file, inputs) for i, rule in enumerate(spec.rules)]
        self._unique_rules(spec.rules)
        built = [rule for rule in rules if rule is not None]
        on_missing, fallback = self._on_missing(spec, {a.knob for rule in built for a in rule.actions})
        return Policy(
            name=file.metadata.name,
            path=self._source.path,
            mode=spec.mode,
            priority=spec.priority,
            annotations=dict(file.metadata.annotations),
            labels=dict(file.metadata.labels),
            inputs=inputs,
            on_missing=on_missing,
            hold_for_ns=spec.hold_for,
            limits=None if spec.limits is None else Limits(spec.limits.max_changes, spec.limits.per),
            rules=tuple(built),
            fallback=fallback,
        )

    def _on_missing(self, spec: Spec, moved: AbstractSet[str]) -> tuple[OnMissing, dict[str, float]]:
        given = spec.on_missing
        if not isinstance(given, OnMissingModel):
            return ("hold" if given == "hold" else "release"), {}
        path: Path = ("spec", "onMissing", "fallback", "set")
        wanted = given.fallback.set
        if not isinstance(wanted, dict):
            if len(moved) != 1:
                several = f"the rules move {', '.join(sorted(moved)) or 'no knob'}"
                self._at(path, f"{several}: say which is set, as in {{set: {{KNOB: VALUE}}}}")
                return "fallback", {}
            wanted = dict.fromkeys(moved, wanted)
        for name, value in wanted.items():
            if name in KNOBS and name not in moved:
                self._at((*path, name), f"no rule of this policy moves {name}", key=True)
            knob = self._findings.knob((*path, name), name)
            if knob is not None:
                self._findings.plausible((*path, name), value, knob)
        return "fallback", dict(wanted)

    def _input(self, name: str, given: Input) -> InputSpec:
        path: Path = ("spec", "inputs", name)
        if name in RESERVED:
            self._at(path, f"'{name}' is a reserved word", key=True)
        signal = SIGNALS.get(given.signal)
        self._findings.signals[name] = signal
        if signal is None:
            hint = did_you_mean(given.signal, SIGNALS)
            self._at((*path, "signal"), f"unknown signal '{given.signal}'{hint}")
        else:
            self._check_window(path, given, signal)
            if given.klass is not None and not signal.per_class:
                self._at((*path, "class"), f"{signal.name} is not measured per class")
        if given.klass is not None:
            self._findings.klass((*path, "class"), given.klass)
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
        self, path: Path, given: RuleModel, file: PolicyFile, inputs: dict[str, InputSpec]
    ) -> Rule | None:
        self._check_rule(path, given, file)
        if given.choose is not None:
            return self._choosing(path, given, file, inputs)
        findings = self._findings
        when = None if given.when is None else findings.expression((*path, "when"), given.when, "bool")
        until = None if given.until is None else findings.expression((*path, "until"), given.until, "bool")
        actions = [build_action(findings, (*path, "do", i), do) for i, do in enumerate(given.do)]
        self._unique_targets(path, actions)
        recover = [
            build_recover(findings, (*path, "recover", i), step, actions)
            for i, step in enumerate(given.recover)
        ]
        if when is None:
            return None
        built = tuple(action for action in actions if action is not None)
        return self._finish(path, given, file, inputs, built, tuple(recover), when, until)

    def _choosing(
        self, path: Path, given: RuleModel, file: PolicyFile, inputs: dict[str, InputSpec]
    ) -> Rule | None:
        assert given.choose is not None, "asked by the caller"
        found = build_choose(self._findings, (*path, "choose"), given.choose)
        if found is None:
            return None
        choose, action = found
        return self._finish(path, given, file, inputs, (action,), (), choose=choose)

    def _check_rule(self, path: Path, given: RuleModel, file: PolicyFile) -> None:
        if not LEASE_MIN_NS <= given.lease <= LEASE_MAX_NS:
            self._at((*path, "lease"), "must be between 2s and 60s")
        if given.protective and file.spec.priority < PROTECTIVE_PRIORITY:
            message = f"needs spec.priority of {PROTECTIVE_PRIORITY} or more, not {file.spec.priority}"
            self._at((*path, "protective"), message)
        if given.choose is not None:
            said = {
                model.alias or name
                for name, model in RuleModel.model_fields.items()
                if name in given.model_fields_set
            }
            for key in ("when", *_OF_WHEN):
                if key in said:
                    self._at((*path, key), "means nothing beside `choose`", key=True)
            return
        if given.when is None and self._source.complete(path):
            self._at(path, f"rule '{given.name}' needs `when`, or `choose`", key=True)
        if not given.do and given.notify is None and self._source.complete(path):
            self._at(path, f"rule '{given.name}' does nothing: give it `do` or `notify`")

    def _unique_targets(self, path: Path, actions: Sequence[Action | None]) -> None:
        seen: list[Action] = []
        for i, action in enumerate(actions):
            if action is None:
                continue
            if any(
                one.acts_on(action.knob, action.scope) or action.acts_on(one.knob, one.scope) for one in seen
            ):
                message = f"a second action on {action.knob} in the same scope"
                self._at((*path, "do", i, "knob"), message)
            seen.append(action)

    def _finish(
        self,
        path: Path,
        given: RuleModel,
        file: PolicyFile,
        inputs: dict[str, InputSpec],
        actions: tuple[Action, ...],
        recover: tuple[Recover, ...],
        when: Expression | None = None,
        until: Expression | None = None,
        choose: Choose | None = None,
    ) -> Rule:
        verify = self._verify(path, given, inputs)
        cooldown_ns = _cooldown_ns(given)
        if verify is not None and verify.undo:
            self._check_undo((*path, "verify", "else"), given, verify, actions, cooldown_ns)
        notify, summary = given.notify, file.metadata.annotations.get("summary", "")
        return Rule(
            name=given.name,
            identity=_identity(given, inputs, _named(actions, verify, when, until, choose)),
            when=when,
            until=until,
            for_ns=given.for_,
            keep_for_ns=given.keep_for,
            cooldown_ns=cooldown_ns,
            lease_ns=given.lease,
            protective=given.protective == "always",
            actions=actions,
            recover=recover,
            verify=verify,
            notify=None
            if notify is None
            else Notify(notify.receiver, notify.severity, notify.summary or summary),
            choose=choose,
        )

    def _verify(self, path: Path, rule: RuleModel, inputs: dict[str, InputSpec]) -> Verify | None:
        given, path = rule.verify, (*path, "verify")
        if given is None:
            return None
        if given.input not in inputs:
            if given.input not in self._findings.signals:
                hint = did_you_mean(given.input, self._findings.signals)
                self._at((*path, "input"), f"undeclared input '{given.input}'{hint}")
            return None
        if not rule.do and rule.choose is None:
            self._at(path, "nothing to verify: the rule has no `do`", key=True)
        if (given.falls is None) == (given.rises is None):
            if given.falls is not None or self._source.complete(path):
                self._at(path, "needs exactly one of falls, rises", key=True)
            return None
        if given.within <= 0:
            self._at((*path, "within"), "must be above 0s")
        window_ns = round((inputs[given.input].window_s or 0.0) * 1e9)
        ratio = given.rises if given.falls is None else given.falls
        assert ratio is not None, "one of the two is there"
        return Verify(
            given.input,
            "rises" if given.falls is None else "falls",
            ratio,
            given.within,
            undo=given.otherwise == "undo",
            window_ns=window_ns,
        )

    def _check_undo(
        self, path: Path, rule: RuleModel, verify: Verify, actions: Sequence[Action], cooldown_ns: int
    ) -> None:
        """An undo needs an effect that is nobody else's, and a change that may be taken back."""
        if cooldown_ns < verify.within_ns:
            wait = "dwell" if rule.choose is not None else "cooldown"
            within = format_duration(verify.within_ns)
            self._at(path, f"undo needs a {wait} of at least `within`, {within}: else the next step blurs it")
        if verify.window_ns > verify.within_ns:
            window, within = format_duration(verify.window_ns), format_duration(verify.within_ns)
            message = (
                f"undo cannot be attributed: {verify.input} looks back {window}, but is judged after {within}"
            )
            self._at(path, message)
        if rule.protective:
            self._at(path, "undo is not for a rule that is `protective: always`")
        for action in actions:
            if action.knob not in UNDOABLE:
                why = "it sheds, admits or guards KV memory"
                self._at(path, f"undo is not for {action.knob}: {why}")
            if action.tracks:
                moves = "a model" if isinstance(action.amount, Solve) else "an expression"
                self._at(
                    path, f"undo cannot be attributed: {action.knob} follows {moves} and moves every tick"
                )

    def _unique_rules(self, rules: Sequence[RuleModel]) -> None:
        names = [rule.name for rule in rules]
        for i, name in enumerate(names):
            if name in names[:i]:
                self._at(("spec", "rules", i, "name"), f"a second rule named '{name}'")


def _named(
    actions: Sequence[Action],
    verify: Verify | None,
    when: Expression | None,
    until: Expression | None,
    choose: Choose | None,
) -> set[str]:
    """Every variable that the rule names anywhere."""
    amounts = [action.amount for action in actions]
    targets = [amount.target for amount in amounts if isinstance(amount, Solve)]
    named = {verify.input} if verify is not None else set[str]()
    for expression in (when, until, choose.unless if choose else None, *amounts, *targets):
        if isinstance(expression, Expression):
            named.update(expression.names)
    return named


def _identity(given: RuleModel, inputs: dict[str, InputSpec], named: AbstractSet[str]) -> str:
    """Of the rule's text and of the inputs that it names: what is unchanged keeps its state over a reload."""
    text = json.dumps(
        [given.model_dump(mode="json"), {name: str(inputs[name]) for name in named if name in inputs}],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cooldown_ns(rule: RuleModel) -> int:
    if rule.choose is not None:
        return rule.choose.dwell
    if rule.cooldown is not None:
        return rule.cooldown
    # What may come and go, or step, on every tick has to be slowed down where nobody says how.
    still = all(do.set is not None and (do.scope is None or do.scope.tenant is None) for do in rule.do)
    return 0 if still else DEFAULT_COOLDOWN_NS
