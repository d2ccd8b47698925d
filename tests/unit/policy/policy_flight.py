"""Policies flown tick by tick in virtual time, against an engine that obeys at the next tick."""

from dataclasses import dataclass, field

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Context
from kvpilot.policy.evaluate import evaluate
from kvpilot.policy.expr import Reading
from kvpilot.policy.load import load_text
from kvpilot.policy.outcome import Decision, Outcome
from kvpilot.policy.rules import Policy
from kvpilot.policy.state import Phase, State
from kvpilot.signals import Missing

MS = 1_000_000
GONE = Missing("no_samples")
ALL = Scope("all")
LOWEST = Scope("class_at_most", 0)

CHUNK = ManifestKnob("prefill_chunk_tokens", "tokens", 16, 4096, 1024, 16, "per step")
DRAFTS = ManifestKnob("speculative_tokens", "tokens", 0, 8, 4, 1, "per step")
SHED = ManifestKnob("shed_fraction", "ratio", 0, 1, 0, 0.01, "valve")


def policy(
    rules: str, name: str = "guard", spec: str = "", seen: str = "{signal: requests_running}"
) -> Policy:
    """A policy of these rules over two inputs, `load` and `seen`."""
    return load_text(
        f"""
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {{name: {name}}}
spec:
  inputs:
    load: {{signal: requests_waiting}}
    seen: {seen}
  {spec}
  rules:
    {rules}
"""
    )


HALVE = """
    - name: halve
      when: load > 10
      until: load < 5
      for: 200ms
      keepFor: 300ms
      cooldown: 1s
      do: [{knob: prefill_chunk_tokens, multiply: 0.5, min: 100}]
      recover: [{knob: prefill_chunk_tokens, add: 256, every: 500ms}]
"""


SHED_RULE = """
    - name: shed
      when: load > 10
      cooldown: 100ms
      do: [{knob: shed_fraction, add: 0.15, step: 0.05, scope: {classAtMost: 0}}]
      recover: [{knob: shed_fraction, add: -0.2, every: 100ms}]
"""


@dataclass
class Flight:
    """Policies flown tick by tick against an engine that obeys at the next tick."""

    policies: list[Policy]
    state: State = field(default_factory=State)
    now_ms: int = 0
    tick_ms: int = 100
    obeys: bool = True
    knobs: tuple[ManifestKnob, ...] = (CHUNK, DRAFTS, SHED)
    log: list[Decision] = field(default_factory=list)
    values: dict[tuple[str, Scope], float] = field(default_factory=dict)
    last: Outcome | None = None

    def fly(self, load: Reading, ticks: int = 1, seen: Reading = 1.0, **context: object) -> Outcome:
        for _ in range(ticks):
            names = {one.name for one in self.policies}
            inputs = {
                (name, signal): value for name in names for signal, value in (("load", load), ("seen", seen))
            }
            now = Context(
                self.now_ms * MS, {knob.name: knob for knob in self.knobs}, dict(self.values), **context
            )
            outcome = evaluate(self.policies, self.state, inputs, now)
            self.state, self.last = outcome.state, outcome
            self.log += outcome.decisions
            if self.obeys:
                self.values = {(lease.knob, lease.scope): lease.value for lease in outcome.leases}
            self.now_ms += self.tick_ms
        assert self.last is not None
        return self.last

    def phase(self, rule: str = "halve", name: str = "guard") -> Phase:
        return self.state.rules[name, rule].phase

    def held(self, knob: str = "prefill_chunk_tokens", scope: Scope = ALL) -> float | None:
        assert self.last is not None
        return next(
            (lease.value for lease in self.last.leases if (lease.knob, lease.scope) == (knob, scope)), None
        )

    def verdicts(self) -> list[str]:
        return [decision.verdict for decision in self.log]
