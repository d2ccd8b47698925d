"""An alert, and the body that carries it: Alertmanager's webhook format, version 4, for the receivers it has.

One alert is one group: its key is stable over firing and resolved, so a receiver can pair them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from kvpilot.clock import NS

NOT_ENDED = "0001-01-01T00:00:00Z"
"""What Alertmanager writes where an alert has no end yet."""


@dataclass(frozen=True, slots=True)
class Alert:
    """Something a person should know. `labels` are its identity; it resolves when `ended_wall_ns` is set."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str] = field(default_factory=dict)
    started_wall_ns: int = 0
    ended_wall_ns: int | None = None

    @property
    def status(self) -> str:
        return "firing" if self.ended_wall_ns is None else "resolved"


def webhook_body(receiver: str, alert: Alert, external_url: str) -> bytes:
    """The JSON that a version 4 receiver takes."""
    group = {name: alert.labels[name] for name in ("alertname", "engine", "rank") if name in alert.labels}
    key = ", ".join(f'{name}="{_escaped(value)}"' for name, value in sorted(alert.labels.items()))
    return json.dumps(
        {
            "receiver": receiver,
            "status": alert.status,
            "alerts": [
                {
                    "status": alert.status,
                    "labels": dict(alert.labels),
                    "annotations": dict(alert.annotations),
                    "startsAt": _rfc3339(alert.started_wall_ns),
                    "endsAt": NOT_ENDED if alert.ended_wall_ns is None else _rfc3339(alert.ended_wall_ns),
                    "generatorURL": f"{external_url}/status",
                    "fingerprint": fingerprint(alert.labels),
                }
            ],
            "groupLabels": group,
            "commonLabels": dict(alert.labels),
            "commonAnnotations": dict(alert.annotations),
            "externalURL": external_url,
            "version": "4",
            "groupKey": f"{{}}:{{{key}}}",
            "truncatedAlerts": 0,
        }
    ).encode()


def fingerprint(labels: Mapping[str, str]) -> str:
    """16 hex digits that depend on the labels alone."""
    text = "\xff".join(f"{name}\xff{value}" for name, value in sorted(labels.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _rfc3339(wall_ns: int) -> str:
    moment = datetime.fromtimestamp(wall_ns // 1_000_000 / 1000, UTC) if wall_ns >= NS else datetime.min
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
