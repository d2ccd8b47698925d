"""A case for a terminal: the verdict first, then why, then the last minute, then the very last steps."""

from collections.abc import Callable, Iterator
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvpilot.clock import NS
from kvpilot.incident.case import Case, ValveWord
from kvpilot.incident.kept import KeptPage
from kvpilot.incident.notes import condensed, notes
from kvpilot.incident.recording import Recording
from kvpilot.incident.timeline import Move, Row, kv_used, timeline
from kvpilot.incident.verdict import clock_time, date_time, first_frame
from kvpilot.link.ending import Ending
from kvpilot.link.records import StepRecord

LAST_STEPS = 5
OUTLIVED_NS = NS // 20
"""A valve that spoke this much later may have told its requests already that their engine is gone."""

_BAD = ("exception", "vanished", "unknown")


def render(case: Case, seconds: float) -> RenderableType:
    """All of it, readable at 100 columns."""
    parts: list[RenderableType] = [*_head(case), "", _evidence(case)]
    rows = timeline(case.recording, seconds)
    if rows:
        parts += ["", *_timeline(case, rows, seconds)]
    if case.recording.steps:
        parts += ["", _last_steps(case.recording)]
    parts += [Text(note, style="yellow") for note in case.notes]
    return Group(*parts)


def _head(case: Case) -> Iterator[Text]:
    recording, verdict = case.recording, case.verdict
    manifest, identity = recording.manifest, recording.identity
    style = "bold red" if verdict.how in _BAD else "bold yellow" if verdict.how != "closed" else "bold"
    engine = "LIVE: the engine" if recording.alive else "the engine"
    yield Text(f"{engine} {verdict.headline}", style=style)
    if verdict.why:
        yield Text(verdict.why, style="bold")
    if recording.ending is not None and recording.ending.what:
        yield from _words(recording.ending)
    rank = f", rank {manifest.rank}" if manifest.rank or manifest.world.get("dp", 1) > 1 else ""
    where = f"{identity.host} ({identity.container})" if identity.container else identity.host
    yield Text(
        f"{manifest.engine} {manifest.engine_version}, {manifest.model}, {manifest.device}{rank};"
        f" start {recording.nonce:016x} on {where}",
        style="dim",
    )
    yield Text(_life(recording), style="dim")
    if case.gone_wall_ns is not None:
        yield Text(f"the pilot saw it gone at {clock_time(case.gone_wall_ns)}")
    if case.next_start_wall_ns is not None:
        yield Text(f"the next start of this rank began at {date_time(case.next_start_wall_ns)}")
    for valve in case.valves:
        yield Text(_valve(valve, recording))


def _life(recording: Recording) -> str:
    identity, last_ns = recording.identity, recording.last_sign_ns
    began = f"began {date_time(identity.start_wall_ns)}"
    if last_ns is None:
        return f"{began} UTC"
    lived = _duration((last_ns - identity.start_monotonic_ns) / NS)
    return f"{began}, lived {lived} until {date_time(recording.wall_ns(last_ns))} UTC, by its own two clocks"


def _words(ending: Ending) -> Iterator[Text]:
    """The exception, and what caused it, with their frames; innermost first, as they were written."""
    for line in ending.what.splitlines():
        file, _, rest = line.partition(":")
        function, _, number = rest.rpartition(":")
        if function and number.isdigit():
            yield Text(f"    {file} line {number}, in {function}", style="dim")
        else:
            yield Text(f"  {line}")


def _valve(word: ValveWord, recording: Recording) -> str:
    """Only a valve that spoke about when the engine went says what was in flight then."""
    valve, shed = f"valve {word.nonce:016x}", f"{word.shed} shed since its start"
    written, last_ns = word.written_wall_ns, recording.last_sign_ns
    if recording.alive and word.alive:
        return f"{valve}: {word.in_flight} requests in flight, {shed}"
    if written is None or last_ns is None or written - recording.wall_ns(last_ns) > OUTLIVED_NS:
        return f"{valve} outlived the engine: what was in flight then it does not say; {shed}"
    return f"{valve}: {word.in_flight} requests in flight at {clock_time(written)}, {shed}"


def _evidence(case: Case) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    for finding in case.evidence.found:
        if not case.verdict.why.endswith(finding.text):
            grid.add_row(" -", Text(finding.text, style="bold" if finding.strong else ""))
    if case.evidence.in_vain:
        words = ", ".join(case.evidence.in_vain)
        grid.add_row(" -", Text(f"not seen in the last minute: {words}", style="dim"))
    if not case.recording.steps:
        grid.add_row(" -", "it recorded no step")
    return grid


