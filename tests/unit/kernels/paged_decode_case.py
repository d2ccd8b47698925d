"""Run in a process of its own: Triton decides on import whether it interprets. Prints the largest
difference.
"""

import random

import torch

from kvkernels import reference
from kvkernels.geometry import Geometry, Span
from kvkernels.paged_decode import PagedDecode

CASES = [  # heads, kv_heads, head_dim, block_size, contexts
    (2, 2, 8, 16, [1, 16, 33]),
    (4, 2, 8, 16, [48]),
    (3, 1, 12, 16, [5, 17]),
]


def main() -> None:
    rng = random.Random(0)
    torch.manual_seed(0)
    worst = 0.0
    for heads, kv_heads, dim, block_size, contexts in CASES:
        free = rng.sample(range(12), 12)
        spans = [
            Span(row, 1, context, [free.pop() for _ in range(-(-context // block_size))])
            for row, context in enumerate(contexts)
        ]
        pool = torch.randn(12, block_size, 2, kv_heads, dim)
        # As in a step: query rows are part of wider rows, which also hold K and V.
        query = torch.randn(len(spans), (heads + 2 * kv_heads) * dim)[:, : heads * dim].unflatten(
            1, (-1, dim)
        )
        out = torch.full((len(spans), heads, dim), float("nan"))
        PagedDecode(spans, Geometry(heads, kv_heads, dim, block_size), query, out).attend(pool.view(12, -1))
        difference = (out - reference.attend(query, pool, spans)).abs().max()
        worst = max(worst, float(difference) if not difference.isnan() else float("inf"))
    print(worst)


if __name__ == "__main__":
    main()
