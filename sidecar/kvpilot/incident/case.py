"""All there is about one engine start: its recording, the journal's decisions, the valves, the verdict."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvpilot.clock import NS
from kvpilot.incident.evidence import Evidence, gather
from kvpilot.incident.kept import KeptPage, kept_pages
from kvpilot.incident.recording import Recording, read_file, read_kept
from kvpilot.incident.verdict import Verdict, judge
from kvpilot.journal.past import Past, read_past
from kvpilot.journal.records import EventRecord
from kvpilot.journal.store import JournalError
from kvpilot.link.following import open_pages
from kvpilot.link.page import LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.link.valve_page import ValvePageReader

AFTERWARDS_NS = 60 * NS
"""Orders that people gave this long after the end are shown too."""


class IncidentError(Exception):
    """There is nothing to show; the message is one line."""


@dataclass(frozen=True, slots=True)
class ValveWord:
    """What one valve's page says. Of a valve that died with its engine, these are its last words."""

    nonce: int
    alive: bool
    written_wall_ns: int | None
    """When the valve last wrote its summary; None where it never did."""
    in_flight: int
    offered: int
    admitted: int
    shed: int


@dataclass(frozen=True, slots=True)
class Case:
    """One engine start. `notes` are what could not be read, a line each."""

    recording: Recording
    past: Past
    valves: tuple[ValveWord, ...]
    gone_wall_ns: int | None
    """When a pilot first saw the engine gone; None where none did."""
    next_start_wall_ns: int | None
    """When the next start of this rank began, if there is one."""
    evidence: Evidence
    verdict: Verdict
    notes: tuple[str, ...]


def open_file(path: Path, journal: Path | None) -> Case:
    """The case of a page named by a person. Raises IncidentError."""
    try:
        recording = read_file(path)
    except LinkError as error:
        raise IncidentError(str(error)) from error
    return _case(recording, (), None, journal, ())


def open_kept(
    place: LinkPlace, rank: int, journal: Path | None, start: str | None = None, live: bool = False
) -> Case:
    """The case of one start of a rank: by the first digits of its nonce, else the newest that is over, or
    with `live` the newest that lives. Raises IncidentError.
    """
    directory = place.telemetry_directory(rank)
    try:
        pages = kept_pages(directory, place.uids)
        page = _choose(pages, directory, start, live)
        recording = read_kept(directory, page.name, place.uids)
    except FileNotFoundError as error:
        raise IncidentError(f"{directory}: the page has gone meanwhile: try again") from error
    except LinkError as error:
        raise IncidentError(str(error)) from error
    later = [page.start_wall_ns for page in pages if page.start_wall_ns > recording.identity.start_wall_ns]
    notes = [page.problem for page in pages if page.problem]
    return _case(recording, notes, min(later, default=None), journal, _valves(place, recording))


def _choose(pages: list[KeptPage], directory: Path, start: str | None, live: bool) -> KeptPage:
    if start is not None:
        wanted = [page for page in pages if f"{page.nonce:016x}".startswith(start.lower().removeprefix("0x"))]
        if len(wanted) != 1:
            found = "no page" if not wanted else f"{len(wanted)} pages"
            raise IncidentError(f"{directory}: {found} of a start {start}: `kvpilot incident list` has them")
        pages, live = wanted, wanted[0].alive
    whole = [page for page in pages if page.problem is None]
    for page in whole:
        if page.alive == live:
            return page
    if pages and not whole:
        raise IncidentError(f"{directory}: {pages[0].problem}")
    if whole:
        hint = (
            "no engine lives: leave --live away"
            if live
            else "no start has ended: --live shows the one that lives"
        )
        raise IncidentError(f"{directory}: {hint}")
    raise IncidentError(f"{directory}: no engine has written here")


def _case(
    recording: Recording,
    notes: Iterable[str],
    next_start_wall_ns: int | None,
    journal: Path | None,
    valves: tuple[ValveWord, ...],
) -> Case:
    notes = list(notes)
    past = Past()
    if journal is None:
        notes.append("no journal: decisions are not shown; name it with --journal")
    else:
        until_ns = recording.wall_ns(recording.last_sign_ns or recording.identity.start_monotonic_ns)
        try:
            past = read_past(
                journal, recording.nonce, recording.identity.start_wall_ns, until_ns + AFTERWARDS_NS
            )
        except JournalError as error:
            notes.append(f"{error}; decisions are not shown")
    gone_wall_ns = None if recording.alive else seen_gone(past.events, recording.nonce)
    gone_ns = None
    if gone_wall_ns is not None:
        gone_ns = gone_wall_ns - recording.identity.start_wall_ns + recording.identity.start_monotonic_ns
    evidence = gather(recording, gone_ns)
    verdict = judge(recording, evidence)
    return Case(recording, past, valves, gone_wall_ns, next_start_wall_ns, evidence, verdict, tuple(notes))


def seen_gone(events: Iterable[EventRecord], nonce: int) -> int | None:
    """When a pilot that had this start in sight saw its lock released."""
    words = f"engine {nonce:016x} is dead"
    return next((event.at_wall_ns for event in events if event.detail.startswith(words)), None)


def _valves(place: LinkPlace, recording: Recording) -> tuple[ValveWord, ...]:
    """Valves that stood before this start: they lived when it did."""
    try:
        pages = open_pages(place.telemetry_directory(None), "valve", place.uids, locked=False)
    except LinkError:
        return ()
    words = []
    began_ns = recording.identity.start_wall_ns
    ended_ns = recording.wall_ns(recording.last_sign_ns or recording.identity.start_monotonic_ns)
    for page in pages:
        try:
            word = _valve(ValvePageReader(page.read_at), page.is_locked())
        except LinkError:
            word = None
        before_the_end = page.header.identity.start_wall_ns <= ended_ns
        if word is not None and before_the_end and (word.alive or (word.written_wall_ns or 0) >= began_ns):
            words.append(word)
        page.close()
    return tuple(words)


def _valve(reader: ValvePageReader, alive: bool) -> ValveWord | None:
    seen = reader.read()
    if seen is None:
        return None
    identity = reader.identity
    written = identity.start_wall_ns + seen.written_ns - identity.start_monotonic_ns
    return ValveWord(
        nonce=reader.nonce,
        alive=alive,
        written_wall_ns=written if seen.written_ns else None,
        in_flight=seen.in_flight,
        offered=sum(row.offered for row in seen.rows),
        admitted=sum(row.admitted for row in seen.rows),
        shed=sum(row.shed for row in seen.rows),
    )
