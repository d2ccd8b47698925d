"""The memory of one step: every intermediate of a forward pass, carved out of one allocation.

`ModelConfig.step_memory` is the sum of what is made here, in bytes, without torch: the planner and the memory
account use it before a step runs, and a test holds it against what torch really allocates. Making one costs
a few microseconds: no buffer is kept between steps, so a large chunk leaves nothing behind.
"""

import torch

from kvengine.model.config import ModelConfig


class Workspace:
    """Named views; `rows` tokens, of which `wanted` go through the output layer."""

    def __init__(self, config: ModelConfig, rows: int, wanted: int, device: torch.device) -> None:
        hidden, query, kv = config.hidden, config.query_width, config.kv_width
        qkv, ff, dim = query + kv, config.intermediate, config.head_dim
        # Complex views need even offsets, so what is rotated comes first and the odd widths last.
        widths = (dim, qkv, query, 2 * ff, hidden, hidden, 1)
        last_widths = (hidden, hidden, 1, config.vocab_size)
        shapes = [(rows, width) for width in widths] + [(wanted, width) for width in last_widths]
        sizes = [count * width for count, width in shapes]
        parts = torch.empty(sum(sizes), device=device).split(sizes)
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.rotation, self.qkv, self.mixed, self.gate_up, self.residual, self.normed, self.scale = views[:7]
        self.last, self.last_normed, self.last_scale, self.logits = views[7:]

        self.query = self.qkv[:, :query].unflatten(1, (-1, dim))
        self.new_kv = self.qkv[:, query:]
        # Q and K are neighbours in a row, so one product rotates both.
        pairs = self.qkv[:, : query + kv // 2].unflatten(1, (-1, dim // 2, 2))
        self.rotated = torch.view_as_complex(pairs)
        self.rotation_factor = torch.view_as_complex(self.rotation.view(rows, 1, dim // 2, 2))
        self.mixed_heads = self.mixed.view(rows, -1, dim)
        self.gate, self.up = self.gate_up[:, :ff], self.gate_up[:, ff:]
