"""Fine scales: what e4m3 codes gain by a scale of each vector's own, one byte beside its codes.

e4m3 rounds a value by a share of itself, whatever the scale; but how far the values of one vector lie from
numbers that e4m3 has changes with it, and is the same again an octave on. So of FINE_STEPS scales within an
octave each vector takes the one that errs least: its scale is its head's times 2 ** (step / FINE_STEPS). On
normally distributed values that takes a third off the error. Every byte is a step; 0 means the head's own.

The search tries nothing out. What rounding does to a value at each step follows from its mantissa: a row of
a table, and a vector's errors are the sum of its values' rows, weighted by their squares. O(elements x STEPS)
products, all in one call. Codes that are subnormal, 2 ** -15 of the largest and less, err a little more than
the table says.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from kvkernels.geometry import MANTISSA_BITS, MANTISSAS
from kvkernels.precision import FINE_STEPS

MANTISSA_SHIFT = 23 - MANTISSA_BITS
"""Leaves the bits of an fp32 that choose its row of the table, and those before."""

_SAMPLES = 8
"""Of each row's interval, averaged."""


def search(vectors: Tensor) -> Tensor:
    """The step [vectors] of each of `vectors` [vectors, head_dim], fp32 and contiguous, that errs least.

    SEARCHED_VECTORS at most: it takes `search_bytes`.
    """
    rows = (vectors.view(torch.int32) >> MANTISSA_SHIFT).bitwise_and_(MANTISSAS - 1)
    table = squared_errors(vectors.device)
    return embedding_bag(rows, table, mode="sum", per_sample_weights=vectors.square()).argmin(1)


@cache
def squared_errors(device: torch.device) -> Tensor:
    """Of rounding to e4m3, as a share of a value's square: [MANTISSAS, FINE_STEPS]."""
    count = MANTISSAS * _SAMPLES
    mantissas = (1 + (torch.arange(count, dtype=torch.float64) + 0.5) / count).unsqueeze(1)
    scales = torch.exp2(torch.arange(FINE_STEPS, dtype=torch.float64) / FINE_STEPS)
    codes = mantissas / scales
    # Between 1 and 2 e4m3 has eight numbers; below 1 its steps are half as wide.
    spacing = torch.where(codes < 1, 1 / 16, 1 / 8)
    lost = (torch.round(codes / spacing) * spacing - codes) * scales / mantissas
    return lost.square().view(MANTISSAS, _SAMPLES, -1).mean(1).float().to(device)


@cache
def inverse_factors(device: torch.device) -> Tensor:
    """What a value under its head's scale is multiplied by at each step: [FINE_STEPS]."""
    return torch.exp2(-torch.arange(FINE_STEPS, dtype=torch.float64) / FINE_STEPS).float().to(device)
