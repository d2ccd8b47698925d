"""A decision as an OpenTelemetry span. Its ids are made from what it is, so that exemplars can name them."""

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from kvpilot.clock import NS
from kvpilot.publish.decision_spans import Decided, attributes
from kvpilot.publish.traces import span_id, trace_id
from kvpilot.version import version

SCOPE = InstrumentationScope("kvpilot", version())
_FAILED = ("rejected_by_engine", "lease_expired")


def make_span(decided: Decided, engine: str, rank: int, resource: Resource) -> ReadableSpan:
    """From the decision to the last that is known of it."""
    row, verdict, effect = decided.decision, decided.verdict, decided.effect
    identity = (engine, rank, row.engine_nonce, row.number)
    context = SpanContext(
        trace_id(*identity), span_id(*identity), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)
    )
    events, end_ns = [], row.at_wall_ns
    if verdict is not None:
        end_ns = row.at_wall_ns + round(verdict.after_s * NS)
        events.append(Event("echoed", {"kvpilot.verdict": verdict.verdict}, end_ns))
    if effect is not None:
        # Wall time may have stepped back meanwhile; a span must not end before it began.
        end_ns = max(end_ns, effect.at_wall_ns)
        events.append(Event("effect", {"kvpilot.effect.reason": effect.reason}, end_ns))
    failed = decided.name in _FAILED
    return ReadableSpan(
        f"decide {row.knob}",
        context=context,
        resource=resource,
        attributes=attributes(decided),
        events=events,
        kind=SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR, decided.name) if failed else Status(StatusCode.OK),
        start_time=row.at_wall_ns,
        end_time=end_ns,
        instrumentation_scope=SCOPE,
    )
