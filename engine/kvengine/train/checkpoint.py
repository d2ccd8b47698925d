"""Write and read model directories: `config.json`, `model.safetensors` and the tokenizer's files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvengine.model.vocabulary import BOS_ID, EOS_ID, PAD_ID, tokenizer_files
from kvengine.train.dense import DenseLlama, Shape


def save(model: DenseLlama, folder: Path) -> int:
    """Write the directory, weights in fp16; returns the bytes of the weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to(torch.float16).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.shape.config(BOS_ID, EOS_ID, PAD_ID)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name, text in tokenizer_files(model.shape.max_position_embeddings).items():
        (folder / name).write_text(text)
    return (folder / "model.safetensors").stat().st_size


def load(folder: Path) -> DenseLlama:
    """The dense model of a directory that `save` wrote, in fp32."""
    config = json.loads((folder / "config.json").read_text())
    model = DenseLlama(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()
