"""Shapes of well-known models, by name: the numbers of their published config.json files, and no others.

Kept in the keys of those files, so that `shape` reads them as it reads a directory. A test holds each against
the published count of parameters. Dense models with grouped-query attention only.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from kvengine.errors import ConfigError


def _config(
    kind: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    positions: int,
    **more: Any,
) -> Mapping[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "torch_dtype": "bfloat16",
        **more,
    }


_UNUSED_WINDOW = {"use_sliding_window": False, "sliding_window": 131_072}

PUBLISHED: dict[str, Mapping[str, Any]] = {
    "llama-2-7b": _config("llama", 4096, 11_008, 32, 32, 32, 32_000, 4096),
    "llama-3-8b": _config("llama", 4096, 14_336, 32, 32, 8, 128_256, 8192),
    "llama-3.2-1b": _config(
        "llama", 2048, 8192, 16, 32, 8, 128_256, 131_072, head_dim=64, tie_word_embeddings=True
    ),
    "llama-3.1-8b": _config("llama", 4096, 14_336, 32, 32, 8, 128_256, 131_072),
    "llama-3.1-70b": _config("llama", 8192, 28_672, 80, 64, 8, 128_256, 131_072),
    "mistral-7b-v0.1": _config("mistral", 4096, 14_336, 32, 32, 8, 32_000, 32_768, sliding_window=4096),
    "mistral-7b-v0.3": _config("mistral", 4096, 14_336, 32, 32, 8, 32_768, 32_768, sliding_window=None),
    "qwen2.5-7b": _config("qwen2", 3584, 18_944, 28, 28, 4, 152_064, 131_072, **_UNUSED_WINDOW),
    "qwen2.5-32b": _config("qwen2", 5120, 27_648, 64, 40, 8, 152_064, 131_072, **_UNUSED_WINDOW),
    "qwen3-8b": _config("qwen3", 4096, 12_288, 36, 32, 8, 151_936, 40_960, head_dim=128),
}


def published_named(name: str) -> tuple[str, Mapping[str, Any]]:
    """`llama-3.1-8b`, or as in a hub: `meta-llama/Llama-3.1-8B`. Raises ConfigError."""
    key = name.strip().lower().rsplit("/", 1)[-1]
    if key in PUBLISHED:
        return key, PUBLISHED[key]
    near = difflib.get_close_matches(key, PUBLISHED, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{name}: no such directory, and no model that the planner knows; {hint}"
        f"give a directory with config.json, or one of {', '.join(PUBLISHED)}"
    )
