"""From a model's config.json to bytes on one device: weights, KV a token, activations of a step. No torch.

Dense decoders of the Llama family (Llama, Mistral, Qwen2, Qwen3), in any of their published precisions, split
over `tp` devices by heads, as vLLM and SGLang split them: projections and embeddings divided, norms on each.
`kvengine.model.config` is the narrower question what this engine itself computes, in fp32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvengine.errors import ConfigError
from kvengine.kv.plan.precision import WEIGHT_BITS, Precision, weight_dtype

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_SAMPLED_BYTES = 40
"""Of one row's vocabulary entry while it is sampled under top-k and top-p: about ten 4-byte copies (logits,
scaled, sorted values and their 8-byte indices, probabilities, running sum, masks).
"""
_FORWARD_INDEX_BYTES = 24
"""A token's id, position and slot."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides its memory. Widths are elements; `window` is of every layer, or None."""

    name: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    window: int | None
    windowed_layers: int
    """How many layers look back only so far; where that is some but not all, `window` is None."""
    dtype: str | None
    """Of weights and activations; None where the file does not say."""
    packed: bool
    """The weights are quantised in some format of their own, whatever `dtype` says."""

    @property
    def compute_dtype(self) -> str:
        return self.dtype or "bf16"

    @property
    def parameters(self) -> int:
        return self.projection_parameters(1) + self.other_parameters(1)

    def kv_heads_per_device(self, tp: int) -> int:
        """With more devices than KV heads, each holds a copy of one."""
        return max(1, self.kv_heads // tp)

    def projection_parameters(self, tp: int) -> int:
        """The matrices that quantised checkpoints quantise, on one device."""
        query = self.heads // tp * self.head_dim
        key_value = 2 * self.kv_heads_per_device(tp) * self.head_dim
        attention = self.hidden * (2 * query + key_value)
        return self.layers * (attention + 3 * self.hidden * (self.intermediate // tp))

    def other_parameters(self, tp: int) -> int:
        """Embeddings, output layer, norms and biases, on one device: they stay in 16 bits or more."""
        query = self.heads // tp * self.head_dim
        key_value = 2 * self.kv_heads_per_device(tp) * self.head_dim
        layer = 2 * self.hidden
        layer += (query + key_value) * self.qkv_bias + self.hidden * self.out_bias
        layer += (2 * self.intermediate // tp + self.hidden) * self.mlp_bias
        layer += 2 * self.head_dim * self.qk_norm
        vocabulary = -(-self.vocab_size // tp) * self.hidden * (1 if self.tied_embeddings else 2)
        return vocabulary + self.layers * layer + self.hidden

    def weights_bytes(self, dtype: str, tp: int) -> int:
        """On one device."""
        bits = WEIGHT_BITS[dtype]
        return (self.projection_parameters(tp) * bits + self.other_parameters(tp) * max(bits, 16)) // 8

    def kv_bytes_per_token(self, precision: Precision, tp: int) -> int:
        """K and V of all layers, on one device."""
        return self.layers * 2 * self.kv_heads_per_device(tp) * precision.vector_bytes(self.head_dim)

    def fine_bytes_per_token(self, precision: Precision, tp: int) -> int:
        """What the reference engine keeps beside it, on one device: 0 but for fp8."""
        return self.layers * 2 * self.kv_heads_per_device(tp) * precision.fine

    def activation_bytes(self, chunk_tokens: int, sequences: int, dtype: str, tp: int) -> int:
        """The most that one step allocates on one device: a chunk in, and a token sampled for each sequence.

        The larger of two moments, beside the hidden states and the residual of the chunk: inside a layer
        (normed states, and either q, k, v and attention's output or the two halves of the MLP and their
        product), and after the last one (the sampled rows' logits and what sampling makes of them). Attention
        itself allocates nothing that grows with the context, as paged kernels do.

        Checked against vLLM's own profile of Llama-3-8B on an A100 (8,192 tokens, 256 sequences, bf16):
        1.26 GiB measured with one device and with two, 1.41 GiB here (vllm-project/vllm pull request 10511).
        """
        element = max(WEIGHT_BITS[dtype], 16) // 8
        query = self.heads // tp * self.head_dim
        key_value = 2 * self.kv_heads_per_device(tp) * self.head_dim
        layer = self.hidden + max(2 * query + key_value, 3 * (self.intermediate // tp))
        inside = chunk_tokens * layer * element
        rows = min(chunk_tokens, sequences)
        after = rows * (self.hidden * element + self.vocab_size * (element + _SAMPLED_BYTES))
        stays = chunk_tokens * (2 * self.hidden * element + _FORWARD_INDEX_BYTES)
        return stays + max(inside, after)

    def check_tp(self, tp: int) -> None:
        """Raises ConfigError where the model cannot be split over `tp` devices."""
        if tp < 1:
            raise ConfigError(f"--tp {tp}: at least 1")
        shared = self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        for count, what, fits in (
            (self.heads, "attention heads", self.heads % tp == 0),
            (self.kv_heads, "KV heads", shared),
            (self.intermediate, "columns of the MLP", self.intermediate % tp == 0),
        ):
            if not fits:
                raise ConfigError(f"--tp {tp}: does not divide the {count} {what} of {self.name}")


def shape_in(path: Path) -> ModelShape:
    """Of a directory that holds config.json, or of that file. Raises ConfigError with one line."""
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; a model directory holds config.json") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return shape_of(raw, file.resolve().parent.name, str(file))


def shape_of(raw: Mapping[str, Any], name: str, where: str) -> ModelShape:
    """Of the object in a config.json; `where` begins an error's line. Raises ConfigError."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {kind!r}; the planner counts {', '.join(FAMILIES)}: "
            "for another give --weights, --kv-bytes-per-token and --activation-memory instead"
        )
    heads = _count(raw, "num_attention_heads", where)
    hidden = _count(raw, "hidden_size", where)
    layers = _count(raw, "num_hidden_layers", where)
    window, windowed = _window(raw, layers, where)
    shape = ModelShape(
        name=name,
        vocab_size=_count(raw, "vocab_size", where),
        hidden=hidden,
        intermediate=_count(raw, "intermediate_size", where),
        layers=layers,
        heads=heads,
        kv_heads=_count(raw, "num_key_value_heads", where, heads),
        head_dim=_count(raw, "head_dim", where, hidden // heads),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bool(raw.get("attention_bias")),
        out_bias=kind != "qwen2" and bool(raw.get("attention_bias")),
        mlp_bias=bool(raw.get("mlp_bias")),
        qk_norm=kind == "qwen3",
        max_positions=_count(raw, "max_position_embeddings", where),
        window=window,
        windowed_layers=windowed,
        dtype=_dtype(raw, where),
        packed=bool(raw.get("quantization_config")),
    )
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"{where}: {shape.kv_heads} KV heads do not divide {shape.heads} heads")
    return shape


def _count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"{where}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {key}={value!r}: a whole number, at least 1")
    return value


def _window(raw: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, int]:
    """The window that bounds KV, and how many layers have one. Qwen's files name one that is not in use."""
    if raw.get("sliding_window") is None or raw.get("use_sliding_window") is False:
        return None, 0
    window = _count(raw, "sliding_window", where)
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):
        windowed = sum(kind == "sliding_attention" for kind in kinds)
    elif raw.get("use_sliding_window"):
        # In Qwen2 the first `max_window_layers` see everything.
        windowed = max(0, layers - int(raw.get("max_window_layers") or 0))
    else:
        windowed = layers
    return (window if windowed == layers else None), windowed


def _dtype(raw: Mapping[str, Any], where: str) -> str | None:
    name = raw.get("torch_dtype") or raw.get("dtype")
    if name is None:
        return None
    try:
        return weight_dtype(str(name))
    except ConfigError as error:
        raise ConfigError(f"{where}: torch_dtype {name}; give --weight-dtype or --weights") from error
