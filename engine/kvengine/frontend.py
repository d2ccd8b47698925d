"""The API process's side of the core: submit a request, read what it emits, cancel it, notice a dead core.

Everything runs on one asyncio loop, which reads the channel whenever there is something. Emissions that
arrive while a reader is busy are handed over together. When the core dies every open generation gets an
error: no client hangs.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvengine.channel import Channel
from kvengine.errors import ChannelClosed

CORE_GONE = "The engine core has stopped; the server must be restarted."


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens that one step brought out; `at_ns` is the core's time of emission. The last has a `finish`."""

    at_ns: int
    tokens: list[int]
    finish: str | None
    first_scheduled_ns: int
    preemptions: int
    logprob: float = 0.0
    """Of all tokens so far, where the request is scored."""


class GenerationError(Exception):
    """The core could not serve a request; `status` is the HTTP one."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Generation:
    """One request in flight. Exactly one reader."""

    def __init__(self, engine: "EngineClient", request_id: int, received_ns: int) -> None:
        self.id = request_id
        self.received_ns = received_ns
        self._engine = engine
        self._arrived: list[Tokens] = []
        self._error: GenerationError | None = None
        self._wake = asyncio.Event()

    async def next(self) -> list[Tokens]:
        """What was emitted since the last call, waiting for at least one emission. Raises GenerationError."""
        await self._wake.wait()
        self._wake.clear()
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            if self._error is not None:
                self._wake.set()
            return arrived
        assert self._error is not None
        raise self._error

    def stop(self) -> None:
        """Its text is complete; further tokens are not wanted."""
        self._engine.end(self, "stop")

    def cancel(self) -> None:
        """Nobody reads it any more; does nothing if it has ended."""
        self._engine.end(self, "cancel")

    def deliver(self, tokens: Tokens) -> None:
        self._arrived.append(tokens)
        self._wake.set()

    def fail(self, error: GenerationError) -> None:
        self._error = error
        self._wake.set()


class EngineClient:
    """All generations in flight, by id."""

    def __init__(self, channel: Channel) -> None:
        self.alive = True
        self._channel = channel
        self._open: dict[int, Generation] = {}
        self._last_id = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def attach(self) -> None:
        """Start reading on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._channel, self._read)

    def close(self) -> None:
        """Let the core go: it stops when the channel closes."""
        if self._loop is not None:
            self._die()
        self._channel.close()

    def submit(
        self,
        prompt: list[int],
        sampling: Mapping[str, Any],
        level: int,
        tenant: str | None,
        received_ns: int,
        *,
        choices: int = 1,
        pin: bool = False,
        eviction: Mapping[str, Any] | None = None,
    ) -> list[Generation]:
        """Send a request to the core, for one generation or more; `sampling`: the fields of SamplingParams.

        `pin`: keep the prompt in the prefix cache for good. `eviction`: the fields of Eviction. Raises
        GenerationError.
        """
        if not self.alive:
            raise GenerationError(503, CORE_GONE)
        first = self._last_id + 1
        self._last_id += choices
        generations = [Generation(self, first + number, received_ns) for number in range(choices)]
        self._open.update((generation.id, generation) for generation in generations)
        self._send(["add", first, prompt, sampling, level, tenant, received_ns, choices, pin, eviction])
        if not self.alive:
            raise GenerationError(503, CORE_GONE)
        return generations

    def count_rejected(self) -> None:
        """Tell the core that a request was refused here, for its totals."""
        self._send(["reject", 0])

    def end(self, generation: Generation, kind: str) -> None:
        """`stop` or `cancel` a generation, unless it has ended."""
        if self._open.pop(generation.id, None) is not None:
            self._send([kind, generation.id])

    def _send(self, message: list[Any]) -> None:
        if not self.alive:
            return
        try:
            self._channel.send(message)
        except ChannelClosed:
            self._die()
            return
        if self._channel.unsent and self._loop is not None:
            self._loop.add_writer(self._channel, self._flush)

    def _flush(self) -> None:
        try:
            self._channel.flush()
        except ChannelClosed:
            self._die()
            return
        if not self._channel.unsent and self._loop is not None:
            self._loop.remove_writer(self._channel)

    def _read(self) -> None:
        try:
            messages = self._channel.receive()
        except ChannelClosed:
            self._die()
            return
        for message in messages:
            if message[0] == "out":
                self._hand_out(message[1], message[2])
            else:
                _kind, request_id, status, reason = message
                generation = self._open.pop(request_id, None)
                if generation is not None:
                    generation.fail(GenerationError(status, reason))

    def _hand_out(self, at_ns: int, rows: list[list[Any]]) -> None:
        for row in rows:
            generation = self._open.get(row[0])
            if generation is None:
                continue  # Cancelled or stopped while these were under way.
            tokens = Tokens(at_ns, *row[1:])
            if tokens.finish is not None:
                del self._open[generation.id]
            generation.deliver(tokens)

    def _die(self) -> None:
        if not self.alive:
            return
        self.alive = False
        if self._loop is not None:
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
        for generation in self._open.values():
            generation.fail(GenerationError(503, CORE_GONE))
        self._open.clear()
