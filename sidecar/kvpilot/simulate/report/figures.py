"""Which charts a scoreboard has: what is drawn of it, and how axes are chosen."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

from kvpilot.simulate.comparison import goodput
from kvpilot.simulate.report.svg import (
    Axis,
    Dot,
    Drawing,
    Line,
    Mark,
    Tick,
    nice,
    plot,
    rows,
    seconds,
)
from kvpilot.simulate.scoreboard import Scoreboard
from kvpilot.simulate.watch import MULTIPLES, Kept, Moved, Seen

WIDE, HALF, NARROW = 1140.0, 560.0, 350.0
"""Of a card, of one of two in a row, of a phone."""
KNOBS = 8
"""Are drawn, those that moved most."""
FAR = 20
"""Times what was asked of a knob: a baseline beyond is not drawn."""
SHARE = Axis(0, 1, tuple(Tick(at / 4, f"{at * 25}%") for at in range(5)))
KINDS = {"pilot": "pilot", "defaults": "defaults", "best static": "best", "single best": "single"}
FLOOR_NAMES = {
    "count": "by count",
    "class": "worst class",
    "longest_fifth": "longest fifth",
    "tenant": "worst tenant",
    "smooth": "smooth",
}
LEAST_FLOOR = 0.9
"""What the project asks of every floor."""
_PROMISE = Mark(1.0, 1.0, "promise")


def drawn(board: Scoreboard) -> list[Drawing]:
    """All charts of a comparison, as files."""
    return [
        *(each.at(HALF) for each in (*heads(board), *latencies(board))),
        *(each.at(WIDE) for each in timeline(board)),
        *(each.at(HALF) for each in knobs(board)),
    ]


@dataclass(frozen=True, slots=True)
class Chart:
    """One that can be drawn at any width; `body` is given it, and returns height and the SVG's inside."""

    name: str
    title: str
    body: Callable[[float], tuple[float, str]]

    def at(self, width: float) -> Drawing:
        """Of one width."""
        return Drawing(self.name, self.title, width, *self.body(width))


def heads(board: Scoreboard) -> list[Chart]:
    """Goodput of every leg, and the floors."""
    return [_goodput(board), _floors(board)]


def _goodput(board: Scoreboard) -> Chart:
    named: list[tuple[str, Sequence[Dot]]] = []
    for title, flown in board.columns:
        values = [row.goodput for row in flown]
        spread = min(values), max(values)
        named.append((title, [Dot(goodput(flown), KINDS[title], flown[0].leg, spread)]))
    points = board.judged.points
    grid = [
        Dot(goodput(flown), "point", f"{name}: {goodput(flown):.3f}")
        for name, flown in sorted(points.items())
    ]
    named.append((f"{len(points)} settings", grid))
    low = min(dot.value for _, dots in named for dot in dots)
    axis = nice(max(0.0, low - 0.02), 1.0, 5)
    axis = Axis(max(0.0, axis.low), 1.0, axis.ticks)
    return Chart("goodput", "Goodput by work", lambda width: rows(width, axis, named))


def _floors(board: Scoreboard) -> Chart:
    found = board.floors
    named = [
        (FLOOR_NAMES[name], [Dot(value, "fine" if value >= LEAST_FLOOR else "low", f"{value:.3f}")])
        for name, value in found.items()
    ]
    values = [*found.values(), 1.0, LEAST_FLOOR]
    axis = nice(max(0.0, min(values) - 0.05), min(max(values) + 0.05, 3.0), 5)
    marks = [Mark(LEAST_FLOOR, LEAST_FLOOR, "floor")]
    title = "Floors: the pilot over the best static setting"
    return Chart("floors", title, lambda width: rows(width, axis, named, marks))


def latencies(board: Scoreboard) -> list[Chart]:
    """Of each class, arrivals that were served within a multiple of what they were promised."""
    watched = [(title, flown[0].seen) for title, flown in board.columns[:3]]
    first = watched[0][1]
    picks: tuple[tuple[str, str, Callable[[Kept], Sequence[float]]], ...] = (
        ("ttft", "first token", lambda kept: kept.ttft),
        ("itl", "time per token", lambda kept: kept.itl),
    )
    found = []
    for klass in sorted(first.classes, reverse=True) if first is not None else ():
        for key, what, of in picks:
            lines = [
                Line(title, KINDS[title], list(zip(MULTIPLES, of(seen.classes[klass]), strict=True)))
                for title, seen in watched
                if seen is not None
            ]
            found.append(Chart(f"latency-{klass}-{key}", f"{klass}: {what}", _cumulated(lines)))
    return found


