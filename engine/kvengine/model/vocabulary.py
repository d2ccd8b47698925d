"""The byte vocabulary of the shipped pair: token id = byte value, then three special tokens.

`tokenizer_files` writes it in the tokenizers library's format, so that every Hugging Face tool reads it.
"""

from __future__ import annotations

import json

BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCAB_SIZE = 259

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "# {{ message.role }}\n{{ message.content }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)


def tokenizer_files(max_tokens: int) -> dict[str, str]:
    """File name -> text of the tokenizer a model directory ships."""
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(BOS_ID, BOS), _special(EOS_ID, EOS), _special(PAD_ID, PAD)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {glyph: byte for byte, glyph in enumerate(_byte_glyphs())},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, indent=1, ensure_ascii=False) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _special(token_id: int, text: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, **flags, "special": True}


def _byte_glyphs() -> list[str]:
    """The printable stand-in the byte-level format has for each byte: itself, or the next free one."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]
