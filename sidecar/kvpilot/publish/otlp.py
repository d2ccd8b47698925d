"""OTLP/HTTP: decisions as traces and everything of the metrics page as metrics, sent by a thread of its own.

Only where kvpilot.yaml names an endpoint: without one nothing of this is imported, built or started. The tick
appends rows to a bounded queue and never waits; what the queue does not take and what cannot be sent is
dropped and counted. An endpoint that is down or slow holds up this thread alone.
"""

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from kvpilot.clock import NS, Clock
from kvpilot.config import Otlp
from kvpilot.journal.records import Record
from kvpilot.publish.board import Tick
from kvpilot.publish.collected import Collected
from kvpilot.publish.decision_spans import Decided, DecisionSpans
from kvpilot.publish.otlp_metrics import MetricsMaker
from kvpilot.publish.otlp_spans import make_span
from kvpilot.publish.sheet import Sheet
from kvpilot.version import version

QUEUE_ROWS = 4096
QUEUE_BATCHES = 4
WORK_S = 1.0

_log = logging.getLogger(__name__)
# The exporters log every attempt; this module says once what matters.
logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Batch:
    """The metrics page as of `wall_ns`. The counters of engine start `nonce` began at `started_wall_ns`."""

    wall_ns: int
    collected: Sequence[Collected]
    started_wall_ns: int | None = None
    nonce: int = 0
    model: str | None = None
    provider: str | None = None

    @classmethod
    def of(cls, collected: Sequence[Collected], tick: Tick | None, wall_ns: int) -> "Batch":
        """What was collected of `tick`, with the engine start that it saw."""
        if tick is None or tick.sight.manifest is None:
            return cls(wall_ns, collected)
        sight, manifest = tick.sight, tick.sight.manifest
        started_wall_ns = tick.wall_ns - round(sight.age_s * NS)
        return cls(wall_ns, collected, started_wall_ns, sight.nonce, manifest.model, manifest.engine)


@dataclass(slots=True)
class Counts:
    """What became of what was to be sent, by kind: traces, metrics."""

    exports: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


class OtlpSender:
    """One endpoint's queue and thread. `engine` and `rank` say which pilot this is."""

    def __init__(self, config: Otlp, engine: str, rank: int, clock: Clock, rows: int = QUEUE_ROWS) -> None:
        assert config.endpoint is not None
        self.counts = Counts()
        self._clock = clock
        self._identity = (engine, rank)
        base = config.endpoint.rstrip("/")
        headers = dict(config.headers)
        self._spans_to = OTLPSpanExporter(f"{base}/v1/traces", headers=headers, timeout=config.timeout)
        self._metrics_to = OTLPMetricExporter(f"{base}/v1/metrics", headers=headers, timeout=config.timeout)
        self._resource = Resource.create(
            {
                "service.name": "kvpilot",
                "service.version": version(),
                "service.instance.id": f"{engine}-{rank}",
                "kvpilot.engine": engine,
                "kvpilot.rank": rank,
                **config.resource,
            }
        )
        self._make_metrics = MetricsMaker(self._resource, clock.wall_ns(), config.genai)
        self._rows: queue.Queue[Record] = queue.Queue(rows)
        self._batches: queue.Queue[Batch] = queue.Queue(QUEUE_BATCHES)
        self._decisions = DecisionSpans()
        self._endpoint = base
        self._failing = False
        self._started: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)

    def start(self) -> None:
        """Send from now on."""
        self._thread.start()

    def add(self, row: Record) -> None:
        """One journal row; never waits."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self.counts.dropped["traces"] += 1

    def offer(self, batch: Batch) -> None:
        """One batch of metrics; never waits. Where the queue is full the oldest gives way."""
        while True:
            try:
                self._batches.put_nowait(batch)
                return
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._batches.get_nowait()
                    self.counts.dropped["metrics"] += 1

    def add_to(self, sheet: Sheet) -> None:
        """Its own metrics."""
        for (kind, outcome), count in self.counts.exports.items():
            sheet.add("otlp_exports", count, kind, outcome)
        for kind in ("traces", "metrics"):
            sheet.add("otlp_dropped", self.counts.dropped[kind], kind)
        sheet.add("otlp_queue_length", self._rows.qsize() + self._batches.qsize())

    def close(self, within_s: float) -> None:
        """Send what is queued, decisions as far as they are known; after `within_s` give up."""
        self._stop.set()
        self._thread.join(within_s)
        # Ends retries that are still waiting: the thread is not waited for any longer.
        for exporter in (self._spans_to, self._metrics_to):
            exporter.shutdown()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(WORK_S)
            try:
                self.work(last=stopping)
            except Exception as error:  # A defect of ours, or of a library: later rows must still go out.
                self._say(str(error) or type(error).__name__)

    def work(self, last: bool = False) -> None:
        """Send what there is, now. With `last` also decisions of which more may come."""
        while not self._rows.empty():
            self._decisions.add(self._rows.get_nowait())
        decided = self._decisions.take(None if last else self._clock.wall_ns())
        if decided:
            self._send("traces", len(decided), lambda: self._send_spans(decided))
        while not self._batches.empty():
            batch = self._batches.get_nowait()
            self._send("metrics", 1, lambda batch=batch: self._send_metrics(batch))  # type: ignore[misc]

    def _send_spans(self, decided: Sequence[Decided]) -> bool:
        spans: list[ReadableSpan] = [make_span(each, *self._identity, self._resource) for each in decided]
        return self._spans_to.export(spans) is SpanExportResult.SUCCESS

    def _send_metrics(self, batch: Batch) -> bool:
        started_ns = batch.started_wall_ns
        if started_ns is not None:
            # The first that was said of a start holds: another would read as another start.
            self._started = {batch.nonce: self._started.get(batch.nonce, started_ns)}
            started_ns = self._started[batch.nonce]
        data = self._make_metrics(batch.collected, batch.wall_ns, started_ns, batch.model, batch.provider)
        return self._metrics_to.export(data) is MetricExportResult.SUCCESS

    def _send(self, kind: str, count: int, send: Callable[[], bool]) -> None:
        sent = send()
        self.counts.exports[kind, "sent" if sent else "failed"] += 1
        if not sent:
            self.counts.dropped[kind] += count
        self._say(None if sent else "not taken")

    def _say(self, trouble: str | None) -> None:
        """Once until it works again."""
        if trouble is not None and not self._failing:
            _log.warning("otlp %s: %s; what it does not take is dropped and counted", self._endpoint, trouble)
        elif trouble is None and self._failing:
            _log.warning("otlp %s: takes data again", self._endpoint)
        self._failing = trouble is not None
