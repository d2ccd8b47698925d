"""From a generation's tokens to what the client sees: text, stop strings, chunks or one whole, usage, times.

An answer is advanced until it is done. Tokens that arrive after a stop string are dropped; tokens up to it
count as usage. Subclasses say how each endpoint words it.
"""

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from kvengine.frontend import Generation, Tokens
from kvengine.model.tokenizer import Detokenizer, Tokenizer
from kvengine.protocol import Body, usage

Chunk = dict[str, Any]


class Answer:
    """One request's answer. `created_s` is wall time, for display."""

    prefix: str

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: Body,
        model: str,
        created_s: int,
        prompt_tokens: int,
        generation: Generation,
    ) -> None:
        self.done = False
        self._body = body
        self._generation = generation
        self._detokenizer = Detokenizer(tokenizer, body.stops)
        self._base = {"id": f"{self.prefix}-{uuid4().hex}", "created": created_s, "model": model}
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._emitted: list[tuple[int, int]] = []
        self._last: Tokens | None = None
        self._text: list[str] = []
        self._finish: str | None = None

    async def collect(self) -> None:
        """Wait for the end. Raises GenerationError."""
        while not self.done:
            self._text.append(self._take(await self._generation.next()))

    async def advance(self) -> list[Chunk]:
        """Wait for more tokens and return the chunks they make, perhaps none. Raises GenerationError."""
        text = self._take(await self._generation.next())
        chunks = [self._chunk(text, self._finish)] if text or self.done else []
        if self.done and self._body.include_usage:
            chunks.append(self._usage_chunk())
        if self.done and self._body.kvpilot_times:
            chunks[-1]["kvpilot"] = self._times()
        return chunks

    def opening(self) -> list[Chunk]:
        """Chunks before the first text."""
        return []

    def whole(self) -> Chunk:
        """The complete answer, once done."""
        answer = {
            **self._base,
            "object": self._object(stream=False),
            "choices": [self._choice("".join(self._text), self._finish)],
            "usage": usage(self._prompt_tokens, self._completion_tokens),
        }
        if self._body.kvpilot_times:
            answer["kvpilot"] = self._times()
        return answer

    def _take(self, arrived: Sequence[Tokens]) -> str:
        """The text that these emissions settle."""
        text = ""
        for emission in arrived:
            self._emitted.append((emission.at_ns, len(emission.tokens)))
            self._last = emission
            # One by one: what a step brings out together must not decide which stop string is found.
            for token in emission.tokens:
                self._completion_tokens += 1
                text += self._detokenizer.push([token])
                if self._detokenizer.stopped is not None:
                    break
            if self._detokenizer.stopped is None and emission.finish is not None:
                text += self._detokenizer.finish()
            if self._detokenizer.stopped is not None:
                self._finish, self.done = "stop", True
                self._generation.stop()
                break
            if emission.finish is not None:
                self._finish, self.done = emission.finish, True
        return text

    def _times(self) -> dict[str, Any]:
        """When the core emitted what, on the machine's monotonic clock."""
        assert self._last is not None
        return {
            "received_ns": self._generation.received_ns,
            "first_scheduled_ns": self._last.first_scheduled_ns,
            "emitted": self._emitted,
            "preemptions": self._last.preemptions,
        }

    def _chunk(self, text: str, finish: str | None) -> Chunk:
        chunk = {
            **self._base,
            "object": self._object(stream=True),
            "choices": [self._chunk_choice(text, finish)],
        }
        if self._body.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage_chunk(self) -> Chunk:
        return {
            **self._base,
            "object": self._object(stream=True),
            "choices": [],
            "usage": usage(self._prompt_tokens, self._completion_tokens),
        }

    def _object(self, stream: bool) -> str:
        raise NotImplementedError

    def _choice(self, text: str, finish: str | None) -> Chunk:
        raise NotImplementedError

    def _chunk_choice(self, text: str, finish: str | None) -> Chunk:
        raise NotImplementedError


class TextAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"

    def _object(self, stream: bool) -> str:
        return "text_completion"

    def _choice(self, text: str, finish: str | None) -> Chunk:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    _chunk_choice = _choice


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def opening(self) -> list[Chunk]:
        chunk = self._chunk("", None)
        chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return [chunk]

    def _object(self, stream: bool) -> str:
        return "chat.completion.chunk" if stream else "chat.completion"

    def _choice(self, text: str, finish: str | None) -> Chunk:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}

    def _chunk_choice(self, text: str, finish: str | None) -> Chunk:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
