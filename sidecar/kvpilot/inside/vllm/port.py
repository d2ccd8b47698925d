"""A port: the one place in a scheduler where a knob acts.

At baseline a port writes nothing, and what was there stands exactly as it was. The first value away from
baseline takes down what it finds; the return to baseline puts that back, the same object.
"""

from collections.abc import Callable
from typing import Any


class Port:
    """Attributes of the scheduler or of its parts that hold one knob.

    `places` are (owner, attribute, what to write for a value of the knob).
    """

    def __init__(
        self, name: str, baseline: float, *places: tuple[Any, str, Callable[[float], object]]
    ) -> None:
        self.name = name
        self.baseline = baseline
        self.value = baseline
        """In force here."""
        self._places = places
        self.originals: list[object] | None = None

    def apply(self, value: float) -> None:
        """Put `value` in force, from the engine's thread, between two steps."""
        if value == self.value:
            return
        if value == self.baseline:
            self.restore()
            return
        if self.originals is None:
            self.originals = [getattr(owner, attribute) for owner, attribute, _ in self._places]
        for owner, attribute, wanted in self._places:
            setattr(owner, attribute, wanted(value))
        self.value = value

    def restore(self) -> None:
        """Baseline, exactly as it was found. Does nothing where it holds."""
        originals, self.originals = self.originals, None
        self.value = self.baseline
        if originals is None:
            return
        for (owner, attribute, _), original in zip(self._places, originals, strict=True):
            setattr(owner, attribute, original)

    def each_step(self) -> None:
        """Called before every step while a value away from baseline is in force."""
