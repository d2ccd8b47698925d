"""A step's time from a device's datasheet and a model's config: the roofline, operation by operation.

Every operation waits for arithmetic and for memory; where both matter they overlap imperfectly, which the
root of the sum of squares says well (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009, has the
larger of the two). With n tokens in a step, of which `rows` are sampled, on each of `tp` devices:

    matrix of k x m      sqrt((2 n k m / F)^2 + (b (k m + n k + n m) / B)^2) + launch      4 a layer, and
                         with n = rows the output layer
    elementwise          bytes read and written / B' + launch       norms, rotation, activation, residual
    attention, decode    sqrt((4 h d c / F)^2 + (c x KV bytes / B)^2) + launch             c: context read
    attention, prefill   4 h d p / A + launch       p: (token, position) pairs under the causal mask
    all-reduce, tp > 1   2 (tp - 1)/tp x n k b / link + latency     2 a layer, ring (Patarasuk and Yuan, 2009)
    host                 a constant and a little for each sequence

F, B: datasheet peaks (`kvengine.kv.plan.devices`) times `MATRIX_SHARE`, `BANDWIDTH_SHARE`. b: bytes of an
element. p is `chunk_positions` less the half square of a chunk above the diagonal, as if all prompt tokens of
the step were one chunk, and never less than half of it, which is exact for whole prompts. Drafts by a draft
model are as many passes of that model over the decoding sequences as each of them drafts; without one (by
n-grams) drafting itself takes no time. Verified drafts are tokens like others.

`MATRIX_SHARE`, `BANDWIDTH_SHARE` and the launches were chosen once, on an H100, against the profile of
Llama-2-7B that Vidur publishes (github.com/microsoft/vidur, MIT): matrices within 8 % in the median and 20 %
at p90, over 1 to 4,096 tokens and tp 1 to 8; a test holds them there. `ATTENTION_SHARE`, the links' latency
and the host's time are not in that profile: they are assumptions, in line with FlashAttention's and NCCL's
published figures. Other devices are assumed to reach the same shares of their peaks.
"""

import random
from dataclasses import dataclass
from math import exp, sqrt
from typing import TYPE_CHECKING

from kvpilot.simulate.plants.plant import StepFeatures

if TYPE_CHECKING:
    from kvengine.kv.plan.devices import Device
    from kvengine.kv.plan.precision import Precision
    from kvengine.kv.plan.shape import ModelShape

MATRIX_SHARE = 0.70
"""Of the datasheet's arithmetic that matrix products reach."""
BANDWIDTH_SHARE = 0.75
"""Of the datasheet's bandwidth, under matrix products and paged attention."""
ELEMENTWISE_SHARE = 0.60
ATTENTION_SHARE = 0.50
"""Of the datasheet's arithmetic that prefill attention reaches."""
MATRIX_LAUNCH_S = 4e-6
ELEMENTWISE_LAUNCH_S = 2e-6
REDUCE_LATENCY_S = 10e-6
HOST_S = 0.5e-3
HOST_SEQUENCE_S = 2e-6
LINK_SHARE = 0.75
LINK_BYTES_PER_S = {
    "a100-40gb": 300e9,
    "a100-80gb": 300e9,
    "h100": 450e9,
    "h200": 450e9,
    "b200": 900e9,
}
"""NVLink, one direction (datasheets give both directions together)."""
PCIE_BYTES_PER_S = 32e9
"""PCIe 4 x16, one direction: devices without NVLink."""
_LOGITS_BYTES = 12
"""A sampled row's vocabulary entry: a 4-byte logit written, read for the softmax, read to sample."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One product, in seconds: arithmetic and traffic for each row, traffic of the weights."""

    row_flop_s: float
    row_bytes_s: float
    weight_s: float

    def seconds(self, rows: float) -> float:
        return MATRIX_LAUNCH_S + sqrt(
            (rows * self.row_flop_s) ** 2 + (rows * self.row_bytes_s + self.weight_s) ** 2
        )


