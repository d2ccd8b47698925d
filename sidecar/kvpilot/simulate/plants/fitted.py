"""A plant fitted to a live engine: what each kind of work cost there, and how steps scattered around that.

The mean is a sum of non-negative costs (`terms`): a constant, every token through the model, more for prompts
and beyond some knees (a step first waits for memory, then for arithmetic), decoding sequences, context read,
prompt positions, drafts, and the depth of drafting. Knees are quantiles of what the recording holds, not
numbers chosen beforehand.

Noise is what the recording's residuals were: ratios of actual over predicted, by whether the step had prompt
tokens, drawn with the recording's own lag-one correlation and a seed. `gap_s` is the time between two steps
of a busy engine, which no step's duration holds.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import erf, sqrt
from pathlib import Path
from typing import Any

from kvpilot.simulate.plants.plant import StepFeatures

FORMAT, VERSION = "kvpilot-plant", 1
KNEE = "tokens_beyond_"
TERMS = (
    "step",
    "tokens",
    "prompts",
    "prefill_tokens",
    "decode_sequences",
    "context_tokens",
    "chunk_positions",
    "drafted_tokens",
    "depth",
    "depth_context",
)
"""Seconds for one more of each; knees (`tokens_beyond_N`) come after them. `prompts` is 1 for a step with any
prompt tokens.
"""


class PlantError(ValueError):
    """No plant is to be had from this; one line that says why."""


@dataclass(frozen=True, slots=True)
class Error:
    """Of predictions, relative: |predicted / actual - 1| over `steps` steps."""

    steps: int
    median: float
    p90: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """`held_out`: by fits that had not seen the step. None where there was no such step."""

    fitted: Error
    held_out: Error
    held_out_decoding: Error | None
    held_out_prefilling: Error | None


@dataclass(frozen=True, slots=True)
class Band:
    """Steps alike: what disturbs a short one by a multiple is lost in a long one."""

    prefilling: bool
    """Whether of steps with prompt tokens."""
    upto_s: float
    """Predicted."""
    residuals: tuple[float, ...]
    """Quantiles, evenly spaced and ascending, of actual over predicted."""


@dataclass(frozen=True, slots=True)
class Law:
    """Everything of a fitted plant but its dice; JSON and back."""

    engine: str
    model: str
    device: str
    terms: Mapping[str, float]
    decoding: tuple[float, ...]
    """Quantiles, evenly spaced and ascending, of actual over predicted: steps without prompt tokens."""
    prefilling: tuple[float, ...]
    """The same of steps with them; both have at least one."""
    correlation: float
    gap_s: float
    fidelity: Fidelity
    unseen: tuple[str, ...] = ()
    """Terms of which the recording holds nothing: they cost nothing here, which is unknown, not true."""
    bands: tuple["Band", ...] = ()
    """The noise by how long a step is predicted to take, shorter ones first; without any, `decoding` and
    `prefilling` are drawn from."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n")


