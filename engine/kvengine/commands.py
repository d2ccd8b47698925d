"""The `kvengine` command: check the settings, start the core, serve.

Exit codes: 2 for settings that cannot work, 1 for an engine that cannot start; both with one line on stderr.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn

from kvengine import warm as warming
from kvengine.config import (
    SHIPPED_DRAFT,
    SHIPPED_NAME,
    SHIPPED_TARGET,
    EngineConfig,
    parse_bytes,
    parse_external,
)
from kvengine.errors import ConfigError, EngineError, StartError
from kvengine.frontend import EngineClient
from kvengine.kv.plan import Plan
from kvengine.model.config import ModelConfig
from kvengine.model.tokenizer import Tokenizer
from kvengine.process import LOG_FORMAT, CoreProcess
from kvengine.sched.admission import Limits
from kvengine.server import ServedModel, Server
from kvpilot.clock import SystemClock
from kvpilot.inside.callers import Callers, CallersError
from kvpilot.inside.valve import Valve

DRAIN_S = 10
"""A stopping server lets requests in flight finish for this long."""

NGRAM = "ngram"

log = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """A small LLM inference engine with finite memory."""


@app.command()
def serve(
    model: Annotated[
        Path | None, typer.Option(help="Model directory; the shipped model if not given.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model directory, ngram, or none.")] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any free one.")] = 8000,
    memory: Annotated[str, typer.Option(help="Device memory: weights, KV and steps.")] = "256MiB",
    kv_fraction: Annotated[
        float | None, typer.Option(help="Share for KV of what weights leave, instead of what is safe.")
    ] = None,
    external_memory: Annotated[
        str | None, typer.Option(help="What a neighbour takes, and when: 64MiB@10s.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens in a KV block.")] = 16,
    step_tokens: Annotated[int, typer.Option(help="Most tokens in a step.")] = 2048,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Most prompt tokens in a step; all of it if not given.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Most requests that hold KV.")] = 64,
    speculative_tokens: Annotated[int, typer.Option(help="Drafts a sequence and step; 0 is off.")] = 4,
    watermark: Annotated[float, typer.Option(help="Share of KV up to which requests are admitted.")] = 1.0,
    admission: Annotated[
        str, typer.Option(help="What the watermark bounds: predicted (peak of KV) or held (now).")
    ] = "predicted",
    kv_dtype: Annotated[str, typer.Option(help="Of the KV pool: fp32, bf16, fp8, int8 or int4.")] = "fp32",
    kv_eight_bits: Annotated[
        str, typer.Option(help="What a lease of 8 bits stores KV in: int8 or fp8.")
    ] = "int8",
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and output.")] = None,
    callers: Annotated[Path | None, typer.Option(help="Callers file: classes and keys.")] = None,
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep the KV of prompts for those that begin alike.")
    ] = True,
    pinned_share: Annotated[float, typer.Option(help="Share of KV that pinned prompts may keep.")] = 0.0,
    heavy_hitters: Annotated[
        bool, typer.Option(help="Set memory aside for requests that evict by attention: h2o, fastgen.")
    ] = False,
    evict_tenant: Annotated[
        list[str] | None,
        typer.Option(help="A tenant whose requests keep less KV under pressure; repeatable."),
    ] = None,
    warm: Annotated[
        Path | None, typer.Option(help="Prompts to cache at the start, and again on SIGHUP; JSON lines.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of the model.")] = 1,
    name: Annotated[str | None, typer.Option(help="Model name that clients use.")] = None,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    _on_stop_signals(_leave)
    try:
        if callers is not None:
            os.environ["KVPILOT_CALLERS"] = str(callers)
        config = EngineConfig(
            model=model or SHIPPED_TARGET,
            draft=None if draft == NGRAM else _draft(model, draft),
            drafter="ngram" if draft == NGRAM else "model",
            prefix_cache=prefix_cache,
            pinned_share=pinned_share,
            heavy_hitters=heavy_hitters,
            evict_tenants=tuple(evict_tenant or ()),
            name=name or (model.resolve().name if model else SHIPPED_NAME),
            memory_bytes=parse_bytes(memory),
            kv_fraction=kv_fraction,
            external=parse_external(external_memory) if external_memory else None,
            block_size=block_size,
            step_token_budget=step_tokens,
            prefill_chunk_tokens=step_tokens if prefill_chunk is None else prefill_chunk,
            max_running=max_running,
            speculative_tokens=speculative_tokens,
            admission_watermark=watermark,
            admission=admission,  # type: ignore[arg-type]
            kv_dtype=kv_dtype,
            kv_eight_bits=kv_eight_bits,  # type: ignore[arg-type]
            max_model_len=max_model_len,
            threads=threads,
            device=device,  # type: ignore[arg-type]
            classes=Callers.load(os.environ.get("KVPILOT_CALLERS")).classes,
        )
        if warm is not None:
            warming.load(warm)
        _serve(config, host, port, warm)
    except (ConfigError, CallersError) as error:
        _give_up(error, 2)
    except EngineError as error:
        _give_up(error, 1)


def _draft(model: Path | None, draft: str | None) -> Path | None:
    """The shipped draft goes with the shipped model only."""
    if draft is None:
        return SHIPPED_DRAFT if model is None else None
    return None if draft == "none" else Path(draft)


def _serve(config: EngineConfig, host: str, port: int, warm: Path | None = None) -> None:
    ModelConfig.load(config.model)
    tokenizer = Tokenizer.load(config.model)
    listener = _bind(host, port)
    core = CoreProcess.start(config)
    engine = EngineClient(core.channel)
    try:
        model = ServedModel(
            config.name,
            core.facts["vocabulary"],
            Limits(**core.facts["limits"]),
            len(config.classes),
            config.max_running,
        )
        server = Server(engine, tokenizer, model, SystemClock())
        warmer = None if warm is None else Warmer(warm, engine, tokenizer, model.limits.tokens)
        _listen(listener, host, port)
        print(_ready_line(config, core.facts, *listener.getsockname()[:2]), flush=True)
        asyncio.run(_run(server, engine, listener, warmer))
    finally:
        engine.close()
        core.stop()


class Warmer:
    """Goes through the file of warm prompts, at the start and whenever asked."""

    def __init__(self, path: Path, engine: EngineClient, tokenizer: Tokenizer, limit: int) -> None:
        self._path = path
        self._engine = engine
        self._tokenizer = tokenizer
        self._limit = limit
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Now, and at every SIGHUP that finds it idle."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._again)
        self._again()

    def _again(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._warm())

    async def _warm(self) -> None:
        try:
            prompts = warming.load(self._path)
        except ConfigError as error:
            log.error("%s", error)
            return
        done = await warming.warm(self._engine, self._tokenizer, prompts, self._limit, SystemClock())
        print(f"kvengine: {done} of {len(prompts)} warm prompts are cached", file=sys.stderr, flush=True)


async def _run(
    server: Server, engine: EngineClient, listener: socket.socket, warmer: Warmer | None = None
) -> None:
    engine.attach()
    if warmer is not None:
        warmer.start()
    valve = Valve(server.app())
    settings = uvicorn.Config(
        valve,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="on",
    )
    # The server drains on these signals and then raises them again; we are leaving by then anyway.
    _on_stop_signals(signal.SIG_IGN)
    await DrainingServer(settings, valve).serve(sockets=[listener])
    # The lifespan has reported its end and may still be tidying up behind it.
    if rest := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(rest, timeout=1)


class DrainingServer(uvicorn.Server):
    """Tells the valve at the signal: uvicorn reads on for a while, and its lifespan ends only after all."""

    def __init__(self, settings: uvicorn.Config, valve: Valve) -> None:
        super().__init__(settings)
        self._valve = valve

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._valve.drain()
        super().handle_exit(sig, frame)


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded; listen once it is."""
    try:
        family, kind, protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise StartError(
            f"cannot listen on {host}:{port}: {error}; choose another --host or --port"
        ) from error
    return listener


def _listen(listener: socket.socket, host: str, port: int) -> None:
    try:
        listener.listen(2048)
    except OSError as error:  # Somebody who had bound it too was faster.
        raise StartError(f"cannot listen on {host}:{port}: {error}; choose another --port") from error


def _ready_line(config: EngineConfig, facts: dict[str, Any], host: str, port: int) -> str:
    return f"kvengine serves {config.name} on http://{host}:{port}: {Plan(**facts['plan']).sentence}"


def _on_stop_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _leave(_number: int, _frame: object) -> None:
    """Asked to stop while starting."""
    raise SystemExit(0)


def _give_up(error: Exception, code: int) -> None:
    print(f"kvengine: {error}", file=sys.stderr)
    raise typer.Exit(code)
