"""What the console shows of the past, read in a process of its own: `python -m kvpilot.api.console.past`.

    tests DIRECTORY KEY                           incidents TELEMETRY ENGINE RANK
    incident TELEMETRY ENGINE RANK JOURNAL START

Prints JSON; one line on stderr and status 1 where there is nothing to show.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvpilot.api.console.wire import encoded
from kvpilot.clock import NS, SystemClock
from kvpilot.incident.case import Case, IncidentError, open_kept
from kvpilot.incident.export import page_json
from kvpilot.incident.kept import kept_pages
from kvpilot.incident.recording import Recording
from kvpilot.incident.timeline import kv_used
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.page import LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.link.records import StepRecord
from kvpilot.link.trust import trusted_uids

NICE = 10
MOST_ROWS = 400
MOST_MOMENTS = 500
MOST_EVIDENCE = 8


def tests_of(directory: Path) -> dict[str, Any]:
    """By policy: how many tests pass, and the names of those that fail."""
    # Here, because it brings pydantic and CEL along, which the others can do without.
    from kvpilot.policy.testing import run_tests

    report = run_tests([directory], SystemClock())
    found: dict[str, dict[str, Any]] = {}
    for result in report.results:
        one = found.setdefault(result.policy, {"passed": 0, "failed": []})
        if result.passed:
            one["passed"] += 1
        else:
            one["failed"].append(result.case)
    return {"errors": [str(problem) for problem in report.errors], "policies": found}


def starts(place: LinkPlace, rank: int) -> list[dict[str, Any]]:
    """The kept starts, newest first. Raises LinkError."""
    return [page_json(page) for page in kept_pages(place.telemetry_directory(rank), place.uids)]


def incident(case: Case) -> dict[str, Any]:
    """One start for the scrubber: at most `MOST_ROWS` moments, evenly apart, in wall seconds."""
    recording = case.recording
    knobs = [
        field.name.removeprefix(KNOB_PREFIX)
        for field in recording.manifest.fields
        if field.name.startswith(KNOB_PREFIX)
    ]
    end_ns = recording.last_sign_ns
    return {
        "alive": recording.alive,
        "start": f"{recording.nonce:016x}",
        "how": case.verdict.how,
        "headline": case.verdict.headline,
        "why": case.verdict.why or None,
        "evidence": [finding.text for finding in case.evidence.found[:MOST_EVIDENCE]],
        "knobs": knobs,
        "columns": [
            *("wall_s", "kv_used", "running", "waiting", "step_max_s"),
            *(f"{KNOB_PREFIX}{name}" for name in knobs),
        ],
        "rows": list(_rows(recording, knobs)),
        "end_wall_s": None if end_ns is None else recording.wall_ns(end_ns) / NS,
        "moments": list(_moments(case))[-MOST_MOMENTS:],
    }


def _rows(recording: Recording, knobs: Sequence[str]) -> Iterator[list[float | None]]:
    """The last record of each part of the time, and the longest step within it."""
    timed = [record for record in recording.steps if record.get("time_ns") is not None]
    if not timed:
        return
    first_ns, last_ns = timed[0]["time_ns"], timed[-1]["time_ns"]
    part_ns = max(1.0, (last_ns - first_ns) / MOST_ROWS)
    longest: float | None = None
    for index, record in enumerate(timed):
        took_ns = record.get("duration_ns")
        if took_ns:
            longest = max(longest or 0.0, took_ns / NS)
        part = (record["time_ns"] - first_ns) // part_ns
        following = timed[index + 1]["time_ns"] if index + 1 < len(timed) else math.inf
        if following == math.inf or (following - first_ns) // part_ns != part:
            yield _row(recording, record, knobs, longest)
            longest = None


def _row(
    recording: Recording, record: StepRecord, knobs: Sequence[str], longest_s: float | None
) -> list[float | None]:
    used = kv_used(recording, record)
    values = [
        *(None if used is None else round(used, 4), record.get("running"), record.get("waiting")),
        None if longest_s is None else round(longest_s, 5),
        *(record.get(f"{KNOB_PREFIX}{name}") for name in knobs),
    ]
    wall_s = round(recording.wall_ns(record["time_ns"]) / NS, 3)
    return [wall_s, *(value if value is None or math.isfinite(value) else None for value in values)]


def _moments(case: Case) -> Iterator[dict[str, Any]]:
    """What was decided and ordered meanwhile, in order."""
    found = [
        (
            row.at_wall_ns,
            f"{row.policy}/{row.rule}: {row.knob} {_word(row.before)} -> {_word(row.after)}, {row.verdict}",
        )
        for row in case.past.decisions
    ]
    found += [(row.at_wall_ns, f"{row.who}: {row.knob} = {_word(row.value)}") for row in case.past.overrides]
    found += [(row.at_wall_ns, f"{row.who}: {'off' if row.off else 'on'}") for row in case.past.switches]
    found += [(row.at_wall_ns, f"{row.kind}: {row.detail}") for row in case.past.events]
    for at_wall_ns, text in sorted(found):
        yield {"wall_s": round(at_wall_ns / NS, 3), "text": text}


def _word(value: float | None) -> str:
    return "baseline" if value is None else f"{value:g}"


def answer(arguments: Sequence[str]) -> bytes:
    """JSON for one order. Raises IncidentError, LinkError."""
    what, *rest = arguments
    if what == "tests":
        return encoded(tests_of(Path(rest[0])))
    telemetry, engine, rank = Path(rest[0]), rest[1], int(rest[2])
    place = LinkPlace(telemetry, telemetry, engine, trusted_uids(os.environ))
    if what == "incidents":
        return encoded(starts(place, rank))
    return encoded(incident(open_kept(place, rank, Path(rest[3]), rest[4])))


def main() -> None:
    """See the module docstring."""
    os.nice(NICE)
    try:
        told = answer(sys.argv[1:])
    except (IncidentError, LinkError) as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(told)


if __name__ == "__main__":
    main()