class Pass:
    """One forward pass of one model on each of `tp` devices."""

    def __init__(self, device: "Device", shape: "ModelShape", tp: int, kv: "Precision", dtype: str) -> None:
        from kvengine.kv.plan.precision import WEIGHT_BITS

        self.element_bytes = max(WEIGHT_BITS[dtype], 16) // 8
        weight_bytes = WEIGHT_BITS[dtype] / 8
        # Narrow weights that the matrix units do not multiply are widened first.
        wide = "tf32" if dtype == "fp32" else "bf16"
        self._flops = float(device.flops.get(dtype, device.flops[wide]))
        self._bandwidth = float(device.bandwidth_bytes_per_s)
        self._layers = shape.layers
        query = shape.heads // tp * shape.head_dim
        key_value = 2 * shape.kv_heads_per_device(tp) * shape.head_dim
        hidden, inner = shape.hidden, shape.intermediate // tp

        def matrix(k: int, m: int) -> _Matrix:
            bandwidth = self._bandwidth * BANDWIDTH_SHARE
            return _Matrix(
                2 * k * m / (self._flops * MATRIX_SHARE),
                self.element_bytes * (k + m) / bandwidth,
                weight_bytes * k * m / bandwidth,
            )

        self.matrices = {
            "qkv": matrix(hidden, query + key_value),
            "out": matrix(query, hidden),
            "up": matrix(hidden, 2 * inner),
            "down": matrix(inner, hidden),
        }
        self._layer = tuple(self.matrices.values())
        self._head = matrix(hidden, -(-shape.vocab_size // tp))
        self._logits_s = _LOGITS_BYTES * shape.vocab_size / tp / (self._bandwidth * ELEMENTWISE_SHARE)
        moved = 2 * 2 * hidden + 2 * (query + key_value) + 3 * inner + 2 * 3 * hidden
        self._elementwise_row_s = self.element_bytes * moved / (self._bandwidth * ELEMENTWISE_SHARE)
        self._position_flop_s = 4 * query / (self._flops * MATRIX_SHARE)
        self._position_bytes_s = (
            shape.kv_bytes_per_token(kv, tp) / shape.layers / (self._bandwidth * BANDWIDTH_SHARE)
        )
        self._pair_s = 4 * query / (self._flops * ATTENTION_SHARE)
        link = LINK_BYTES_PER_S.get(device.name, PCIE_BYTES_PER_S) * LINK_SHARE
        self._reduce_row_s = 2 * (tp - 1) / tp * self.element_bytes * hidden / link
        self._reduce_s = REDUCE_LATENCY_S if tp > 1 else 0.0

    def seconds(self, tokens: float, rows: float, context: float, pairs: float) -> float:
        """Of `tokens` in all, `rows` sampled, `context` positions read, `pairs` of prompt attention."""
        layer = sum([one.seconds(tokens) for one in self._layer])
        # Two norms, rotation, activation, two residual additions.
        layer += 6 * ELEMENTWISE_LAUNCH_S + tokens * self._elementwise_row_s
        layer += 2 * (self._reduce_s + tokens * self._reduce_row_s)
        if context:
            layer += MATRIX_LAUNCH_S + context * sqrt(self._position_flop_s**2 + self._position_bytes_s**2)
        if pairs:
            layer += MATRIX_LAUNCH_S + pairs * self._pair_s
        return self._layers * layer + self._head.seconds(rows) + rows * self._logits_s


class Roofline:
    """A plant. `sigma` is the spread of a lognormal noise on every step, 0 for none, drawn from `seed`."""

    def __init__(
        self,
        device: "Device",
        shape: "ModelShape",
        tp: int = 1,
        kv_precision: "Precision | None" = None,
        weight_dtype: str | None = None,
        draft: "ModelShape | None" = None,
        sigma: float = 0.0,
        seed: int = 0,
        score_bytes: float = 0.0,
    ) -> None:
        """`score_bytes`: memory for each (token, position) pair of a prompt chunk, for kernels that keep
        attention scores; paged ones keep none. Raises ConfigError for a `tp` that does not divide the model.
        """
        from kvengine.kv.plan.precision import kv_precision as precision_named

        shape.check_tp(tp)
        dtype = weight_dtype or shape.compute_dtype
        kv = kv_precision or precision_named(shape.compute_dtype)
        self.shape, self.tp, self.dtype = shape, tp, dtype
        self.target = Pass(device, shape, tp, kv, dtype)
        # A draft is small: each device computes it whole.
        self._draft = None if draft is None else Pass(device, draft, 1, kv, draft.compute_dtype)
        self._sigma = sigma
        self._dice = random.Random(f"plant/{seed}")
        self._score_bytes = score_bytes

    def step_seconds(self, features: StepFeatures) -> float:
        mean_s = self.mean_seconds(features)
        return mean_s * exp(self._dice.gauss(0.0, self._sigma)) if self._sigma else mean_s

    def mean_seconds(self, features: StepFeatures) -> float:
        """Without noise."""
        decodes, drafted, prefill = (
            features.decode_sequences,
            features.drafted_tokens,
            features.prefill_tokens,
        )
        tokens, rows = prefill + decodes + drafted, decodes + drafted + min(prefill, 1.0)
        positions = features.chunk_positions
        pairs = max(positions / 2, positions - prefill * prefill / 2)
        seconds = HOST_S + HOST_SEQUENCE_S * decodes
        seconds += self.target.seconds(tokens, rows, features.context_tokens, pairs)
        if self._draft is not None and drafted:
            passes = drafted / decodes
            # The context that verification reads already counts the drafts.
            seconds += passes * self._draft.seconds(decodes, decodes, features.context_tokens, 0.0)
        return seconds

    def activation_bytes(self, features: StepFeatures) -> int:
        """By the planner's formula, on one device."""
        rows = int(features.decode_sequences + features.drafted_tokens) + (features.prefill_tokens > 0)
        tokens = int(features.prefill_tokens + features.decode_sequences + features.drafted_tokens)
        activations: int = self.shape.activation_bytes(tokens, rows, self.dtype, self.tp)
        return activations + round(self._score_bytes * features.chunk_positions)
