"""The OpenAI wire format, as far as this engine speaks it: bodies in, responses and chunks out, errors.

Fields that we do not know are ignored, as clients send many; fields that we know and cannot honour are
refused when they ask for something, so that nobody gets other output than was asked for without being told.
"""

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvengine.kv.eviction.policy import RECOVERY, SINK_TOKENS, Eviction

MAX_STOPS = 4
MAX_CHOICES = 128
"""OpenAI's own limit; an engine's is what it runs at once, if that is less."""
COMPLETION_MAX_TOKENS = 16
"""What a completion without max_tokens gets; OpenAI's default."""
MAX_LENGTH_PENALTY = 10.0
"""Powers of a length beyond this leave the range of floats for long texts."""

_REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class BadRequest(Exception):
    """A request that cannot be served as it is; one line for its sender."""

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class EvictBody(BaseModel):
    """How a request gives up KV, in tokens; see docs/eviction.md."""

    model_config = ConfigDict(strict=True, extra="forbid")

    policy: str
    sink: int = SINK_TOKENS
    recent: int | None = None
    heavy: int = 0
    by_head: bool = False
    recovery: float = RECOVERY

    @model_validator(mode="after")
    def _means_something(self) -> "EvictBody":
        assert self.eviction
        return self

    @property
    def eviction(self) -> Eviction:
        return Eviction(**self.model_dump())


class Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    use_beam_search: bool | None = False
    """Of vLLM's former API, with `length_penalty` and `early_stopping`: best_of beams, the best n of them."""
    length_penalty: float | None = Field(default=None, ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY)
    early_stopping: bool | Literal["never"] | None = None
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    ignore_eos: bool = False
    """Extension: go on to max_tokens whatever the model says."""
    kvpilot_times: bool = False
    """Extension: tell when the engine emitted each token."""
    kvpilot_evict: EvictBody | None = None
    """Extension: keep KV of some tokens only."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_we_lack(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            for name, harmless in _REFUSED_UNLESS.items():
                if name in raw and raw[name] not in harmless:
                    raise ValueError(f"{name}={json.dumps(raw[name])[:60]} is not supported; leave it out")
        return raw

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        return stop

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @model_validator(mode="after")
    def _times_are_of_one(self) -> "Body":
        if self.kvpilot_times and self.candidates > 1:
            raise ValueError("kvpilot_times tells the times of one choice: leave out n and best_of")
        return self

    @model_validator(mode="after")
    def _best_of_what_is_whole(self) -> "Body":
        if self.best_of is not None and self.best_of < self.choices:
            raise ValueError(f"best_of={self.best_of} is less than n={self.choices}")
        if self.use_beam_search:
            self._check_beams()
            return self
        if self.length_penalty not in (None, 1.0) or self.early_stopping not in (None, False):
            raise ValueError(
                "length_penalty and early_stopping need use_beam_search: set it, or leave them out"
            )
        if self.stream and self.candidates > self.choices:
            raise ValueError("best_of cannot be streamed: which is best is known at the end")
        return self

    def _check_beams(self) -> None:
        if self.stream:
            raise ValueError("use_beam_search cannot be streamed: which beams are best is known at the end")
        if self.candidates < 2:
            raise ValueError("use_beam_search needs the number of beams: set best_of (or n) to 2 or more")
        if self.temperature or self.top_p not in (None, 1.0):
            raise ValueError("use_beam_search draws nothing: leave out temperature and top_p, or set 0 and 1")
        if self.stops:
            raise ValueError("stop with use_beam_search is not supported; leave it out")
        if self.kvpilot_evict is not None:
            raise ValueError("kvpilot_evict with use_beam_search: beams keep all of their KV; leave one out")

    @property
    def choices(self) -> int:
        """How many answers the client gets."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """How many are generated; the best of them are the choices."""
        return self.best_of or self.choices

    @property
    def stops(self) -> list[str]:
        """Stop strings that can stop anything."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens to generate; None for as many as fit."""
        return self.max_tokens


B = TypeVar("B", bound=Body)


class CompletionBody(Body):
    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            return prompt[0]
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and all(type(token) is int for token in prompt)
        ):
            raise ValueError("give one text or one list of token ids")
        return prompt

    @property
    def asked_tokens(self) -> int | None:
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str
    content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        """Content may come in parts; ours are text."""
        if not isinstance(content, list):
            return content
        texts = [
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        ]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError("only text parts are supported")
        return "".join(texts)


class ChatBody(Body):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(kind: type[B], data: bytes) -> B:
    """A body from its bytes. Raises BadRequest with the first thing that is wrong."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "list[int]", "list[str]"))
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise BadRequest(f"{where}: {message}" if where else message, param=where or None) from None


def sampling(body: Body, max_tokens: int, seed: int) -> dict[str, Any]:
    """The fields of SamplingParams; `seed` is for requests that bring none."""
    if body.use_beam_search:
        return {
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": body.ignore_eos,
            "scored": True,
            "beams": body.candidates,
            "length_penalty": 1.0 if body.length_penalty is None else body.length_penalty,
            "early_stopping": body.early_stopping or False,
        }
    return {
        "max_tokens": max_tokens,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "seed": seed if body.seed is None else body.seed,
        "ignore_eos": body.ignore_eos,
        "scored": body.candidates > body.choices,
    }


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An OpenAI-style error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
