"""Tiny Llamas with random weights for a real vLLM: targets, and drafts that are never right or always.

The target's layers after the first add nothing (their output projections are zero), so one layer predicts
what four do: `draft_hit` is that layer alone, and greedy decoding accepts whatever it drafts. `draft_miss` is
the same with its head negated: it drafts the least likely token, and none is ever accepted.

What `target` says depends on the whole context and never settles into a pattern: n-gram lookup finds next to
nothing. `looping` does not attend, so that its greedy output is a cycle of a few dozen tokens: n-gram lookup
is nearly always right. All weights come from one seed; outputs are the same on machines of one kind.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_lab.environment import CACHE

Target = Literal["target", "looping"]
ModelName = Literal["target", "looping", "draft_hit", "draft_miss"]

VOCABULARY = 384
"""Token ids below this; the first FIRST_ORDINARY are special."""
FIRST_ORDINARY = 4
MAX_POSITIONS = 8192

_RECIPE: dict[str, Any] = {
    "version": 2,
    "seed": 20_240_229,
    "hidden": 256,
    "intermediate": 512,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": VOCABULARY,
    "positions": MAX_POSITIONS,
    "deviation": 0.25,
    "head_deviation": 0.5,
}


def model(name: ModelName) -> Path:
    """The model's folder; made on first use (a second or two)."""
    recipe = hashlib.sha256(json.dumps(_RECIPE, sort_keys=True).encode()).hexdigest()[:12]
    place = CACHE / "vllm-models" / recipe
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch) / "models"
            _make_all(made)
            if not place.is_dir():
                os.rename(made, place)
    return place / name


def _make_all(folder: Path) -> None:
    # Imported here: benches and tests that only ask for a name should not wait for torch.
    import torch
    from transformers import LlamaForCausalLM

    weights = _weights()
    for name in get_args(ModelName):
        layers = 1 if name.startswith("draft") else _RECIPE["layers"]
        llama = LlamaForCausalLM(_config(layers))
        state = {key: weights[key] for key in llama.state_dict()}
        if name == "draft_miss":
            state["lm_head.weight"] = -state["lm_head.weight"]
        if name == "looping":
            attention = "model.layers.0.self_attn.o_proj.weight"
            state[attention] = torch.zeros_like(state[attention])
        with torch.no_grad():
            llama.load_state_dict(state)
        llama.to(torch.bfloat16).save_pretrained(folder / name)
        _tokenizer().save_pretrained(folder / name)


def _config(layers: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=_RECIPE["vocabulary"],
        hidden_size=_RECIPE["hidden"],
        intermediate_size=_RECIPE["intermediate"],
        num_hidden_layers=layers,
        num_attention_heads=_RECIPE["heads"],
        num_key_value_heads=_RECIPE["kv_heads"],
        max_position_embeddings=_RECIPE["positions"],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def _weights() -> dict[str, Any]:
    import torch
    from transformers import LlamaForCausalLM

    generator = torch.Generator().manual_seed(_RECIPE["seed"])
    weights = {}
    for key, value in LlamaForCausalLM(_config(_RECIPE["layers"])).state_dict().items():
        adds_to_residual = key.endswith(("o_proj.weight", "down_proj.weight"))
        if "norm" in key:
            weights[key] = torch.ones_like(value)
        elif adds_to_residual and ".layers.0." not in key:
            weights[key] = torch.zeros_like(value)
        else:
            deviation = _RECIPE["head_deviation" if key == "lm_head.weight" else "deviation"]
            weights[key] = torch.randn(value.shape, generator=generator) * deviation
    return weights


def _tokenizer() -> Any:
    """Byte-level BPE: every text can be encoded; a few merges, so that bytes and tokens differ."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in "etaoinshrdlu" for second in "etaoinshrd"]
    merged = [first + second for first, second in pairs]
    words = [*special, *alphabet, *merged]
    spare = [f"<spare-{number}>" for number in range(VOCABULARY - len(words))]
    vocabulary = {word: number for number, word in enumerate([*words, *spare])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
