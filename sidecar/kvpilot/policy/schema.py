"""The shape of a policy file, as pydantic models: what `load` validates against and editors complete from.

Shape only. What needs the catalogues or the other rules (names, expressions, bounds) is checked in `build`.
Every description here is what an editor shows on hover.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic.alias_generators import to_camel

from kvpilot.policy.rules import DEFAULT_LEASE_NS
from kvpilot.policy.schema_types import (
    ON_MISSING,
    Amount,
    Duration,
    InputName,
    KnobName,
    Name,
    Number,
    Numbers,
    Seconds,
    Series,
)
from kvpilot.signals import AGGREGATIONS, SIGNALS

API_VERSION = "kvpilot.dev/v1alpha1"
DEFAULT_HOLD_NS = 30_000_000_000
DEFAULT_MAX_AGE_NS = 2_000_000_000
DEFAULT_DWELL_NS = 2_000_000_000


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
    """Which requests an action is about: exactly one of `classAtMost`, `tenant`."""

    class_at_most: int | None = Field(
        default=None, ge=0, le=7, description="Classes of this level and below; 0 is the lowest class."
    )
    tenant: str | None = Field(
        default=None,
        min_length=1,
        max_length=32,
        description="`top`: whichever tenant holds most KV memory when the rule acts; or a tenant's name.",
    )


class SolveModel(_Model):
    """The value that a model gives, anew every tick: exactly one of `stepTime`, `ttft`."""

    step_time: Seconds | None = Field(
        default=None,
        description="Largest chunk whose predicted step, divided by the model's residual quantile, takes "
        "this long at most: seconds, a duration, or an expression.",
    )
    ttft: Seconds | None = Field(
        default=None,
        description="Prompt tokens that the backlogged service rate can still serve within this time: "
        "seconds, a duration, or an expression.",
    )
    klass: str | None = Field(
        default=None,
        alias="class",
        description="With `ttft`: the class and all below it; `lowest` and `highest` are the ends.",
    )


class Do(_Model):
    """One action on one knob: exactly one of `set`, `add`, `multiply`, `solve`."""

    knob: KnobName
    set: Amount | None = Field(default=None, description="A value, or an expression followed every tick.")
    add: Number | None = Field(default=None, description="Step the rule's claim by this much.")
    multiply: Number | None = Field(default=None, description="Step the rule's claim by this factor.")
    solve: SolveModel | None = Field(
        default=None, description="The value that a model gives, followed every tick."
    )
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
    otherwise: Literal["alert", "undo"] = Field(
        default="alert",
        alias="else",
        description="Where the effect does not come: tell people, or drop the claims and pause the rule.",
    )


class NotifyReceiver(_Model):
    """Whom to tell when the rule becomes active, and when it is over."""

    receiver: str = Field(min_length=1)
    severity: Literal["info", "warning", "critical"] = "warning"
    summary: str | None = None


class ProbeModel(_Model):
    """Keeps alive a signal that a choice below the candidate silences."""

    candidate: Number = Field(description="What to be at for a moment; one of the candidates.")
    for_: Duration = Field(alias="for", description="How long; about a tick.")
    every: Duration = Field(description="How long after the last one, before jitter and back-off.")
    jitter: Number = Field(
        default=0.1, ge=0, le=0.9, description="Lengthen or shorten each wait by up to this share."
    )
    backoff: Number = Field(
        default=2.0,
        ge=1,
        le=16,
        description="Lengthen the wait by this factor after each probe that changed nothing, up to 16 times.",
    )


class ChooseModel(_Model):
    """Take the candidate with the lowest forecast."""

    knob: KnobName
    candidates: list[Number] = Field(
        min_length=2, max_length=16, description="What to choose from, beside the engine's baseline."
    )
    minimise: Literal["forecast.seconds_per_token"]
    hysteresis: Number = Field(
        default=0.03, ge=0, lt=1, description="Only change for a forecast lower by this share."
    )
    dwell: Duration = Field(default=DEFAULT_DWELL_NS, description="Least time between two changes.")
    unless: str | None = Field(default=None, description="No probe while this is true.")
    probe: ProbeModel | None = None


class RuleModel(_Model):
    """When something holds for long enough, do something, until something else holds; or choose."""

    name: Name
    when: str | None = Field(default=None, description="Enter when this is true for `for`.")
    choose: ChooseModel | None = Field(
        default=None, description="Instead of `when` and `do`: take the candidate with the lowest forecast."
    )
    until: str | None = Field(
        default=None, description="Leave when this is true for `keepFor`; default: not `when`."
    )
    for_: Duration = Field(default=0, alias="for")
    keep_for: Duration = 0
    cooldown: Duration | None = Field(
        default=None,
        description="Least time between two steps; default 1s with `add`, `multiply`, `solve` or the top "
        "tenant, else 0s.",
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


class FallbackModel(_Model):
    """What to be at while blind."""

    set: Numbers = Field(description="A value for the one knob that the rules move, or a value by knob.")


class OnMissingModel(_Model):
    """What to do while an input is missing, beside `release` and `hold`."""

    fallback: FallbackModel


def _on_missing(value: object) -> str | OnMissingModel:
    if isinstance(value, dict):
        return OnMissingModel.model_validate(value)
    if value in ("release", "hold"):
        return str(value)
    raise ValueError("must be release, hold or {fallback: {set: VALUE}}")


class Spec(_Model):
    """What the policy does."""

    mode: Literal["off", "shadow", "enforce"] = "enforce"
    priority: int = Field(default=100, ge=0, le=10_000)
    inputs: dict[InputName, Input] = Field(min_length=1)
    on_missing: Annotated[
        str | OnMissingModel,
        PlainValidator(_on_missing),
        WithJsonSchema(ON_MISSING),
    ] = Field(
        default="release",
        description="Drop all claims; keep them without stepping; or claim a value. Both for `holdFor`.",
    )
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


class ForecastSeries(_Model):
    """What the models say in a test, tick by tick, in the notation of `series`."""

    chunk: Series | None = Field(default=None, description="What `solve: {stepTime: ...}` gets, in tokens.")
    credits: Series | None = Field(default=None, description="What `solve: {ttft: ...}` gets, in tokens.")
    seconds_per_token: dict[str, Series] = Field(
        default={}, description="Predicted seconds for each token, by speculation length."
    )


class TestModel(_Model):
    """One run of the policy in virtual time."""

    __test__ = False

    name: str = Field(min_length=1)
    tick: Duration = 100_000_000
    slo: dict[str, Numbers] = {}
    knobs: dict[str, Number] = Field(default={}, description="Baselines.")
    series: dict[str, Series]
    forecasts: ForecastSeries | None = None
    top_tenant: dict[Duration, str | None] = Field(
        default={}, description="Who holds most KV memory, by the time since when; null: nobody."
    )
    offered: Series | None = Field(
        default=None, description="Requests offered a second; by default a load that never changes."
    )
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


def key_owners() -> dict[str, list[str]]:
    """For each key, the places where it belongs: so that a misplaced one can be told where to go."""
    places: dict[str, type[BaseModel]] = {
        "metadata": Metadata,
        "spec": Spec,
        "an input": Input,
        "a rule": RuleModel,
        "an action of `do`": Do,
        "a step of `recover`": RecoverStep,
        "`solve`": SolveModel,
        "`choose`": ChooseModel,
        "`probe`": ProbeModel,
        "`onMissing`": OnMissingModel,
        "`fallback`": FallbackModel,
        "`verify`": VerifyEffect,
        "`notify`": NotifyReceiver,
        "`limits`": LimitsModel,
        "`scope`": Scope,
        "a test": TestModel,
        "`forecasts` of a test": ForecastSeries,
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
