"""The catalogues for people: every signal and knob, what it means, and which engines have it.

One source each: `kvpilot.signals` and `kvpilot.knobs` say what a name means, `known_engines` who has it. The
commands, the reference pages and the editors' schema are all derived from these.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from kvpilot.adapters.condition import CONDITION_SIGNALS
from kvpilot.adapters.gpu_signals import GPU_SIGNALS
from kvpilot.adapters.known_engines import KNOWN, Capability
from kvpilot.knobs import KNOBS
from kvpilot.policy.quantity import format_number
from kvpilot.signals import AGGREGATIONS, SIGNALS

_MANY = 1e12
"""From here on an upper end says nothing to people."""

FORECAST_NEEDS: dict[str, tuple[str, ...]] = {
    "forecast.kv_exhaustion_seconds": ("kv_free_blocks",),
    "forecast.kv_exhaustion_p10_seconds": ("kv_free_blocks",),
    "forecast.kv_exhaustion_p90_seconds": ("kv_free_blocks",),
    "forecast.queue_wait_seconds": ("waiting_prompt_tokens",),
    "forecast.queue_wait_p90_seconds": ("waiting_prompt_tokens",),
    "forecast.ttft_miss_ratio": ("waiting_prompt_tokens",),
    "forecast.ttft_ratio": ("waiting_prompt_tokens",),
    "forecast.wait_ratio": ("waiting_prompt_tokens",),
    "forecast.service_tokens_per_second": ("prefill_tokens",),
    "forecast.step_seconds": ("steps", "prefill_tokens"),
    "forecast.step_p97_seconds": ("steps", "prefill_tokens"),
    "forecast.step_residual_ratio": ("steps", "prefill_tokens"),
    "forecast.acceptance_ratio": ("spec_acceptance_ratio",),
    "forecast.seconds_per_token": ("steps", "prefill_tokens"),
    "forecast.device_headroom_bytes": ("device_free_bytes",),
}
"""The pilot's forecasts: what an engine must show for each."""


@dataclass(frozen=True, slots=True)
class SignalRow:
    """One signal. `engines`: by kind, who has it and under which condition."""

    name: str
    kind: str
    unit: str
    plausible: tuple[float, float]
    aggregations: tuple[str, ...]
    per_class: bool
    provider: str
    meaning: str
    engines: Mapping[str, Capability]


@dataclass(frozen=True, slots=True)
class KnobRow:
    """One knob."""

    name: str
    unit: str
    plausible: tuple[float, float]
    safer: str
    """`lower` or `higher`: the direction in which memory and latency get safer."""
    scoped: bool
    where: str
    meaning: str
    engines: Mapping[str, Capability]


def signal_rows() -> list[SignalRow]:
    """In the catalogue's order."""
    return [
        SignalRow(
            name,
            signal.kind,
            signal.unit,
            signal.plausible,
            AGGREGATIONS[signal.kind],
            signal.per_class,
            signal.provider,
            signal.meaning,
            {kind: _has(engine.signals, name) for kind, engine in KNOWN.items()},
        )
        for name, signal in SIGNALS.items()
    ]


def knob_rows() -> list[KnobRow]:
    """In the catalogue's order."""
    return [
        KnobRow(
            name,
            knob.unit,
            knob.plausible,
            knob.protective,
            knob.scoped,
            knob.where,
            knob.meaning,
            {kind: engine.knobs[name] for kind, engine in KNOWN.items()},
        )
        for name, knob in KNOBS.items()
    ]


def _has(signals: Mapping[str, Capability], name: str) -> Capability:
    """A forecast is there where all that it is made of is."""
    if name in CONDITION_SIGNALS:
        return Capability(True, "the pilot's look at it")
    if name in GPU_SIGNALS:
        return Capability(True, "the pilot's look at its GPUs", needs="NVML: kvpilot[gpu] beside the driver")
    if name not in FORECAST_NEEDS:
        return signals[name]
    needed = [signals[need] for need in FORECAST_NEEDS[name]]
    lacking = next((each for each in needed if not each.supported), None)
    if lacking is not None:
        return lacking
    since = max((each.since for each in needed), default="")
    needs = ", ".join(dict.fromkeys(each.needs for each in needed if each.needs))
    return Capability(True, f"forecast from {', '.join(FORECAST_NEEDS[name])}", since=since, needs=needs)


def as_json(rows: Iterable[SignalRow] | Iterable[KnobRow]) -> list[dict[str, Any]]:
    """Plain data; an infinite end is the text `+Inf`."""
    plain = [asdict(row) for row in rows]
    for row in plain:
        row["plausible"] = ["+Inf" if end == float("inf") else end for end in row["plausible"]]
    return plain


