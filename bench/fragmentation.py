"""Waste at the ends of block tables: KV slots allocated and not filled, over those allocated, at every step.

The engine's own scheduler, pool, tables and telemetry in virtual time, 16 tokens a block; `short_chat` is 250
tokens on average, prompt and output; `agents` share prompts of 512 tokens by tenant. `accounting_error` is
the largest difference, in slots or blocks at any step, between what the engine writes to the link and what
follows from the tokens alone: whole blocks by their text, each text once, and a rest for each request.
Results also have the waste at 32 and 128 tokens a block. The figures are counts, equal on every machine.
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

from frame import Bar, run
from virtual_engine import Asked, Lengths, VirtualEngine

from kvengine.config import EngineConfig
from kvengine.core import Step
from kvengine.kv.plan import Plan
from kvengine.manifest import build_manifest
from kvengine.sched.scheduler import Knobs
from kvengine.telemetry import Telemetry, provided_fields
from kvpilot.inside.hook import StepHook, with_hook_fields
from kvpilot.link.page import Identity
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, plan_page

BLOCK_SIZES = (16, 32, 128)
MOST_TENANT_TOKENS = 8_192
POOL_TOKENS = 64_000
KNOBS = Knobs(2_048, 512, 0, 48, 1.0)
TENANTS = ("north", "south", "west")

Draw = Callable[[random.Random], Asked]


def _plain(prompt: Lengths, output: Lengths) -> Draw:
    return lambda rng: Asked(0.0, prompt.draw(rng), output.draw(rng), output.most)


def _agents(rng: random.Random) -> Asked:
    own, output = Lengths(400, 0.7, 16, 3_000).draw(rng), Lengths(120, 0.7, 4, 1_000).draw(rng)
    return Asked(0.0, 512 + own, output, 1_000, rng.choice(TENANTS), shared_prefix=512)


WORKLOADS: dict[str, Draw] = {
    "short_chat": _plain(Lengths(161, 0.7, 16, 1_000), Lengths(84, 0.7, 4, 600)),
    "conversation": _plain(Lengths(1_000, 0.8, 16, 4_000), Lengths(220, 0.8, 4, 1_000)),
    "reasoning": _plain(Lengths(200, 0.6, 16, 1_000), Lengths(1_200, 0.7, 16, 6_000)),
    "agents": _agents,
}


class Ledger:
    """Beside a running engine: what it reports at each step, and what follows from the tokens."""

    def __init__(self, engine: VirtualEngine, block_size: int) -> None:
        self._engine = engine
        self._size = block_size
        self._texts: dict[int, list[int]] = {}
        """Request -> a name for the text up to the end of each of its full blocks."""
        self.wasted_slots = self.slots = 0
        self.error = 0
        self.mean_tokens = 0.0
        core, pool = engine.core, engine.scheduler.pool
        config = EngineConfig(draft=None, block_size=block_size, max_running=KNOBS.max_running)
        manifest = with_hook_fields(
            build_manifest(
                config,
                Plan(1 << 30, 1 << 20, block_size, 512, pool.total, 1 << 20),
                fields=provided_fields(core, engine.executor, engine.lengths),
                max_model_len=MOST_TENANT_TOKENS,
                activation_bytes_per_token=1,
                device="cpu",
            )
        )
        page = bytearray(plan_page(manifest).page_bytes)
        writer = TelemetryWriter(page, manifest, nonce=1, identity=Identity("bench", "", 0, 0))
        self._telemetry = Telemetry(core, engine.executor, engine.lengths, StepHook(manifest, writer))
        self._reader = TelemetryReader(lambda offset, size: bytes(page[offset : offset + size]))
        self._blocks = pool.total

    def watch(self, step: Step) -> None:
        """After each step."""
        self._telemetry.knobs(step.ended_ns)
        self._telemetry.record(step, KNOBS)
        record = self._reader.poll(1)[-1]
        used = self._blocks - round(record["kv_blocks_free"] + record["kv_blocks_cached"])
        waste = round(record["tail_waste_tokens"])
        blocks, rest = self._arithmetic()
        self.error = max(self.error, abs(used - blocks), abs(waste - rest))
        self.slots += used * self._size
        self.wasted_slots += waste

    def _arithmetic(self) -> tuple[int, int]:
        """(blocks, slots of them that are empty) of what runs, from numbers of tokens and texts alone."""
        texts: set[int] = set()
        tails = rest = 0
        for request in self._engine.scheduler.running:
            named = self._texts.setdefault(request.id, [])
            while (len(named) + 1) * self._size <= request.computed:
                start = len(named) * self._size
                before = named[-1] if named else hash((request.tenant, "" if self._cached else request.id))
                named.append(hash((before, tuple(request.tokens[start : start + self._size]))))
            texts.update(named[: request.computed // self._size])
            if over := request.computed % self._size:
                tails += 1
                rest += self._size - over
        return len(texts) + tails, rest

    @property
    def _cached(self) -> bool:
        return self._engine.scheduler.tables.tree is not None


def flown(name: str, block_size: int, requests: int) -> Ledger:
    """One workload at one block size, to its end."""
    rng = random.Random(7)
    asked = [WORKLOADS[name](rng) for _ in range(requests)]
    blocks = POOL_TOKENS // block_size
    engine = VirtualEngine(blocks, block_size, MOST_TENANT_TOKENS, cached=name == "agents")
    ledger = Ledger(engine, block_size)
    engine.run(asked, KNOBS, watch=ledger.watch)
    ledger.mean_tokens = sum(one.prompt + one.output for one in asked) / requests
    return ledger


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[Bar]]:
    requests = 150 if arguments.quick else 400
    bars, results, error = [], {}, 0
    for name in WORKLOADS:
        ledgers = {size: flown(name, size, requests) for size in BLOCK_SIZES}
        waste = {size: ledger.wasted_slots / ledger.slots for size, ledger in ledgers.items()}
        results[f"tail_waste_{name}_by_block_size"] = {str(size): share for size, share in waste.items()}
        results[f"mean_tokens_{name}"] = ledgers[16].mean_tokens
        error = max(error, *(ledger.error for ledger in ledgers.values()))
        bars.append(Bar(f"tail_waste_{name}", waste[16], at_most=0.04))
    bars.append(Bar("accounting_error", error, at_most=0))
    settings = {"requests": requests, "pool_tokens": POOL_TOKENS, "max_running": KNOBS.max_running}
    return settings, results, bars


if __name__ == "__main__":
    run("fragmentation", 1, measure, __doc__ or "")
