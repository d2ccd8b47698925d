"""How long will a step take? Learnt from the engine's own steps, for any mix of work.

The model is a sum of non-negative costs: a constant (launches, reading the weights), one for each token that
goes through the model, more for tokens beyond `KNOTS` (below the knee a step waits for memory, beyond it for
arithmetic: the cost per token rises, never falls), and for decoding sequences, context read, prompt chunks at
their positions, drafted tokens, the depth of drafting, and the context that drafts read again (a GPU reads it
once, a CPU works through it for each draft). Residuals are relative: steps differ a hundredfold, their noise
is a share of them. `kvpilot.forecast.regression` does the learning.

A mean is not a promise: with a noise of 20 % a bound from the mean alone is missed half of the time, which
costs most of the goodput that it was to save. Whoever needs a bound divides by the residual quantile, which
is measured apart for steps with prompt chunks and for steps without. Where the model has seen little like the
step in question, its own uncertainty widens that.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.regression import Regression, Solution
from kvpilot.forecast.residuals import Residuals
from kvpilot.forecast.work import Work, WorkedStep
from kvpilot.signals import Missing

KNOTS = (128.0, 512.0)
"""Tokens in a step from which on each one more may cost more."""
BOUND_QUANTILE = 0.97
FIRST_STEPS = 16
"""Whose median is the first guess."""
SETTLING_STEPS = 32
"""What the first steps' residuals were is not kept: the model had yet to settle."""
LEAST_RESIDUALS = 32
"""Of steps with prompt tokens, before a chunk can be chosen; of either kind, before there is a model."""
STEPS_A_TICK = 16
"""Learnt from at one time: a step costs 25 us here, and a small model makes seventy a tick."""
RECENT_STEPS = 16
MOST_GROWTH = 2.0
"""A chunk is at most so many times the largest one seen: beyond that the model only guesses."""
_FEATURES = 8 + len(KNOTS)