_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("steps", 6, lambda row: f"{row.steps}"),
    ("ms p50", 7, lambda row: _number(row.step_p50_ms, 1)),
    ("max", 7, lambda row: _number(row.step_max_ms, 1)),
    ("run", 5, lambda row: _number(row.running)),
    ("wait", 5, lambda row: _number(row.waiting)),
    ("prefill", 8, lambda row: _number(row.prefill_tokens)),
    ("decode", 7, lambda row: _number(row.decode_tokens)),
    ("KV", 5, lambda row: "" if row.kv_used is None else f"{row.kv_used:.0%}"),
    ("preempt", 8, lambda row: _number(row.preemptions)),
    ("host", 7, lambda row: _size(row.host_available_bytes)),
    ("device", 7, lambda row: _size(row.device_free_bytes)),
)
"""Tokens and preemptions are counts within the row; levels are at its end; host and device: bytes free."""


def _timeline(case: Case, rows: list[Row], seconds: float) -> Iterator[RenderableType]:
    recording = case.recording
    last = "so far" if recording.alive else "before the end"
    columns = [column for column in _COLUMNS if any(column[2](row) for row in rows)]
    yield Text(f"The last {seconds:g} s {last}; host and device: free memory", style="italic")
    yield Text("  until" + "".join(f"{name:>{width}}" for name, width, _ in columns), style="bold")
    end_wall_ns = recording.wall_ns(recording.last_sign_ns or 0)
    lines = [note for note in notes(case) if note.at_wall_ns >= end_wall_ns - seconds * NS]
    for row in _merged(rows):
        until = f"-{row.to_s:g} s" if row.to_s else "now" if recording.alive else "end"
        line = f"{until:>7}" + "".join(f"{show(row):>{width}}" for _, width, show in columns)
        stuck = not row.steps and (row.running or row.waiting)
        yield Text(line, style="yellow" if stuck else "" if row.steps else "dim")
        for move in row.moves:
            yield _indented(_move(move), "cyan")
        until_wall_ns = end_wall_ns - row.to_s * NS if row.to_s else float("inf")
        inside = [note for note in lines if note.at_wall_ns < until_wall_ns]
        lines = lines[len(inside) :]
        for note in condensed(inside):
            yield _indented(f"{clock_time(note.at_wall_ns)} {note}", "yellow")


def _move(move: Move) -> str:
    text = f"{move.knob} {move.before:g} -> {move.after:g}"
    if (move.lowest, move.highest) != (min(move.before, move.after), max(move.before, move.after)):
        text += f" within {move.lowest:g} to {move.highest:g}"
    return f"{text} in {move.changes} moves" if move.changes > 1 else text


def _indented(text: str, style: str) -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 8), expand=False)


def _merged(rows: list[Row]) -> Iterator[Row]:
    """Without rows in which nothing moved, where the next one is like them."""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        quiet = not row.steps and not row.moves and following is not None and not following.steps
        if not quiet:
            yield row


def _last_steps(recording: Recording) -> Table:
    table = Table(
        title=f"The last {LAST_STEPS} records",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for name in ("ended", "step", "ms", "run", "wait", "prefill", "decode", "KV used"):
        table.add_column(name, justify="right")
    shown: list[StepRecord | None] = [None, *recording.steps][-LAST_STEPS - 1 :]
    for before, record in pairwise(shown):
        assert record is not None
        at_ns, used = record.get("time_ns"), kv_used(recording, record)
        duration_ns = record.get("duration_ns")
        table.add_row(
            "" if at_ns is None else clock_time(recording.wall_ns(at_ns)),
            _number(record.get("steps_total")),
            "between" if duration_ns == 0 else _number(None if duration_ns is None else duration_ns / 1e6, 2),
            _number(record.get("running")),
            _number(record.get("waiting")),
            *(
                _number(None if before is None or name not in record else record[name] - before[name])
                for name in ("prefill_tokens_total", "decode_tokens_total")
            ),
            "" if used is None else f"{used:.1%}",
        )
    return table


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _size(count: float | None) -> str:
    if count is None:
        return ""
    for unit, size in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:.0f}B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def render_list(pages: list[KeptPage]) -> RenderableType:
    """The pages that one rank keeps."""
    table = Table(
        "start", "began (UTC)", "last sign", "steps", "engine", "how it ended", box=None, pad_edge=False
    )
    for page in pages:
        if page.problem is not None:
            table.add_row(f"{page.nonce:016x}", "", "", "", "", Text(page.problem, style="red"))
            continue
        table.add_row(
            f"{page.nonce:016x}",
            date_time(page.start_wall_ns),
            "" if page.last_wall_ns is None else clock_time(page.last_wall_ns),
            "" if page.steps is None else f"{page.steps}",
            Text(page.engine),
            _how(page),
        )
    return table


def _how(page: KeptPage) -> Text:
    if page.alive:
        return Text("lives", style="green")
    if page.ending is None:
        return Text("vanished without a word", style="bold red")
    error, place = first_frame(page.ending)
    match page.ending.kind:
        case "closed":
            return Text("closed in order")
        case "exception":
            return Text(f"{error}{place}", style="bold red")
        case "hook_failed":
            return Text(f"kvpilot's hook failed: {error}", style="yellow")
    return Text("in a way that this kvpilot does not know", style="yellow")
