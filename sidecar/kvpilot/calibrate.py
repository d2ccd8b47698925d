"""`kvpilot calibrate`: a plant fitted to a recording of a live engine, and how far to trust it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvpilot.simulate.plants.fitted import Error, Law

_EVERY = {
    "step": "a step, whatever it computes",
    "tokens": "a token through the model",
    "prompts": "a step with prompt tokens",
    "prefill_tokens": "a prompt token",
    "decode_sequences": "a decoding sequence",
    "context_tokens": "a position of context read",
    "chunk_positions": "a (prompt token, last position) pair",
    "drafted_tokens": "a draft token",
    "depth": "a draft deeper",
    "depth_context": "a position of context, for each draft",
}


def calibrate(
    recording: Annotated[Path, typer.Argument(help="A telemetry page: live, left behind, or a copy.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the plant here, for `kvpilot simulate --plant`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """Fit a simulated engine to a recording of a live one; print its residuals and fidelity."""
    from kvpilot.simulate.plants.calibration import calibrated, recorded
    from kvpilot.simulate.plants.fitted import PlantError

    try:
        law = calibrated(recorded(recording))
        if out is not None:
            law.write(out)
    except PlantError as error:
        sys.exit(f"kvpilot: {error}")
    except OSError as error:
        sys.exit(f"kvpilot: {out}: {error.strerror}: the plant is not written")
    if as_json:
        typer.echo(json.dumps(asdict(law)))
        return
    from rich.console import Console

    Console().print(_rendered(law))


def _rendered(law: "Law") -> "RenderableType":
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    costs = Table(title=f"{law.engine}, {law.model} on {law.device}", title_justify="left", box=None)
    costs.add_column("what")
    costs.add_column("costs, us", justify="right")
    for name, seconds in law.terms.items():
        if seconds:
            costs.add_row(_EVERY.get(name, name.replace("_", " ")), f"{1e6 * seconds:.4g}")
    costs.add_row("between two steps", f"{1e6 * law.gap_s:.4g}")

    errors = Table(title="|predicted / actual - 1|", title_justify="left", box=None)
    for head in ("steps", "count", "median", "p90"):
        errors.add_column(head, justify="left" if head == "steps" else "right")
    fidelity = law.fidelity
    _add(errors, "fitted to", fidelity.fitted)
    _add(errors, "not seen by the fit", fidelity.held_out)
    _add(errors, "  without prompt tokens", fidelity.held_out_decoding)
    _add(errors, "  with prompt tokens", fidelity.held_out_prefilling)

    noise = Table(title="noise that is replayed: actual / predicted", title_justify="left", box=None)
    for head in ("steps", "p1", "p10", "p50", "p90", "p99"):
        noise.add_column(head, justify="left" if head == "steps" else "right")
    for kind, ratios in (("without prompt tokens", law.decoding), ("with prompt tokens", law.prefilling)):
        marks = [ratios[round(q * (len(ratios) - 1))] for q in (0.01, 0.1, 0.5, 0.9, 0.99)]
        noise.add_row(kind, *(f"{mark:.3f}" for mark in marks))
    parts: list[RenderableType] = [costs, Text(), errors, Text(), noise]
    parts.append(Text(f"correlation of one step's noise with the next one's: {law.correlation:.2f}"))
    if law.unseen:
        unseen = ", ".join(_EVERY[name] for name in law.unseen)
        parts.append(Text(f"not in this recording, so unknown here: {unseen}"))
    return Group(*parts)


def _add(table: "Table", name: str, error: "Error | None") -> None:
    if error is None:
        table.add_row(name, "0", "-", "-")
    else:
        table.add_row(name, f"{error.steps:,}", f"{error.median:.1%}", f"{error.p90:.1%}")
