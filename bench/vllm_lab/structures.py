"""Our block tables and prefix tree, and vLLM's KVCacheManager, on one workload in one process, in turns.

Runs in vLLM's environment with our engine on PYTHONPATH; prints one JSON object. Times are CPU seconds of
this thread. Each leg does for a request what its engine does: make the request object, look its prompt up,
take blocks for the rest, remember what was computed, make room for one token 64 times, give all back.
"""

import gc
import json
import random
import sys
import time
from collections import deque
from typing import Any

import torch
from vllm.sampling_params import SamplingParams as VllmSamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request as VllmRequest

from kvengine.kv.pool import BlockPool
from kvengine.kv.table import BlockTables
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request, SamplingParams

GROUPS, SHARED, UNIQUE, GENERATED = 64, 512, 64, 64
BLOCK, BLOCKS, LIVE = 16, 16_384, 16
EVICTED = 2_048
SIZES = (4_096, 65_536)

Prompt = tuple[int, list[int]]
"""Group, which is its tenant too, and tokens."""


def workload(count: int, seed: int) -> list[Prompt]:
    rng = random.Random(seed)
    shared = [[rng.randrange(50_000) for _ in range(SHARED)] for _ in range(GROUPS)]
    groups = [rng.randrange(GROUPS) for _ in range(count)]
    return [(group, shared[group] + [rng.randrange(50_000) for _ in range(UNIQUE)]) for group in groups]


class Ours:
    def __init__(self) -> None:
        self.append_s = 0.0
        self._pool = BlockPool(BLOCKS)
        self._tree = PrefixTree(self._pool, BLOCK, "bench")
        self._tables = BlockTables(self._pool, BLOCK, self._tree)

    def begin(self, number: int, group: int, prompt: list[int]) -> Request:
        tables = self._tables
        request = Request(number, prompt, SamplingParams(GENERATED), tenant=str(group))
        tables.adopt(request)
        assert tables.cover(request, len(prompt))
        request.computed = len(prompt)
        tables.register(request)
        began = time.thread_time()
        for token in range(GENERATED):
            request.tokens.append(token)
            tables.cover(request, request.computed + 1)
            request.computed += 1
            tables.register(request)
        self.append_s += time.thread_time() - began
        return request

    def end(self, request: Request) -> None:
        self._tables.clear(request)

    def hit_rate(self) -> float:
        return self._tables.hit_tokens_total / self._tables.queried_tokens_total

    def check(self) -> None:
        self._pool.check()
        self._tree.check()
        assert self._tree.mismatches == 0


class Vllm:
    def __init__(self) -> None:
        self.append_s = 0.0
        self._hit = self._queried = 0
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
        self._manager = KVCacheManager(config, 8_192, BLOCK, BLOCK)

    def begin(self, number: int, group: int, prompt: list[int]) -> VllmRequest:
        manager = self._manager
        request = VllmRequest(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling_params=VllmSamplingParams(max_tokens=GENERATED),
            pooling_params=None,
            cache_salt=str(group),
            block_hasher=self._hasher,
        )
        blocks, computed, *_ = manager.get_computed_blocks(request)
        self._hit, self._queried = self._hit + computed, self._queried + len(prompt)
        assert manager.allocate_slots(request, len(prompt) - computed, computed, blocks) is not None
        request.num_computed_tokens = len(prompt)
        began = time.thread_time()
        for token in range(GENERATED):
            request.append_output_token_ids(token)
            manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1
        self.append_s += time.thread_time() - began
        return request

    def end(self, request: VllmRequest) -> None:
        self._manager.free(request)

    def hit_rate(self) -> float:
        return self._hit / self._queried


def serve(leg: Any, prompts: list[Prompt]) -> float:
    """Requests a CPU second."""
    live: deque[Any] = deque()
    gc.collect()
    began = time.thread_time()
    for number, (group, prompt) in enumerate(prompts):
        if len(live) == LIVE:
            leg.end(live.popleft())
        live.append(leg.begin(number, group, prompt))
    while live:
        leg.end(live.popleft())
    return len(prompts) / (time.thread_time() - began)


class Full:
    """A pool all of whose blocks are cached, as chains of 32."""

    def __init__(self, size: int) -> None:
        self._pool = BlockPool(size)
        self._tree = PrefixTree(self._pool, BLOCK, "bench")
        tables = BlockTables(self._pool, BLOCK, self._tree)
        rng = random.Random(size)
        for number in range(size // 32):
            prompt = [rng.randrange(50_000) for _ in range(32 * BLOCK)]
            request = Request(number, prompt, SamplingParams(1))
            tables.adopt(request)
            tables.cover(request, len(prompt))
            request.computed = len(prompt)
            tables.register(request)
            tables.clear(request)
        assert self._pool.cached == size

    def evict(self, count: int) -> float:
        """CPU microseconds a block, taken by allocations of 32; they stay taken."""
        gc.collect()
        began = time.thread_time()
        for _ in range(count // 32):
            self._pool.allocate(32)
        return (time.thread_time() - began) / count * 1e6


def main() -> None:
    count, repeats = int(sys.argv[1]), int(sys.argv[2])
    rows: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    for repeat in range(repeats + 1):
        prompts = workload(count, repeat)
        legs = {"ours": Ours(), "vllm": Vllm()}
        for name in sorted(legs, reverse=bool(repeat % 2)):
            rate = serve(legs[name], prompts)
            if repeat:  # the first one warms up
                note(f"{name}_requests_per_s", rate)
                note(f"{name}_append_us", legs[name].append_s / count / GENERATED * 1e6)
                note(f"{name}_hit_rate", legs[name].hit_rate())
        legs["ours"].check()
        pools = {size: Full(size) for size in SIZES}
        parts: dict[int, list[float]] = {size: [] for size in SIZES}
        for _ in range(4):
            for size, pool in pools.items():
                parts[size].append(pool.evict(EVICTED // 4))
        if repeat:
            for size in SIZES:
                note(f"evict_us_{size}", sum(parts[size]) / 4)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
