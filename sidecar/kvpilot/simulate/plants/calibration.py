"""From a recording of an engine to a plant like it, with its error beside it.

Relative errors are what is minimised: steps differ a hundredfold, their noise is a share of them. The error
that counts is of steps that a fit has not seen: blocks of the recording are left out in turn.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, Protocol

from kvpilot.incident.recording import read_file
from kvpilot.link.manifest import Manifest
from kvpilot.link.page import LinkError
from kvpilot.link.records import StepRecord
from kvpilot.simulate.plants.fitted import KNEE, TERMS, Band, Error, Fidelity, Law, PlantError, row
from kvpilot.simulate.plants.least_squares import fit, predict
from kvpilot.simulate.plants.plant import NEEDED, TimedStep, between

LEAST_STEPS = 64
FOLDS = 5
BLOCK_STEPS = 32
"""Steps that are left out together: neighbours are too much alike to judge each other."""
KNEES_AT = (0.5, 0.75, 0.9, 0.97)
"""Quantiles of tokens in a step beyond which one more may cost more."""
KEPT_RESIDUALS = 201
LEAST_RESIDUALS = 32
"""Of a kind of step, before its noise is its own and not that of all steps."""
MOST_BANDS = 5
"""Of each kind of step: a disturbance is a larger share of a short one."""
_MOST_CORRELATION = 0.95


class Steps(NamedTuple):
    """What of a recording a plant is fitted to."""

    engine: str
    model: str
    device: str
    steps: tuple[TimedStep, ...]
    gap_s: float
    """Mean time between steps of a busy engine."""


def recorded(path: Path) -> Steps:
    """The steps in a recording: a telemetry page, live, left behind or copied. Raises PlantError."""
    try:
        recording = read_file(path)
    except LinkError as error:
        raise PlantError(
            f"{error}; give a telemetry page (`kvpilot incident list` names those that are kept)"
        ) from error
    return steps_of(recording)


class Source(Protocol):
    """Whatever holds an engine's step records."""

    @property
    def path(self) -> Path: ...
    @property
    def manifest(self) -> Manifest: ...
    @property
    def steps(self) -> tuple[StepRecord, ...]: ...


def steps_of(recording: Source) -> Steps:
    """Raises PlantError where its records do not say what steps computed, or hold too few."""
    manifest, where = recording.manifest, recording.path
    told = {field.name for field in manifest.fields}
    missing = [name for name in NEEDED if name not in told]
    if missing:
        raise PlantError(f"{where}: {manifest.engine} records no {', '.join(missing)}: nothing to fit to")
    steps = tuple(step for pair in pairwise(recording.steps) if (step := between(*pair)) is not None)
    if len(steps) < LEAST_STEPS:
        raise PlantError(
            f"{where}: {len(steps)} steps with work and a duration, at least {LEAST_STEPS} are needed: "
            "record an engine under load"
        )
    engine = f"{manifest.engine} {manifest.engine_version}"
    return Steps(engine, manifest.model, manifest.device, steps, _gap_s(recording.steps))


def calibrated(recorded: Steps) -> Law:
    """Fit, judge on what was left out, keep the residuals."""
    steps = recorded.steps
    knees = _knees(steps)
    columns = [list(column) for column in zip(*(row(step.features, knees) for step in steps), strict=True)]
    seconds = [step.seconds for step in steps]
    coefficients = _fit(columns, seconds)
    predicted = predict(columns, coefficients)
    apart = _left_out(columns, seconds)
    prompts = [step.features.prefill_tokens > 0 for step in steps]
    names = (*TERMS, *(f"{KNEE}{knee:g}" for knee in knees))
    ratios = [actual / made for actual, made in zip(seconds, predicted, strict=True)]
    pairs = list(zip(seconds, predicted, strict=True))
    decoding = [pair for pair, prompt in zip(pairs, prompts, strict=True) if not prompt]
    prefilling = [pair for pair, prompt in zip(pairs, prompts, strict=True) if prompt]
    return Law(
        engine=recorded.engine,
        model=recorded.model,
        device=recorded.device,
        terms=dict(zip(names, coefficients, strict=True)),
        decoding=_noise(decoding if len(decoding) >= LEAST_RESIDUALS else pairs),
        prefilling=_noise(prefilling if len(prefilling) >= LEAST_RESIDUALS else pairs),
        correlation=_correlation(ratios),
        gap_s=recorded.gap_s,
        fidelity=Fidelity(
            fitted=_error(predicted, seconds),
            held_out=_error(apart, seconds),
            held_out_decoding=_error_of(apart, seconds, [not prompt for prompt in prompts]),
            held_out_prefilling=_error_of(apart, seconds, prompts),
        ),
        unseen=tuple(name for name, column in zip(TERMS, columns, strict=False) if not any(column)),
        bands=(*_bands(decoding, False), *_bands(prefilling, True)),
    )


