"""`kvpilot plan`: how much KV a device holds, from sizes or from a model and a device. No engine, no GPU.

The arithmetic is the engine's (`kvengine.kv.plan`), imported when the command runs. Sizes are of one device.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from kvengine.kv.plan.devices import Device
    from kvengine.kv.plan.shape import ModelShape

Size = str | None


def _size(flag: str, what: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(flag, metavar="SIZE", help=what, show_default=False)
    return option


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="A directory with config.json, or a name from --list.", show_default=False),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="a10g, l4, l40s, a100, h100, h200, b200.", show_default=False)
    ] = None,
    tp: Annotated[int, typer.Option(help="Devices that share the model, by heads.")] = 1,
    kv_dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, fp8, int8, int4; the model's own if left out.")
    ] = None,
    weight_dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16, fp16, fp8, int8; the checkpoint's if left out.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a block, a power of two.")] = 16,
    chunk: Annotated[int, typer.Option(help="Prompt tokens that one step computes.")] = 2048,
    max_running: Annotated[int, typer.Option(help="Sequences that one step samples for.")] = 256,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; 4,096 if left out.", show_default=False)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Sliding window, if the model's differs.", show_default=False)
    ] = None,
    device_memory: Annotated[Size, _size("--device-memory", "Of one device, in place of --device.")] = None,
    weights: Annotated[Size, _size("--weights", "Of one device, in place of the model's.")] = None,
    kv_memory: Annotated[Size, _size("--kv-memory", "KV, in place of what is left.")] = None,
    kv_fraction: Annotated[
        float | None, typer.Option(help="KV as a share of what remains after weights.", show_default=False)
    ] = None,
    kv_bytes_per_token: Annotated[Size, _size("--kv-bytes-per-token", "In place of the model's.")] = None,
    activation_memory: Annotated[
        Size, _size("--activation-memory", "For steps, in place of the estimate.")
    ] = None,
    reserve: Annotated[
        Size, _size("--reserve", "Kept free: 3GiB of a --device, 5GiB with --tp, else nothing.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="The devices and models that are known.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """How many tokens of KV a device holds beside the weights, and what would change that."""
    from kvengine.errors import EngineError
    from kvengine.kv.plan.alternatives import alternatives
    from kvengine.kv.plan.precision import kv_precision
    from kvengine.kv.plan.precision import weight_dtype as weight_dtype_named
    from kvengine.kv.plan.serving import Question, answer
    from kvengine.kv.plan.units import parse_bytes
    from kvpilot.plan_report import as_object, known_object, render, render_known

    if list_:
        _print(known_object(), render_known(), as_json)
        return

    def size(option: str, text: Size) -> int | None:
        try:
            return None if text is None else parse_bytes(text)
        except EngineError as error:
            _fail(f"{option} {error}")

    try:
        shape = None if model is None else _model(model)
        if shape is None and (kv_dtype or weight_dtype):
            kv_precision(kv_dtype or "bf16")
            _fail("--kv-dtype and --weight-dtype need a model; or give --kv-bytes-per-token and --weights")
        hardware, memory = _memory(device, size("--device-memory", device_memory))
        question = Question(
            memory_bytes=memory,
            reserve_bytes=_reserve(size("--reserve", reserve), hardware, tp),
            block_size=block_size,
            chunk_tokens=chunk,
            max_running=max_running,
            sequence_tokens=length,
            kv_bytes=size("--kv-memory", kv_memory),
            kv_fraction=kv_fraction,
            weights_bytes=size("--weights", weights),
            kv_bytes_per_token=size("--kv-bytes-per-token", kv_bytes_per_token),
            activation_bytes=size("--activation-memory", activation_memory),
            window=window,
            model=shape,
            tp=tp,
            kv_precision=kv_precision(kv_dtype or shape.compute_dtype) if shape else None,
            weight_dtype=weight_dtype_named(weight_dtype) if weight_dtype else None,
        )
        serving = answer(question)
        others = alternatives(serving)
    except EngineError as error:
        _fail(error)
    _print(as_object(serving, hardware, others), render(serving, hardware, others), as_json)


def _model(name: str) -> "ModelShape":
    """A directory that is there wins over a name."""
    from kvengine.kv.plan.published import published_named
    from kvengine.kv.plan.shape import shape_in, shape_of

    path = Path(name)
    if path.exists():
        return shape_in(path)
    known, raw = published_named(name)
    return shape_of(raw, known, known)


def _memory(device: str | None, memory_bytes: int | None) -> "tuple[Device | None, int]":
    """The device from the table, if one was named, and the bytes of memory that the plan divides."""
    from kvengine.kv.plan.devices import device_named

    hardware = None if device is None else device_named(device)
    if hardware is None and memory_bytes is None:
        _fail("which device? Give --device, such as h200, or --device-memory; --list shows the known")
    if hardware is not None and memory_bytes is not None:
        _fail("--device and --device-memory: give one of them")
    return hardware, hardware.memory_bytes if hardware is not None else memory_bytes or 0


def _reserve(given_bytes: int | None, hardware: "Device | None", tp: int) -> int:
    """A table's device is the whole of it; `--device-memory` is what the operator says is there to use."""
    from kvengine.kv.plan.serving import RESERVE_BYTES, RESERVE_TP_BYTES

    if given_bytes is not None:
        return given_bytes
    if hardware is None:
        return 0
    return RESERVE_TP_BYTES if tp > 1 else RESERVE_BYTES


def _print(plain: object, shown: object, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plain))
        return
    from rich.console import Console

    Console().print(shown)


def _fail(message: object) -> NoReturn:
    sys.exit(f"kvpilot: {message}")
