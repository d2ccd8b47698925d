"""Every kernel on one backend, against the reference: a JSON object of case -> largest difference.

`torch` is what a CPU uses. `triton` needs TRITON_INTERPRET=1 on a CPU, and Triton reads that on import: so a
test runs this in a process of its own. `--device cuda` runs it on a GPU, `--full` at sizes of real models;
the interpreter takes 4 ms an inner loop, whatever a tile holds, so that the small sizes are very small.
"""

import argparse
import importlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvkernels import reference
from kvkernels.geometry import Geometry, Span
from kvkernels.precision import BF16, FINE_STEPS, FP8, FP32, INT4, INT8, PRECISIONS, Precision
from kvkernels.scratch import Scratch

SMALL = [  # heads, kv_heads, head_dim, block_size, [(count, context)]
    (2, 2, 8, 16, [(1, 1), (1, 16), (1, 33)]),
    (4, 2, 8, 16, [(1, 48)]),
    (3, 1, 12, 32, [(1, 5), (1, 40)]),
]
SMALL_CHUNKS = [
    (2, 2, 8, 16, [(7, 7), (3, 40)]),
    (4, 2, 12, 32, [(18, 50)]),
]
FULL = [(32, 8, 128, 16, [(1, context) for context in (1, 17, 4096, 1000, 513)])]
FULL_CHUNKS = [(32, 8, 128, 16, [(256, 256), (100, 900), (33, 2000)])]


@dataclass
class World:
    """A pool of random KV, in its precision and as what that means, and queries of some spans."""

    geometry: Geometry
    spans: list[Span]
    query: Tensor
    stored: Tensor
    scales: Tensor | None
    fine: Tensor | None
    meant: Tensor
    scratch: Scratch

    @property
    def per_head(self) -> Tensor | None:
        if self.scales is None:
            return None
        return self.scales.view(2, self.geometry.kv_heads, 1, self.geometry.head_dim)


def world(shape: tuple, precision: Precision, device: str, window: int | None = None) -> World:
    heads, kv_heads, dim, block_size, lengths = shape
    geometry = Geometry(heads, kv_heads, dim, block_size, window)
    rng = random.Random(f"{shape}")
    torch.manual_seed(7)
    blocks = sum(geometry.blocks_for(context) for _, context in lengths) + 3
    free = rng.sample(range(blocks), blocks)
    spans, row = [], 0
    for count, context in lengths:
        spans.append(Span(row, count, context, [free.pop() for _ in range(geometry.blocks_for(context))]))
        row += count
    kv = torch.randn(blocks * block_size, 2 * kv_heads, dim, device=device)
    scales = scales_for(kv, precision)
    steps = torch.randint(0, FINE_STEPS, kv.shape[:2], device=device) if precision.fine else None
    stored = reference.codes(kv, scales, precision, steps)
    meant = reference.values(stored, scales, precision, dim, steps)
    meant = meant.view(blocks, block_size, 2, kv_heads, dim)
    fine = None
    if steps is not None:
        fine = steps.view(blocks, block_size, -1).transpose(1, 2).to(torch.uint8).contiguous()
    # As in a step: query rows are part of wider rows, which also hold K and V.
    query = torch.randn(row, (heads + 2 * kv_heads) * dim, device=device)[:, : heads * dim]
    scratch = Scratch.for_geometries([geometry], max(c for _, c in lengths), torch.device(device))
    query = query.unflatten(1, (-1, dim))
    return World(geometry, spans, query, stored.view(blocks, -1), scales, fine, meant, scratch)


def scales_for(kv: Tensor, precision: Precision) -> Tensor | None:
    """Powers of two, so that multiplying by the inverse is dividing."""
    if not precision.scaled:
        return None
    peak = kv.abs().amax(0) if precision.by_channel else kv.abs().amax((0, 2)).unsqueeze(1)
    return torch.exp2(torch.ceil(torch.log2(peak / precision.limit))).expand(kv.shape[1:]).contiguous()


def difference(got: Tensor, expected: Tensor) -> float:
    gap = (got.float() - expected.float()).abs().max()
    return float("inf") if gap.isnan() else gap.item()


def attends(
    shape: tuple, precision: Precision, device: str, parts: Callable, window: int | None = None
) -> float:
    given = world(shape, precision, device, window)
    expected = reference.attend(given.query.clone(), given.meant, given.spans, window)
    out = torch.full(given.query.shape, float("nan"), device=device)
    for part in parts(given.spans, given.geometry, given.scratch, given.query, out, precision):
        part.attend(given.stored, given.per_head, given.fine)
    return difference(out, expected)


