"""What the pilot decided, what people ordered and what the pilot saw, as lines between a timeline's rows."""

from collections.abc import Iterable
from dataclasses import dataclass

from kvpilot.incident.case import Case
from kvpilot.journal.records import DecisionRecord


@dataclass(frozen=True, slots=True)
class Note:
    """One line. `decisions`: those of one rule on one knob that are summed up in it."""

    at_wall_ns: int
    text: str = ""
    decisions: tuple[DecisionRecord, ...] = ()

    def __str__(self) -> str:
        return _summed_up(self.decisions) if self.decisions else self.text


def notes(case: Case) -> list[Note]:
    """In the order of time. Once the engine is gone, decisions only let go of it: one line for all."""
    past, gone_wall_ns = case.past, case.gone_wall_ns
    lines = [
        Note(row.at_wall_ns, decisions=(row,))
        for row in past.decisions
        if gone_wall_ns is None or row.at_wall_ns < gone_wall_ns
    ]
    after = len(past.decisions) - len(lines)
    if after and gone_wall_ns is not None:
        lines.append(Note(gone_wall_ns, f"{after} decisions let go of an engine that is gone"))
    lines += [
        Note(order.at_wall_ns, f"{order.who} orders {order.knob} = {_number(order.value)}: {order.why}")
        for order in past.overrides
    ]
    lines += [
        Note(each.at_wall_ns, f"{each.who} turns the pilot {'off' if each.off else 'on'}: {each.why}")
        for each in past.switches
    ]
    lines += [Note(event.at_wall_ns, f"pilot: {event.detail}") for event in past.events]
    return sorted(lines, key=lambda note: note.at_wall_ns)


def condensed(lines: Iterable[Note]) -> list[Note]:
    """The lines of one row, with each rule's decisions on one knob summed up in the place of the first."""
    places: dict[tuple[str, ...], int] = {}
    kept: list[Note] = []
    for note in lines:
        if not note.decisions:
            kept.append(note)
            continue
        row = note.decisions[0]
        place = places.setdefault((row.policy, row.rule, row.knob, row.scope), len(kept))
        if place == len(kept):
            kept.append(note)
        else:
            first = kept[place]
            kept[place] = Note(first.at_wall_ns, decisions=(*first.decisions, *note.decisions))
    return kept


def _summed_up(rows: tuple[DecisionRecord, ...]) -> str:
    first, last = rows[0], rows[-1]
    scope = "" if last.scope == "all" else f" {last.scope}"
    change = f"{last.knob}{scope} {_number(first.before)} -> {_number(last.after)}"
    numbers = (
        f"#{last.number}" if len(rows) == 1 else f"#{first.number} to #{last.number}, {len(rows)} decisions"
    )
    verdicts = ", ".join(dict.fromkeys(row.verdict for row in rows))
    return f"{numbers} {last.policy}/{last.rule}: {change} {verdicts}: {last.reason}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
