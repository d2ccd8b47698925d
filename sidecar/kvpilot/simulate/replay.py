"""What other policies would have made of a recorded flight, and how far to believe that.

Three accounts of the same arrivals: what was *recorded*; the simulation of it under the decisions that were
recorded (*as flown*); and under other policies (*new*). New less as-flown is what would have changed.
As-flown less recorded is the simulator's error on this very recording: no smaller change means anything.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from kvpilot.adapters.gpu_signals import GPU_SIGNALS
from kvpilot.adapters.valves import VALVE_SIGNALS
from kvpilot.clock import NS
from kvpilot.pilot import TICK_NS
from kvpilot.policy.rules import PolicySet
from kvpilot.recordings.recorded import Recorded, read_recording
from kvpilot.recordings.recorder import Moment
from kvpilot.recordings.segment import RecordingError
from kvpilot.score import Score, score
from kvpilot.simulate.deployment import Promises
from kvpilot.simulate.legs import load_policies
from kvpilot.simulate.plants.calibration import calibrated, steps_of
from kvpilot.simulate.plants.fitted import Fitted, Law
from kvpilot.simulate.plants.pace import pace
from kvpilot.simulate.recalled import DRAIN_S, Recalled, newest_steps, recall
from kvpilot.simulate.replica import Replica, plain_prompt
from kvpilot.workload.prompt import token_ids

SEEDS = 3
"""Of the plant's noise: one flight of each account is one draw."""
FIT_STEPS = 16_384
WARM_S = 120.0
"""Flown before what is judged, as far as it was recorded: pilot and engine have to learn first."""
FIGURES = (
    "goodput_work",
    "goodput_per_offered",
    "goodput_smooth",
    "goodput_longest_fifth",
    "ttft_p50_s",
    "ttft_p95_s",
    "itl_p50_s",
    "itl_p95_s",
    "finished",
    "shed",
    "abandoned",
    "failed",
    "preemptions",
    "oom",
    "actions",
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the score, in each account; None where there was nothing to measure."""

    name: str
    recorded: float | None
    flown: float | None
    """As flown, simulated: mean over seeds."""
    new: float | None
    error: float | None
    """Of the simulator on this recording: as flown against recorded, or between seeds of either account; the
    largest."""

    @property
    def delta(self) -> float | None:
        return None if self.new is None or self.flown is None else self.new - self.flown

    @property
    def verdict(self) -> str:
        """Whether to believe the change."""
        if self.delta is None:
            return "unknown"
        if self.error is None:
            return "unverified"
        return "within error" if abs(self.delta) <= self.error else "changed"


@dataclass(frozen=True, slots=True)
class Moved:
    """What one rule did to one knob."""

    rule: str
    knob: str
    held_s: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Replayed:
    """The whole answer."""

    recorded: Recorded
    recalled: Recalled
    law: Law
    figures: tuple[Figure, ...]
    did: tuple[Moved, ...]
    """By the recorded decisions."""
    would: tuple[Moved, ...]
    """By the new policies, in the first seed's flight."""
    judged: int
    limits: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "recording": str(self.recorded.path),
            "engine": f"{self.law.engine}, {self.law.model} on {self.law.device}",
            "seconds": (self.recorded.end_ns - self.recorded.begin_ns) / NS,
            "requests": len(self.recalled.arrivals),
            "judged": self.judged,
            "plant_error_median": self.law.fidelity.held_out.median,
            "plant_error_p90": self.law.fidelity.held_out.p90,
            "limits": list(self.limits),
            "figures": [
                {
                    "name": each.name,
                    "recorded": each.recorded,
                    "as_flown": each.flown,
                    "error": each.error,
                    "new": each.new,
                    "delta": each.delta,
                    "verdict": each.verdict,
                }
                for each in self.figures
            ],
            "did": [_row(each) for each in self.did],
            "would": [_row(each) for each in self.would],
        }


def _row(moved: Moved) -> dict[str, Any]:
    return {name: getattr(moved, name) for name in Moved.__slots__}


