"""promtool's series notation: `0.02x7 0.06x19 1+0.5x3 _ _x4 stale`, one sample a tick.

`AxN` is A and then N more; `A+BxN` and `A-BxN` step by B; `_` is missing, `_xN` is N missing; `stale` is a
value that has grown too old.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, overload

from kvpilot.policy.expr import Reading
from kvpilot.signals import Missing

MAX_SAMPLES = 100_000

NOTHING = Missing("no_samples")
STALE = Missing("too_old")

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?|[-+]?[iI]nf"
_ITEM = re.compile(
    rf"(?P<gap>_)(?:x(?P<gaps>\d{{1,9}}))?|(?P<stale>stale)"
    rf"|(?P<start>{_NUMBER})(?:(?P<step>[-+](?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?)?x(?P<times>\d{{1,9}}))?"
)


class SeriesError(ValueError):
    """The text is no series; `offset` is the character where it stops being one."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


class _Run(NamedTuple):
    """Samples of one item: the first, what each next one adds, and how many come before its end."""

    first: Reading
    step: float
    end: int


class Series(Sequence[Reading]):
    """Samples as they were written, a few words however many: `1x99999` is one run."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self._runs = runs
        self._ends = [run.end for run in runs]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Reading: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Reading]: ...
    def __getitem__(self, index: int | slice) -> Reading | Sequence[Reading]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        run = self._runs[number]
        if isinstance(run.first, Missing):
            return run.first
        return run.first + run.step * (index - (self._ends[number - 1] if number else 0))


def parse_series(text: str) -> Series:
    """The samples. Raises SeriesError."""
    runs: list[_Run] = []
    end = 0
    for word in re.finditer(r"\S+", text):
        match = _ITEM.fullmatch(word[0])
        if match is None:
            raise SeriesError(
                word.start(), f"'{word[0][:40]}' is not a series item such as 0.02x7, 1+0.5x3, _ or stale"
            )
        count = int(match["gaps"] or match["times"] or 0)
        end += count if match["gaps"] else count + 1
        if end > MAX_SAMPLES:
            raise SeriesError(word.start(), f"more than {MAX_SAMPLES} samples")
        if match["gap"]:
            runs.append(_Run(NOTHING, 0.0, end))
        elif match["stale"]:
            runs.append(_Run(STALE, 0.0, end))
        else:
            runs.append(_Run(float(match["start"]), float(match["step"] or 0), end))
    if not end:
        raise SeriesError(0, "an empty series")
    return Series(runs)
