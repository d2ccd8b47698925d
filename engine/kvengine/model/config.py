"""What a Llama is: the shape in its `config.json`, and the bytes that follow from the shape. No torch.

Compute is fp32 whatever the files hold, so every float here is 4 bytes. The two sums at the end are the same
allocations that `model.workspace` and `kv.storage` make; a test holds them against the profiler.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvengine.errors import StartError
from kvengine.kv.plan import StepMemory
from kvkernels.geometry import TILE_ROWS

FLOAT_BYTES = 4
INDEX_BYTES = 8

_DRAWN_COPIES = 5
"""Tensors of a row's vocabulary that are alive at once while it is drawn from; sorting for top_p takes as
many again.
"""
_CONTEXT_TOKEN_BYTES = 7
"""Of a decoding sequence: the mask of a padded group as float and as bool, and its share of the block
table.
"""
_SMALL_BYTES = 8192
"""Index tensors and scalars of a step."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Widths are floats a token."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    sliding_window: int | None = None
    """Each token attends to itself and the tokens before it, this many together; None: to all."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K and V of one layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """All layers."""
        return self.layers * self.kv_width * FLOAT_BYTES

    @property
    def parameters(self) -> int:
        attention = self.hidden * (2 * self.query_width + self.kv_width)
        layer = attention + 3 * self.hidden * self.intermediate
        embeddings = self.vocab_size * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * layer + self.hidden

    @property
    def weights_bytes(self) -> int:
        """As held for compute: norms before a projection are folded into it, so only the last one is left."""
        return self.parameters * FLOAT_BYTES

    @property
    def step_memory(self) -> StepMemory:
        """What one forward pass allocates and gives back; see `model.workspace.Workspace`."""
        residual_normed_scale = 2 * self.hidden + 1
        projections = self.query_width + self.kv_width + self.query_width + 2 * self.intermediate
        token_floats = residual_normed_scale + projections + self.head_dim
        indices = 3
        row_floats = 2 * self.hidden + 1 + self.vocab_size
        attended = TILE_ROWS * (self.query_width + self.heads)
        return StepMemory(
            token_bytes=token_floats * FLOAT_BYTES + indices * INDEX_BYTES,
            logits_row_bytes=row_floats * FLOAT_BYTES + 2 * INDEX_BYTES,
            drawn_row_bytes=_DRAWN_COPIES * self.vocab_size * FLOAT_BYTES,
            context_token_bytes=_CONTEXT_TOKEN_BYTES,
            fixed_bytes=(attended + _flash_floats(self.head_dim)) * FLOAT_BYTES + _SMALL_BYTES,
        )

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read `directory`/config.json. Raises StartError with one line."""
        if not directory.is_dir():
            raise StartError(f"{directory}: no such model directory; give one that holds config.json")
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text())
        except OSError as error:
            raise StartError(f"{path}: {error.strerror}; a model directory holds config.json") from error
        except ValueError as error:
            raise StartError(f"{path}: not JSON ({error})") from error
        if not isinstance(raw, dict):
            raise StartError(f"{path}: not a JSON object")
        return _from_hugging_face(raw, path)


def _from_hugging_face(raw: Mapping[str, Any], path: Path) -> ModelConfig:
    architectures = str(raw.get("architectures") or "unnamed")
    if raw.get("model_type") not in ("llama", "mistral") and "LlamaForCausalLM" not in architectures:
        kind = raw.get("model_type") or architectures.strip("[']")
        raise StartError(f"{path}: a {kind} model; this engine runs LlamaForCausalLM and MistralForCausalLM")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise StartError(f"{path}: {key} is not supported; use a Llama without biases")
    if raw.get("hidden_act", "silu") != "silu":
        raise StartError(f"{path}: hidden_act={raw['hidden_act']} is not supported; a Llama has silu")
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        config = ModelConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden=hidden,
            intermediate=int(raw["intermediate_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            rope_theta=_rope_theta(raw, path),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_positions=int(raw.get("max_position_embeddings", 2048)),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(raw, path),
        )
    except KeyError as error:
        raise StartError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise StartError(f"{path}: {error}") from error
    _check_shape(config, path)
    return config


def _check_shape(config: ModelConfig, path: Path) -> None:
    for name in (
        "vocab_size",
        "hidden",
        "intermediate",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "max_positions",
    ):
        if getattr(config, name) < 1:
            raise StartError(f"{path}: {name}={getattr(config, name)}: must be at least 1")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise StartError(
            f"{path}: {config.heads} heads of {config.head_dim} with {config.kv_heads} KV heads: "
            "KV heads must divide heads and a head must be even"
        )


def _sliding_window(raw: Mapping[str, Any], path: Path) -> int | None:
    """A Mistral's file may leave it out and mean 4,096; null is none."""
    given = raw.get("sliding_window", 4096 if raw.get("model_type") == "mistral" else None)
    if given is None or raw.get("use_sliding_window") is False:
        return None
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise StartError(f"{path}: sliding_window={given!r}: must be null or a number of tokens, at least 1")
    return given


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """Older files hold `rope_theta` and `rope_scaling`, newer ones one `rope_parameters`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling={rope!r}: must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise StartError(f"{path}: rope scaling {kind!r} is not supported; use a model without it")
    return float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))


def _flash_floats(head_dim: int) -> int:
    """What torch's attention on a CPU allocates for itself, a thread: tiles of 32 queries by 512 keys."""
    return 32 * (512 + 2 + head_dim)