def replay(
    path: Path,
    policies: Path,
    seeds: int = SEEDS,
    despite_missing: bool = False,
    last_s: float | None = None,
    ago_s: float = 0.0,
) -> Replayed:
    """All of the recording, or the `last_s` until `ago_s` before its end. Raises RecordingError, PlantError
    and PolicyErrors, each in one line or a line for each mistake.
    """
    from kvengine.errors import ConfigError

    recorded = read_recording(path, None if last_s is None else last_s + WARM_S, ago_s)
    law = calibrated(steps_of(newest_steps(recorded, FIT_STEPS)))
    recalled = _judged(recall(recorded), recorded, last_s)
    loaded = load_policies(policies, recalled.deployment.classes)
    limits = list(recalled.limits)
    if lacking := _lacking(loaded, recorded):
        if not despite_missing:
            raise RecordingError(f"{policies}: {lacking[0]}; --despite-missing flies it with that missing")
        limits += lacking
    if recorded.torn_bytes:
        limits.append(f"{recorded.torn_bytes:,} bytes at the end of a file are torn, and left out")
    if recorded.starts > 1:
        limits.append(f"the recording holds {recorded.starts} starts of the engine; this is the longest")
    promises = Promises(recalled.slos, recalled.patience, pace(Fitted(law, noise=False)).speed.r)
    try:
        flown = [_fly(recalled, law, promises, seed, None) for seed in range(seeds)]
        new = [_fly(recalled, law, promises, seed, loaded) for seed in range(seeds)]
    except ConfigError as error:
        raise RecordingError(f"{path}: {error}") from error
    truth = None
    if recalled.outcomes:
        actions = _actions(recorded)
        window = recalled.window_s
        truth = score(recalled.outcomes, promises.slos, promises.r, window, recalled.totals, actions)
    return Replayed(
        recorded,
        recalled,
        law,
        tuple(_figure(name, truth, [one for one, _ in flown], [one for one, _ in new]) for name in FIGURES),
        did=_did(recorded),
        would=tuple(new[0][1]),
        judged=flown[0][0].offered,
        limits=tuple(limits),
    )


def _judged(recalled: Recalled, recorded: Recorded, last_s: float | None) -> Recalled:
    """What comes before the stretch that was asked for is flown and not judged."""
    if last_s is None:
        return recalled
    begin_s, end_s = recalled.window_s
    begin_s = max(begin_s, (recorded.end_ns - recorded.begin_ns) / NS - last_s)
    return replace(recalled, window_s=(begin_s, max(end_s, begin_s + 1e-6)))


def _fly(
    recalled: Recalled, law: Law, promises: Promises, seed: int, policies: PolicySet | None
) -> tuple[Score, list[Moved]]:
    """With `policies`, or the recorded decisions without."""
    ledger: dict[tuple[str, str], list[float]] = defaultdict(list)

    def note(moment: Moment) -> None:
        for lease in moment.tick.leases:
            ledger[f"{lease.policy}/{lease.rule}", lease.knob].append(lease.value)

    shared = recalled.deployment.prefix_cache
    replica = Replica(
        *(recalled.deployment, Fitted(law, seed), promises, policies, recalled.acceptance),
        prompt=token_ids if shared else plain_prompt,
        record=note,
        decided=recalled.decided if policies is None else None,
    )
    outcomes = replica.fly(recalled.arrivals, DRAIN_S)
    made = score(outcomes, promises.slos, promises.r, recalled.window_s, replica.totals, replica.actions)
    tick_s = TICK_NS / NS
    return made, [
        Moved(rule, knob, len(values) * tick_s, min(values), max(values))
        for (rule, knob), values in ledger.items()
    ]


def _figure(name: str, truth: Score | None, flown: Sequence[Score], new: Sequence[Score]) -> Figure:
    recorded = None if truth is None else getattr(truth, name)
    ours, theirs = (
        [value for one in each if (value := getattr(one, name)) is not None] for each in (flown, new)
    )
    error = None
    if ours and recorded is not None:
        spreads = [max(each) - min(each) for each in (ours, theirs) if each]
        error = max(abs(fmean(ours) - recorded), *spreads)
    return Figure(name, recorded, fmean(ours) if ours else None, fmean(theirs) if theirs else None, error)


def _actions(recorded: Recorded) -> int:
    before: Mapping[Any, float] = {}
    count = 0
    for held in recorded.held:
        targets = before.keys() | held.values.keys()
        count += sum(before.get(target) != held.values.get(target) for target in targets)
        before = held.values
    return count


def _did(recorded: Recorded) -> tuple[Moved, ...]:
    """How long each rule held what, by the recorded decisions."""
    spans: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    ends = [*(held.at_ns for held in recorded.held[1:]), recorded.end_ns]
    for held, end_ns in zip(recorded.held, ends, strict=False):
        for target, value in held.values.items():
            spans[held.by[target], target[0]].append((max(0, end_ns - held.at_ns) / NS, value))
    return tuple(
        Moved(rule, knob, sum(s for s, _ in each), min(v for _, v in each), max(v for _, v in each))
        for (rule, knob), each in spans.items()
    )


def _lacking(policies: PolicySet, recorded: Recorded) -> list[str]:
    """Policies that move knobs by signals of which this recording can tell nothing, one line each."""
    unsupported = recorded.manifest.unsupported_signals
    lines = []
    for policy in policies.policies:
        if not any(rule.actions for rule in policy.rules):
            continue
        for spec in policy.inputs.values():
            why = unsupported.get(spec.signal)
            if spec.signal in GPU_SIGNALS:
                why = "recordings hold nothing of what NVML says"
            elif spec.signal in VALVE_SIGNALS and not recorded.has_valve:
                why = "no valve was recorded"
            if why is not None:
                lines.append(f"policy {policy.name} needs {spec.signal}, which the recording lacks: {why}")
    return lines
