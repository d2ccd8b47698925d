"""Decode speed of the engine's executor against `transformers` generate and a contiguous static cache.

Every leg decodes greedily from the same prompts of the same length with the same seeded random weights, in
the shape of the shipped target, one thread. Ours is the whole `EagerExecutor.execute`, sampling included,
with the batch built and the tokens committed around it; its block tables are shuffled, as in an engine that
has run for long. The contiguous leg runs the same layers over a preallocated [batch, heads, length, dim]
cache that is written in place. Legs alternate; a leg's time in one repeat is the median over its steps.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import frame
import kvengine
import torch
from kvengine.executor.torch import EagerExecutor
from kvengine.memory import DeviceMemory
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama
from kvengine.request import Request, SamplingParams
from kvengine.sched.batch import Batch, Slice
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

TARGET = Path(kvengine.__file__).parent / "weights" / "target"
BATCHES = (1, 8, 32)
PROMPT_TOKENS = 256
NEW_TOKENS = 48
BLOCK_SIZE = 16
SEED = 7


class Steps:
    """Wall and CPU seconds of each step, from marks set when a step's tokens are known."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self._marks.append((time.perf_counter(), time.thread_time()))

    def medians_ms(self) -> tuple[float, float]:
        """Wall and CPU; the first step is left out, it warms the caches."""
        pairs = list(zip(self._marks[1:], self._marks[2:], strict=False))
        wall, cpu = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
        return statistics.median(wall) * 1e3, statistics.median(cpu) * 1e3


class MarkingStreamer(BaseStreamer):
    """How generate tells of each step as it is done; the first call holds the prompt."""

    def __init__(self) -> None:
        self.steps = Steps()
        self._started = False

    def put(self, value: torch.Tensor) -> None:
        if self._started:
            self.steps.mark()
        self._started = True

    def end(self) -> None:
        pass


class HuggingFaceLeg:
    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[Steps, list[list[int]]]:
        streamer = MarkingStreamer()
        out = self._model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        )
        return streamer.steps, out[:, len(prompts[0]) :].tolist()


class PagedLeg:
    """The engine's own executor."""

    def __init__(self, model: Llama) -> None:
        length = PROMPT_TOKENS + NEW_TOKENS
        self._blocks_each = -(-length // BLOCK_SIZE)
        self._blocks = self._blocks_each * max(BATCHES)
        self._executor = EagerExecutor(model, None, DeviceMemory(1 << 31), self._blocks, BLOCK_SIZE)

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[Steps, list[list[int]]]:
        free = random.Random(SEED).sample(range(self._blocks), self._blocks)
        requests = []
        for number, prompt in enumerate(prompts):
            request = Request(number, prompt, SamplingParams(new_tokens, temperature=0.0))
            request.blocks = free[number * self._blocks_each : (number + 1) * self._blocks_each]
            requests.append(request)
            self._commit([Slice(request, 0, len(prompt), samples=True)])
        steps = Steps()
        steps.mark()
        for _ in range(new_tokens - 1):
            self._commit([Slice(r, r.computed, 1, samples=True, decode=True) for r in requests])
            steps.mark()
        return steps, [request.tokens[len(request.prompt) :] for request in requests]

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

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[Steps, list[list[int]]]:
        newest = self._step(prompts, 0)
        steps, emitted = Steps(), [[token] for token in newest]
        steps.mark()
        for position in range(len(prompts[0]), len(prompts[0]) + new_tokens - 1):
            newest = self._step([[token] for token in newest], position)
            for tokens, token in zip(emitted, newest, strict=True):
                tokens.append(token)
            steps.mark()
        return steps, emitted

    def _step(self, new: list[list[int]], start: int) -> list[int]:
        batch, count, config = len(new), len(new[0]), self._model.config
        work = self._model.workspace(batch * count, batch)
        positions = list(range(start, start + count)) * batch
        flat = [token for tokens in new for token in tokens]
        indices, places = torch.tensor([flat, positions]).unbind()
        heads = (batch, count, -1, config.head_dim)
        query = work.query.view(heads).transpose(1, 2)
        key, value = (
            half.unflatten(1, (-1, config.head_dim)).view(heads).transpose(1, 2)
            for half in work.new_kv.chunk(2, 1)
        )
        mixed = work.mixed.view(heads).transpose(1, 2)

        def attend(layer: int) -> None:
            keys, values = (cache[:batch, :, : start + count] for cache in self._cache[layer])
            keys[:, :, start:].copy_(key)
            values[:, :, start:].copy_(value)
            mixed.copy_(scaled_dot_product_attention(query, keys, values, is_causal=count > 1))

        last = list(range(count - 1, batch * count, count))
        return self._model.run(work, indices, places, last, attend).argmax(-1).tolist()


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
    legs = {"hf": HuggingFaceLeg(reference), "paged": PagedLeg(model), "contiguous": ContiguousLeg(model)}
    names = list(legs)
    rng = random.Random(SEED)
    prompts = [[rng.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(max(BATCHES))]
    wall: dict[tuple[str, int], list[float]] = {}
    cpu: dict[tuple[str, int], list[float]] = {}
    different = 0
    for repeat in range(repeats + 1):
        for batch in BATCHES:
            texts = []
            for name in names[repeat % 3 :] + names[: repeat % 3]:
                steps, tokens = legs[name].decode(prompts[:batch], NEW_TOKENS)
                texts.append(tokens)
                if repeat:  # the first one warms up
                    wall_ms, cpu_ms = steps.medians_ms()
                    wall.setdefault((name, batch), []).append(wall_ms)
                    cpu.setdefault((name, batch), []).append(cpu_ms)
            different += any(text != texts[0] for text in texts)
    return settings(model, repeats), results(wall, cpu, different), bars(wall)


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


def results(
    wall: dict[tuple[str, int], list[float]], cpu: dict[tuple[str, int], list[float]], different: int
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for (name, batch), values in sorted(wall.items()):
        rows[f"step_ms_{name}_b{batch}"] = {
            "wall": statistics.median(values),
            "cpu": statistics.median(cpu[name, batch]),
            "min": min(values),
            "max": max(values),
        }
    rows["runs_with_different_tokens"] = different
    return rows


def bars(wall: dict[tuple[str, int], list[float]]) -> list[frame.Bar]:
    def ratios(over: str, under: str, batch: int) -> list[float]:
        return [a / b for a, b in zip(wall[over, batch], wall[under, batch], strict=True)]

    return [
        frame.median_bar("vs_hf_b1", ratios("hf", "paged", 1), at_least=1.15),
        frame.median_bar("vs_hf_b8", ratios("hf", "paged", 8), at_least=0.95),
        frame.median_bar("vs_hf_b32", ratios("hf", "paged", 32), at_least=1.0),
        frame.median_bar("time_vs_contiguous_b32", ratios("paged", "contiguous", 32), at_most=1.45),
    ]


if __name__ == "__main__":
    frame.run("engine_decode", 1, measure, __doc__ or "")
