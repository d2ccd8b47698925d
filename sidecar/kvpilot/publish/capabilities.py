"""The capability table, of the engines that are known or of the ranks that run: terminal and JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvpilot.adapters.capabilities import RankSeen, missing_signals
from kvpilot.adapters.known_engines import Capability, KnownEngine
from kvpilot.knobs import KNOBS
from kvpilot.link.manifest import Manifest, ManifestKnob


def known_json(engines: Iterable[KnownEngine]) -> list[dict[str, Any]]:
    """The table of what is known, as plain data."""
    return [asdict(engine) for engine in engines]


def render_known(engines: Sequence[KnownEngine]) -> RenderableType:
    """The table of what is known."""
    parts: list[RenderableType] = []
    for engine in engines:
        parts.append(_about(engine))
        parts.append(_capabilities("knob", engine.knobs))
        parts.append(_signals(engine))
        parts += [Text(f"  {note}", style="dim") for note in engine.notes]
        parts.append("")
    parts.append(Text("What an engine beside you has: -c kvpilot.yaml, or --telemetry DIR --engine NAME."))
    return Group(*parts)


def _about(engine: KnownEngine) -> Text:
    line = Text(engine.kind, style="bold")
    line.append(f"  run: {engine.run}", style="")
    if engine.read:
        line.append(f"; only read: {engine.read}", style="dim")
    return line


def _capabilities(kind: str, rows: Mapping[str, Capability]) -> Table:
    table = Table(kind, "has it", "since", "shown by", "how", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, row in rows.items():
        table.add_row(name, _yes(row.supported), row.since, _shown(row), Text(_how(row)))
    return table


def _signals(engine: KnownEngine) -> Table:
    """One line for all signals that come the same way; they are many."""
    table = Table("signals", "has them", "how", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    groups: dict[tuple[bool, str, str], list[str]] = {}
    for name, row in engine.signals.items():
        since = f", since {row.since}" if row.since else ""
        groups.setdefault((row.supported, _how(row) + since, _shown(row)), []).append(name)
    for (supported, how, _), names in groups.items():
        table.add_row(Text(", ".join(names)), _yes(supported), Text(how))
    return table


def _yes(supported: bool) -> Text:
    return Text("yes", style="green") if supported else Text("no", style="red")


def _shown(row: Capability) -> str:
    return row.shown if row.supported else ""


def _how(row: Capability) -> str:
    return f"{row.how} (needs {row.needs})" if row.needs else row.how


def ranks_json(name: str, ranks: Iterable[RankSeen], valves: int) -> dict[str, Any]:
    """What runs, as plain data."""
    return {"engine": name, "valves": valves, "ranks": [_rank_json(rank) for rank in ranks]}


def _rank_json(rank: RankSeen) -> dict[str, Any]:
    manifest = rank.manifest
    return {
        "rank": rank.rank,
        "start": f"{rank.nonce:016x}",
        "alive": rank.alive,
        "host": rank.identity.host,
        "start_wall_ns": rank.identity.start_wall_ns,
        "engine": manifest.engine,
        "version": manifest.engine_version,
        "model": manifest.model,
        "device": manifest.device,
        "world": manifest.world,
        "blocks": manifest.blocks,
        "block_size": manifest.block_size,
        "max_model_len": manifest.max_model_len,
        "classes": list(manifest.classes),
        "latency_measured_at": manifest.latency_measured_at,
        "knobs": {
            knob.name: {**asdict(knob), "in_force": rank.in_force.get(knob.name)} for knob in manifest.knobs
        },
        "unsupported_knobs": manifest.unsupported_knobs,
        "signals": [name for name, why in missing_signals(manifest).items() if why is None],
        "unsupported_signals": {
            name: why for name, why in missing_signals(manifest).items() if why is not None
        },
        "fields": [field._asdict() for field in manifest.fields],
    }


def render_ranks(name: str, ranks: Sequence[RankSeen], valves: int) -> RenderableType:
    """What runs. Ranks that are alike share their tables."""
    parts: list[RenderableType] = []
    groups: list[list[RankSeen]] = []
    for rank in ranks:
        alike = next((group for group in groups if _alike(group[0], rank)), None)
        if alike is None:
            groups.append([rank])
        else:
            alike.append(rank)
    for group in groups:
        manifest = group[0].manifest
        parts += [_headline(name, group, manifest), _knobs(group, manifest), _provided(manifest), ""]
    return Group(*parts[:-1], _valves(valves))


def _valves(count: int) -> Text:
    if not count:
        return Text("valves: none lives, so nothing can be shed", style="yellow")
    moved = [name for name, knob in KNOBS.items() if knob.where == "valve"]
    return Text(f"valves: {count}, which take {', '.join(moved)}")


def _alike(one: RankSeen, other: RankSeen) -> bool:
    def what(rank: RankSeen) -> tuple[object, ...]:
        manifest = rank.manifest
        return manifest.engine, manifest.engine_version, manifest.model, manifest.knobs, manifest.fields

    return what(one) == what(other)


def _headline(name: str, group: Sequence[RankSeen], manifest: Manifest) -> Text:
    line = Text(name, style="bold")
    for rank in group:
        state = Text("lives", style="green") if rank.alive else Text("gone", style="red")
        line.append(f"  rank {rank.rank} (start {rank.nonce:016x}) ", style="").append(state)
    world = ", ".join(f"{kind}={size}" for kind, size in manifest.world.items() if size > 1)
    line.append(
        f"\n{manifest.engine} {manifest.engine_version}, {manifest.model}, {manifest.device}"
        f"{', ' + world if world else ''}; {manifest.blocks} KV blocks of {manifest.block_size} tokens; "
        f"classes, lowest first: {', '.join(manifest.classes) or 'none'}",
        style="dim",
    )
    return line


def _knobs(group: Sequence[RankSeen], manifest: Manifest) -> Table:
    table = Table(
        "knob",
        "least",
        "baseline",
        "most",
        "in force",
        "unit",
        "how",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for knob in manifest.knobs:
        table.add_row(knob.name, *_limits(knob), _in_force(group, knob.name), knob.unit, Text(knob.applied))
    for name, why in manifest.unsupported_knobs.items():
        table.add_row(Text(name, style="red"), "", "", "", "", "", Text(f"no: {why}", style="red"))
    return table


def _limits(knob: ManifestKnob) -> tuple[str, str, str]:
    return f"{knob.minimum:g}", f"{knob.baseline:g}", f"{knob.maximum:g}"


def _in_force(group: Sequence[RankSeen], knob: str) -> str:
    values = [rank.in_force.get(knob) for rank in group if rank.alive]
    return ", ".join(dict.fromkeys("" if value is None else f"{value:g}" for value in values))


def _provided(manifest: Manifest) -> RenderableType:
    missing = missing_signals(manifest)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("signals", Text(", ".join(name for name, why in missing.items() if why is None)))
    for name, why in missing.items():
        if why is not None:
            grid.add_row("", Text(f"not {name}: {why}", style="red"))
    grid.add_row("", Text(f"TTFT and ITL are measured at the {manifest.latency_measured_at}", style="dim"))
    return grid
