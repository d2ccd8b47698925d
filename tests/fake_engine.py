"""A whole engine in this process without a model: real HTTP, core and loop, an executor that can be held.

The core's loop runs in one thread, the HTTP server in another, as they run in two processes in life.
"""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import httpx
import uvicorn
from fake_executor import VOCABULARY, FakeExecutor

from kvengine.channel import Channel
from kvengine.config import SHIPPED_TARGET, EngineConfig
from kvengine.core import Core
from kvengine.frontend import EngineClient
from kvengine.kv.plan import Plan
from kvengine.kv.pool import BlockPool
from kvengine.loop import EngineLoop
from kvengine.manifest import build_manifest
from kvengine.model.tokenizer import Tokenizer
from kvengine.sched.admission import Limits
from kvengine.sched.batch import Batch
from kvengine.sched.scheduler import Scheduler
from kvengine.server import ServedModel, Server
from kvengine.telemetry import Telemetry, provided_fields
from kvpilot.clock import SystemClock
from kvpilot.inside.hook import StepHook
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.inside.valve import Valve

PATIENCE_S = 20.0
MODEL = "fake"


def eventually(predicate: Callable[[], bool], meanwhile: Callable[[], object] | None = None) -> None:
    """Wait for other threads to bring something about; fail if they never do."""
    tick = threading.Event()
    for _ in range(round(PATIENCE_S / 0.005)):
        if predicate():
            return
        if meanwhile is not None:
            meanwhile()
        tick.wait(0.005)
    raise AssertionError("it never came about")


class FakeEngine:
    """One running engine. `hold()` stops it before its next step, `let(n)` lets n through, `free()` all."""

    def __init__(self, blocks: int, eos: frozenset[int], environ: Mapping[str, str]) -> None:
        self.error: Exception | None = None
        self._held = False
        self._permits = threading.Semaphore(0)
        config = EngineConfig(name=MODEL, block_size=4, step_token_budget=64, prefill_chunk_tokens=64)
        executor = FakeExecutor(4, before=self._before)
        lengths = LengthPredictor(512)
        self.clock = SystemClock()
        self.scheduler = Scheduler(BlockPool(blocks), 4, levels=2)
        limits = Limits(512, blocks * 4)
        self.core = Core(self.scheduler, executor, limits, eos, lengths, self.clock)
        manifest = build_manifest(
            config,
            Plan(64 << 20, 1 << 20, 4, 4096, blocks, 1 << 20),
            fields=provided_fields(self.core, executor, lengths),
            max_model_len=512,
            activation_bytes_per_token=4096,
            device="cpu",
        )
        telemetry = Telemetry(self.core, executor, lengths, StepHook(manifest))
        ours, theirs = socket.socketpair()
        self.core_channel = Channel(theirs)
        self.client = EngineClient(Channel(ours))
        self._loop = EngineLoop(self.core, telemetry, self.core_channel, self.clock)
        self._core_thread = threading.Thread(target=self._loop.run, daemon=True)
        served = ServedModel(MODEL, VOCABULARY, limits, levels=2, max_choices=64)
        app = Server(self.client, Tokenizer.load(SHIPPED_TARGET), served, self.clock).app()
        self._listener = socket.create_server(("127.0.0.1", 0))
        settings = uvicorn.Config(Valve(app, environ), log_level="error", lifespan="off")
        self._uvicorn = uvicorn.Server(settings)
        self._web_thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def _serve(self) -> None:
        self.client.attach()
        await self._uvicorn.serve(sockets=[self._listener])

    def _before(self, _batch: Batch) -> None:
        if self._held:
            assert self._permits.acquire(timeout=PATIENCE_S), "held for good"
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def start(self) -> None:
        self._core_thread.start()
        self._web_thread.start()
        eventually(lambda: self._uvicorn.started)

    def stop(self) -> None:
        self.free()
        self._uvicorn.should_exit = True
        self._web_thread.join(PATIENCE_S)
        self.client.close()
        self._core_thread.join(PATIENCE_S)
        self._listener.close()
        self.core_channel.close()

    def hold(self) -> None:
        self._held = True

    def let(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def free(self) -> None:
        self._held = False
        self._permits.release(1000)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False)

    def open_requests(self) -> int:
        """Requests whose clients still wait, as the server knows."""
        return len(self.client._open)

    def all_blocks_free(self) -> bool:
        return not self.core.requests and self.scheduler.pool.free == self.scheduler.pool.total


@contextmanager
def fake_engine(
    blocks: int = 256, eos: frozenset[int] = frozenset(), environ: Mapping[str, str] | None = None
) -> Iterator[FakeEngine]:
    engine = FakeEngine(blocks, eos, environ or {})
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
