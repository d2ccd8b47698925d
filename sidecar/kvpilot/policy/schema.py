"""The shape of a policy file, as pydantic models: what `load` validates against and editors complete from.

Shape only. What needs the catalogues or the other rules (names, expressions, bounds) is checked in `build`.
Every description here is what an editor shows on hover.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

from kvpilot.knobs import KNOBS
from kvpilot.policy.quantity import parse_amount, parse_duration, parse_number
from kvpilot.policy.rules import DEFAULT_LEASE_NS
from kvpilot.signals import AGGREGATIONS, SIGNALS

API_VERSION = "kvpilot.dev/v1alpha1"
DEFAULT_HOLD_NS = 30_000_000_000
DEFAULT_MAX_AGE_NS = 2_000_000_000

Duration = Annotated[
    int,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\d+(\.\d+)?(ms|s|m|h)$", "examples": ["250ms", "5s", "2m"]}
    ),
]
Number = Annotated[
    float,
    BeforeValidator(parse_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+]?\d+(\.\d+)?\s*%$"}]}),
]
Amount = Annotated[
    float | str,
    BeforeValidator(parse_amount),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]}),
]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
InputName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
KnobName = Annotated[str, Field(json_schema_extra={"enum": sorted(KNOBS)})]


def _series(value: object) -> str:
    """A series of one number is a YAML number; everything else is text already."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return value
    raise ValueError('a series is text such as "0.02x7 0.06x19 _ stale"')


def _slo(value: object) -> float | dict[str, float]:
    if isinstance(value, dict):
        return {str(name): parse_number(target) for name, target in value.items()}
    return parse_number(value)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, alias_generator=to_camel)


class Metadata(_Model):
    """Who this policy is."""

    name: Name = Field(description="Unique among all loaded policies; lower-case words joined by dashes.")
    labels: dict[str, str] = Field(default={}, description="Copied to alerts.")
    annotations: dict[str, str] = Field(default={}, description="For people: summary, runbook_url.")


class Input(_Model):
    """A window over one signal of the catalogue, computed once a tick."""

    signal: str = Field(json_schema_extra={"enum": [*sorted(SIGNALS)]})
    agg: str = Field(
        default="last",
        description="How samples become one value.",
        json_schema_extra={"enum": [*sorted({agg for aggs in AGGREGATIONS.values() for agg in aggs})]},
    )
    window: Duration | None = Field(default=None, description="How far back samples count; not for `last`.")
    min_samples: int = Field(default=1, ge=1, description="Fewer samples than this in the window: missing.")
    max_age: Duration = Field(
        default=DEFAULT_MAX_AGE_NS, description="A newest sample older than this: missing."
    )
    klass: str | None = Field(default=None, alias="class", description="Only this class of requests.")


class Scope(_Model):
    """Which requests an action is about."""

    class_at_most: int = Field(
        ge=0, le=7, description="Classes of this level and below; 0 is the lowest class."
    )


class Do(_Model):
    """One action on one knob: exactly one of `set`, `add`, `multiply`."""

    knob: KnobName
    set: Amount | None = Field(default=None, description="A value, or an expression followed every tick.")
    add: Number | None = Field(default=None, description="Step the rule's claim by this much.")
    multiply: Number | None = Field(default=None, description="Step the rule's claim by this factor.")
    min: Number | None = Field(default=None, description="The claim never goes below.")
    max: Number | None = Field(default=None, description="The claim never goes above.")
    step: Number | None = Field(default=None, gt=0, description="Claims are multiples of this.")
    scope: Scope | None = None


class RecoverStep(_Model):
    """How the claim walks back to baseline once the rule is inactive."""

    knob: KnobName
    add: Number
    every: Duration
    scope: Scope | None = None


class VerifyEffect(_Model):
    """What the change is expected to do: exactly one of `falls`, `rises`."""

    input: str
    falls: Number | None = Field(default=None, gt=0)
    rises: Number | None = Field(default=None, gt=0)
    within: Duration
    otherwise: Literal["alert"] = Field(default="alert", alias="else")


