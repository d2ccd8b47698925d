"""What the engines in front of us have: the manifests of all ranks, and how they compare with the table.

Reads pages as any reader does; no pilot is needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvpilot.adapters.known_engines import TENANTS, KnownEngine
from kvpilot.adapters.readings import FIELD_OF, HISTOGRAM_OF, read_field
from kvpilot.knobs import KNOBS
from kvpilot.link.fields import KNOB_PREFIX
from kvpilot.link.following import open_pages
from kvpilot.link.manifest import Manifest
from kvpilot.link.page import Identity, LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.link.records import StepRecord
from kvpilot.link.telemetry import TelemetryReader
from kvpilot.signals import SIGNALS, Missing


@dataclass(frozen=True, slots=True)
class RankSeen:
    """The newest start of one rank: the one that lives, if any does."""

    rank: int
    nonce: int
    alive: bool
    identity: Identity
    manifest: Manifest
    in_force: Mapping[str, float]
    """Engine knobs as the newest record says; empty before the first step."""


def ranks_seen(place: LinkPlace) -> tuple[list[RankSeen], list[str]]:
    """Every rank that has a page, lowest first, and a line for each page that cannot be read."""
    seen, problems = [], []
    name = re.compile(rf"{re.escape(place.engine)}-([0-9]{{1,4}})")
    try:
        found = sorted(
            int(match.group(1))
            for entry in place.telemetry.iterdir()
            if (match := name.fullmatch(entry.name)) is not None
        )
    except OSError as error:
        return [], [f"link directory {place.telemetry}: {error.strerror}"]
    for rank in found:
        try:
            one = _newest(place, rank)
        except LinkError as error:
            problems.append(str(error))
            continue
        if one is not None:
            seen.append(one)
    return seen, problems


def _newest(place: LinkPlace, rank: int) -> RankSeen | None:
    pages = open_pages(place.telemetry_directory(rank), "telemetry", place.uids, locked=False)
    try:
        living = [page for page in pages if page.is_locked()]
        if not pages:
            return None
        page = (living or pages)[0]
        reader = TelemetryReader(page.read_at)
        newest = reader.poll(limit=1)
        in_force = {
            field.removeprefix(KNOB_PREFIX): value
            for field, value in (dict(newest[-1]) if newest else {}).items()
            if field.startswith(KNOB_PREFIX)
        }
        return RankSeen(rank, reader.nonce, bool(living), reader.identity, reader.manifest, in_force)
    finally:
        for page in pages:
            page.close()


def valves_seen(place: LinkPlace) -> int:
    """How many valves live."""
    try:
        pages = open_pages(place.telemetry_directory(None), "valve", place.uids, locked=True)
    except LinkError:
        return 0
    for page in pages:
        page.close()
    return len(pages)


def missing_signals(manifest: Manifest) -> dict[str, str | None]:
    """Every engine signal of the catalogue: None where this engine provides it, else why it does not."""
    blank = StepRecord(0, (0.0,) * len(manifest.fields), {f.name: i for i, f in enumerate(manifest.fields)})
    found: dict[str, str | None] = {}
    for name, signal in SIGNALS.items():
        if signal.provider != "engine":
            continue
        why = manifest.unsupported_signals.get(name) or manifest.unsupported_signals.get(
            FIELD_OF.get(name, "")
        )
        if why is None and name not in HISTOGRAM_OF:
            value = read_field(manifest, blank, name)
            absent = isinstance(value, Missing) and value.reason == "not_provided"
            why = "its records have no field for it" if absent else None
        found[name] = why
    found[TENANTS] = manifest.unsupported_signals.get(TENANTS)
    return found


def differences(known: KnownEngine, manifest: Manifest) -> list[str]:
    """Where an engine's manifest is not as the table says, a line each.

    What needs configuration may be absent, and what valves do is no business of a manifest.
    """
    lines = []
    knobs = {knob.name for knob in manifest.knobs}
    for name, capability in known.knobs.items():
        if KNOBS[name].where == "valve":
            continue
        if capability.supported and not capability.needs and name not in knobs:
            lines.append(
                f"knob {name}: in the table, not in the manifest: {manifest.unsupported_knobs.get(name)}"
            )
        if not capability.supported and name in knobs:
            lines.append(f"knob {name}: in the manifest, not in the table")
    for name, why in missing_signals(manifest).items():
        capability = known.signals[name]
        if capability.supported and not capability.needs and why is not None:
            lines.append(f"signal {name}: in the table, not in the manifest: {why}")
        if not capability.supported and why is None:
            lines.append(f"signal {name}: in the manifest, not in the table")
    return lines
