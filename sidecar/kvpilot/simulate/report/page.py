"""The report: one HTML page that asks nobody for anything. Names of traces, tenants and policies are
escaped where they are written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from kvpilot.score import Slo
from kvpilot.simulate.comparison import goodput
from kvpilot.simulate.report.figures import (
    FLOOR_NAMES,
    KINDS,
    LEAST_FLOOR,
    WIDE,
    heads,
    knobs,
    latencies,
    timeline,
)
from kvpilot.simulate.report.markup import card, cell, chosen, row, table, time, titled
from kvpilot.simulate.report.style import PAGE
from kvpilot.simulate.scoreboard import Scoreboard, recovery_s, spread

LEAST_RATIO, MOST_REVERSALS = 0.97, 2.0
"""What the project asks of the pilot against the best static setting, and of its steadiness."""
TENANTS = 12
RULES = 12
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SCORED = (
    ("by count", "goodput_per_offered", "share"),
    ("smooth", "goodput_smooth", "share"),
    ("longest fifth", "goodput_longest_fifth", "share"),
    ("TTFT p95", "ttft_p95_s", "time"),
    ("ITL p95", "itl_p95_s", "time"),
    ("output tokens/s", "tokens_per_s", "count"),
    ("KV occupancy, most", "kv_occupancy_max", "share"),
    ("offered", "offered", "count"),
    ("finished", "finished", "count"),
    ("shed", "shed", "count"),
    ("abandoned", "abandoned", "count"),
    ("failed", "failed", "count"),
    ("out of memory", "oom", "count"),
    ("preempted", "preemptions", "count"),
    ("tokens computed again", "recomputed_tokens", "count"),
)
_FORESIGHT = (
    ("times that KV memory ran out", "events", "count"),
    ("of them foretold", "warned", "count"),
    ("foretold how long before, median", "lead_s", "time"),
    ("false alarms an hour", "false_alarms_per_h", "count"),
    ("outcomes within p10-p90 (0.80 is right)", "coverage", "share"),
    ("late first tokens: precision", "late_precision", "share"),
    ("late first tokens: recall", "late_recall", "share"),
)


@dataclass(frozen=True, slots=True)
class About:
    """What was asked, for whoever reads or repeats it."""

    device: str
    model: str
    seeds: int
    arrivals: int
    oversized: int
    promises: Mapping[str, Slo]
    command: str
    version: str


def page(board: Scoreboard, about: About) -> str:
    """The whole file."""
    parts = [
        _head(board, about),
        _tiles(board),
        _scenario(board),
        _goodput(board),
        _latency(board, about),
        _over(board),
        _knobs(board),
        f'<div class="pair">{_forecasts(board)}{_steadiness(board)}</div>',
        _tenants(board),
        _settings(board),
        _again(about),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(board.name)} · kvpilot scoreboard</title><style>{PAGE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(board: Scoreboard, about: About) -> str:
    said = (
        f"{about.model} on {about.device} · {about.arrivals:,} requests in {board.window_s:,.0f} s · "
        f"{about.seeds} seed{'s' if about.seeds > 1 else ''} · {len(board.judged.points)} static settings"
    )
    happened = f'<p class="note">{escape(_sentence(board.scenario.happened))}</p>' if board.scenario else ""
    left = [f"{about.oversized} requests are longer than the model or the pool; the engine refused them."] * (
        about.oversized > 0
    )
    notes = "".join(f'<p class="note">{escape(each)}</p>' for each in left)
    return (
        f'<header><h1>{escape(board.name)}</h1><p class="sub">{escape(said)}</p>{happened}'
        f'<p class="verdict">{escape(_verdict(board))}</p>{notes}</header>'
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _verdict(board: Scoreboard) -> str:
    """One sentence that a tired person takes away."""
    ratio, defaults = board.ratios["vs_best_static"], board.ratios["vs_defaults"]
    if ratio >= 1.01:
        against = f"{(ratio - 1) * 100:.0f}\u00a0% more good work than the best of {len(board.judged.points)}"
    elif ratio > 0.99:
        against = f"as much good work as the best of {len(board.judged.points)}"
    else:
        against = f"{(1 - ratio) * 100:.0f}\u00a0% less good work than the best of {len(board.judged.points)}"
    low = [FLOOR_NAMES[name] for name, value in board.floors.items() if value < LEAST_FLOOR]
    bought = f" Below {LEAST_FLOOR:g} of that setting's: {', '.join(low)}." if low else ""
    return (
        f"With nobody tuning it, the pilot served {against} static settings, chosen with hindsight, and "
        f"{defaults:.2f} times what the engine's defaults served.{bought}"
    )


def _tiles(board: Scoreboard) -> str:
    pilot = board.judged.pilot
    worst = min(board.floors.items(), key=lambda each: each[1], default=None)
    back = max(row.reversals_per_min for row in pilot)
    oom = sum(row.score["oom"] for row in pilot)
    recovery = recovery_s(pilot)
    seen = pilot[0].seen
    burst = seen is not None and seen.recovery_s is not None
    last = (
        (
            "never" if recovery is None else f"{recovery:.0f} s",
            "to recover from the burst",
            recovery is not None,
        )
        if burst
        else (f"{oom}", "steps out of memory", oom == 0)
    )
    static, defaults = board.ratios["vs_best_static"], board.ratios["vs_defaults"]
    tiles = [
        (f"{goodput(pilot):.3f}", "goodput by work: good requests' share of all work offered", "pilot"),
        _judged(f"{static:.2f}×", "the best static setting's", static >= LEAST_RATIO),
        _judged(f"{defaults:.2f}×", "the engine defaults'", defaults >= LEAST_RATIO),
        _judged("-", "no floor to compare", True)
        if worst is None
        else _judged(f"{worst[1]:.2f}", f"lowest floor: {FLOOR_NAMES[worst[0]]}", worst[1] >= LEAST_FLOOR),
        _judged(f"{back:.1f}", "reversals a minute, 2 at most", back <= MOST_REVERSALS),
        _judged(*last),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile {kind}"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
            for value, text, kind in tiles
        )
        + "</div>"
    )


def _judged(value: str, text: str, good: bool) -> tuple[str, str, str]:
    return value, text, "good" if good else "bad"


def _scenario(board: Scoreboard) -> str:
    if board.scenario is None:
        return ""
    named = {True: "holds", False: "missed", None: "unknown"}
    body = [
        f'<tr><td class="text">{escape(held.asked)}</td>'
        f"<td>{'-' if held.value is None else 'never' if held.value == float('inf') else f'{held.value:.3g}'}"
        f'</td><td><span class="{named[held.holds]}">{escape(held.said)}</span></td></tr>'
        for held in board.bounds
    ]
    note = f"The incident: {board.scenario.source}. What must hold of the pilot, so that it does not recur."
    return card(
        "What must hold",
        note,
        table(['<th class="text">bound</th>', "<th>measured</th>", "<th></th>"], body),
    )


def _goodput(board: Scoreboard) -> str:
    goodputs, floors = heads(board)
    left = (
        f"<div>{titled(goodputs)}"
        '<p class="note">A line through a dot is the spread over seeds. Grey: every static setting.</p></div>'
    )
    right = (
        f"<div>{titled(floors)}"
        '<p class="note">What a better total could be bought with. Below 0.90 somebody pays for it.</p></div>'
    )
    return card("Goodput", "", f'<div class="pair">{left}{right}</div>{_scores(board)}')


def _scores(board: Scoreboard) -> str:
    columns = board.columns
    head = [
        '<th class="text"></th>',
        *(f'<th><i class="{KINDS[t]}"></i>{escape(t)}</th>' for t, _ in columns),
    ]
    body = [row("goodput by work (Gw)", (f"{goodput(rows):.3f}" for _, rows in columns), "strong")]
    body.append(row("spread over seeds", (f"{spread(rows):.3f}" for _, rows in columns)))
    for name in columns[0][1][0].score["classes"]:
        values = (rows[0].score["classes"][name]["goodput_work"] for _, rows in columns)
        body.append(row(f"Gw of {name}", (cell(value, "share") for value in values)))
    for title, key, kind in _SCORED:
        body.append(row(title, (cell(rows[0].score[key], kind) for _, rows in columns)))
    ratios = board.ratios
    shown = {"best static": "vs_best_static", "defaults": "vs_defaults", "single best": "vs_single_best"}
    cells = (f"{ratios[shown[t]]:.3f}" if shown.get(t) in ratios else "" for t, _ in columns)
    body.append(row("pilot's Gw over it", cells))
    regret = f"Regret, the best static setting's Gw less the pilot's: {board.regret:+.3f}."
    return table(head, body) + f'<p class="note">{escape(regret)} Figures but Gw are of the first seed.</p>'


def _latency(board: Scoreboard, about: About) -> str:
    promised = "; ".join(
        f"{name}: first token in {time(slo.ttft_s)}"
        + (
            f" and {slo.ttft_s_per_prompt_token * 1000:.2g} ms a prompt token"
            if slo.ttft_s_per_prompt_token
            else ""
        )
        + f", then {time(slo.itl_s)} a token"
        for name, slo in sorted(about.promises.items(), reverse=True)
    )
    note = (
        "Share of all arrivals that were served within so many times their promise; who was turned away, "
        f"gave up or failed never is, so a curve ends below 100 %. {promised}."
    )
    panels = "".join(map(titled, latencies(board)))
    return card("Latency against the promise", note, f'<div class="knobs">{panels}</div>')


def _over(board: Scoreboard) -> str:
    charts = "".join(titled(each, WIDE) for each in timeline(board))
    return (
        '<section class="card over"><h2>Over time</h2><p class="note">The first seed, by time of arrival or '
        f"of the look; bursts and faults are shaded.</p>{charts}</section>"
    )


def _knobs(board: Scoreboard) -> str:
    shown = knobs(board)
    if not shown:
        return card("Knobs", "The pilot moved none.", "")
    panels = "".join(map(titled, shown))
    note = "What the pilot held over time; the engine's own value, where it fits the scale, is dashed."
    return card("Knobs", note, f'<div class="knobs">{panels}</div>')


def _forecasts(board: Scoreboard) -> str:
    seens = (board.hands_off.seen, board.judged.pilot[0].seen)
    told = [seen.foresight if seen is not None else None for seen in seens]
    if all(each is None for each in told):
        return card("Forecasts", "There were none to score.", "")
    body = [
        row(title, (cell(getattr(each, key) if each is not None else None, kind) for each in told))
        for title, key, kind in _FORESIGHT
    ]
    head = ['<th class="text"></th>', "<th>hands off</th>", "<th>flying</th>"]
    note = (
        "A pilot that acts on a forecast keeps it from coming true: so they are scored on a flight in which "
        "it keeps its hands off, and beside it on the real one."
    )
    return card("Forecasts", note, table(head, body))


def _steadiness(board: Scoreboard) -> str:
    pilot = board.judged.pilot
    seen = pilot[0].seen
    body = [
        row("changes of a knob a minute", [f"{max(row.actions_per_min for row in pilot):.1f}"]),
        row("reversals a minute", [f"{max(row.reversals_per_min for row in pilot):.2f}"]),
    ]
    if seen is not None and seen.recovery_s is not None:
        back = recovery_s(pilot)
        body.append(row("recovery from the burst", ["never" if back is None else f"{back:.0f} s"]))
    rules = list(seen.rules.items())[:RULES] if seen is not None else []
    body += [row(name, [f"{count:,}"]) for name, count in rules]
    note = (
        "A reversal is a change of a fifth of a knob's range, back within 10 s of the one before. Below: "
        "decisions that each rule put in force."
    )
    return card("Steadiness", note, table([], body))


def _tenants(board: Scoreboard) -> str:
    """Those that fare worst with the pilot first."""
    columns = board.columns[:3]
    tenants: dict[str, float | None] = columns[0][1][0].score["tenants"]
    if len(tenants) < 2:
        return ""
    worst = sorted(tenants, key=lambda name: (tenants[name] is None, tenants[name] or 0.0))[:TENANTS]
    body = [
        row(name, (cell(rows[0].score["tenants"].get(name), "share") for _, rows in columns))
        for name in worst
    ]
    head = ['<th class="text">tenant</th>']
    head += [f'<th><i class="{KINDS[t]}"></i>{escape(t)}</th>' for t, _ in columns]
    more = f" The worst {TENANTS} of {len(tenants)}." if len(tenants) > TENANTS else ""
    return card("Tenants", f"Goodput by work of each.{more}", table(head, body))


def _settings(board: Scoreboard) -> str:
    columns = [(title, dict(board.legs[rows[0].leg].settings)) for title, rows in board.columns]
    names = list(dict.fromkeys(name for _, setting in columns for name in setting))
    body = [row(name, (chosen(setting.get(name)) for _, setting in columns)) for name in names]
    head = [
        '<th class="text"></th>',
        *(f'<th><i class="{KINDS[t]}"></i>{escape(t)}</th>' for t, _ in columns),
    ]
    flown = sorted(board.judged.points.items(), key=lambda each: -goodput(each[1]))
    grid = table(
        ['<th class="text">chunk, drafts, running, watermark, queue caps</th>', "<th>Gw</th>"],
        [row(name, [f"{goodput(rows):.3f}"]) for name, rows in flown],
    )
    note = "Where each leg starts, and, of all but the pilot, stays. Queue caps: interactive/batch."
    return card(
        "Settings",
        note,
        table(head, body) + f"<details><summary>All {len(flown)} static settings</summary>{grid}</details>",
    )


def _again(about: About) -> str:
    words = (
        ("Gw", "Work of good requests over the work of all that arrived; work is prompt tokens and output "
         "tokens, weighed by what they cost this machine. Good: finished, first token and mean time per "
         "token within the promise, at most 5 % of the gaps above it and none above 20 times it."),
        ("best static", "The grid's setting with the most goodput here, known only afterwards; the same "
         "scheduler and priorities, and nobody at the knobs."),
        ("defaults", "What the engine comes with: first come, first served, no bound on the queue."),
        ("single best", "The one setting that is known as the best over many workloads."),
        ("smooth", "Goodput in which a late request counts for less, not for nothing."),
    )  # fmt: skip
    listed = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in words)
    return card(
        "Fly it again",
        f"kvpilot {about.version}. The same seeds give the same figures.",
        f"<pre>{escape(about.command)}</pre><details><summary>What the words mean</summary>"
        f"<dl>{listed}</dl></details>",
    )
