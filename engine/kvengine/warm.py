"""Prompts that an operator wants in the prefix cache before anybody asks: a file, one JSON object a line.

    {"prompt": "You are a helpful ...", "tenant": "acme", "pin": true}
    {"messages": [{"role": "system", "content": "..."}], "tenant": "acme"}

A cached prefix serves one tenant only, so each line names whose it is; without `tenant` it is for requests
without one. `pin` keeps the prompt's full blocks for good, within the engine's pinned share. Each prompt goes
through the engine as a request for one token; what is cached already costs almost nothing, so the whole file
can be gone through again at any time.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kvengine.errors import ConfigError
from kvengine.frontend import EngineClient, GenerationError
from kvengine.model.tokenizer import Tokenizer, TokenizerError
from kvengine.protocol import ChatMessage
from kvpilot.clock import Clock

log = logging.getLogger(__name__)


class WarmPrompt(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tenant: str | None = None
    pin: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> "WarmPrompt":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def tokens(self, tokenizer: Tokenizer, limit: int) -> list[int]:
        """What the model will see. Raises TokenizerError."""
        if self.prompt is not None:
            return tokenizer.encode(self.prompt, limit)
        messages = [{"role": one.role, "content": one.content or ""} for one in self.messages or ()]
        return tokenizer.encode_chat(messages, limit)


def load(path: Path) -> list[WarmPrompt]:
    """The prompts of a file. Raises ConfigError with the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--warm {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(WarmPrompt.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            what = f"{where}: {first['msg']}" if where else first["msg"]
            raise ConfigError(f"--warm {path}:{number}: {what}") from None
    return prompts


async def warm(
    engine: EngineClient, tokenizer: Tokenizer, prompts: Sequence[WarmPrompt], limit: int, clock: Clock
) -> int:
    """Bring the prompts into the cache, one after another; how many got there. Logs which did not."""
    done = 0
    for number, prompt in enumerate(prompts, 1):
        try:
            tokens = prompt.tokens(tokenizer, limit)
            sampling = {"max_tokens": 1, "temperature": 0.0}
            (generation,) = engine.submit(
                tokens, sampling, 0, prompt.tenant, clock.monotonic_ns(), pin=prompt.pin
            )
            while (await generation.next())[-1].finish is None:
                pass
        except (TokenizerError, GenerationError) as error:
            log.warning("warm prompt %d is not in the cache: %s", number, error)
        else:
            done += 1
    return done