def _bands(pairs: Sequence[tuple[float, float]], prefilling: bool) -> list[Band]:
    """Equal parts of (actual, predicted), by predicted, each with its own noise, and its time conserved."""
    count = min(MOST_BANDS, len(pairs) // LEAST_RESIDUALS)
    ordered = sorted(pairs, key=lambda pair: pair[1])
    places = [place * len(ordered) // count for place in range(count + 1)] if count else []
    return [
        Band(prefilling, ordered[end - 1][1], _noise(ordered[begin:end])) for begin, end in pairwise(places)
    ]


def _knees(steps: Sequence[TimedStep]) -> list[float]:
    tokens = sorted(
        each.features.prefill_tokens + each.features.decode_sequences + each.features.drafted_tokens
        for each in steps
    )
    chosen = {tokens[int(share * (len(tokens) - 1))] for share in KNEES_AT}
    return sorted(knee for knee in chosen if tokens[0] < knee < tokens[-1])


def _fit(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    relative = [[value / actual for value, actual in zip(column, seconds, strict=True)] for column in columns]
    return fit(relative, [1.0] * len(seconds))


def _left_out(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Each step as predicted by a fit to the blocks of the other folds."""
    predicted = [0.0] * len(seconds)
    fold_of = [index // BLOCK_STEPS % FOLDS for index in range(len(seconds))]
    for fold in set(fold_of):
        seen = [index for index, own in enumerate(fold_of) if own != fold]
        others = [index for index, own in enumerate(fold_of) if own == fold]
        coefficients = _fit([[column[i] for i in seen] for column in columns], [seconds[i] for i in seen])
        made = predict([[column[i] for i in others] for column in columns], coefficients)
        for index, value in zip(others, made, strict=True):
            predicted[index] = value
    return predicted


def _error_of(predicted: Iterable[float], actual: Iterable[float], chosen: Sequence[bool]) -> Error | None:
    pairs = [pair for pair, take in zip(zip(predicted, actual, strict=True), chosen, strict=True) if take]
    return _error(*map(list, zip(*pairs, strict=True))) if pairs else None


def _error(predicted: Sequence[float], actual: Sequence[float]) -> Error:
    errors = sorted(abs(made / took - 1) for made, took in zip(predicted, actual, strict=True))
    return Error(len(errors), errors[len(errors) // 2], errors[int(0.9 * (len(errors) - 1))])


def _noise(pairs: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Quantiles of actual over predicted, by (actual, predicted). All of them moved by one factor, so that
    the recorded steps, simulated, take as long together as they took: short steps scatter further, and a mean
    of ratios counts them as much as long ones.
    """
    ordered = sorted(actual / made for actual, made in pairs)
    last, kept = len(ordered) - 1, min(KEPT_RESIDUALS, len(ordered))
    quantiles = [ordered[round(last * i / max(kept - 1, 1))] for i in range(kept)]
    whole = sum(actual for actual, _ in pairs) / sum(made for _, made in pairs)
    return tuple(one * whole / fmean(quantiles) for one in quantiles)


def _correlation(ratios: Sequence[float]) -> float:
    """Of one step's residual with the next one's; below 0 is taken as none."""
    logs = [log(ratio) for ratio in ratios]
    mean = sum(logs) / len(logs)
    spread = sum((value - mean) ** 2 for value in logs)
    together = sum((before - mean) * (after - mean) for before, after in pairwise(logs))
    return min(max(together / spread, 0.0), _MOST_CORRELATION) if spread else 0.0


def _gap_s(records: Sequence[StepRecord]) -> float:
    """From the end of a step to the beginning of the next, where sequences were waiting to go on: the mean,
    for what counts is the time that they take together.
    """
    gaps_ns = [
        after["time_ns"] - after["duration_ns"] - before["time_ns"]
        for before, after in pairwise(records)
        if "time_ns" in after
        and between(before, after) is not None
        and after["decode_sequences_total"] > before["decode_sequences_total"]
    ]
    return max(0.0, fmean(gaps_ns) / 1e9) if gaps_ns else 0.0
