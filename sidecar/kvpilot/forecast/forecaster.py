"""The forecast stage of a tick: an engine's new records in, an outlook out. No I/O, no clock.

Everything is forgotten when another engine start comes, but for the step-time model, where the new engine is
of the old one's kind. While an engine is silent with work on its hands, nothing is forecast for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from kvpilot.adapters.readings import available_blocks
from kvpilot.forecast import outlook
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.exhaustion import KvExhaustion
from kvpilot.forecast.flow import Flow, tells_acceptance
from kvpilot.forecast.headroom import DeviceHeadroom
from kvpilot.forecast.outlook import Key, Outlook
from kvpilot.forecast.queue import QueueForecast, overtaking
from kvpilot.forecast.speculation import PerDrafts, seconds_per_token
from kvpilot.forecast.step_time import StepTime, StepTimeModel
from kvpilot.forecast.survival import UNKNOWN_TOKENS, Inflow, demand_ahead, exhaustion
from kvpilot.forecast.tried import TriedExhaustion
from kvpilot.forecast.work import WorkReader, works_told
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry_page import ClassRow
from kvpilot.policy.context import Forecasts, Slo
from kvpilot.signals import Missing

FULL_STEPS = 0.5
"""Share of steps that used up their budget, from which on decoding is judged by what it adds to a step."""
KV_BOUND_STEPS = 0.3
"""Share of steps that want of KV memory limited, from which on it is not."""

NOT_PROVIDED = Missing("not_provided")
_INF = float("inf")


class Forecaster:
    """One engine's forecasts. `begin` for each engine start, then `observe` and `look` once a tick."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._manifest: Manifest | None = None
        self._steps = StepTime()
        self._reset()

    def begin(self, manifest: Manifest) -> None:
        """Another engine start."""
        alike = self._manifest is not None and _kind(self._manifest) == _kind(manifest)
        self._steps = self._steps.successor(alike)
        self._manifest = manifest
        self._reset()

    def _reset(self) -> None:
        self._works = WorkReader()
        self._flow = Flow()
        self._slope = KvExhaustion()
        self._tried = TriedExhaustion()
        self._headroom = DeviceHeadroom(self._manifest.activation_bytes_per_token if self._manifest else None)
        self._record: StepRecord | None = None
        self._rows: tuple[ClassRow, ...] = ()
        self._awaited: int | None = None

    def observe(
        self,
        at_ns: int,
        records: Sequence[StepRecord],
        rows: Sequence[ClassRow] = (),
        admitted: Mapping[str, float] | None = None,
        awaited: int | None = None,
    ) -> None:
        """What is new since the last tick: records in order, the classes' queues (lowest first), how many
        requests valves have let in, by class, and for how many of those the engine is awaited. `at_ns` is the
        pilot's clock.
        """
        self._awaited = awaited
        self._steps.observe(list(self._works.read(records)))
        self._rows = tuple(rows)
        if records:
            self._record = records[-1]
            self._flow.observe(self._record, rows, admitted)
        if self._record is not None:
            available, free = available_blocks(self._record), self._record.get("device_free_bytes")
            if available is not None:
                self._slope.observe(at_ns, available)
                running = self._record.get("running") or 0.0
                self._tried.observe(self._flow.at_s, running > 0 and available < running)
            if free is not None:
                self._headroom.observe(at_ns, free)

    def look(self) -> Outlook:
        """Everything that can be said now."""
        manifest, record = self._manifest, self._record
        if manifest is None or record is None:
            return outlook.missing("no_samples", manifest.classes if manifest else ())
        model = self._steps.model() if works_told(record) else NOT_PROVIDED
        queue = self._queue(manifest)
        acceptance = self._acceptance(record)
        drafts = self._drafts(manifest, model, acceptance)
        found: dict[Key, Estimate | float | Missing] = {
            **self._kv(manifest, record, queue),
            **self._queues(manifest, queue),
            **_step_times(model),
            ("forecast.acceptance_ratio", None): acceptance,
            ("forecast.seconds_per_token", None): drafts.get(_in_force(record), NOT_PROVIDED),
            ("forecast.device_headroom_bytes", None): self._device(manifest, record),
        }
        return Outlook(
            {key: value.p50 if isinstance(value, Estimate) else value for key, value in found.items()},
            {key: value for key, value in found.items() if isinstance(value, Estimate)},
            Forecasts(
                partial(_chunk_for, model, manifest.knob("prefill_chunk_tokens")),
                queue.credits,
                {k: value.p50 if isinstance(value, Estimate) else value for k, value in drafts.items()},
            ),
        )

    def _queue(self, manifest: Manifest) -> QueueForecast:
        names = list(manifest.classes) or [""]
        total = (self._record.get("waiting_prompt_tokens") if self._record else None) or 0.0
        by_class = {row.name: float(row.waiting_prompt_tokens) for row in self._rows}
        # Without rows nobody knows whose requests wait: everybody's, then.
        waiting = {name: by_class.get(name, 0.0) for name in names} if by_class else {names[-1]: total}
        arrivals, in_order = self._flow.arrivals, manifest.queue_order == "class"
        own = {name: arrivals.request_tokens(name) or arrivals.request_tokens() for name in names}
        return QueueForecast(
            self._flow.service.tokens_per_s(),
            self._flow.service,
            {name: waiting.get(name, 0.0) for name in names},
            overtaking(arrivals, names) if in_order else {},
            {name: tokens for name, tokens in own.items() if tokens},
            {name: ttft_s for name in names if (ttft_s := self._ttft_s(name)) is not None},
            in_order,
            self._requests_on_the_way(manifest) * (arrivals.request_tokens() or 0.0),
        )

    def _requests_on_the_way(self, manifest: Manifest) -> float:
        """Those that valves let in and the engine does not hold, as far as one rank can tell."""
        record = self._record
        if self._awaited is None or record is None or manifest.world.get("dp", 1) != 1:
            return 0.0
        running, waiting = record.get("running"), record.get("waiting")
        return 0.0 if running is None or waiting is None else max(0.0, self._awaited - running - waiting)

    def _queues(self, manifest: Manifest, queue: QueueForecast) -> dict[Key, Estimate | float | Missing]:
        """Of each class, and of the lowest, which waits behind all others, for all."""
        told = self._record is not None and "waiting_prompt_tokens" in self._record
        found: dict[Key, Estimate | float | Missing] = {}
        for klass in (None, *manifest.classes):
            name = next(iter(queue.waiting)) if klass is None else klass
            wait = queue.wait(name) if told else NOT_PROVIDED
            ttft_s = self._ttft_s(name)
            miss = queue.ttft_miss(name, ttft_s) if told and ttft_s is not None else NOT_PROVIDED
            found["forecast.queue_wait_seconds", klass] = wait
            found["forecast.queue_wait_p90_seconds", klass] = wait if isinstance(wait, Missing) else wait.p90
            found["forecast.ttft_miss_ratio", klass] = miss
        ratios = [queue.ttft_ratio(name, ttft_s) for name, ttft_s in queue.promises.items()]
        known = [ratio for ratio in ratios if not isinstance(ratio, Missing)]
        worst = max(known) if known else next(iter(ratios), NOT_PROVIDED)
        found["forecast.ttft_ratio", None] = worst if told else NOT_PROVIDED
        found["forecast.wait_ratio", None] = queue.pressing_wait_ratio() if told else NOT_PROVIDED
        rate, band = queue.rate, queue.service.band
        found["forecast.service_tokens_per_second", None] = (
            rate if isinstance(rate, Missing) else Estimate(rate / band.p90, rate / band.p50, rate / band.p10)
        )
        return found

    def _ttft_s(self, name: str) -> float | None:
        target = self._slo.get(name, self._slo if not name else None)
        value = target.get("ttft") if isinstance(target, Mapping) else None
        return value if isinstance(value, float | int) else None

    def _kv(
        self, manifest: Manifest, record: StepRecord, queue: QueueForecast
    ) -> dict[Key, Estimate | float | Missing]:
        available = available_blocks(record)
        ahead, token_s = demand_ahead(record), self._flow.token_s
        found: Estimate | Missing
        if available is None:
            found = NOT_PROVIDED
        elif ahead and token_s and manifest.blocks:
            knob, inflow = manifest.knob("admission_watermark"), self._inflow(record, queue)
            watermark = record.get("knob.admission_watermark") or (knob.baseline if knob else 1.0)
            found = exhaustion(
                manifest.blocks, available, ahead, token_s, manifest.block_size, inflow, watermark
            )
        else:
            found = self._slope.seconds(available)
        if isinstance(found, Estimate):
            found = self._tried.judged(self._flow.at_s, found)
        low = found if isinstance(found, Missing) else found.p10
        high = found if isinstance(found, Missing) else found.p90
        return {
            ("forecast.kv_exhaustion_seconds", None): found,
            ("forecast.kv_exhaustion_p10_seconds", None): low,
            ("forecast.kv_exhaustion_p90_seconds", None): high,
        }

    def _inflow(self, record: StepRecord, queue: QueueForecast) -> tuple[Inflow, Inflow, Inflow]:
        """What joins the running requests: fast, as expected, and slowly."""
        arrivals, band = self._flow.arrivals, queue.service.band
        # A rate that want of KV memory sets is no limit of its own: what becomes free is taken at once.
        expected = Inflow(
            record.get("waiting_prompt_tokens") or 0.0,
            arrivals.tokens_per_s() or 0.0,
            _INF if isinstance(queue.rate, Missing) or self._kv_bound else queue.rate,
            arrivals.request_tokens() or UNKNOWN_TOKENS,
            self._flow.output_tokens or _INF,
        )
        fast, middle, slow = (
            replace(expected, served_per_s=expected.served_per_s / factor)
            for factor in (band.p10, band.p50, band.p90)
        )
        return fast, middle, slow

    @property
    def _kv_bound(self) -> bool:
        return (self._flow.kv_limited.share or 0.0) > KV_BOUND_STEPS

    def _drafts(
        self, manifest: Manifest, model: StepTimeModel | Missing, acceptance: Estimate | Missing
    ) -> PerDrafts:
        knob = manifest.knob("speculative_tokens")
        full = (self._flow.budget_limited.share or 0.0) > FULL_STEPS
        most = int(knob.maximum) if knob else 0
        return seconds_per_token(model, acceptance, most, full and not self._kv_bound)

    def _acceptance(self, record: StepRecord) -> Estimate | Missing:
        told = tells_acceptance(record)
        return self._flow.acceptance.estimate(self._flow.at_s) if told else NOT_PROVIDED

    def _device(self, manifest: Manifest, record: StepRecord) -> Estimate | Missing:
        """With the largest step that the knobs in force allow beside the latest batch."""
        if "device_free_bytes" not in record:
            return NOT_PROVIDED
        knob = manifest.knob("prefill_chunk_tokens")
        chunk = record.get("knob.prefill_chunk_tokens")
        if chunk is None:
            chunk = knob.baseline if knob else 0.0
        batch = self._steps.batch
        return self._headroom.after(chunk + batch.decodes + batch.drafted)


