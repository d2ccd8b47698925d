"""The manifest: what one engine rank is, what it lets us move, and what it lets us see.

Bounded JSON inside the telemetry header. Unknown keys are ignored by readers, so that adding one is no new
version.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from kvpilot.link.fields import Field

MANIFEST_MAX_BYTES = 32_768
_LEFT_OUT = ("device_uuids", "weights_bytes", "tenant_columns", "request_columns", "request_records")
"""Not written where an engine does not tell."""


class ManifestError(ValueError):
    """The bytes are not a manifest; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class ManifestKnob:
    """A knob this engine really has, with its limits. `applied` says how, in words for an operator."""

    name: str
    unit: str
    minimum: float
    maximum: float
    baseline: float
    granularity: float
    applied: str

    def __post_init__(self) -> None:
        if not self.minimum <= self.baseline <= self.maximum:
            raise ManifestError(
                f"knob {self.name}: baseline {self.baseline} outside {self.minimum}..{self.maximum}"
            )
        if not self.granularity > 0:
            raise ManifestError(f"knob {self.name}: granularity {self.granularity} must be above 0")

    def snap(self, value: float) -> float:
        """`value` on this knob's grid, inside its limits. Anchored at 0; limits and baseline are on the grid.

        Idempotent, so that what one side has snapped is what the other side puts in force.
        """
        if value == self.baseline:
            return value
        if value <= self.minimum or value >= self.maximum:
            return self.minimum if value <= self.minimum else self.maximum
        on_grid = round(value / self.granularity) * self.granularity
        return min(max(on_grid, self.minimum), self.maximum)


@dataclass(frozen=True, slots=True)
class Manifest:
    """See the module docstring. Sizes are bytes, lengths tokens."""

    engine: str
    engine_version: str
    model: str
    block_size: int
    blocks: int
    bytes_per_block: int
    max_model_len: int
    device: str
    knobs: tuple[ManifestKnob, ...]
    fields: tuple[Field, ...]
    classes: tuple[str, ...] = ()
    """Class names by level, lowest first: index = level, as leases with `classAtMost` mean it."""
    queue_order: str = "arrival"
    """`class` where higher classes are admitted first, else `arrival`: everybody waits for everybody."""
    rank: int = 0
    world: dict[str, int] = field(default_factory=lambda: {"dp": 1, "tp": 1, "pp": 1})
    activation_bytes_per_token: int | None = None
    device_memory_bytes: int | None = None
    device_uuids: tuple[str, ...] = ()
    """Of the devices that this rank computes on, as NVML or the framework writes them; empty: not told."""
    weights_bytes: int | None = None
    """Device memory of weights and buffers that stay."""
    tenant_columns: tuple[str, ...] = ()
    """What the page's sixth section counts by tenant, beside the rows of tenants; empty: no such section."""
    request_columns: tuple[str, ...] = ()
    """What the page's ring of ended requests holds of each, beside its tenant; empty: no such ring."""
    request_records: int = 0
    """How many that ring holds."""
    latency_measured_at: str = "engine"
    """`engine` (step) or `frontend`: where TTFT and ITL are taken; never mixed."""
    unsupported_knobs: dict[str, str] = field(default_factory=dict)
    unsupported_signals: dict[str, str] = field(default_factory=dict)

    def knob(self, name: str) -> ManifestKnob | None:
        """The knob of that name, if this engine has it."""
        return next((knob for knob in self.knobs if knob.name == name), None)

    def to_json(self) -> bytes:
        """Compact UTF-8 JSON. Raises ManifestError if over MANIFEST_MAX_BYTES."""
        told = {name: value for name, value in asdict(self).items() if value or name not in _LEFT_OUT}
        data = json.dumps(told, separators=(",", ":")).encode()
        if len(data) > MANIFEST_MAX_BYTES:
            raise ManifestError(f"manifest of {len(data)} bytes: at most {MANIFEST_MAX_BYTES}")
        return data

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """Inverse of `to_json`; unknown keys are ignored. Raises ManifestError."""
        try:
            raw = json.loads(data)
            known: dict[str, Any] = {k: v for k, v in raw.items() if k in cls.__dataclass_fields__}
            known["knobs"] = tuple(_only(ManifestKnob, knob) for knob in raw["knobs"])
            known["fields"] = tuple(
                Field(f["name"], f["type"], f["unit"], f["meaning"]) if isinstance(f, dict) else Field(*f[:4])
                for f in raw["fields"]
            )
            known["classes"] = tuple(raw.get("classes", ()))
            known["tenant_columns"] = tuple(map(str, raw.get("tenant_columns", ())))
            known["request_columns"] = tuple(map(str, raw.get("request_columns", ())))
            known["request_records"] = int(raw.get("request_records", 0))
            known["device_uuids"] = tuple(map(str, raw.get("device_uuids", ())))
            return cls(**known)
        except ManifestError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"not a manifest: {error}") from error


def _only(kind: Any, raw: dict[str, Any]) -> Any:
    return kind(**{k: v for k, v in raw.items() if k in kind.__dataclass_fields__})
