"""Scales of KV codes, per layer and head (per channel at four bits), calibrated by the traffic itself.

The first tokens written set them, with some room; a value beyond what a scale reaches makes it grow, before
it is stored, so that nothing is ever clipped. Growth is by a fifth at least, or by powers of two where codes
are floats (exact), so it happens a few times in an engine's life; whoever holds codes moves them along.
"""

import torch
from torch import Tensor

from kvkernels.geometry import Geometry
from kvkernels.precision import Precision

_ROOM = 1.2
"""A scale reaches this much further than the largest value that made it."""
_LEAST = 1e-30
"""A channel that has only ever been zero still needs a scale above zero."""


class Scales:
    """One model's, at one precision. Zero until the first write."""

    def __init__(
        self, precision: Precision, layers: int, geometry: Geometry, device: torch.device | str
    ) -> None:
        shape = (layers, 2 * geometry.kv_heads, geometry.head_dim)
        assert precision.limit is not None
        self._limit = precision.limit
        self._by_channel, self._doubles = precision.by_channel, precision.floating
        self._values = torch.zeros(shape, device=device)
        self._reach = torch.zeros(shape, device=device)
        self.inverse = torch.zeros(shape, device=device)
        """One over them."""
        self.by_head = self._values.view(layers, 2, geometry.kv_heads, 1, geometry.head_dim)
        self._shape = shape[1:]

    def fit(self, layer: int, kv: Tensor) -> Tensor | None:
        """Make the layer's scales reach all of `kv` [rows, token_floats].

        Returns what older codes must be multiplied by, [2 * kv_heads, head_dim], if there are any and scales
        grew. Waits for the device: scales must be known before anything is stored.
        """
        rows = kv.unflatten(1, self._shape)
        over = 0 if self._by_channel else (0, 2)
        peaks = torch.linalg.vector_norm(rows, torch.inf, over, keepdim=True)[0]
        reach = self._reach[layer]
        if not bool((peaks > reach).any()):
            return None
        growth = (peaks.clamp_min(_LEAST) * _ROOM / reach.clamp_min(_LEAST)).expand(self._shape)
        first = not bool(reach.any())
        if self._doubles:
            growth = torch.exp2(torch.ceil(torch.log2(growth)))
        growth = torch.where(peaks > reach, growth, 1.0)
        # Channels without a value so far keep a tiny reach, which the first value lifts.
        reach.clamp_min_(_LEAST).mul_(growth)
        self._values[layer] = reach / self._limit
        self.inverse[layer] = self._limit / reach
        return None if first else 1 / growth
