"""Text to tokens and back, for any Hugging Face `tokenizer.json`, without torch.

`Tokenizer` encodes prompts and renders chat templates (sandboxed: a model directory is data, not code).
`Detokenizer` turns one request's tokens into text as they come: it never emits part of a UTF-8 character, and
it holds back text that may yet turn out to be the start of a stop string. A token costs O(tokens not yet
settled), which is a handful for real text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend

from kvengine.errors import EngineError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_PARTIAL_TOKENS = 3
"""A UTF-8 character has four bytes, so at most three tokens can be waiting for its end."""
_PATIENCE_TOKENS = 16
"""After this many tokens without one whole character the text is garbage, and is shown as such."""


class TokenizerError(EngineError):
    """A tokenizer directory that cannot be read, or text that it cannot turn into tokens: one line."""


class TextTooLong(TokenizerError):
    """More characters than the tokens allowed can stand for."""


class Tokenizer:
    """The tokenizer of one model directory."""

    def __init__(self, backend: Backend, settings: Mapping[str, Any], eos_ids: frozenset[int]) -> None:
        self.backend = backend
        self.eos_ids = eos_ids
        self._longest_piece = max(map(len, backend.get_vocab()), default=1)
        """Characters; in byte-level vocabularies bytes, which are no fewer."""
        self._special = {key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
        self._chat_template = _default_template(settings.get("chat_template"))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` and, where present, the settings beside it."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder}: no tokenizer.json; give a Hugging Face style model directory")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer: {error}") from error
        settings = dict(_read_json(folder / "tokenizer_config.json"))
        template = folder / "chat_template.jinja"
        if template.is_file():
            settings["chat_template"] = _read_text(template)
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, settings, _eos_ids(folder, backend, settings))

    def encode(self, text: str, most_tokens: int | None = None) -> list[int]:
        """Tokens of a prompt, with whatever special tokens this tokenizer puts around one.

        Raises TextTooLong, before the work of encoding, for a text that `most_tokens` cannot hold.
        """
        return self._encode(text, most_tokens, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], most_tokens: int | None = None) -> list[int]:
        """Tokens of a conversation ready for the assistant's next words; `most_tokens` as in `encode`."""
        if self._chat_template is None:
            raise TokenizerError("this model has no chat template: use /v1/completions")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        try:
            template = environment.from_string(self._chat_template)
            text = template.render(messages=messages, add_generation_prompt=True, **self._special)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TokenizerError(f"the chat template refuses these messages: {error}") from error
        # The template writes the special tokens itself.
        return self._encode(text, most_tokens, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def _encode(self, text: str, most_tokens: int | None, *, add_special_tokens: bool) -> list[int]:
        if most_tokens is not None and len(text) > most_tokens * self._longest_piece:
            raise TextTooLong(
                f"Too long: the prompt has {len(text)} characters, more than {most_tokens} tokens can hold. "
                "Shorten the prompt."
            )
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:  # the library takes half a surrogate for bytes
            raise TokenizerError(
                "the text holds half a surrogate pair, which no tokenizer can encode"
            ) from error


class Detokenizer:
    """One request's text, token by token. `stopped` is the stop string that ended it, or None."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._window: list[int] = []
        self._settled = (
            0  # tokens at the window's start whose text is out; kept because spacing needs context
        )
        self._emitted = 0  # characters of the window's text that are out
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Text that these tokens settle: possibly empty, never part of a character or of a stop string."""
        return "" if self.stopped is not None else self._pass_stop("".join(map(self._settle, tokens)))

    def finish(self) -> str:
        """What was still held back, when no more tokens come."""
        if self.stopped is not None:
            return ""
        rest = self._tokenizer.decode(self._window)[self._emitted :] if self._window else ""
        self._window, self._settled, self._emitted = [], 0, 0
        text = self._pass_stop(rest)
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def _settle(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        if len(whole) == len(text):
            new = text[self._emitted :]
            self._shift()
            return new
        if len(self._window) - self._settled > _PATIENCE_TOKENS:
            whole = text[:-_LONGEST_PARTIAL_TOKENS]
        new = whole[self._emitted :]
        self._emitted = max(self._emitted, len(whole))
        return new

    def _shift(self) -> None:
        """All of the window is out: its last group becomes the context of the next."""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._emitted = len(self._tokenizer.decode(self._window))

    def _pass_stop(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found, key=lambda hit: hit[0])
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise TokenizerError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return value


def _eos_ids(folder: Path, backend: Backend, settings: Mapping[str, Any]) -> frozenset[int]:
    """End tokens, from the most specific source that names one."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    token = backend.token_to_id(_content(settings.get("eos_token")))
    return frozenset() if token is None else frozenset([token])


def _content(token: Any) -> str:
    """A special token is written as its text, or as an object that holds it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _default_template(value: Any) -> str | None:
    """The chat template, or of several named ones the default."""
    if isinstance(value, list):
        value = next((entry.get("template") for entry in value if entry.get("name") == "default"), None)
    return value


def _raise_exception(message: str) -> None:
    """What templates call when they refuse a conversation."""
    raise TemplateError(message)
