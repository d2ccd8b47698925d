"""A case for programs: one JSON object with every step and decision, or the steps as CSV."""

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from kvpilot.incident.case import Case
from kvpilot.incident.kept import KeptPage
from kvpilot.incident.timeline import timeline
from kvpilot.link.ending import Ending
from kvpilot.link.fields import Field

SEQUENCE = "sequence"
WALL = "wall_ns"


def as_json(case: Case, seconds: float) -> dict[str, Any]:
    """Plain data. `steps` are arrays in the order of `fields`; a value that is not finite is null."""
    recording, past = case.recording, case.past
    identity, manifest = recording.identity, recording.manifest
    return {
        "how": case.verdict.how,
        "headline": case.verdict.headline,
        "why": case.verdict.why or None,
        "ending": ending_json(recording.ending),
        "evidence": [asdict(finding) for finding in case.evidence.found],
        "looked_for_in_vain": list(case.evidence.in_vain),
        "start": f"{recording.nonce:016x}",
        "alive": recording.alive,
        "page": str(recording.path),
        "host": identity.host,
        "container": identity.container or None,
        "engine": {
            "kind": manifest.engine,
            "version": manifest.engine_version,
            "model": manifest.model,
            "device": manifest.device,
            "rank": manifest.rank,
            "blocks": manifest.blocks,
            "block_size": manifest.block_size,
        },
        "clock": {
            "start_wall_ns": identity.start_wall_ns,
            "start_monotonic_ns": identity.start_monotonic_ns,
            "meaning": "wall = start_wall_ns + time_ns - start_monotonic_ns",
        },
        "last_sign_ns": recording.last_sign_ns,
        "boundary_ns": recording.boundary_ns,
        "gone_wall_ns": case.gone_wall_ns,
        "next_start_wall_ns": case.next_start_wall_ns,
        "valves": [{**asdict(word), "nonce": f"{word.nonce:016x}"} for word in case.valves],
        "tenants": [row._asdict() for row in recording.tenants],
        "timeline": [asdict(row) for row in timeline(recording, seconds)],
        "torn_records": recording.torn,
        "fields": [
            {"name": SEQUENCE, "unit": "-", "meaning": "The record's number, from 1."},
            *(_field(field) for field in manifest.fields),
        ],
        "steps": [
            [record.sequence, *(_finite(record[name]) for name in record)] for record in recording.steps
        ],
        "decisions": [_decision(asdict(row)) for row in past.decisions],
        "overrides": [asdict(row) for row in past.overrides],
        "switches": [asdict(row) for row in past.switches],
        "events": [asdict(row) for row in past.events],
        "notes": list(case.notes),
    }


def ending_json(ending: Ending | None) -> dict[str, Any] | None:
    """An ending with its lines apart."""
    if ending is None:
        return None
    return {**ending._asdict(), "what": ending.what.splitlines()}


def page_json(page: KeptPage) -> dict[str, Any]:
    """One line of the list of kept pages."""
    return {**asdict(page), "nonce": f"{page.nonce:016x}", "ending": ending_json(page.ending)}


def write_csv(case: Case, file: TextIO) -> None:
    """Every step, a row each; the header has `name [unit]`."""
    recording = case.recording
    out = csv.writer(file)
    names = [f"{field.name} [{field.unit}]" for field in recording.manifest.fields]
    out.writerow([SEQUENCE, f"{WALL} [ns]", *names])
    for record in recording.steps:
        at_ns = record.get("time_ns")
        wall_ns = "" if at_ns is None else recording.wall_ns(at_ns)
        out.writerow([record.sequence, wall_ns, *(record[name] for name in record)])


def _field(field: Field) -> dict[str, str]:
    return {"name": field.name, "unit": field.unit, "meaning": field.meaning}


def _decision(row: Mapping[str, Any]) -> dict[str, Any]:
    inputs = {name: _finite(value) for name, value in row["inputs"].items()}
    return {**row, "engine_nonce": f"{row['engine_nonce']:016x}", "inputs": inputs}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
