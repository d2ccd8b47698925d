"""OpenTelemetry against a real receiver: decisions as spans, the page as metrics, an endpoint in trouble."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from fake_engine import eventually
from otlp_receiver import Receiver, plain, receiver
from prometheus_client.core import Exemplar

from kvpilot.clock import NS, VirtualClock
from kvpilot.config import Otlp
from kvpilot.journal.records import DecisionRecord, EffectRecord, RuleRecord, VerdictRecord
from kvpilot.publish.collected import Collected, Distribution
from kvpilot.publish.decision_spans import OPEN_FOR_NS
from kvpilot.publish.families import FAMILIES
from kvpilot.publish.otlp import QUEUE_BATCHES, Batch, OtlpSender
from kvpilot.publish.sheet import Sheet
from kvpilot.publish.traces import trace_id

WALL_NS = 1_700_000_000 * NS
Lab = tuple[OtlpSender, Receiver, VirtualClock]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with receiver() as (state, endpoint):
        clock = VirtualClock()
        config = Otlp(
            endpoint=endpoint,
            headers={"x-tenant": "lab"},
            resource={"k8s.pod.name": "pod-0"},
            genai=True,
            timeout=0.5,
        )
        yield OtlpSender(config, "engine", 1, clock), state, clock


def decision(number: int, verdict: str = "unconfirmed", text: str | None = None) -> DecisionRecord:
    return DecisionRecord(
        number=number,
        at_wall_ns=WALL_NS,
        engine_nonce=7,
        policy="guard",
        rule="act",
        knob="prefill_chunk_tokens",
        scope="all",
        before=512.0,
        after=256.0,
        verdict=verdict,
        reason="entered",
        inputs={"itl": 0.06, "queue": "missing: too_old"},
        ages={"itl": 0.1},
        phase="active",
        text=text,
    )


def test_a_decision_is_a_span_with_inputs_verdict_and_effect(lab: Lab) -> None:
    sender, state, _clock = lab
    sender.add(RuleRecord("t", WALL_NS, "guard", "act", {"verify": "itl falls 10% within 2s, else undo"}))
    sender.add(decision(5, text="t"))
    sender.work()
    assert state.spans() == [], "its echo and its effect are still to come"
    sender.add(VerdictRecord(5, "applied", 0.2))
    sender.work()
    assert state.spans() == []
    sender.add(
        EffectRecord(WALL_NS + 2 * NS, "guard", "act", "itl", "falls 10%", 0.06, 0.03, True, "it fell", 5)
    )
    sender.work()
    (span,) = state.spans()
    said = plain(span.attributes)
    assert span.name == "decide prefill_chunk_tokens"
    assert span.trace_id.hex() == f"{trace_id('engine', 1, 7, 5):032x}"
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (WALL_NS, WALL_NS + 2 * NS)
    assert (said["kvpilot.policy"], said["kvpilot.rule"]) == ("guard", "act")
    assert said["kvpilot.verdict"] == "applied"
    assert (said["kvpilot.value.before"], said["kvpilot.value.after"]) == (512.0, 256.0)
    assert said["kvpilot.input.itl"] == 0.06
    assert said["kvpilot.input.queue"] == "missing: too_old", "missing is never a number"
    assert said["kvpilot.effect.expected"] == "itl falls 10% within 2s, else undo"
    assert said["kvpilot.effect.realised_ratio"] == pytest.approx(-0.5)
    assert said["kvpilot.effect.outcome"] == "came"
    assert [event.name for event in span.events] == ["echoed", "effect"]


def test_resource_attributes_and_headers(lab: Lab) -> None:
    sender, state, _clock = lab
    sender.add(decision(1, "shadowed"))
    sender.work()
    resource = plain(state.traces[0].resource_spans[0].resource.attributes)
    assert resource["service.name"] == "kvpilot"
    assert resource["service.instance.id"] == "engine-1"
    assert (resource["kvpilot.engine"], resource["kvpilot.rank"]) == ("engine", 1)
    assert resource["k8s.pod.name"] == "pod-0"
    assert state.headers[0]["x-tenant"] == "lab"


def test_what_nothing_follows_is_told_at_once_and_the_rest_in_the_end(lab: Lab) -> None:
    sender, state, clock = lab
    sender.add(decision(1, "shadowed"))
    sender.add(decision(2))
    sender.work()
    assert [plain(span.attributes)["kvpilot.decision"] for span in state.spans()] == [1]
    clock.advance(OPEN_FOR_NS / NS)
    sender.work()
    assert [plain(span.attributes)["kvpilot.verdict"] for span in state.spans()] == [
        "shadowed",
        "unconfirmed",
    ]


def test_a_rejected_decision_is_an_error(lab: Lab) -> None:
    sender, state, _clock = lab
    sender.add(decision(1))
    sender.add(VerdictRecord(1, "rejected_by_engine", 1.0))
    sender.work()
    (span,) = state.spans()
    assert (span.status.code, span.status.message) == (2, "rejected_by_engine")


def page() -> list[Collected]:
    sheet = Sheet("engine", 1)
    sheet.add("steps", 40.0)
    sheet.add("kv_used_ratio", 0.25)
    told = {1: Exemplar({"decision": "5"}, 0.0015, 1.0)}
    sheet.add_distribution(
        "time_to_first_token_seconds", Distribution((0.001, 0.002), (1, 3, 4), 0.5, told), "batch"
    )
    return sheet.collected()


def test_metrics_are_the_pages_cumulative(lab: Lab) -> None:
    sender, state, _clock = lab
    sender.offer(Batch(WALL_NS, page(), WALL_NS - 9 * NS, 7, "tiny", "kvengine"))
    sender.offer(Batch(WALL_NS + NS, page(), WALL_NS - 8 * NS, 7, "tiny", "kvengine"))
    sender.work()
    steps = state.metric("kvpilot_steps")
    assert (steps.sum.is_monotonic, steps.sum.aggregation_temporality) == (True, 2)
    (point,) = steps.sum.data_points
    assert (point.as_double, plain(point.attributes)) == (40.0, {"engine": "engine", "rank": "1"})
    assert point.start_time_unix_nano == WALL_NS - 9 * NS, "one start of the engine has one start time"
    assert state.metric("kvpilot_kv_used_ratio").gauge.data_points[0].as_double == 0.25
    ttft = state.metric("kvpilot_time_to_first_token_seconds")
    (point,) = ttft.histogram.data_points
    assert ttft.unit == "s"
    assert (list(point.bucket_counts), list(point.explicit_bounds)) == ([1, 2, 1], [0.001, 0.002])
    assert (point.count, point.sum) == (4, 0.5)
    genai = state.metric("gen_ai.server.time_to_first_token")
    said = plain(genai.histogram.data_points[0].attributes)
    assert (said["gen_ai.provider.name"], said["gen_ai.request.model"]) == ("kvengine", "tiny")


def test_genai_metrics_are_off_unless_asked_for() -> None:
    with receiver() as (state, endpoint):
        sender = OtlpSender(Otlp(endpoint=endpoint), "engine", 0, VirtualClock())
        sender.offer(Batch(WALL_NS, page(), WALL_NS, 7, "tiny", "kvengine"))
        sender.work()
        assert state.metric("kvpilot_steps") is not None
        assert state.metric("gen_ai.server.time_to_first_token") is None


def test_an_endpoint_that_is_down_costs_counted_spans_and_nothing_else(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    sender, state, _clock = lab
    state.status = 400
    for number in range(3):
        sender.add(decision(number, "shadowed"))
    sender.work()
    sender.offer(Batch(WALL_NS, page()))
    sender.work()
    assert dict(sender.counts.dropped) == {"traces": 3, "metrics": 1}
    assert sender.counts.exports["traces", "failed"] == 1
    assert [record.message for record in caplog.records if "otlp" in record.message] == [
        f"otlp {sender._endpoint}: not taken; what it does not take is dropped and counted"
    ], "once until it works again"
    state.status = 200
    sender.add(decision(9, "shadowed"))
    sender.work()
    assert len(state.spans()) == 1


def test_a_slow_endpoint_fills_a_bounded_queue_and_the_tick_never_waits() -> None:
    with receiver() as (state, endpoint):
        state.free.clear()
        sender = OtlpSender(Otlp(endpoint=endpoint, timeout=0.5), "engine", 0, VirtualClock(), rows=10)
        sender.start()
        for number in range(100):
            sender.add(decision(number, "shadowed"))
        for _ in range(QUEUE_BATCHES + 3):
            sender.offer(Batch(WALL_NS, page()))
        assert sender.counts.dropped["traces"] == 90
        assert sender.counts.dropped["metrics"] == 3
        sheet = Sheet("engine", 0)
        sender.add_to(sheet)
        dropped = next(each for each in sheet.collected() if each.family is FAMILIES["kvpilot_otlp_dropped"])
        assert dropped.samples == [(("engine", "0", "traces"), 90), (("engine", "0", "metrics"), 3)]
        began = time.monotonic()
        sender.close(0.2)
        assert time.monotonic() - began < 5, "landing does not wait for an endpoint"


def test_the_thread_sends_by_itself_and_tells_the_rest_at_the_end(lab: Lab) -> None:
    sender, state, _clock = lab
    sender.start()
    sender.add(decision(1, "shadowed"))
    eventually(lambda: len(state.spans()) == 1)
    sender.add(decision(2))
    sender.close(5)
    assert len(state.spans()) == 2


def test_without_an_endpoint_nothing_of_it_is_installed() -> None:
    """A pilot's service without `otlp: endpoint` loads neither the SDK nor an exporter."""
    script = (
        "import sys, json, threading\n"
        "import kvpilot.service, kvpilot.config\n"
        "assert kvpilot.config.Otlp().endpoint is None\n"
        "installed = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print(json.dumps([name for name in sys.modules if name.startswith(installed)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == []
