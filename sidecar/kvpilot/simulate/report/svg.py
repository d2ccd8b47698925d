"""Charts as SVG text: plain functions of values. Colours are CSS classes (`style.CHARTS`), so that one
drawing serves light and dark; every line differs from the others in its dashes too, and is named where it
is drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

from kvpilot.simulate.report.style import CHARTS

CHAR_PX = 6.1
"""A letter of the charts' text, about."""
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 30.0
LEGEND_PX = 20.0
NOTES_PX, NUDGE_PX = 13.0, 30.0
"""For what is written above stretches and lines of the x axis."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One chart. `name` is a file's; `body` is the inside of the SVG; all text in it is escaped."""

    name: str
    title: str
    width: float
    height: float
    body: str

    @property
    def inline(self) -> str:
        """For a page that has the style."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(self.title)}">'
            f"{self.body}</svg>"
        )


def standalone(drawing: Drawing) -> str:
    """A file of its own."""
    height = drawing.height + 26
    title = f'<text class="title" x="10" y="17">{escape(drawing.title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width:g} {height:g}" '
        f'width="{drawing.width:g}" height="{height:g}"><style>{CHARTS}</style>'
        f'<rect class="page" width="100%" height="100%"/>{title}'
        f'<g transform="translate(0 26)">{drawing.body}</g></svg>\n'
    )


class Tick(NamedTuple):
    """A place on an axis, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """`log`: by ratios; values must then be above 0."""

    low: float
    high: float
    ticks: tuple[Tick, ...]
    title: str = ""
    log: bool = False

    def share(self, value: float) -> float:
        """Where along the axis, 0..1; what lies outside is drawn at its end."""
        low, high = (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)
        at = log10(max(value, self.low)) if self.log else value
        return min(1.0, max(0.0, (at - low) / ((high - low) or 1.0)))


@dataclass(frozen=True, slots=True)
class Line:
    """`kind` is a CSS class; `stepped`: a value holds until the next one; `filled`: down to the axis."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    stepped: bool = False
    filled: bool = False


class Mark(NamedTuple):
    """A stretch of the x axis that is something special; a line where both ends are one."""

    start: float
    end: float
    label: str


class Dot(NamedTuple):
    """One value of a row: a CSS class, and what a pointer is told. `spread`: from, to."""

    value: float
    kind: str
    hint: str
    spread: tuple[float, float] | None = None


def nice(low: float, high: float, count: int = 4, label: Callable[[float], str] = "{:g}".format) -> Axis:
    """A linear axis over a range, with round ticks; its ends are ticks."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple(Tick(round(i * step, 10), label(round(i * step, 10))) for i in range(first, last + 1))
    return Axis(ticks[0].at, ticks[-1].at, ticks)


def seconds(until_s: float, count: int = 6) -> Axis:
    """Time of a run: seconds, or minutes where it is long."""
    if until_s <= 240:
        axis = nice(0, until_s, count)
        return Axis(0, until_s, tuple(t for t in axis.ticks if t.at <= until_s), "seconds of the run")
    axis = nice(0, until_s / 60, count)
    ticks = tuple(Tick(tick.at * 60, tick.label) for tick in axis.ticks if tick.at * 60 <= until_s)
    return Axis(0, until_s, ticks, "minutes of the run")


def plot(
    size: tuple[float, float],
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    named: bool = True,
) -> str:
    """Lines over two axes, the first above the others; `named`: with a legend."""
    width, height = size
    noted = any(mark.label for mark in marks)
    top = TOP + (LEGEND_PX if named else 0) + (NOTES_PX if noted else 0)
    inner, tall = width - LEFT - RIGHT, height - top - BOTTOM

    def px(value: float) -> float:
        return LEFT + inner * x.share(value)

    def py(value: float) -> float:
        return top + tall * (1 - y.share(value))

    parts = [_legend(lines, LEFT)] if named else []
    parts += [_band(mark, px, top, tall) for mark in marks if mark.end > mark.start]
    parts.append(_notes(marks, px, top - 4, width))
    for tick in y.ticks:
        at = py(tick.at)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}H{width - RIGHT:g}"/>')
        parts.append(
            f'<text class="tick end" x="{LEFT - 6:g}" y="{at + 3.5:.1f}">{escape(tick.label)}</text>'
        )
    for tick in x.ticks:
        at = px(tick.at)
        parts.append(f'<path class="notch" d="M{at:.1f} {top + tall:g}v4"/>')
        parts.append(
            f'<text class="tick mid" x="{at:.1f}" y="{top + tall + 15:g}">{escape(tick.label)}</text>'
        )
    if x.title:
        parts.append(
            f'<text class="axis end" x="{width - RIGHT:g}" y="{height - 3:g}">{escape(x.title)}</text>'
        )
    parts += [_rule(mark, px, top, tall) for mark in marks if mark.end <= mark.start]
    parts += [_path(line, px, py, top + tall) for line in reversed(lines)]
    parts.append(f'<path class="base" d="M{LEFT:g} {top + tall:g}H{width - RIGHT:g}"/>')
    return "".join(parts)


