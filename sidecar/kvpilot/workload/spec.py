"""A workload as a plain value: parts one after another, synthetic or recorded, each at its own load.

Loads are relative to a machine (`Speed`): the same value offers every machine as much as it can just do. What
it is made into depends on the seed and that speed alone, and on the trace files, which lie in a directory of
their own: where one is not there, that is an error of its own kind, to be reported and never skipped.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.formats import read_trace
from kvpilot.workload.generator import Burst, generate
from kvpilot.workload.mixes import MIXES
from kvpilot.workload.trace import at_load

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class TraceAbsent(Exception):
    """A trace file that a workload names is not there."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spell(_Plain):
    """A burst: begins at `start`, lasts `length` (shares of the part), `factor` times the load around it."""

    start: float = Field(ge=0, lt=1)
    length: float = Field(gt=0, le=1)
    factor: float = Field(gt=1, le=100)


class Part(_Plain):
    """One stretch of a workload: a `mix` of the generator's, or a slice of a `trace`."""

    seconds: Seconds
    load: float = Field(gt=0, le=20)
    mix: str | None = None
    trace: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """File name in the directory of traces."""
    start: float = Field(default=0.0, ge=0)
    end: float | None = Field(default=None, gt=0)
    """Seconds of the trace's own time."""
    cv: float = Field(default=1.0, gt=0, le=50)
    bursts: tuple[Spell, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.mix is None) == (self.trace is None):
            raise ValueError("a part is either a mix or a trace: name one of them")
        if self.mix is not None and self.mix not in MIXES:
            raise ValueError(f"mix {self.mix}: known are {', '.join(MIXES)}")
        if self.trace is not None and (self.bursts or self.cv != 1.0):
            raise ValueError("bursts and cv are the generator's; a trace has its own")
        if self.mix is not None and (self.start or self.end is not None):
            raise ValueError("start and end cut a trace; a mix has none")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end {self.end:g}: after start {self.start:g}")
        return self


class Workload(_Plain):
    """Parts one after another."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    parts: tuple[Part, ...] = Field(min_length=1)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def traces(self) -> tuple[str, ...]:
        """File names, each once."""
        return tuple(dict.fromkeys(part.trace for part in self.parts if part.trace is not None))

    def arrivals(self, seed: int, speed: Speed, traces: Path | None = None) -> list[Arrival]:
        """In order of time. Raises TraceAbsent for a file that is not there, TraceError for one that is
        wrong.
        """
        made: list[Arrival] = []
        begin_s, first_id = 0.0, 0
        for number, part in enumerate(self.parts):
            offered = _part(part, seed + 1009 * number, speed, traces)
            made += [_shifted(one, begin_s, first_id) for one in offered]
            begin_s += part.seconds
            if part.trace is not None:
                first_id = max((max(one.prefix, default=0) for one in made), default=0) + 1
        return made


def _part(part: Part, seed: int, speed: Speed, traces: Path | None) -> list[Arrival]:
    if part.mix is not None:
        bursts = [Burst(spell.start, spell.length, spell.factor) for spell in part.bursts]
        return generate(seed, part.seconds, part.load, speed, MIXES[part.mix], bursts, part.cv)
    assert part.trace is not None, "a part is a mix or a trace"
    path = None if traces is None else traces / part.trace
    if path is None or not path.exists():
        raise TraceAbsent(f"{part.trace}: not in {traces or 'any directory of traces'}")
    recorded = read_trace(path, part.start or None, part.end)
    return at_load(recorded, seed, part.seconds, part.load, speed, MIXES["chat"])


def _shifted(one: Arrival, by_s: float, first_id: int) -> Arrival:
    if not by_s and not first_id:
        return one
    return Arrival(
        one.at_s + by_s,
        one.prompt_tokens,
        one.output_tokens,
        one.klass,
        one.tenant,
        one.domain,
        one.seed,
        tuple(first_id + block for block in one.prefix),
        one.prefix_block_tokens,
    )