def read(path: Path) -> Law:
    """What `write` wrote. Raises PlantError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlantError(f"{path}: {error.strerror}; `kvpilot calibrate` writes plants") from error
    except ValueError as error:
        raise PlantError(
            f"{path}: not JSON; `kvpilot calibrate RECORDING --out {path}` writes one"
        ) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise PlantError(f"{path}: no plant; `kvpilot calibrate RECORDING --out {path}` writes one")
    if raw.get("version") != VERSION:
        raise PlantError(
            f"{path}: version {raw.get('version')!r} of a plant, this is {VERSION}: calibrate again"
        )
    try:
        return _law(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise PlantError(
            f"{path}: a damaged plant ({type(error).__name__}: {error}): calibrate again"
        ) from error


def _law(raw: Mapping[str, Any]) -> Law:
    fidelity: dict[str, Any] = {
        name: None if error is None else Error(**error) for name, error in dict(raw["fidelity"]).items()
    }
    terms = {str(name): float(seconds) for name, seconds in raw["terms"].items()}
    if set(TERMS) - set(terms) or min(terms.values()) < 0:
        raise ValueError(f"terms must be {', '.join(TERMS)} and knees, none below 0")
    for name in terms:
        if name not in TERMS:
            float(name.removeprefix(KNEE))
    decoding, prefilling = (tuple(map(float, raw[kind])) for kind in ("decoding", "prefilling"))
    for kind in (decoding, prefilling):
        if not kind or list(kind) != sorted(kind) or kind[0] <= 0:
            raise ValueError("residuals must be ascending and above 0")
    return Law(
        engine=str(raw["engine"]),
        model=str(raw["model"]),
        device=str(raw["device"]),
        terms=terms,
        decoding=decoding,
        prefilling=prefilling,
        correlation=float(raw["correlation"]),
        gap_s=float(raw["gap_s"]),
        fidelity=Fidelity(**fidelity),
        unseen=tuple(map(str, raw["unseen"])),
        bands=tuple(_band(each) for each in raw.get("bands", ())),
    )


def _band(raw: Mapping[str, Any]) -> Band:
    residuals = tuple(map(float, raw["residuals"]))
    if not residuals or list(residuals) != sorted(residuals) or residuals[0] <= 0:
        raise ValueError("residuals must be ascending and above 0")
    return Band(bool(raw["prefilling"]), float(raw["upto_s"]), residuals)


def row(features: StepFeatures, knees: Sequence[float]) -> list[float]:
    """What the coefficients multiply: `TERMS`, then tokens beyond each knee."""
    decodes, drafted, context = features.decode_sequences, features.drafted_tokens, features.context_tokens
    tokens = features.prefill_tokens + decodes + drafted
    depth = drafted / decodes if decodes else 0.0
    prefill = features.prefill_tokens
    return [
        *(1.0, tokens, 1.0 if prefill else 0.0, prefill, decodes, context, features.chunk_positions),
        *(drafted, depth, depth * context),
        *[max(0.0, tokens - knee) for knee in knees],
    ]


class Fitted:
    """A plant. `noise` False leaves the residuals out."""

    def __init__(self, law: Law, seed: int = 0, noise: bool = True) -> None:
        self.law = law
        self._knees = [float(name.removeprefix(KNEE)) for name in law.terms if name not in TERMS]
        names = (*TERMS, *(name for name in law.terms if name not in TERMS))
        self._coefficients = [law.terms[name] for name in names]
        self._bands = {
            kind: [band for band in law.bands if band.prefilling == kind] for kind in (False, True)
        }
        self._noise = noise
        self._dice = random.Random(f"plant/{seed}")
        self._state = self._dice.gauss(0.0, 1.0)
        self._fresh = sqrt(1 - law.correlation**2)

    def step_seconds(self, features: StepFeatures) -> float:
        mean_s = self.mean_seconds(features)
        if not self._noise:
            return mean_s + self.law.gap_s
        self._state = self.law.correlation * self._state + self._fresh * self._dice.gauss(0.0, 1.0)
        share = 0.5 * (1 + erf(self._state / sqrt(2)))
        return mean_s * _at(self._residuals(features, mean_s), share) + self.law.gap_s

    def _residuals(self, features: StepFeatures, mean_s: float) -> tuple[float, ...]:
        bands = self._bands[bool(features.prefill_tokens)]
        for band in bands:
            if mean_s <= band.upto_s:
                return band.residuals
        if bands:
            return bands[-1].residuals
        return self.law.prefilling if features.prefill_tokens else self.law.decoding

    def mean_seconds(self, features: StepFeatures) -> float:
        """Of the step itself, without noise and without the gap after it. Above 0."""
        values = row(features, self._knees)
        return max(sum([c * v for c, v in zip(self._coefficients, values, strict=True)]), 1e-6)

    def activation_bytes(self, features: StepFeatures) -> int | None:
        """Records say what is free between steps, not what a step needed."""
        return None


def _at(quantiles: Sequence[float], share: float) -> float:
    place = share * (len(quantiles) - 1)
    low = min(int(place), len(quantiles) - 1)
    high = min(low + 1, len(quantiles) - 1)
    return quantiles[low] + (quantiles[high] - quantiles[low]) * (place - low)
