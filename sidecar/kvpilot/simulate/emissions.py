"""When a request's tokens came, in nine bytes a step: a run has millions of them."""

from array import array
from collections.abc import Iterator, Sequence
from typing import overload


class Emissions(Sequence[tuple[int, int]]):
    """(time in ns, tokens that came then), in order; at most 255 tokens at a time. Only grows."""

    __slots__ = ("_counts", "_times")

    def __init__(self) -> None:
        self._times = array("q")
        self._counts = array("B")

    def add(self, at_ns: int, tokens: int) -> None:
        self._times.append(at_ns)
        self._counts.append(tokens)

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._times, self._counts, strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(index, slice):
            return list(zip(self._times[index], self._counts[index], strict=True))
        return self._times[index], self._counts[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Emissions):
            return NotImplemented
        return self._times == other._times and self._counts == other._counts

    def __hash__(self) -> int:
        return hash((self._times.tobytes(), self._counts.tobytes()))
