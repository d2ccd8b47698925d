"""Decode speed of the engine's executor against `transformers` generate and a contiguous static cache.

Every leg decodes greedily from the same prompts of the same length with the same seeded random weights, in
the shape of the shipped target, one thread. Ours is the whole `EagerExecutor.execute`, sampling included,
with the batch built and the tokens committed around it; its block tables are shuffled, as in an engine that
has run for long. The contiguous leg runs the same layers over a preallocated [batch, heads, length, dim]
cache that is written in place. Legs take turns every few steps (generate cannot be interrupted: every run).
A leg's time in one repeat is the median of its steps' CPU time, which neighbours on the machine disturb
least; wall time is beside it.
"""

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import frame
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import kvengine
from kvengine.executor.torch import EagerExecutor
from kvengine.memory import DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.batch import Batch, Slice

TARGET = Path(kvengine.__file__).parent / "weights" / "target"
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 256
NEW_TOKENS = 48
BLOCK_SIZE = 16
TURN_STEPS = 6
SEED = 7

Times = dict[tuple[str, int], list[dict[str, float]]]
"""(leg, batch) -> milliseconds a step of each repeat, on each clock."""


class Steps:
    """Wall and CPU seconds of each step."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self._began = (0.0, 0.0)

    def begin(self) -> None:
        self._began = (time.perf_counter(), time.thread_time())

    def end(self) -> None:
        self.wall_s.append(time.perf_counter() - self._began[0])
        self.cpu_s.append(time.thread_time() - self._began[1])

    def medians_ms(self) -> dict[str, float]:
        return {"cpu": statistics.median(self.cpu_s) * 1e3, "wall": statistics.median(self.wall_s) * 1e3}


class StepStreamer(BaseStreamer):
    """How generate tells of each step as it is done: once for the prompt, once for its first token, then
    steps.
    """

    def __init__(self) -> None:
        self.steps = Steps()
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        if self._calls >= 2:
            self.steps.end()
        self._calls += 1
        self.steps.begin()

    def end(self) -> None:
        pass


class HuggingFaceLeg:
    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]]) -> tuple[Steps, list[list[int]]]:
        streamer = StepStreamer()
        out = self._model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
        return streamer.steps, out[:, len(prompts[0]) :].tolist()


class PagedLeg:
    """The engine's own executor; `decode` yields each step's tokens, the prompt's first."""

    def __init__(self, model: Llama) -> None:
        self._blocks_each = -(-(PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE)
        self._blocks = self._blocks_each * max(BATCHES)
        self._executor = EagerExecutor(model, None, DeviceMemory(1 << 31), self._blocks, BLOCK_SIZE)

    def decode(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        free = random.Random(SEED).sample(range(self._blocks), self._blocks)
        requests = []
        for number, prompt in enumerate(prompts):
            request = Request(number, prompt, SamplingParams(NEW_TOKENS, temperature=0.0))
            request.blocks = free[number * self._blocks_each : (number + 1) * self._blocks_each]
            requests.append(request)
            self._commit([Slice(request, 0, len(prompt), samples=True)])
        yield [request.tokens[-1] for request in requests]
        while True:
            self._commit([Slice(r, r.computed, 1, samples=True, decode=True) for r in requests])
            yield [request.tokens[-1] for request in requests]

    def _commit(self, slices: list[Slice]) -> None:
        for piece, result in zip(slices, self._executor.execute(Batch(slices)), strict=True):
            piece.request.computed += piece.count
            piece.request.tokens += result.tokens


class ContiguousLeg:
    """The same layers over a static cache: what pages cost is the difference."""

    def __init__(self, model: Llama) -> None:
        config = model.config
        shape = (max(BATCHES), config.kv_heads, PROMPT_TOKENS + NEW_TOKENS, config.head_dim)
        self._model = model
        self._cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.layers)]

    def decode(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        newest, position = self._step(prompts, 0), len(prompts[0])
        while True:
            yield newest
            newest = self._step([[token] for token in newest], position)
            position += 1

    @torch.inference_mode()
    def _step(self, new: list[list[int]], start: int) -> list[int]:
        batch, count, config = len(new), len(new[0]), self._model.config
        work = self._model.workspace(batch * count, batch)
        positions = list(range(start, start + count)) * batch
        flat = [token for tokens in new for token in tokens]
        indices, places = torch.tensor([flat, positions]).unbind()
        heads = (batch, count, -1, config.head_dim)
        query = work.query.view(heads).transpose(1, 2)
        halves = work.new_kv.chunk(2, 1)
        key, value = (half.unflatten(1, (-1, config.head_dim)).view(heads).transpose(1, 2) for half in halves)
        mixed = work.mixed.view(heads).transpose(1, 2)

        def attend(layer: int) -> None:
            keys, values = (cache[:batch, :, : start + count] for cache in self._cache[layer])
            keys[:, :, start:].copy_(key)
            values[:, :, start:].copy_(value)
            mixed.copy_(scaled_dot_product_attention(query, keys, values, is_causal=count > 1))

        last = list(range(count - 1, batch * count, count))
        return self._model.run(work, indices, places, last, attend).argmax(-1).tolist()


def alternate(runs: dict[str, Iterator[list[int]]]) -> tuple[dict[str, Steps], dict[str, list[list[int]]]]:
    """Step several runs in turns; the first tokens, which come with the prompts, are not timed."""
    steps = {name: Steps() for name in runs}
    tokens = {name: [next(run)] for name, run in runs.items()}
    for first in range(0, NEW_TOKENS - 1, TURN_STEPS):
        for name, run in runs.items():
            for _ in range(min(TURN_STEPS, NEW_TOKENS - 1 - first)):
                steps[name].begin()
                newest = next(run)
                steps[name].end()
                tokens[name].append(newest)
    return steps, {
        name: [list(column) for column in zip(*rows, strict=True)] for name, rows in tokens.items()
    }


def build() -> tuple[LlamaForCausalLM, Llama]:
    """Both models on the same seeded random weights, in the shipped shape."""
    torch.manual_seed(SEED)
    config = ModelConfig.load(TARGET)
    reference = LlamaForCausalLM(LlamaConfig.from_pretrained(TARGET, dtype=torch.float32)).float().eval()
    reference.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" not in name:
                parameter.mul_(3.0)  # at its usual scale a random model repeats one token for ever
    return reference, Llama(config, weights.pack(dict(reference.state_dict()), config))


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[frame.Bar]]:
    torch.set_num_threads(1)
    repeats = 5 if arguments.quick else 15
    reference, model = build()
    hugging_face, paged, contiguous = HuggingFaceLeg(reference), PagedLeg(model), ContiguousLeg(model)
    rng = random.Random(SEED)
    prompts = [[rng.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(max(BATCHES))]
    times: Times = {}
    different = 0
    for repeat in range(repeats + 1):
        for batch in BATCHES:
            some = prompts[:batch]
            ours = {"paged": paged.decode(some), "contiguous": contiguous.decode(some)}
            steps, texts = alternate(dict(sorted(ours.items(), reverse=bool(repeat % 2))))
            steps["hf"], texts["hf"] = hugging_face.decode(some)
            different += any(text != texts["hf"] for text in texts.values())
            if repeat:  # the first one warms up
                for name, timed in steps.items():
                    times.setdefault((name, batch), []).append(timed.medians_ms())
    return settings(model, repeats), results(times, different), bars(times)


def settings(model: Llama, repeats: int) -> dict[str, Any]:
    config = model.config
    return {
        "layers": config.layers,
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "vocab": config.vocab_size,
        "weights": "seeded random",
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "block_size": BLOCK_SIZE,
        "block_tables": "shuffled",
        "threads": 1,
        "repeats": repeats,
    }


def results(times: Times, different: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for (name, batch), medians in sorted(times.items()):
        cpu = [one["cpu"] for one in medians]
        rows[f"step_ms_{name}_b{batch}"] = {
            "cpu": statistics.median(cpu),
            "cpu_min": min(cpu),
            "cpu_max": max(cpu),
            "wall": statistics.median(one["wall"] for one in medians),
        }
    rows["runs_with_different_tokens"] = different
    return rows


def bars(times: Times) -> list[frame.Bar]:
    def ratios(over: str, under: str, batch: int) -> list[float]:
        return [a["cpu"] / b["cpu"] for a, b in zip(times[over, batch], times[under, batch], strict=True)]

    return [
        frame.median_bar("vs_hf_b1", ratios("hf", "paged", 1), at_least=1.15),
        frame.median_bar("vs_hf_b8", ratios("hf", "paged", 8), at_least=0.95),
        frame.median_bar("vs_hf_b32", ratios("hf", "paged", 32), at_least=1.0),
        frame.median_bar("time_vs_contiguous_b32", ratios("paged", "contiguous", 32), at_most=1.45),
    ]


if __name__ == "__main__":
    frame.run("engine_decode", 1, measure, __doc__ or "")