def _legend(lines: Sequence[Line], left: float) -> str:
    parts, at = [], left
    for line in lines:
        if line.filled:
            mark = f'<rect class="fill {line.kind}" x="{at:g}" y="6" width="18" height="8"/>'
        else:
            mark = f'<path class="line {line.kind}" d="M{at:g} 10h18"/>'
        parts.append(f'{mark}<text class="tick" x="{at + 23:g}" y="13.5">{escape(line.name)}</text>')
        at += 23 + len(line.name) * CHAR_PX + 14
    return "".join(parts)


def _band(mark: Mark, px: Callable[[float], float], top: float, tall: float) -> str:
    left, right = px(mark.start), px(mark.end)
    return (
        f'<rect class="band" x="{left:.1f}" y="{top:g}" width="{max(1.0, right - left):.1f}" '
        f'height="{tall:g}"><title>{escape(mark.label)}</title></rect>'
    )


def _notes(marks: Sequence[Mark], px: Callable[[float], float], y: float, width: float) -> str:
    """What marks are called, above them, or a little beside; who finds no room there goes unnamed."""
    parts, free = [], 0.0
    for mark in sorted(marks):
        length = len(mark.label) * CHAR_PX * 0.93
        at = min(max(px(mark.start), free), width - length)
        if mark.label and free <= at <= px(mark.start) + NUDGE_PX:
            parts.append(f'<text class="note" x="{at:.1f}" y="{y:g}">{escape(mark.label)}</text>')
            free = at + length + 6
    return "".join(parts)


def _rule(mark: Mark, px: Callable[[float], float], top: float, tall: float) -> str:
    return f'<path class="rule" d="M{px(mark.start):.1f} {top:g}v{tall:g}"/>'


def _path(line: Line, px: Callable[[float], float], py: Callable[[float], float], floor_px: float) -> str:
    points = [(px(x), py(y)) for x, y in line.points if isfinite(x) and isfinite(y)]
    if not points:
        return ""
    drawn = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for at, value in points[1:]:
        drawn.append(f"H{at:.1f}V{value:.1f}" if line.stepped else f"L{at:.1f} {value:.1f}")
    if line.filled:
        drawn.append(f"V{floor_px:g}H{points[0][0]:.1f}Z")
        return f'<path class="fill {line.kind}" d="{"".join(drawn)}"/>'
    return f'<path class="line {line.kind}" d="{"".join(drawn)}"/>'


def rows(
    width: float,
    x: Axis,
    named: Sequence[tuple[str, Sequence[Dot]]],
    marks: Sequence[Mark] = (),
    left: float = 96.0,
    row_px: float = 30.0,
) -> tuple[float, str]:
    """(height, body): a row of dots for each name; a row with one dot has its value beside it."""
    top, inner = TOP + 12, width - left - 46
    tall = row_px * len(named)

    def px(value: float) -> float:
        return left + inner * x.share(value)

    parts = [_notes(marks, px, top - 5, width), *(_rule(mark, px, top, tall) for mark in marks)]
    for tick in x.ticks:
        at = px(tick.at)
        parts.append(f'<path class="grid" d="M{at:.1f} {top:g}v{tall:g}"/>')
        parts.append(
            f'<text class="tick mid" x="{at:.1f}" y="{top + tall + 15:g}">{escape(tick.label)}</text>'
        )
    for index, (name, dots) in enumerate(named):
        middle = top + row_px * (index + 0.5)
        parts.append(
            f'<text class="name end" x="{left - 10:g}" y="{middle + 4:.1f}">{escape(name)}</text>'
            f'<path class="rail" d="M{left:g} {middle:.1f}h{inner:g}"/>'
        )
        for dot in dots:
            if dot.spread is not None and dot.spread[1] > dot.spread[0]:
                ends = px(dot.spread[0]), px(dot.spread[1])
                parts.append(
                    f'<path class="spread {dot.kind}" d="M{ends[0]:.1f} {middle:.1f}H{ends[1]:.1f}"/>'
                )
            size = 5.5 if len(dots) == 1 else 3.5
            parts.append(
                f'<circle class="dot {dot.kind}" cx="{px(dot.value):.1f}" cy="{middle:.1f}" r="{size}">'
                f"<title>{escape(dot.hint)}</title></circle>"
            )
        if len(dots) == 1:
            place = f'x="{left + inner + 8:g}" y="{middle + 4:.1f}"'
            parts.append(f'<text class="value" {place}>{dots[0].value:.3f}</text>')
    return top + tall + 22, "".join(parts)