def _kind(manifest: Manifest) -> tuple[object, ...]:
    """What two engines must share for one to be as fast as the other."""
    return (
        manifest.engine,
        manifest.engine_version,
        manifest.model,
        manifest.device,
        tuple(sorted(manifest.world.items())),
        manifest.block_size,
        tuple(each.name for each in manifest.fields),
    )


def _in_force(record: StepRecord) -> int:
    return int(record.get("knob.speculative_tokens") or 0)


def _chunk_for(model: StepTimeModel | Missing, knob: ManifestKnob | None, target_s: float) -> float | Missing:
    if isinstance(model, Missing):
        return model
    return NOT_PROVIDED if knob is None else model.chunk_for(target_s, knob.minimum, knob.maximum)


def _step_times(model: StepTimeModel | Missing) -> dict[Key, Estimate | float | Missing]:
    """Of the mean step of late."""
    expected: Estimate | Missing
    bound: float | Missing
    ratio: float | Missing
    if isinstance(model, Missing):
        expected = bound = ratio = model
    else:
        expected, bound = model.seconds(model.mean), model.bound_s(model.mean)
        ratio = model.spread(model.mean).bound
    return {
        ("forecast.step_seconds", None): expected,
        ("forecast.step_p97_seconds", None): bound,
        ("forecast.step_residual_ratio", None): ratio,
    }