def _cumulated(lines: Sequence[Line]) -> Callable[[float], tuple[float, str]]:
    ticks = tuple(Tick(at, f"{at:g}×") for at in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0))
    x = Axis(MULTIPLES[0], MULTIPLES[-1], ticks, "of the promise", log=True)
    return lambda width: (215, plot((width, 215), x, SHARE, lines, [_PROMISE]))


def timeline(board: Scoreboard) -> list[Chart]:
    """Goodput by arrival, KV memory, the queue, and who was turned away."""
    watched = [(title, flown[0].seen) for title, flown in board.columns[:3] if flown[0].seen is not None]
    if not watched:
        return []
    pilot = watched[0][1]
    until_s = max(board.window_s, 1.0)
    marks = [Mark(*mark) for mark in board.marks]

    def over(lines: Sequence[Line], y: Axis, height: float) -> Callable[[float], tuple[float, str]]:
        def body(width: float) -> tuple[float, str]:
            x = seconds(until_s, 4 if width < HALF else 10)
            return height, plot((width, height), x, y, lines, marks)

        return body

    good = [
        Line(
            title,
            KINDS[title],
            [(each.at_s + seen.bin_s / 2, each.goodput) for each in seen.bins if each.goodput is not None],
        )
        for title, seen in watched
    ]
    kv = [Line(title, KINDS[title], _moments(seen, until_s, lambda m: m.kv)) for title, seen in watched]
    queue = [Line(t, KINDS[t], _moments(seen, until_s, lambda m: m.waiting)) for t, seen in watched]
    most = max((value for line in queue for _, value in line.points), default=0.0)
    charts = [
        Chart("goodput-over-time", "Goodput of those who arrived then", over(good, SHARE, 210)),
        Chart("kv-over-time", "KV memory held", over(kv, SHARE, 190)),
        Chart("queue-over-time", "Requests waiting", over(queue, nice(0, max(most, 4), 3), 170)),
    ]
    if any(each.shed for each in pilot.bins):
        shed = [(each.at_s, each.shed / each.offered if each.offered else 0.0) for each in pilot.bins]
        turned = Line("turned away by the pilot", "shed", [*shed, (until_s, 0.0)], stepped=True, filled=True)
        charts.append(Chart("shed-over-time", "Arrivals turned away", over([turned], SHARE, 150)))
    return charts


def _moments(
    seen: Seen, until_s: float, pick: Callable[..., float], most: int = 400
) -> list[tuple[float, float]]:
    """At most so many; where looks are left out, the highest of them stands for all."""
    looks = [moment for moment in seen.moments if moment.at_s <= until_s]
    step = max(1, -(-len(looks) // most))
    return [
        (looks[at].at_s, max(pick(moment) for moment in looks[at : at + step]))
        for at in range(0, len(looks), step)
    ]


def knobs(board: Scoreboard) -> list[Chart]:
    """What the pilot moved, the baseline dashed."""
    seen = board.judged.pilot[0].seen
    moved = () if seen is None else [each for each in seen.moved if len(each.values) > 1][:KNOBS]
    return [_knob(each, board) for each in moved]


def file_name(*parts: str) -> str:
    """Letters, digits, dots and dashes, whatever a tenant is called; others are told apart by a checksum."""
    plain = "-".join(part for part in parts if part)
    safe = re.sub(r"[^\w.]+", "-", plain.replace(" ", "-"), flags=re.ASCII)[:80]
    return safe if safe == plain.replace(" ", "-") else f"{safe}-{crc32(plain.encode()):08x}"


def _knob(each: Moved, board: Scoreboard) -> Chart:
    until_s = max(board.window_s, 1.0)
    values = [value for _, value in each.values]
    baseline = each.bounds[2]
    # A baseline far above all that was asked, such as "no limit", would press the rest flat.
    asked = [value for value in values if value != baseline] or values
    far = baseline > FAR * max(abs(value) for value in asked) > 0
    top = max(asked) * 1.1 if far else max([*values, 1e-9])
    points = [(at_s, min(value, top)) for at_s, value in each.values if at_s <= until_s]
    line = Line("held", "pilot", [*points, (until_s, points[-1][1])], stepped=True)
    home = [] if far else [Line("baseline", "home", [(0.0, baseline), (until_s, baseline)])]
    y = nice(0.0, top, 3, _short)
    marks = [Mark(at_s, to_s, "") for at_s, to_s, _ in board.marks]
    title = each.knob + (f" · {each.scope}" if each.scope else "")
    name = file_name("knob", each.knob, each.scope)

    def body(width: float) -> tuple[float, str]:
        return 120, plot((width, 120), seconds(until_s, 5), y, [line, *home], marks, named=False)

    return Chart(name, title, body)


def _short(value: float) -> str:
    if value >= 10_000_000:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
