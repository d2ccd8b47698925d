"""One rule's notices during a tick: that it became active, that its effect failed, that this is over."""

from dataclasses import replace

from kvpilot.policy.notice import About, Notice
from kvpilot.policy.outcome import Effect
from kvpilot.policy.rules import Policy, Rule
from kvpilot.policy.state import RuleState


class Crier:
    """`notified` and `disappointed` are what is firing, for the next tick; `notices` is this tick's news."""

    def __init__(self, policy: Policy, rule: Rule, state: RuleState) -> None:
        self.notices: list[Notice] = []
        self.notified = state.notified
        self.disappointed = state.disappointed
        self._policy = policy
        self._rule = rule

    def tell(self, active: bool) -> None:
        """Of the rule's state. With it ends what was said of its effect."""
        notify = self._rule.notify
        if not active:
            self._reassure()
        if notify is None or active == (self.notified is not None):
            return
        notice = self._notice(notify.summary, active, "state")
        self.notified = notice if active else None
        self.notices.append(notice)

    def judge(self, found: Effect) -> None:
        """Of an effect that was measured."""
        if found.met:
            self._reassure()
        elif self.disappointed is None:
            change = f"{found.input} went from {found.before:.4g} to {found.after:.4g}"
            self.disappointed = self._notice(f"{change}, expected {found.expected}", True, "effect")
            self.notices.append(self.disappointed)

    def _reassure(self) -> None:
        if self.disappointed is not None:
            self.notices.append(replace(self.disappointed, firing=False))
            self.disappointed = None

    def _notice(self, summary: str, firing: bool, about: About) -> Notice:
        notify = self._rule.notify
        receiver, severity = (notify.receiver, notify.severity) if notify is not None else ("", "warning")
        return Notice(self._policy.name, self._rule.name, receiver, severity, summary, firing, about)
