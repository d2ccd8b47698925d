"""What a test of a policy gives beside its inputs: what models say, who holds memory, the offered load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvpilot.policy.context import Forecasts
from kvpilot.policy.expr import Reading
from kvpilot.policy.schema import ForecastSeries, TestModel
from kvpilot.policy.series import STALE, SeriesError, parse_series
from kvpilot.policy.source import Path, Source
from kvpilot.signals import Missing

_NOT_PROVIDED = Missing("not_provided")

Samples = Sequence[Reading]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Samples a tick; after a series' end its model is stale, and without a series there is none."""

    chunk: Samples = (_NOT_PROVIDED,)
    credits: Samples = (_NOT_PROVIDED,)
    seconds_per_token: Mapping[int, Samples] = field(default_factory=dict)
    offered: Samples | None = None
    """None: a load that never changes."""
    top_tenant: tuple[tuple[int, str | None], ...] = ()
    """(since when in ns, who), in order of time; nothing: the engine does not say."""

    def forecasts(self, tick: int) -> Forecasts:
        """What the models say at a tick, whatever the target or class."""
        chunk, credits_ = _sample(self.chunk, tick), _sample(self.credits, tick)
        return Forecasts(
            chunk_for=lambda step_seconds: chunk,
            credits=lambda class_name, ttft_seconds: credits_,
            seconds_per_token={
                length: _sample(samples, tick) for length, samples in self.seconds_per_token.items()
            },
        )

    def load(self, tick: int) -> Reading:
        """Requests a second that are offered at a tick."""
        return 1.0 if self.offered is None else _sample(self.offered, tick)

    def top(self, now_ns: int) -> str | Missing | None:
        """Who holds most KV memory."""
        since = [who for at_ns, who in self.top_tenant if at_ns <= now_ns]
        return since[-1] if since else _NOT_PROVIDED


def build_surroundings(source: Source, path: Path, test: TestModel) -> Surroundings:
    """What `test` gives; mistakes go to `source.problems`."""
    given = test.forecasts or ForecastSeries()
    where: Path = (*path, "forecasts")
    prices = {}
    for length, text in given.seconds_per_token.items():
        at: Path = (*where, "secondsPerToken", length)
        if not length.isdecimal():
            source.problems.append(source.at(at, f"'{length}' is no number of draft tokens", key=True))
            continue
        prices[int(length)] = _series(source, at, text)
    return Surroundings(
        chunk=_series(source, (*where, "chunk"), given.chunk),
        credits=_series(source, (*where, "credits"), given.credits),
        seconds_per_token=prices,
        offered=None if test.offered is None else _series(source, (*path, "offered"), test.offered),
        top_tenant=tuple(sorted(test.top_tenant.items())),
    )


def _series(source: Source, path: Path, text: str | None) -> Samples:
    if text is None:
        return (_NOT_PROVIDED,)
    try:
        return parse_series(text)
    except SeriesError as error:
        source.problems.append(source.inside(path, error.offset, f"{path[-1]}: {error}"))
        return (_NOT_PROVIDED,)


def _sample(samples: Samples, tick: int) -> Reading:
    if samples == (_NOT_PROVIDED,):
        return _NOT_PROVIDED
    return samples[tick] if tick < len(samples) else STALE
