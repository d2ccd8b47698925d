"""promtool's series notation: `0.02x7 0.06x19 1+0.5x3 _ _x4 stale`, one sample a tick.

`AxN` is A and then N more; `A+BxN` and `A-BxN` step by B; `_` is missing, `_xN` is N missing; `stale` is a
value that has grown too old.
"""

import re

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


def parse_series(text: str) -> tuple[Reading, ...]:
    """The samples. Raises SeriesError."""
    samples: list[Reading] = []
    for word in re.finditer(r"\S+", text):
        match = _ITEM.fullmatch(word[0])
        if match is None:
            raise SeriesError(
                word.start(), f"'{word[0][:40]}' is not a series item such as 0.02x7, 1+0.5x3, _ or stale"
            )
        count = int(match["gaps"] or match["times"] or 0)
        if len(samples) + count > MAX_SAMPLES:
            raise SeriesError(word.start(), f"more than {MAX_SAMPLES} samples")
        if match["gap"]:
            samples += [NOTHING] * (count if match["gaps"] else 1)
        elif match["stale"]:
            samples.append(STALE)
        else:
            start, step = float(match["start"]), float(match["step"] or 0)
            samples += [start + step * i for i in range(count + 1)]
    if not samples:
        raise SeriesError(0, "an empty series")
    return tuple(samples)
