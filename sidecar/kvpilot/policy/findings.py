"""What building a policy needs everywhere: a place for mistakes, expressions, names of the catalogues."""

import difflib
from collections.abc import Iterable, Sequence

from kvpilot.knobs import KNOBS, Knob
from kvpilot.policy.expr import HIGHEST, LOWEST, Expression, Wanted, compile_expression
from kvpilot.policy.source import Path, Problem, Source
from kvpilot.policy.tokens import ExpressionError
from kvpilot.signals import Signal


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


class Findings:
    """The mistakes of one file, as they are found. `classes`: the configured names, or None for any."""

    def __init__(self, source: Source, declared: Iterable[str], classes: Sequence[str] | None) -> None:
        self.source = source
        self.classes = classes
        # An input that is itself wrong still declares its name: one mistake, one message.
        self.signals: dict[str, Signal | None] = dict.fromkeys(declared)
        self.problems: list[Problem] = []

    def at(self, path: Path, message: str, key: bool = False) -> None:
        """A mistake at the value of `path`, or at its key; the name of the place comes first."""
        named = path[-1] if isinstance(path[-1], str) else None
        prefix = f"{named}: " if named is not None and not message.startswith(("agg", named)) else ""
        self.problems.append(self.source.at(path, f"{prefix}{message}", key))

    def expression(self, path: Path, text: str, wanted: Wanted, fixed: bool = False) -> Expression | None:
        """The expression at `path`; None after a mistake."""
        try:
            return compile_expression(text, self.signals, wanted, self.classes, fixed)
        except ExpressionError as error:
            for fault in error.faults:
                self.problems.append(self.source.inside(path, fault.offset, f"{path[-1]}: {fault.message}"))
            return None

    def knob(self, path: Path, name: str) -> Knob | None:
        """The catalogue's row; None after a mistake."""
        knob = KNOBS.get(name)
        if knob is None:
            self.at(path, f"unknown knob '{name}'{did_you_mean(name, KNOBS)}")
        return knob

    def klass(self, path: Path, name: str, ends: bool = False) -> None:
        """A class must be configured; `lowest` and `highest`, where they are allowed, always are."""
        known = [*(self.classes or ()), LOWEST, HIGHEST] if ends else self.classes
        if self.classes is None or known is None or name in known:
            return
        self.at(path, f"unknown class '{name}'{did_you_mean(name, known)}")

    def plausible(self, path: Path, value: float, knob: Knob) -> None:
        """A value that is meant for `knob` must be one that it can have anywhere."""
        low, high = knob.plausible
        if not low <= value <= high:
            self.at(path, f"{value:g} is outside what {knob.name} can be ({low:g} to {high:g} {knob.unit})")
