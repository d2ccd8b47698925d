"""What moved in an engine between two looks at its cumulative counts, faded into rates and shares.

One look a tick, with the engine's own clock: counts give exact rates however many steps lie between. An idle
stretch is no step: it makes no step look slow.
"""

from collections.abc import Mapping, Sequence

from kvpilot.clock import NS
from kvpilot.forecast.acceptance import Acceptance
from kvpilot.forecast.arrivals import Arrivals
from kvpilot.forecast.faded import FadedShare
from kvpilot.forecast.service import ServiceRate
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry_page import ClassRow

CADENCE_TAU_S = 2.0
OUTPUT_TAU_S = 30.0
BUDGET_TAU_S = 0.5
KV_TAU_S = 1.0


class Flow:
    """All estimators over cumulative counts. A field that the engine lacks leaves its estimator empty."""

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.service = ServiceRate()
        self.arrivals = Arrivals()
        self.budget_limited = FadedShare(BUDGET_TAU_S)
        """Share of steps that used up their token budget."""
        self.kv_limited = FadedShare(KV_TAU_S)
        """Share of steps in which want of KV memory kept a request waiting."""
        self.at_s = 0.0
        """The engine's time of the latest record."""
        self._step_s = FadedShare(CADENCE_TAU_S)
        self._step_tokens = FadedShare(CADENCE_TAU_S)
        self._outputs = FadedShare(OUTPUT_TAU_S, keep=10)
        self._left_tokens = self._emitted = 0.0
        self._last: StepRecord | None = None

    @property
    def token_s(self) -> float | None:
        """Time between two tokens of one sequence; None before anything decoded."""
        step_s, tokens = self._step_s.share, self._step_tokens.share
        return step_s / tokens if step_s and tokens else None

    @property
    def output_tokens(self) -> float | None:
        """Tokens emitted for each request that finished; None before one has."""
        return self._outputs.share

    def observe(
        self, record: StepRecord, rows: Sequence[ClassRow], admitted: Mapping[str, float] | None
    ) -> None:
        """The newest record, the classes' queues, and requests that valves let in, by class."""
        last, self._last = self._last, record
        self.at_s = (record.get("time_ns") or 0.0) / NS
        waiting = record.get("waiting_prompt_tokens")
        served = served_tokens(record)
        if waiting is not None and served is not None:
            again = record.get("recomputed_tokens_total") or 0.0
            self.arrivals.observe(self.at_s, served - again, waiting, rows, admitted)
            self._left_tokens += self._given_up(last, record)
            self.service.observe(self.at_s, served, waiting, self._left_tokens)
        if last is not None:
            self._differ(last, record)

    def _given_up(self, last: StepRecord | None, record: StepRecord) -> float:
        """Prompt tokens of clients that went away, about: under a backlog it is those who wait that do."""
        if last is None or "cancelled_total" not in record or not last.get("waiting"):
            return 0.0
        gone = min(record["cancelled_total"] - last["cancelled_total"], last["waiting"])
        return max(0.0, gone) * (self.arrivals.request_tokens() or 0.0)

    def _differ(self, last: StepRecord, record: StepRecord) -> None:
        def grew(name: str) -> float:
            return record[name] - last[name] if name in record else 0.0

        steps, at_s = grew("steps_total"), self.at_s
        if steps <= 0:
            return
        if last.get("running"):
            self._step_s.add(at_s, grew("time_ns") / NS, steps)
        self._step_tokens.add(at_s, grew("decode_tokens_total"), grew("decode_sequences_total"))
        self._emitted += grew("decode_tokens_total")
        if grew("finished_total") > 0:
            self._outputs.add(at_s, self._emitted, grew("finished_total"))
            self._emitted = 0.0
        if tells_acceptance(record):
            self.acceptance.add(at_s, grew("accepted_tokens_total"), grew("rejected_rounds_total"))
        self.budget_limited.add(at_s, grew("budget_limited_steps_total"), steps)
        self.kv_limited.add(at_s, grew("kv_limited_steps_total"), steps)


def tells_acceptance(record: StepRecord) -> bool:
    """Whether this engine counts both what was accepted and what was rejected."""
    return "accepted_tokens_total" in record and "rejected_rounds_total" in record


def served_tokens(record: StepRecord) -> float | None:
    """Prompt tokens taken care of since the engine started: computed, or found in its prefix cache."""
    computed = record.get("prefill_tokens_total")
    return None if computed is None else computed + (record.get("prefix_tokens_hit_total") or 0.0)
