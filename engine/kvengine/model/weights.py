"""Load a Hugging Face Llama directory into the form the forward pass wants. O(parameters), one tensor at a
time.

Reads one `model.safetensors` or the shards that `model.safetensors.index.json` names; fp16, bf16 and fp32
on disk all become fp32. Three rewritings, each an identity in exact arithmetic:

- projections that share an input are one matrix, stored as [in, out], so that a step makes one product of
  them;
- the norm's scale before a projection is folded into the projection's rows;
- RoPE pairs element i of a head with element i + dim/2; rows of Q and K are reordered so that pairs are
  neighbours, which makes the rotation one complex product. Scores do not change when Q and K are reordered
  alike.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvengine.errors import StartError
from kvengine.model.config import ModelConfig

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READABLE = (torch.float16, torch.bfloat16, torch.float32)


class _BadTensor(StartError):
    """A tensor that is there, but not as the configuration says."""


@dataclass(slots=True)
class LayerWeights:
    """Matrices are [in, out], fp32."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(slots=True)
class LlamaWeights:
    """`embedding` [vocab, hidden]; `output` [hidden, vocab], a view of the embedding when the two are
    tied.
    """

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    output: Tensor


def load(directory: Path, config: ModelConfig, device: torch.device | str = "cpu") -> LlamaWeights:
    """The weights in `directory`. Raises StartError with one line when they are not all there."""
    files = _tensor_files(directory)
    missing = sorted(set(_names(config)) - files.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise StartError(f"{directory}: tensor {missing[0]} is missing{more}; the download may be incomplete")
    try:
        return pack(_Reader(directory, files, device), config)
    except _BadTensor as error:
        raise StartError(f"{directory}: {error}") from error


def pack(tensors: Mapping[str, Tensor], config: ModelConfig) -> LlamaWeights:
    """From tensors under their Hugging Face names, whatever they come from."""
    embedding = _shaped(tensors, "model.embed_tokens.weight", config.vocab_size, config.hidden)
    output = embedding
    if not config.tied_embeddings:
        output = _shaped(tensors, "lm_head.weight", config.vocab_size, config.hidden)
    norm = _shaped(tensors, "model.norm.weight", config.hidden)
    layers = [_pack_layer(tensors, f"model.layers.{index}.", config) for index in range(config.layers)]
    return LlamaWeights(embedding, layers, norm, output.t())


def _pack_layer(tensors: Mapping[str, Tensor], prefix: str, config: ModelConfig) -> LayerWeights:
    hidden, ff, kv_rows = config.hidden, config.intermediate, config.kv_heads * config.head_dim

    def matrix(name: str, rows: int, columns: int) -> Tensor:
        return _shaped(tensors, f"{prefix}{name}.weight", rows, columns)

    query = _neighbours(matrix("self_attn.q_proj", config.query_width, hidden), config.head_dim)
    key = _neighbours(matrix("self_attn.k_proj", kv_rows, hidden), config.head_dim)
    value = matrix("self_attn.v_proj", kv_rows, hidden)
    before_attention = _shaped(tensors, f"{prefix}input_layernorm.weight", hidden)
    before_mlp = _shaped(tensors, f"{prefix}post_attention_layernorm.weight", hidden)
    gate_up = torch.cat([matrix("mlp.gate_proj", ff, hidden), matrix("mlp.up_proj", ff, hidden)])
    return LayerWeights(
        qkv=(torch.cat([query, key, value]) * before_attention).t().contiguous(),
        out=matrix("self_attn.o_proj", hidden, config.query_width).t().contiguous(),
        gate_up=(gate_up * before_mlp).t().contiguous(),
        down=matrix("mlp.down_proj", hidden, ff).t().contiguous(),
    )


def _neighbours(projection: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows from (0, 1, ..) to (0, dim/2, 1, dim/2 + 1, ..)."""
    return projection.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _names(config: ModelConfig) -> Iterable[str]:
    yield "model.embed_tokens.weight"
    yield "model.norm.weight"
    if not config.tied_embeddings:
        yield "lm_head.weight"
    parts = [f"self_attn.{one}_proj" for one in "qkvo"] + [
        f"mlp.{one}_proj" for one in ("gate", "up", "down")
    ]
    for index in range(config.layers):
        for part in [*parts, "input_layernorm", "post_attention_layernorm"]:
            yield f"model.layers.{index}.{part}.weight"


def _shaped(tensors: Mapping[str, Tensor], name: str, *shape: int) -> Tensor:
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise _BadTensor(f"tensor {name} is {list(tensor.shape)}, config.json says {list(shape)}")
    if tensor.dtype not in _READABLE:
        raise _BadTensor(f"tensor {name} is {tensor.dtype}; this engine reads fp16, bf16 and fp32 weights")
    return tensor.float()


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = directory / _INDEX
    if index.is_file():
        try:
            return {
                str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StartError(f"{index}: not a safetensors index ({error!r})") from error
    if not (directory / _SINGLE).is_file():
        raise StartError(f"{directory}: neither {_SINGLE} nor {_INDEX}; this engine reads safetensors only")
    with _opened(directory / _SINGLE) as file:
        return dict.fromkeys(file.keys(), _SINGLE)


class _Reader(Mapping[str, Tensor]):
    """Tensors by name, read when asked for: at most one layer is held twice."""

    def __init__(self, directory: Path, files: dict[str, str], device: torch.device | str) -> None:
        self._directory, self._files, self._device = directory, files, device

    def __getitem__(self, name: str) -> Tensor:
        path = self._directory / self._files[name]
        with _opened(path) as file:
            if name not in file.keys():  # noqa: SIM118 - not a mapping
                raise StartError(f"{path}: tensor {name} is missing; the download may be incomplete")
            return file.get_tensor(name).to(self._device)

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, "pt")
    except FileNotFoundError as error:
        raise StartError(
            f"{path}: no such file, though the index names it; the download may be incomplete"
        ) from error
    except (OSError, SafetensorError) as error:
        raise StartError(
            f"{path}: not readable as safetensors ({error}); the download may be incomplete"
        ) from error
