"""Model directories as they come: precisions, shards, old and new configuration files, and broken ones."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from llamas import Bench, reference_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from kvengine.errors import StartError
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama

TOKENS = [random.Random(5).randrange(97) for _ in range(40)]


def loaded(directory: Path) -> Llama:
    config = ModelConfig.load(directory)
    return Llama(config, weights.load(directory, config))


def logits(directory: Path) -> torch.Tensor:
    return Bench.of(loaded(directory)).prefill(TOKENS, [3, 1, 2], 40)


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["1GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_any_llama_directory(tmp_path: Path, dtype: torch.dtype, shard_size: str, tied: bool) -> None:
    """Whatever is on disk, computing is fp32 on exactly those numbers."""
    reference_model(kv_heads=2, tied=tied).to(dtype).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "60KB")
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(tmp_path), expected, atol=1e-5, rtol=0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    reference_model(layers=2).save_pretrained(tmp_path)
    return tmp_path


def test_older_configuration_files_mean_the_same(directory: Path) -> None:
    """`rope_theta` beside, not inside `rope_parameters`; KV heads and head size left out."""
    expected = logits(directory)
    edit(directory, rope_parameters=None, rope_theta=5000.0, num_key_value_heads=None, head_dim=None)
    assert torch.equal(logits(directory), expected)


def test_bytes_of_weights_are_what_is_held(directory: Path) -> None:
    config = ModelConfig.load(directory)
    held = weights.load(directory, config)
    tensors = [
        held.embedding,
        held.norm,
        *(getattr(layer, name) for layer in held.layers for name in layer.__slots__),
    ]
    assert sum(tensor.nbytes for tensor in tensors) == config.weights_bytes
    assert held.output.data_ptr() == held.embedding.data_ptr()


def _shards_without_one(directory: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="60KB")
    sorted(directory.glob("*.safetensors"))[1].unlink()


def _without(directory: Path, name: str) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def _retyped(directory: Path, dtype: torch.dtype) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, path)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "a model directory holds config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    "not a Llama": (lambda d: edit(d, model_type="gpt2", architectures=["GPT2LMHeadModel"]), "a gpt2 model"),
    "incomplete config": (lambda d: edit(d, hidden_size=None), "hidden_size is missing"),
    "nonsense in config": (lambda d: edit(d, num_hidden_layers="many"), "many"),
    "heads do not divide": (lambda d: edit(d, num_key_value_heads=3), "KV heads must divide"),
    "scaled rope": (
        lambda d: edit(d, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}),
        "rope scaling 'llama3' is not supported",
    ),
    "scaled rope, older": (
        lambda d: edit(d, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
        "rope scaling 'linear' is not supported",
    ),
    "rope is no object": (
        lambda d: edit(d, rope_parameters=None, rope_scaling="linear"),
        "must be an object",
    ),
    "no architectures": (lambda d: edit(d, model_type=None, architectures=5), "a 5 model"),
    "endless": (lambda d: edit(d, vocab_size=float("inf")), "infinity"),
    "biases": (lambda d: edit(d, attention_bias=True), "attention_bias is not supported"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "reads safetensors only"),
    "weights are no safetensors": (
        lambda d: (d / "model.safetensors").write_bytes(b"x" * 99),
        "not readable",
    ),
    "index is broken": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "not a safetensors index",
    ),
    "a shard is missing": (_shards_without_one, "the index names it"),
    "a tensor is missing": (
        lambda d: _without(d, "model.layers.1.mlp.up_proj.weight"),
        "tensor model.layers.1.mlp.up_proj.weight is missing",
    ),
    "another shape": (lambda d: edit(d, intermediate_size=96), "config.json says"),
    "another precision": (lambda d: _retyped(d, torch.float64), "reads fp16, bf16 and fp32"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_directory_is_one_clear_line(directory: Path, name: str) -> None:
    breakage, says = BREAKAGES[name]
    breakage(directory)
    with pytest.raises(StartError) as raised:
        loaded(directory)
    message = str(raised.value)
    assert says in message
    assert "\n" not in message
    assert str(directory) in message


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such model directory"):
        ModelConfig.load(tmp_path / "nothing")