class NotifyReceiver(_Model):
    """Whom to tell when the rule becomes active, and when it is over."""

    receiver: str = Field(min_length=1)
    severity: Literal["info", "warning", "critical"] = "warning"
    summary: str | None = None


class RuleModel(_Model):
    """When something holds for long enough, do something, until something else holds."""

    name: Name
    when: str = Field(description="Enter when this is true for `for`.")
    until: str | None = Field(
        default=None, description="Leave when this is true for `keepFor`; default: not `when`."
    )
    for_: Duration = Field(default=0, alias="for")
    keep_for: Duration = 0
    cooldown: Duration | None = Field(
        default=None,
        description="Least time between two steps; default 1s with `add` or `multiply`, else 0s.",
    )
    lease: Duration = Field(
        default=DEFAULT_LEASE_NS, description="How long the engine keeps a value unrenewed."
    )
    protective: Literal["always"] | None = Field(
        default=None, description="A limit: armed at once, never rate-limited."
    )
    do: list[Do] = []
    recover: list[RecoverStep] = []
    verify: VerifyEffect | None = None
    notify: NotifyReceiver | None = None


class LimitsModel(_Model):
    """At most so many steps by this policy's rules per time."""

    max_changes: int = Field(ge=1)
    per: Duration


class Spec(_Model):
    """What the policy does."""

    mode: Literal["off", "shadow", "enforce"] = "enforce"
    priority: int = Field(default=100, ge=0, le=10_000)
    inputs: dict[InputName, Input] = Field(min_length=1)
    on_missing: Literal["release", "hold"] = "release"
    hold_for: Duration = DEFAULT_HOLD_NS
    limits: LimitsModel | None = None
    rules: list[RuleModel] = Field(min_length=1)


class Expectation(_Model):
    """What must hold at one moment of a test."""

    at: Duration
    rule: str | None = None
    state: Literal["inactive", "pending", "active", "leaving"] | None = None
    knobs: dict[str, Number] = {}
    notified: list[str] | None = Field(
        default=None, description="Receivers with a firing notice, in any order."
    )


class TestModel(_Model):
    """One run of the policy in virtual time."""

    __test__ = False

    name: str = Field(min_length=1)
    tick: Duration = 100_000_000
    slo: dict[str, Annotated[Any, BeforeValidator(_slo)]] = {}
    knobs: dict[str, Number] = Field(default={}, description="Baselines.")
    series: dict[str, Annotated[str, BeforeValidator(_series)]]
    expect: list[Expectation] = Field(min_length=1)


class PolicyFile(_Model):
    """A policy file."""

    api_version: Literal["kvpilot.dev/v1alpha1"]
    kind: Literal["Policy"]
    metadata: Metadata
    spec: Spec
    tests: list[TestModel] = []


class TestFile(_Model):
    """`NAME.test.yaml`: tests of the policy file `NAME.yaml` beside it."""

    __test__ = False

    tests: list[TestModel] = Field(min_length=1)


NOT_YET = {
    "choose": "choosing by forecast",
    "solve": "solving from the step-time model",
    "probe": "probing",
    "fallback": "a fallback value",
    "tenant": "a tenant scope",
}
"""Keys of the language that this version does not know yet; they deserve a better answer than a typo."""


def key_owners() -> dict[str, list[str]]:
    """For each key, the places where it belongs: so that a misplaced one can be told where to go."""
    places: dict[str, type[BaseModel]] = {
        "metadata": Metadata,
        "spec": Spec,
        "an input": Input,
        "a rule": RuleModel,
        "an action of `do`": Do,
        "a step of `recover`": RecoverStep,
        "`verify`": VerifyEffect,
        "`notify`": NotifyReceiver,
        "`limits`": LimitsModel,
        "`scope`": Scope,
        "a test": TestModel,
        "an expectation": Expectation,
    }
    owners: dict[str, list[str]] = {}
    for place, model in places.items():
        for name, field in model.model_fields.items():
            owners.setdefault(field.alias or name, []).append(place)
    return owners


def json_schema() -> dict[str, Any]:
    """JSON Schema of a policy file, for editors."""
    schema = PolicyFile.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "kvpilot policy", **schema}