def features(work: Work) -> list[float]:
    """The regressors, in tokens; every coefficient is seconds for one more of its kind."""
    tokens = work.prefill + work.decodes + work.drafted
    depth = work.drafted / work.decodes if work.decodes else 0.0
    over = [max(0.0, tokens - knot) for knot in KNOTS]
    decoding = [work.decodes, work.context, work.drafted, depth, depth * work.context]
    return [1.0, tokens, *over, work.chunk_positions, *decoding]


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles of actual over predicted."""

    p10: float
    p50: float
    p90: float
    bound: float


@dataclass(frozen=True, slots=True)
class Prompts:
    """What prompt chunks were like of late: how far into a prompt they reached, and their largest size."""

    position: float = 0.0
    packed: bool = False
    """Whether a chunk holds several whole prompts, so that a larger one reaches no further."""
    largest: float = 0.0

    def positions(self, chunk: float) -> float:
        """What a chunk of that size adds to `Work.chunk_positions`."""
        return chunk * (self.position if self.packed else self.position + chunk)


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """A frozen model: what `StepTime` knew at one moment. Seconds."""

    solution: Solution
    decoding: Spread
    """Of steps without prompt tokens."""
    prefilling: Spread | None
    """Of steps with them; None while too few were seen."""
    batch: Work
    """The largest decoding batch of the latest steps, without prompts."""
    mean: Work
    """The mean step of late."""
    prompts: Prompts
    floor_s: float
    """No step takes less."""

    def seconds(self, work: Work) -> Estimate:
        """How long a step that computes `work` will take."""
        x = features(work)
        predicted = max(self.solution.predict(x), self.floor_s)
        spread, unsure = self.spread(work), 1.28 * self.solution.deviation(x)
        low, high = predicted * spread.p10 - unsure, predicted * spread.p90 + unsure
        return Estimate(max(low, self.floor_s), max(predicted * spread.p50, self.floor_s), high)

    def bound_s(self, work: Work) -> float:
        """What a step that computes `work` will hardly exceed: 97 in 100 took no longer."""
        x = features(work)
        predicted = max(self.solution.predict(x), self.floor_s)
        return predicted * self.spread(work).bound + 2.0 * self.solution.deviation(x)

    def chunk_for(self, target_s: float, least: float, most: float) -> float | Missing:
        """The largest prompt chunk, in `least`..`most` tokens, with which a step beside the latest decoding
        batch meets `target_s`; `least` where none does.
        """
        if self.prefilling is None:
            return Missing("too_few_samples")
        most = max(least, min(most, MOST_GROWTH * self.prompts.largest))
        if self._meets(most, target_s):
            return most
        meets, misses = least, most
        while misses - meets > 1:
            middle = (meets + misses) / 2
            if self._meets(middle, target_s):
                meets = middle
            else:
                misses = middle
        return max(least, float(int(meets)))

    def _meets(self, chunk: float, target_s: float) -> bool:
        """Whether `bound_s` of a step with that chunk is within the target."""
        work = self.batch._replace(prefill=chunk, chunk_positions=self.prompts.positions(chunk))
        x = features(work)
        likely_s = max(self.solution.predict(x), self.floor_s) * self.spread(work).bound
        return likely_s <= target_s and likely_s + 2.0 * self.solution.deviation(x) <= target_s

    def spread(self, work: Work) -> Spread:
        """How far such steps were from what was predicted."""
        return self.prefilling if work.prefill and self.prefilling else self.decoding


class StepTime:
    """Learns the model from steps, in order. See the module docstring."""

    def __init__(self) -> None:
        self._regression = Regression(_FEATURES)
        self._solution: Solution | None = None
        self._first: list[WorkedStep] = []
        self._floor_s = 0.0
        """A twentieth of the first steps' median; 0 before them."""
        self._decoding, self._prefilling = Residuals(), Residuals()
        self._largest = 0.0
        self._recent: deque[Work] = deque(maxlen=RECENT_STEPS)
        self._chunks: deque[Work] = deque(maxlen=RECENT_STEPS // 2)

    def successor(self, alike: bool) -> "StepTime":
        """For another engine start. What was learnt of one `alike` is where it begins; nothing is offered
        before the new one has shown steps of its own.
        """
        heir = StepTime()
        if alike:
            heir._regression = self._regression
            heir._regression.weaken()
        return heir

    def observe(self, steps: Sequence[WorkedStep]) -> None:
        """Learn from the steps since the last call, evenly thinned where there are many."""
        for step in steps[-RECENT_STEPS:]:
            self._recent.append(step.work)
            if step.work.prefill:
                self._chunks.append(step.work)
        self._largest = max(self._largest, *(step.work.prefill for step in steps), 0.0)
        stride = -(-len(steps) // STEPS_A_TICK) or 1
        for step in steps[::stride]:
            if self._floor_s:
                self._learn(step)
            else:
                self._begin(step)
        if steps and self._regression.rows:
            self._solution = self._regression.solve()

    def model(self) -> StepTimeModel | Missing:
        """What is known now."""
        decoding, prefilling = _spread(self._decoding), _spread(self._prefilling)
        either = decoding or prefilling
        if self._solution is None or either is None:
            return Missing("too_few_samples" if self._first else "no_samples")
        return StepTimeModel(
            self._solution,
            either,
            prefilling,
            self.batch,
            Work(*(sum(column) / len(self._recent) for column in zip(*self._recent, strict=True))),
            _prompts(self._chunks, self._largest),
            self._floor_s,
        )

    @property
    def batch(self) -> Work:
        """The largest decoding batch of the latest steps, without prompts."""
        largest = max(self._recent, key=lambda work: work.decodes, default=Work())
        return largest._replace(prefill=0.0, chunk_positions=0.0)

    def _begin(self, step: WorkedStep) -> None:
        self._first.append(step)
        if len(self._first) < FIRST_STEPS:
            return
        scale_s = median(step.seconds for step in self._first)
        self._floor_s = scale_s / 20
        for step in self._first:
            self._regression.learn([value / scale_s for value in features(step.work)], step.seconds / scale_s)
        self._solution = self._regression.solve()

    def _learn(self, step: WorkedStep) -> None:
        x = features(step.work)
        predicted_s = max(self._regression.predict(x), self._floor_s)
        ratio = step.seconds / predicted_s
        if self._regression.rows >= SETTLING_STEPS:
            (self._prefilling if step.work.prefill else self._decoding).add(ratio)
        self._regression.learn([value / predicted_s for value in x], ratio)


def _spread(residuals: Residuals) -> Spread | None:
    if len(residuals) < LEAST_RESIDUALS:
        return None
    return Spread(*map(residuals.quantile, (0.1, 0.5, 0.9, BOUND_QUANTILE)))


def _prompts(chunks: Sequence[Work], largest: float) -> Prompts:
    reached = [(work.chunk_positions / work.prefill, work.prefill) for work in chunks]
    packed = sum(position < 0.75 * size for position, size in reached)
    return Prompts(
        max((position for position, _ in reached), default=0.0), 2 * packed > len(reached), largest
    )
