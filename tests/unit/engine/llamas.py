"""Small random Llamas for tests, as transformers holds them and as the engine does."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvengine.kv.storage import KvStorage
from kvengine.model.config import ModelConfig
from kvengine.model.llama import Llama, Span
from kvengine.model.weights import pack
from kvkernels.scratch import Scratch

BLOCKS = 64


def reference_model(
    *, kv_heads: int = 4, tied: bool = True, head_dim: int = 16, layers: int = 3, seed: int = 0
) -> LlamaForCausalLM:
    """Random, with norms that are not all ones and logits that are not all alike."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=5_000.0,
        tie_word_embeddings=tied,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "embed" not in name:
                parameter.mul_(4.0)
    return model


def engine_model(reference: LlamaForCausalLM) -> Llama:
    raw = reference.config
    config = ModelConfig(
        vocab_size=raw.vocab_size,
        hidden=raw.hidden_size,
        intermediate=raw.intermediate_size,
        layers=raw.num_hidden_layers,
        heads=raw.num_attention_heads,
        kv_heads=raw.num_key_value_heads,
        head_dim=raw.head_dim,
        rope_theta=5_000.0,
        norm_eps=raw.rms_norm_eps,
        max_positions=raw.max_position_embeddings,
        tied_embeddings=raw.tie_word_embeddings,
    )
    return Llama(config, pack(dict(reference.state_dict()), config))


@dataclass
class Bench:
    """A model with a KV pool of its own."""

    model: Llama
    storage: KvStorage
    scratch: Scratch

    @classmethod
    def of(cls, model: Llama, block_size: int = 16) -> "Bench":
        geometry = model.geometry(block_size)
        storage = KvStorage(model.config.layers, BLOCKS * 16 // block_size, geometry, "cpu")
        return cls(model, storage, Scratch.for_geometries([geometry], model.max_tokens, torch.device("cpu")))

    @torch.inference_mode()
    def forward(self, *spans: Span) -> Tensor:
        return self.model.forward(spans, self.storage, self.scratch).clone()

    def prefill(self, tokens: list[int], blocks: list[int], chunk: int) -> Tensor:
        """Logits of every position, computed `chunk` tokens at a time."""
        parts = []
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            parts.append(self.forward(Span(part, start, blocks, len(part))))
        return torch.cat(parts)
