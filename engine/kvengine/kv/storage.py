"""The KV pool's memory: one tensor a layer, in two views. Which block holds what is `kv.pool`'s business.

Zeroed at the start: attention multiplies hidden positions by zero, and zero times garbage is not always zero.
"""

import torch
from torch import Tensor

from kvkernels.geometry import Geometry


class KvStorage:
    """`blocks[layer]` is [blocks, block_floats]; `tokens[layer]` the same memory as [slots, token_floats]."""

    def __init__(self, layers: int, blocks: int, geometry: Geometry, device: torch.device | str) -> None:
        self.geometry = geometry
        self.blocks: list[Tensor] = [
            torch.zeros(blocks, geometry.block_floats, device=device) for _ in range(layers)
        ]
        self.tokens: list[Tensor] = [layer.view(-1, geometry.token_floats) for layer in self.blocks]
