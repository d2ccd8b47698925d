"""A memory plan, shown: tables for people, one object for programs. Nothing is computed here."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kvengine.kv.plan.alternatives import Alternative
    from kvengine.kv.plan.devices import Device
    from kvengine.kv.plan.serving import Serving


def as_object(serving: "Serving", device: "Device | None", others: "Iterable[Alternative]") -> dict[str, Any]:
    """The plan as JSON values; null is "not given" or "does not apply"."""
    question, model = serving.question, serving.question.model
    return {
        "model": model.name if model else None,
        "device": device.name if device else None,
        "tp": question.tp,
        "kv_dtype": _kv_dtype(serving),
        "weight_dtype": _weight_dtype(serving),
        "block_size": question.block_size,
        "chunk_tokens": question.chunk_tokens if _estimated(serving) else None,
        "max_running": question.max_running if _estimated(serving) else None,
        "window": serving.window,
        "memory_bytes": question.memory_bytes,
        "reserve_bytes": question.reserve_bytes,
        "after_weights_bytes": serving.after_weights_bytes,
        "kv_fraction": question.kv_fraction,
        "kv_bytes_per_token": serving.kv_bytes_per_token,
        "fine_scale_bytes_per_token": fine_bytes_per_token(serving),
        **_figures(serving),
        "sequence_tokens": serving.sequence_tokens,
        "sequence_blocks": serving.sequence_blocks,
        "notes": notes(serving, device),
        "alternatives": [
            {
                "change": other.change,
                "refused": other.refused,
                **(_figures(other.serving) if other.serving else {}),
            }
            for other in others
        ],
    }


def _figures(serving: "Serving") -> dict[str, Any]:
    """What a change may change."""
    return {
        "weights_bytes": serving.weights_bytes,
        "kv_bytes": serving.plan.kv_bytes,
        "kv_tokens": serving.plan.kv_tokens,
        "kv_blocks": serving.plan.blocks,
        "block_bytes": serving.plan.block_bytes,
        "activation_bytes": serving.activation_bytes,
        "unused_bytes": serving.unused_bytes,
        "max_sequences": serving.max_sequences,
        "tail_waste": serving.tail_waste,
    }


def fine_bytes_per_token(serving: "Serving") -> int | None:
    """Of scales beside codes, on one device: those of the reference engine, which the plan leaves out."""
    model, precision = serving.question.model, serving.question.kv_precision
    if model is None or precision is None:
        return None
    return model.fine_bytes_per_token(precision, serving.question.tp)


def notes(serving: "Serving", device: "Device | None") -> list[str]:
    """What a reader must know to read the figures right."""
    from kvengine.kv.plan.units import written

    question, model = serving.question, serving.question.model
    after = "weights and what is kept free" if question.reserve_bytes else "weights"
    said = []
    if question.tp > 1:
        said.append(f"bytes are of each of {question.tp} devices; tokens and sequences of all together")
    if device is not None:
        said.append(f"device: {device.title}, as its driver reports it")
    if question.kv_fraction is not None:
        share = f"{question.kv_fraction * 100:g} %"
        said.append(f"KV is {share} of the {written(serving.after_weights_bytes)} that remain after {after}")
    if _estimated(serving):
        said.append(
            f"steps: estimated for a chunk of {question.chunk_tokens:,} tokens and "
            f"{question.max_running:,} sequences; measure yours"
        )
    elif question.activation_bytes is None:
        said.append("steps: nothing says what they need; they have what KV leaves")
    if serving.window is not None:
        said.append(f"window: a sequence holds KV of its last {serving.window:,} tokens at most")
    if model is not None and 0 < model.windowed_layers < model.layers:
        said.append(
            f"{model.windowed_layers} of {model.layers} layers have a window; all are counted as without one"
        )
    if fine := fine_bytes_per_token(serving):
        codes = serving.kv_bytes_per_token
        said.append(f"fp8 as vLLM keeps it: {codes:,} bytes a token; with kvengine's scales {codes + fine:,}")
    if model is not None and question.tp > model.kv_heads:
        said.append(f"{question.tp} devices share {model.kv_heads} KV heads: each holds a copy of one")
    if model is not None and model.dtype is None:
        said.append("config.json names no dtype; steps, and KV unless --kv-dtype says, are counted in bf16")
    if not serving.max_sequences:
        said.append(f"not one sequence of {serving.sequence_tokens:,} tokens fits")
    return said


def render(serving: "Serving", device: "Device | None", others: "Sequence[Alternative]") -> RenderableType:
    """Where the memory goes, what it holds, what would change it."""
    parts: list[RenderableType] = [_heading(serving, device), "", _division(serving), "", _held(serving)]
    parts += [Text(f"- {note}", style="dim") for note in notes(serving, device)]
    if others:
        parts += ["", _others(serving, others)]
        parts += [Text(f"{o.change}: {o.refused}", style="dim") for o in others if o.refused]
    return Group(*parts)


def _heading(serving: "Serving", device: "Device | None") -> Text:
    from kvengine.kv.plan.units import written

    question = serving.question
    line = Text(question.model.name if question.model else "A model", style="bold")
    where = device.title if device else f"a device of {written(question.memory_bytes)}"
    line.append(f" on {question.tp} x {where}" if question.tp > 1 else f" on {where}", style="")
    if (kv := _kv_dtype(serving)) is not None:
        line.append(f", KV in {kv}", style="")
    if (weights := _weight_dtype(serving)) is not None:
        line.append(f", weights in {weights}", style="")
    return line


def _division(serving: "Serving") -> Table:
    from kvengine.kv.plan.units import written

    memory = serving.question.memory_bytes
    table = _table("memory", "size", "share", right=(1, 2))
    for name, size_bytes in (
        ("weights", serving.weights_bytes),
        ("kept free", serving.question.reserve_bytes),
        ("KV", serving.plan.kv_bytes),
        ("steps", serving.activation_bytes),
        ("unused", serving.unused_bytes),
        ("device", memory),
    ):
        table.add_row(name, written(size_bytes), f"{size_bytes / memory:.1%}")
    return table


def _held(serving: "Serving") -> Text:
    from kvengine.kv.plan.units import written

    division = serving.plan
    return Text(
        f"{division.kv_tokens:,} tokens = {division.blocks:,} blocks of {division.block_size} tokens, "
        f"{written(division.block_bytes)} a block, {written(serving.kv_bytes_per_token)} a token\n"
        f"{serving.max_sequences:,} sequences of {serving.sequence_tokens:,} tokens, "
        f"{serving.sequence_blocks:,} blocks each"
    )


def _others(serving: "Serving", others: "Iterable[Alternative]") -> Table:
    from kvengine.kv.plan.units import written

    table = _table("instead", "tokens", "change", "a block", "steps", "sequences", "waste", right=range(1, 7))
    for other in others:
        if other.serving is None:
            table.add_row(other.change, "does not fit")
            continue
        change = other.serving.plan.kv_tokens / serving.plan.kv_tokens - 1
        table.add_row(
            other.change,
            f"{other.serving.plan.kv_tokens:,}",
            "same" if abs(change) < 0.0005 else f"{change:+.1%}",
            written(other.serving.plan.block_bytes),
            written(other.serving.activation_bytes),
            f"{other.serving.max_sequences:,}",
            f"{other.serving.tail_waste:.2%}",
        )
    return table


def known_object() -> dict[str, Any]:
    """The tables of devices and models as JSON values."""
    from kvengine.kv.plan.devices import DEVICES
    from kvengine.kv.plan.published import PUBLISHED

    return {
        "devices": [
            {
                "name": one.name,
                "title": one.title,
                "memory_bytes": one.memory_bytes,
                "bandwidth_bytes_per_s": one.bandwidth_bytes_per_s,
                "flops": dict(one.flops),
                "source": one.source,
            }
            for one in DEVICES.values()
        ],
        "models": {name: dict(raw) for name, raw in PUBLISHED.items()},
    }


def render_known() -> RenderableType:
    """The tables of devices and models."""
    from kvengine.kv.plan.devices import DEVICES
    from kvengine.kv.plan.precision import KV_PRECISIONS
    from kvengine.kv.plan.published import PUBLISHED
    from kvengine.kv.plan.shape import shape_of
    from kvengine.kv.plan.units import written

    devices = _table("device", "memory", "bandwidth", "bf16", "fp8", "source", right=range(1, 5))
    for one in DEVICES.values():
        devices.add_row(
            one.name,
            written(one.memory_bytes),
            f"{written(one.bandwidth_bytes_per_s)}/s",
            *(f"{one.flops[dtype] / 1e12:,.0f}T" if dtype in one.flops else "" for dtype in ("bf16", "fp8")),
            Text(one.source, style="dim"),
        )
    models = _table("model", "parameters", "KV a token, 16 bits", "positions", "window", right=range(1, 5))
    for name, raw in PUBLISHED.items():
        shape = shape_of(raw, name, name)
        models.add_row(
            name,
            f"{shape.parameters / 1e9:.2f}B",
            written(shape.kv_bytes_per_token(KV_PRECISIONS["bf16"], 1)),
            f"{shape.max_positions:,}",
            "" if shape.window is None else f"{shape.window:,}",
        )
    return Group(devices, "", models)


def _table(*columns: str, right: Iterable[int]) -> Table:
    aligned = set(right)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in aligned else "left")
    return table


def _estimated(serving: "Serving") -> bool:
    return serving.question.model is not None and serving.question.activation_bytes is None


def _kv_dtype(serving: "Serving") -> str | None:
    question = serving.question
    if question.kv_bytes_per_token is not None or question.kv_precision is None:
        return None
    return question.kv_precision.name


def _weight_dtype(serving: "Serving") -> str | None:
    question = serving.question
    if question.weights_bytes is not None or question.model is None:
        return None
    return question.weight_dtype or (None if question.model.packed else question.model.dtype)
