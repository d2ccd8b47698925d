"""From a generation's tokens to what the client sees: text, stop strings, chunks or one whole, usage, times.

An answer is advanced until it is done. Tokens that arrive after a stop string are dropped; tokens up to it
count as usage. Subclasses say how each endpoint words it.
"""

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from kvengine.frontend import Generation, Tokens
from kvengine.model.tokenizer import Detokenizer, Tokenizer
from kvengine.protocol import Body, usage

Chunk = dict[str, Any]


class Choice:
    """One generation's text as it comes."""

    def __init__(
        self, index: int, generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]
    ) -> None:
        self.index = index
        self.done = False
        self.finish: str | None = None
        self.tokens = 0
        self.emitted: list[tuple[int, int]] = []
        """(when, how many), on the core's clock."""
        self.last: Tokens | None = None
        self.generation = generation
        self._detokenizer = Detokenizer(tokenizer, stops)

    @property
    def score(self) -> float:
        """Mean log-probability of its tokens."""
        return self.last.logprob / self.tokens if self.last and self.tokens else float("-inf")

    async def advance(self) -> str:
        """Wait for more tokens; the text that they settle. Raises GenerationError."""
        text = ""
        for emission in await self.generation.next():
            self.emitted.append((emission.at_ns, len(emission.tokens)))
            self.last = emission
            # One by one: what a step brings out together must not decide which stop string is found.
            for token in emission.tokens:
                self.tokens += 1
                text += self._detokenizer.push([token])
                if self._detokenizer.stopped is not None:
                    break
            if self._detokenizer.stopped is None and emission.finish is not None:
                text += self._detokenizer.finish()
            if self._detokenizer.stopped is not None:
                self.finish, self.done = "stop", True
                self.generation.stop()
                break
            if emission.finish is not None:
                self.finish, self.done = emission.finish, True
        return text


class Answer:
    """One request's answer, of one choice or more. `created_s` is wall time, for display."""

    prefix: str

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: Body,
        model: str,
        created_s: int,
        prompt_tokens: int,
        generations: Sequence[Generation],
    ) -> None:
        self._body = body
        self._choices = [
            Choice(index, generation, tokenizer, body.stops) for index, generation in enumerate(generations)
        ]
        self._base = {"id": f"{self.prefix}-{uuid4().hex}", "created": created_s, "model": model}
        self._prompt_tokens = prompt_tokens
        self._texts: list[list[str]] = [[] for _ in generations]
        self._waiting: dict[asyncio.Task[str], Choice] = {}

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self._choices)

    async def collect(self) -> None:
        """Wait for the end. Raises GenerationError."""
        for choice in self._choices:
            while not choice.done:
                self._texts[choice.index].append(await choice.advance())

    async def advance(self) -> list[Chunk]:
        """Wait for more tokens and return the chunks they make, perhaps none. Raises GenerationError."""
        chunks = []
        for choice, text in await self._arrived():
            if text or choice.done:
                chunks.append(self._chunk(choice.index, text, choice.finish))
        if self.done and self._body.include_usage:
            chunks.append(self._usage_chunk())
        if self.done and self._body.kvpilot_times:
            chunks[-1]["kvpilot"] = self._times()
        return chunks

    def cancel(self) -> None:
        """Nobody reads it any more; does nothing once it is done."""
        for task in self._waiting:
            task.cancel()
        for choice in self._choices:
            choice.generation.cancel()

    def opening(self) -> list[Chunk]:
        """Chunks before the first text."""
        return []

    def whole(self) -> Chunk:
        """The complete answer, once done."""
        best = sorted(self._choices, key=lambda choice: -choice.score)[: self._body.choices]
        if self._body.use_beam_search or len(self._choices) == self._body.choices:
            # Beams come in order.
            best = self._choices[: self._body.choices]
        answer = {
            **self._base,
            "object": self._object(stream=False),
            "choices": [
                self._choice(index, "".join(self._texts[choice.index]), choice.finish)
                for index, choice in enumerate(best)
            ],
            "usage": self._usage(),
        }
        if self._body.kvpilot_times:
            answer["kvpilot"] = self._times()
        return answer

    async def _arrived(self) -> list[tuple[Choice, str]]:
        """Every choice for which there is something new, and its text."""
        if len(self._choices) == 1:
            return [(self._choices[0], await self._choices[0].advance())]
        busy = self._waiting.values()
        idle = [choice for choice in self._choices if not choice.done and choice not in busy]
        for choice in idle:
            task = asyncio.ensure_future(choice.advance())
            # The first to fail speaks for all; what the others raise is nobody's business.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._waiting[task] = choice
        done, _pending = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        arrived = sorted(((self._waiting.pop(task), task) for task in done), key=lambda one: one[0].index)
        return [(choice, task.result()) for choice, task in arrived]

    def _times(self) -> dict[str, Any]:
        """When the core emitted what, on the machine's monotonic clock."""
        choice = self._choices[0]
        assert choice.last is not None
        return {
            "received_ns": choice.generation.received_ns,
            "first_scheduled_ns": choice.last.first_scheduled_ns,
            "emitted": choice.emitted,
            "preemptions": choice.last.preemptions,
        }

    def _chunk(self, index: int, text: str, finish: str | None) -> Chunk:
        chunk = {
            **self._base,
            "object": self._object(stream=True),
            "choices": [self._chunk_choice(index, text, finish)],
        }
        if self._body.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage_chunk(self) -> Chunk:
        return {
            **self._base,
            "object": self._object(stream=True),
            "choices": [],
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """What was generated counts, whether it was chosen or not."""
        return usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))

    def _object(self, stream: bool) -> str:
        raise NotImplementedError

    def _choice(self, index: int, text: str, finish: str | None) -> Chunk:
        raise NotImplementedError

    def _chunk_choice(self, index: int, text: str, finish: str | None) -> Chunk:
        raise NotImplementedError


class TextAnswer(Answer):
    """Of /v1/completions."""

    prefix = "cmpl"

    def _object(self, stream: bool) -> str:
        return "text_completion"

    def _choice(self, index: int, text: str, finish: str | None) -> Chunk:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}

    _chunk_choice = _choice


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def opening(self) -> list[Chunk]:
        chunks = [self._chunk(choice.index, "", None) for choice in self._choices]
        for chunk in chunks:
            chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return chunks

    def _object(self, stream: bool) -> str:
        return "chat.completion.chunk" if stream else "chat.completion"

    def _choice(self, index: int, text: str, finish: str | None) -> Chunk:
        message = {"role": "assistant", "content": text}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}

    def _chunk_choice(self, index: int, text: str, finish: str | None) -> Chunk:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
