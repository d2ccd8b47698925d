"""What else could be: the same question with one thing changed - chunk, precision, block size."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvengine.errors import EngineError
from kvengine.kv.plan.precision import KV_PRECISIONS
from kvengine.kv.plan.serving import Question, Serving, answer

_OFFERED = ("bf16", "fp8", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Alternative:
    """One change and its answer, or why there is none."""

    change: str
    serving: Serving | None
    refused: str | None = None


def alternatives(serving: Serving) -> list[Alternative]:
    """Half and twice the chunk, every other precision, half and twice the block."""
    return [_try(change, question) for change, question in _changes(serving)]


def _changes(serving: Serving) -> Iterator[tuple[str, Question]]:
    question = serving.question
    if question.model is not None and question.activation_bytes is None:
        for chunk in (question.chunk_tokens // 2, question.chunk_tokens * 2):
            if chunk:
                yield f"chunk {chunk:,}", replace(question, chunk_tokens=chunk)
    if question.model is not None and question.kv_bytes_per_token is None:
        current = question.kv_precision
        for name in _OFFERED:
            other = KV_PRECISIONS[name]
            if current is not None and other.bits != current.bits:
                yield f"KV in {name}", replace(question, kv_precision=other)
    elif serving.kv_bytes_per_token > 1:
        half = serving.kv_bytes_per_token // 2
        yield "KV in half the bits", replace(question, kv_bytes_per_token=half)
    for block in (question.block_size // 2, question.block_size * 2):
        if block:
            yield f"block of {block}", replace(question, block_size=block)


def _try(change: str, question: Question) -> Alternative:
    try:
        return Alternative(change, answer(question))
    except EngineError as error:
        return Alternative(change, None, str(error))