def render_signals(rows: Sequence[SignalRow]) -> RenderableType:
    """For a terminal, however narrow."""
    entries = []
    for row in rows:
        kind = f"{row.kind}, by class" if row.per_class else row.kind
        facts = (kind, _range(row), f"from the {row.provider}", _engines(row.engines))
        entries.append(_entry(row.name, facts, row.meaning))
    fits = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in AGGREGATIONS.items())
    return Group(*entries, Text(f"\nHow samples become one value (agg): {fits}."))


def render_knobs(rows: Sequence[KnobRow]) -> RenderableType:
    """For a terminal, however narrow."""
    entries = []
    for row in rows:
        scopes = "for all, a class or a tenant" if row.scoped else "for all"
        facts = (_range(row), f"{row.safer} is safer", scopes, f"in the {row.where}", _engines(row.engines))
        entries.append(_entry(row.name, facts, row.meaning))
    return Group(*entries)


def _entry(name: str, facts: Iterable[str], meaning: str) -> RenderableType:
    """What it is called, what it means, and what can be said in a word each."""
    said = Text.assemble(meaning, "\n", ("; ".join(fact for fact in facts if fact), "dim"))
    return Group(Text(name, style="bold"), Padding(said, (0, 0, 0, 4)))


def _range(row: SignalRow | KnobRow) -> str:
    low, high = (format_number(end) for end in row.plausible)
    return f"{low} to {high} {row.unit}" if row.plausible[1] < _MANY else f"{low} or more {row.unit}"


def _engines(engines: Mapping[str, Capability]) -> str:
    return ", ".join(
        f"{kind} from {each.since}" if each.since else kind
        for kind, each in engines.items()
        if each.supported
    )


SIGNALS_PAGE = """\
# Signals

What policies can see: `kvpilot signals`, as a page. An input names one of them, how samples become one value
(`agg`), and for all but `last` over which `window`. A threshold outside the plausible range is a mistake.

- A *gauge* is a level: `last`, `mean`, `min`, `max`. A *counter* is read as a difference: `rate` is per
  second, `increase` over the window. A *ratio* is two counters' differences: `mean`. A *distribution* gives
  `p50`, `p90`, `p95`, `p99` and `mean`.
- A signal is a value, or *missing* with a reason: no samples, too few, too old, the engine restarted, a
  counter was reset, not provided. Missing is never zero.
- *By class* means that an input may say `class: NAME`.
- *Engines* says who provides it, from which version, and what has to be configured; `kvpilot engines` says
  what an engine in front of you provides.
"""

KNOBS_PAGE = """\
# Knobs

What policies can move: `kvpilot knobs`, as a page. An engine's manifest says which of them it has, and
narrows the range; `kvpilot engines` shows that, `kvpilot check --engine DIR` checks policies against it.

- *Safer* is the direction in which memory and latency get safer: where rules of equal priority disagree, the
  safer value wins.
- A knob with scopes may be held for one class and below (`scope: {classAtMost: 0}`) or for one tenant
  (`scope: {tenant: top}`); the others hold for all requests.
"""


def signals_page(rows: Sequence[SignalRow]) -> str:
    """docs/signals.md."""
    lines = [SIGNALS_PAGE]
    titles = {"engine": "From the engine", "valve": "From the valve", "pilot": "From the pilot"}
    for provider, title in titles.items():
        lines += [f"## {title}", "", "| signal | is | plausible | by class | meaning | engines |"]
        lines.append("|---|---|---|---|---|---|")
        for row in rows:
            if row.provider == provider:
                by_class = "yes" if row.per_class else ""
                lines.append(
                    f"| `{row.name}` | {row.kind} | {_range(row)} | {by_class} | {row.meaning} "
                    f"| {_who(row.engines)} |"
                )
        lines.append("")
    return "\n".join(lines)


def knobs_page(rows: Sequence[KnobRow]) -> str:
    """docs/knobs.md."""
    lines = [
        KNOBS_PAGE,
        "| knob | plausible | safer | scopes | moved in | meaning |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        scopes = "yes" if row.scoped else ""
        lines.append(
            f"| `{row.name}` | {_range(row)} | {row.safer} | {scopes} | {row.where} | {row.meaning} |"
        )
    lines.append("")
    for kind, engine in KNOWN.items():
        lines += [f"## In {kind}", "", f"Run: {engine.run}.", ""]
        lines += ["| knob | has it | how |", "|---|---|---|"]
        lines += [
            f"| `{row.name}` | {_has_it(row.engines[kind])} | {_how(row.engines[kind])} |" for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def _who(engines: Mapping[str, Capability]) -> str:
    return "; ".join(
        f"{kind} ({', '.join(said)})" if (said := _conditions(each)) else kind
        for kind, each in engines.items()
        if each.supported
    )


def _conditions(each: Capability) -> list[str]:
    return [*([f"from {each.since}"] if each.since else []), *([each.needs] if each.needs else [])]


def _has_it(each: Capability) -> str:
    return (f"from {each.since}" if each.since else "yes") if each.supported else "no"


def _how(each: Capability) -> str:
    return f"{each.how}; needs {each.needs}" if each.needs else each.how
