"""The herald: turns what happened into alerts, remembers which are firing, and resolves what it announced."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvpilot.alerts.body import Alert
from kvpilot.alerts.outbox import Outbox
from kvpilot.alerts.watch import Change
from kvpilot.policy.notice import Notice
from kvpilot.policy.rules import PolicySet

_Key = tuple[str, str, str]
"""(receiver, policy, rule); the pilot's own troubles have policy ""."""


class Herald:
    """Posts to one outbox. `policies` gives alerts the labels and annotations of their policy.

    Alerts about a rank other than 0 carry it as a label.
    """

    def __init__(self, outbox: Outbox, engine_name: str, rank: int = 0) -> None:
        self.policies = PolicySet(())
        self._outbox = outbox
        self._engine = {"engine": engine_name} | ({"rank": str(rank)} if rank else {})
        self._firing: dict[_Key, Alert] = {}

    def notify(self, notice: Notice, wall_ns: int) -> None:
        """A rule became active, or had not the effect that it promises; or that is over."""
        for receiver in (notice.receiver,) if notice.receiver else self._outbox.receivers:
            self._tell(receiver, notice, wall_ns)

    def _tell(self, receiver: str, notice: Notice, wall_ns: int) -> None:
        lacks = "NoEffect" if notice.about == "effect" else ""
        key = (receiver, notice.policy, f"{notice.rule}{lacks}")
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
                "alertname": f"Kvpilot{_camel(notice.rule)}{lacks}",
                **self._engine,
                "policy": notice.policy,
                "rule": notice.rule,
                "severity": notice.severity,
            },
            {**annotations, "summary": notice.summary},
            wall_ns,
        )

    def trouble(
        self, name: str, summary: str | None, wall_ns: int, severity: str = "warning", description: str = ""
    ) -> None:
        """Something is wrong with the engine or the pilot itself, or (`summary` None) is over: every receiver
        is told. `description` says what to do.
        """
        for receiver in self._outbox.receivers:
            key = (receiver, "", name)
            if summary is None:
                self._resolve(key, wall_ns)
                continue
            labels = {"alertname": name, **self._engine, "severity": severity}
            annotations = {"summary": summary} | ({"description": description} if description else {})
            self._fire(key, labels, annotations, wall_ns)

    def change(self, change: Change, wall_ns: int) -> None:
        """An alarm of the engine fires, or is over."""
        alarm = change.alarm
        summary = alarm.summary if change.firing else None
        self.trouble(alarm.name, summary, wall_ns, alarm.severity, alarm.description)

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
