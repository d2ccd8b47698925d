"""Which charts a scoreboard has: what is drawn of it, and how axes are chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

WIDE, NARROW, SMALL = 1150.0, 372.0, 372.0
KNOBS = 8
"""Are drawn, those that moved most."""
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
    over = [each.drawn(WIDE) for each in timeline(board)]
    return [*heads(board), *latencies(board), *over, *knobs(board)]


def heads(board: Scoreboard) -> list[Drawing]:
    """Goodput of every leg, and the floors."""
    return [_goodput(board), _floors(board)]


def _goodput(board: Scoreboard) -> Drawing:
    named: list[tuple[str, Sequence[Dot]]] = []
    for title, flown in board.columns:
        values = [row.goodput for row in flown]
        named.append((title, [Dot(goodput(flown), KINDS[title], flown[0].leg, (min(values), max(values)))]))
    points = board.judged.points
    grid = [
        Dot(goodput(flown), "point", f"{name}: {goodput(flown):.3f}")
        for name, flown in sorted(points.items())
    ]
    named.append((f"{len(points)} settings", grid))
    low = min([dot.value for _, dots in named for dot in dots])
    axis = nice(max(0.0, low - 0.02), 1.0, 5)
    height, body = rows(560, Axis(max(0.0, axis.low), 1.0, axis.ticks), named)
    return Drawing("goodput", "Goodput by work: pilot, defaults, static settings", 560, height, body)


def _floors(board: Scoreboard) -> Drawing:
    found = board.floors
    named = [
        (FLOOR_NAMES[name], [Dot(value, "fine" if value >= LEAST_FLOOR else "low", f"{value:.3f}")])
        for name, value in found.items()
    ]
    values = [*found.values(), 1.0, LEAST_FLOOR]
    axis = nice(max(0.0, min(values) - 0.05), min(max(values) + 0.05, 3.0), 5)
    marks = [Mark(LEAST_FLOOR, LEAST_FLOOR, "floor"), Mark(1.0, 1.0, "")]
    height, body = rows(560, axis, named, marks)
    return Drawing("floors", "Floors: the pilot over the best static setting", 560, height, body)


def latencies(board: Scoreboard) -> list[Drawing]:
    """Of each class, arrivals that were served within a multiple of what they were promised."""
    x = Axis(
        MULTIPLES[0],
        MULTIPLES[-1],
        tuple(Tick(at, f"{at:g}×") for at in (0.01, 0.1, 1.0, 10.0)),
        "of the promise",
        log=True,
    )
    y = Axis(0, 1, tuple(Tick(at / 4, f"{at * 25}%") for at in range(5)))
    found = []
    watched = [(title, flown[0].seen) for title, flown in board.columns[:3]]
    first = watched[0][1]
    picks: tuple[tuple[str, str, Callable[[Kept], Sequence[float]]], ...] = (
        ("ttft", "first token", lambda kept: kept.ttft),
        ("itl", "time per token", lambda kept: kept.itl),
    )
    for klass in sorted(first.classes, reverse=True) if first is not None else ():
        for key, what, of in picks:
            lines = [
                Line(title, KINDS[title], list(zip(MULTIPLES, of(seen.classes[klass]), strict=True)))
                for title, seen in watched
                if seen is not None
            ]
            # The pilot's is drawn last, above the others.
            body = plot((SMALL, 220), x, y, lines[::-1], [_PROMISE])
            found.append(Drawing(f"latency-{klass}-{key}", f"{klass}: {what}", SMALL, 220, body))
    return found


@dataclass(frozen=True, slots=True)
class Over:
    """A chart over the time of the run, at any width."""

    name: str
    title: str
    note: str
    height: float
    body: Callable[[float], str]

    def drawn(self, width: float) -> Drawing:
        """Of one width."""
        return Drawing(self.name, self.title, width, self.height, self.body(width))


def timeline(board: Scoreboard) -> list[Over]:
    """Goodput by arrival, KV memory, the queue, and who was turned away."""
    watched: list[tuple[str, Seen]] = [
        (title, flown[0].seen) for title, flown in board.columns[:3] if flown[0].seen is not None
    ][::-1]
    if not watched:
        return []
    pilot = watched[-1][1]
    until_s = max(board.window_s, 1.0)
    marks = [Mark(*mark) for mark in board.marks]
    share = Axis(0, 1, tuple(Tick(at / 4, f"{at * 25}%") for at in range(5)))

    def over(lines: Sequence[Line], y: Axis, height: float, named: bool = True) -> Callable[[float], str]:
        def body(width: float) -> str:
            return plot((width, height), seconds(until_s, 4 if width < 600 else 10), y, lines, marks, named)

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
    shed = [(each.at_s, each.shed / each.offered if each.offered else 0.0) for each in pilot.bins]
    turned = Line("shed by the pilot", "shed", [*shed, (until_s, 0.0)], stepped=True, filled=True)
    return [
        Over("goodput-over-time", "Goodput of those who arrived then", "", 200, over(good, share, 200)),
        Over("kv-over-time", "KV memory held", "", 190, over(kv, share, 190)),
        Over("queue-over-time", "Requests waiting", "", 170, over(queue, nice(0, max(most, 4), 3), 170)),
        Over("shed-over-time", "Arrivals turned away", "", 140, over([turned], share, 140)),
    ]


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


def knobs(board: Scoreboard) -> list[Drawing]:
    """What the pilot moved, the baseline dashed."""
    seen = board.judged.pilot[0].seen
    until_s = max(board.window_s, 1.0)
    moved = () if seen is None else [each for each in seen.moved if len(each.values) > 1][:KNOBS]
    return [_knob(each, until_s, number, board) for number, each in enumerate(moved)]


def _knob(each: Moved, until_s: float, number: int, board: Scoreboard) -> Drawing:
    values = [value for _, value in each.values]
    baseline = each.bounds[2]
    # A baseline far above all that was asked, such as "no limit", would press the rest flat.
    asked = [value for value in values if value != baseline] or values
    far = baseline > 20 * max(abs(value) for value in asked) > 0
    top = max(asked) * 1.1 if far else max([*values, 1e-9])
    points = [(at_s, min(value, top)) for at_s, value in each.values if at_s <= until_s]
    line = Line("held", "pilot", [*points, (until_s, points[-1][1])], stepped=True)
    home = [] if far else [Line("baseline", "home", [(0.0, baseline), (until_s, baseline)])]
    y = nice(0.0, top, 3, _short)
    title = each.knob + (f" · {each.scope}" if each.scope else "")
    body = plot(
        (560, 120), seconds(until_s, 5), y, [*home, line], [Mark(*m) for m in board.marks], named=False
    )
    return Drawing(f"knob-{number + 1}-{each.knob}", title, 560, 120, body)


def _short(value: float) -> str:
    if value >= 10_000_000:
        return f"{value / 1e6:g}M"
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
