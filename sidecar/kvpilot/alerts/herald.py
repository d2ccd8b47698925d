"""The herald: turns what happened into alerts, remembers which are firing, and resolves what it announced."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvpilot.alerts.body import Alert
from kvpilot.alerts.outbox import Outbox
from kvpilot.policy.outcome import Notice
from kvpilot.policy.rules import PolicySet

_Key = tuple[str, str, str]
"""(receiver, policy, rule); the pilot's own troubles have policy ""."""


class Herald:
    """Posts to one outbox. `policies` gives alerts the labels and annotations of their policy."""

    def __init__(self, outbox: Outbox, engine_name: str) -> None:
        self.policies = PolicySet(())
        self._outbox = outbox
        self._engine_name = engine_name
        self._firing: dict[_Key, Alert] = {}

    def notify(self, notice: Notice, wall_ns: int) -> None:
        """A rule became active, or is over."""
        key = (notice.receiver, notice.policy, notice.rule)
        if not notice.firing:
            self._resolve(key, wall_ns)
            return
        policy = next((each for each in self.policies.policies if each.name == notice.policy), None)
        labels: Mapping[str, str] = policy.labels if policy else {}
        annotations: Mapping[str, str] = policy.annotations if policy else {}
        self._fire(
            key,
            {
                **labels,
                "alertname": f"Kvpilot{_camel(notice.rule)}",
                "engine": self._engine_name,
                "policy": notice.policy,
                "rule": notice.rule,
                "severity": notice.severity,
            },
            {**annotations, "summary": notice.summary},
            wall_ns,
        )

    def trouble(self, name: str, summary: str | None, wall_ns: int) -> None:
        """Something is wrong with the pilot itself, or (`summary` None) is over: every receiver is told."""
        for receiver in self._outbox.receivers:
            key = (receiver, "", name)
            if summary is None:
                self._resolve(key, wall_ns)
            else:
                labels = {"alertname": name, "engine": self._engine_name, "severity": "warning"}
                self._fire(key, labels, {"summary": summary}, wall_ns)

    def resolve_all(self, wall_ns: int) -> None:
        """The pilot leaves: nothing that it announced holds by its doing any more."""
        for key in list(self._firing):
            self._resolve(key, wall_ns)

    def _fire(
        self, key: _Key, labels: Mapping[str, str], annotations: Mapping[str, str], wall_ns: int
    ) -> None:
        started_ns = self._firing[key].started_wall_ns if key in self._firing else wall_ns
        self._firing[key] = Alert(labels, annotations, started_ns)
        self._outbox.post(key[0], self._firing[key])

    def _resolve(self, key: _Key, wall_ns: int) -> None:
        alert = self._firing.pop(key, None)
        if alert is not None:
            self._outbox.post(key[0], replace(alert, ended_wall_ns=wall_ns))


def _camel(name: str) -> str:
    parts: Sequence[str] = name.replace("_", "-").split("-")
    return "".join(part[:1].upper() + part[1:] for part in parts)