def writes(precision: Precision, device: str, dim: int, spread: float, write: Callable) -> float:
    """Share of stored bytes that differ from the reference's, at the steps that were found."""
    torch.manual_seed(3)
    kv_heads, rows, slots_count = 2, 6, 64
    wide = torch.randn(rows, 5 * kv_heads * dim, device=device) * spread
    kv = wide[:, -2 * kv_heads * dim :]
    scales = scales_for(kv.unflatten(1, (-1, dim)), precision)
    if scales is not None and spread < 0.1:
        scales.fill_(1.0)  # most of it falls among fp8's subnormals
    slots = torch.tensor([3, 60, 17, 5, 9, 33], device=device)
    given = kv.unflatten(1, (-1, dim)).clone()
    unset = reference.codes(given, scales, precision)
    tokens = torch.zeros(slots_count, unset.shape[1], dtype=unset.dtype, device=device)
    expected = tokens.clone()
    scratch = Scratch(4096, 16, torch.device(device))
    fine = steps = None
    if precision.fine:
        fine = torch.full((slots_count // 16, 2 * kv_heads, 16), 7, dtype=torch.uint8, device=device)
    write(tokens, slots, kv, dim, scratch, precision, None if scales is None else 1 / scales, fine)
    if fine is not None:
        by_token = fine.transpose(1, 2).reshape(slots_count, -1)
        steps = by_token[slots]
        others = torch.ones(slots_count, dtype=torch.bool, device=device).index_fill_(0, slots, False)
        assert (by_token[others] == 7).all(), "steps of other tokens"
    expected[slots] = reference.codes(given, scales, precision, steps)
    return (tokens.view(torch.uint8) != expected.view(torch.uint8)).float().mean().item()


def searches(device: str, dim: int, write: Callable) -> float:
    """How much larger squared errors are than at the best of all steps, which the reference tries out."""
    torch.manual_seed(5)
    rows, heads = 12, 2
    given = torch.randn(rows, heads, dim, device=device)
    scales = scales_for(given, FP8)
    fine = torch.zeros(1, heads, rows, dtype=torch.uint8, device=device)
    tokens = torch.zeros(rows, heads * dim, dtype=torch.int8, device=device)
    scratch = Scratch(4096, 16, torch.device(device))
    slots = torch.arange(rows, device=device)
    write(tokens, slots, given.flatten(1).clone(), dim, scratch, FP8, 1 / scales, fine)
    errors = reference.fine_errors(given, scales)
    found = errors.gather(2, fine[0].T.long().unsqueeze(2))
    return (found.sum() / errors.min(2)[0].sum() - 1).item()


def cast_only(tokens, slots, kv, dim, scratch, precision, inverse, fine) -> None:
    """The Triton write without its own rounding."""
    paged_write = importlib.import_module("kvkernels.paged_write")
    paged_write.write(tokens, slots, kv, dim, precision, inverse, fine, round_first=False)


def accumulates(shape: tuple, precision: Precision, device: str, accumulate: Callable) -> float:
    given = world(shape, precision, device)
    slots, kv_heads = given.meant.shape[0] * given.geometry.block_size, given.geometry.kv_heads
    expected = torch.rand(slots, kv_heads, device=device)
    mass = expected.clone()
    reference.accumulate(expected, given.query, given.meant, given.spans)
    accumulate(
        mass,
        given.query,
        given.stored,
        given.spans,
        given.geometry,
        given.scratch,
        precision,
        given.per_head,
        given.fine,
    )
    return difference(mass, expected)


def copies(dtype: torch.dtype, device: str, copy: Callable, pairs: list[tuple[int, int]]) -> float:
    blocks = torch.randint(-100, 100, (9, 3000), device=device).to(dtype)
    expected = blocks.clone()
    for source, destination in pairs:
        expected[destination] = blocks[source]
    copy(blocks, pairs)
    return difference(blocks, expected)


def cases(backend: str, device: str, full: bool) -> Iterator[tuple[str, float]]:
    kernels = importlib.import_module(f"kvkernels.{backend}_backend")
    decodes, chunks = (FULL, FULL_CHUNKS) if full else (SMALL, SMALL_CHUNKS)
    for precision in PRECISIONS.values():
        name = precision.name
        # Every shape at full precision, and the one with most to go wrong at the others.
        for number, shape in enumerate(decodes if precision is FP32 else decodes[-1:]):
            yield f"decode {name} {number}", attends(shape, precision, device, kernels.parts)
        for number, shape in enumerate(chunks if precision is FP32 else chunks[-1:]):
            yield f"prefill {name} {number}", attends(shape, precision, device, kernels.parts)
        if precision in (FP32, INT8):
            shape, window = (decodes[-1], 20) if not full else (decodes[-1], 700)
            yield f"decode window {name}", attends(shape, precision, device, kernels.parts, window)
            shape, window = (chunks[-1], 19) if not full else (chunks[-1], 300)
            yield f"prefill window {name}", attends(shape, precision, device, kernels.parts, window)
        for dim in (8, 12):
            yield f"write {name} {dim}", writes(precision, device, dim, 3.0, kernels.write)
    yield "write fp8 tiny", writes(FP8, device, 8, 0.01, kernels.write)
    yield "search fp8 32", searches(device, 32, kernels.write)
    if backend == "triton":
        yield "cast fp8", writes(FP8, device, 8, 3.0, cast_only)
        yield "cast bf16", writes(BF16, device, 8, 3.0, cast_only)
    for precision in (FP32, FP8, INT8, INT4):
        yield f"accumulate {precision.name}", accumulates(decodes[-1], precision, device, kernels.accumulate)
    yield "accumulate chunk", accumulates(chunks[0], FP32, device, kernels.accumulate)
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        yield f"copy {dtype}", copies(dtype, device, kernels.copy, [(0, 4), (2, 7), (0, 8)])
    yield "copy chained", copies(torch.int8, device, kernels.copy, [(0, 4), (4, 7), (7, 0)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=["torch", "triton"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(dict(cases(arguments.backend, arguments.device, arguments.full))))
