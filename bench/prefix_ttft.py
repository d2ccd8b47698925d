"""Time to first token of a prompt whose first 2,000 tokens are in the prefix cache, against one that is new.

The shipped model on one thread, in the engine's own core: scheduler, prefix tree, executor. Every prompt is
2,000 tokens and a tail of 16 that nobody sent before. Cold and warm requests take turns; the time is CPU time
from acceptance to the first token, steps and all. Greedy; a third request without any cache must agree.
"""

import argparse
import random
import statistics
import time
from typing import Any

import frame
import torch

from kvengine.config import SHIPPED_TARGET
from kvengine.core import Core
from kvengine.executor.torch import EagerExecutor
from kvengine.kv.pool import BlockPool
from kvengine.kv.tree import PrefixTree
from kvengine.memory import DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.admission import Limits
from kvengine.sched.scheduler import Knobs, Scheduler
from kvpilot.clock import SystemClock
from kvpilot.inside.lengths import LengthPredictor

PREFIX_TOKENS, TAIL_TOKENS, BLOCK_SIZE, BLOCKS = 2_000, 16, 16, 2_048
KNOBS = Knobs(2_048, 2_048, 0, 8, 1.0)
SEED = 11


class Engine:
    """A core with or without a prefix cache."""

    def __init__(self, model: Llama, cached: bool) -> None:
        pool = BlockPool(BLOCKS)
        tree = PrefixTree(pool, BLOCK_SIZE, "bench") if cached else None
        executor = EagerExecutor(model, None, DeviceMemory(1 << 32), BLOCKS, BLOCK_SIZE)
        limits = Limits(model.max_tokens, BLOCKS * BLOCK_SIZE)
        self.scheduler = Scheduler(pool, BLOCK_SIZE, tree=tree)
        self._core = Core(
            self.scheduler, executor, limits, frozenset(), LengthPredictor(limits.tokens), SystemClock()
        )
        self._requests = 0

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """(CPU milliseconds to the first token, the token)."""
        self._requests += 1
        request = Request(self._requests, prompt, SamplingParams(1, temperature=0.0), tenant="bench")
        began = time.thread_time()
        assert self._core.accept(request) is None
        while self._core.requests:
            self._core.step(KNOBS)
        return (time.thread_time() - began) * 1e3, request.tokens[-1]


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    torch.set_num_threads(1)
    repeats = 5 if arguments.quick else 15
    config = ModelConfig.load(SHIPPED_TARGET)
    model = Llama(config, weights.load(SHIPPED_TARGET, config))
    engine, reference = Engine(model, cached=True), Engine(model, cached=False)
    rng = random.Random(SEED)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(256) for _ in range(count)]

    shared = tokens(PREFIX_TOKENS)
    engine.first_token(shared + tokens(TAIL_TOKENS))
    cold, warm, different = [], [], 0
    for _ in range(repeats):
        cold.append(engine.first_token(tokens(PREFIX_TOKENS + TAIL_TOKENS))[0])
        prompt = shared + tokens(TAIL_TOKENS)
        took, token = engine.first_token(prompt)
        warm.append(took)
        different += token != reference.first_token(prompt)[1]
    settings = {
        "prefix_tokens": PREFIX_TOKENS,
        "tail_tokens": TAIL_TOKENS,
        "block_size": BLOCK_SIZE,
        "model": "the shipped target",
        "threads": 1,
        "repeats": repeats,
    }
    results = {
        "ttft_ms_cold": statistics.median(cold),
        "ttft_ms_warm": statistics.median(warm),
        "hit_tokens": engine.scheduler.tables.hit_tokens_total,
        "different_first_tokens": different,
    }
    gains = [a / b for a, b in zip(cold, warm, strict=True)]
    return settings, results, [frame.median_bar("ttft_gain", gains, at_least=10.0)]


if __name__ == "__main__":
    frame.run("prefix_ttft", 1, measure, __doc__ or "")
