"""A plan's promises, over questions that nobody thought of: nothing is lost, and more is never less."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvengine.errors import ConfigError
from kvengine.kv.plan.alternatives import alternatives
from kvengine.kv.plan.precision import KV_PRECISIONS
from kvengine.kv.plan.published import PUBLISHED
from kvengine.kv.plan.serving import Question, Serving, answer
from kvengine.kv.plan.shape import shape_of

GB, MB = 10**9, 10**6
SHAPES = [shape_of(raw, name, name) for name, raw in PUBLISHED.items()]


@st.composite
def model_questions(draw: st.DrawFn) -> Question:
    return Question(
        # Rarely too little: refusals have tests of their own.
        memory_bytes=draw(st.integers(40 * GB, 600 * GB)),
        reserve_bytes=draw(st.sampled_from([0, 1, 3 * GB])),
        block_size=draw(st.sampled_from([1, 8, 16, 32, 128])),
        chunk_tokens=draw(st.integers(1, 65_536)),
        max_running=draw(st.integers(1, 2_000)),
        kv_fraction=draw(st.none() | st.floats(0.01, 0.99)),
        model=draw(st.sampled_from(SHAPES)),
        tp=draw(st.sampled_from([1, 2, 4])),
        kv_precision=draw(st.sampled_from(list(KV_PRECISIONS.values()))),
        weight_dtype=draw(st.none() | st.sampled_from(["fp8", "int8", "fp32"])),
    )


def answered(question: Question) -> Serving:
    """An answer, or another question."""
    try:
        return answer(question)
    except ConfigError:
        assume(False)
        raise


@given(model_questions())
def test_every_byte_has_one_place(question: Question) -> None:
    serving = answered(question)
    division = serving.plan
    parts = (serving.weights_bytes, question.reserve_bytes, division.kv_bytes, serving.activation_bytes)
    assert all(part >= 0 for part in parts)
    assert sum(parts) + serving.unused_bytes == question.memory_bytes
    assert serving.unused_bytes >= 0
    assert division.kv_bytes == division.blocks * division.block_bytes
    assert division.kv_tokens == division.blocks * question.block_size
    assert serving.max_sequences * serving.sequence_blocks <= division.blocks
    if question.kv_fraction is None:
        assert serving.unused_bytes < division.block_bytes, "one more block would fit"
    else:
        asked = round(serving.after_weights_bytes * question.kv_fraction)
        assert division.kv_bytes <= asked < division.kv_bytes + division.block_bytes


@given(model_questions(), st.sampled_from(["fp32", "bf16", "fp8", "int4"]))
def test_narrower_kv_is_never_fewer_tokens(question: Question, other: str) -> None:
    wide, narrow = sorted(
        (question.kv_precision, KV_PRECISIONS[other]), key=lambda one: -one.vector_bytes(128)
    )
    before = answered(replace(question, kv_precision=wide))
    after = answer(replace(question, kv_precision=narrow))
    assert after.plan.kv_tokens >= before.plan.kv_tokens
    assert after.max_sequences >= before.max_sequences


@given(model_questions(), st.integers(0, 100 * GB), st.integers(0, 10_000))
def test_more_memory_is_never_fewer_tokens_and_a_larger_step_never_more(
    question: Question, more_bytes: int, more_tokens: int
) -> None:
    here = answered(replace(question, kv_fraction=None))
    larger = answer(replace(here.question, memory_bytes=question.memory_bytes + more_bytes))
    assert larger.plan.blocks >= here.plan.blocks
    smaller = answer(replace(here.question, chunk_tokens=max(1, question.chunk_tokens - more_tokens)))
    assert smaller.plan.blocks >= here.plan.blocks
    assert smaller.activation_bytes <= here.activation_bytes


@given(model_questions())
def test_alternatives_change_one_thing_and_keep_the_promises(question: Question) -> None:
    serving = answered(question)
    others = alternatives(serving)
    assert {other.change.split()[0] for other in others} == {"chunk", "KV", "block"}
    for other in others:
        assert (other.serving is None) == (other.refused is not None)
        if other.serving is None:
            continue
        differ = [f for f in Question.__slots__ if getattr(other.serving.question, f) != getattr(question, f)]
        assert len(differ) == 1
        assert other.serving.unused_bytes >= 0


@given(
    kv_bytes=st.integers(1, 10**12), per_token=st.integers(1, MB), block_size=st.sampled_from([1, 4, 16, 64])
)
def test_kv_given_outright_is_filled_to_less_than_a_block(
    kv_bytes: int, per_token: int, block_size: int
) -> None:
    question = Question(
        memory_bytes=kv_bytes + 5,
        weights_bytes=4,
        kv_bytes=kv_bytes,
        kv_bytes_per_token=per_token,
        block_size=block_size,
    )
    serving = answered(question)
    assert serving.plan.kv_bytes <= kv_bytes < serving.plan.kv_bytes + serving.plan.block_bytes
    assert serving.activation_bytes == question.memory_bytes - 4 - serving.plan.kv_bytes
    assert serving.unused_bytes == 0


@given(tokens=st.integers(1, 200), window=st.integers(1, 60), exponent=st.integers(0, 5))
def test_a_window_holds_what_a_sliding_one_touches(tokens: int, window: int, exponent: int) -> None:
    """Against the definition: token i looks back on (i - window, i]; the most blocks at any i."""
    block = 2**exponent
    assume(window >= block)
    question = Question(
        memory_bytes=10**9,
        weights_bytes=1,
        kv_bytes=10**8,
        kv_bytes_per_token=1,
        block_size=block,
        window=window,
        sequence_tokens=tokens,
    )
    touched = max(
        len({position // block for position in range(max(0, i - window + 1), i + 1)}) for i in range(tokens)
    )
    held = answer(question).sequence_blocks
    # A short sequence may end before the window has met its worst alignment.
    assert touched <= held <= touched + (tokens < window + block)


LLAMA = shape_of(PUBLISHED["llama-3.1-8b"], "llama-3.1-8b", "")
SIZES = Question(memory_bytes=80 * GB, weights_bytes=14 * GB, kv_bytes=50 * GB, kv_bytes_per_token=MB // 2)
MODEL = Question(memory_bytes=80 * GB, model=LLAMA, kv_precision=KV_PRECISIONS["bf16"])


def test_the_issue_s_example_exactly() -> None:
    serving = answer(SIZES)
    assert (serving.plan.kv_tokens, serving.plan.block_bytes, serving.plan.blocks) == (100_000, 8 * MB, 6_250)
    assert serving.activation_bytes == 16 * GB
    share = answer(replace(SIZES, kv_bytes=None, kv_fraction=0.6))
    assert (share.plan.kv_bytes, share.after_weights_bytes) == (39_600 * MB, 66 * GB)


def test_sequences_share_nothing_and_hold_whole_blocks() -> None:
    assert answer(replace(SIZES, sequence_tokens=17)).max_sequences == 6_250 // 2
    assert answer(replace(SIZES, sequence_tokens=100_000)).max_sequences == 1


@pytest.mark.parametrize(
    ("question", "changes", "says"),
    [
        (SIZES, {"weights_bytes": 90 * GB}, "90 GB of weights do not fit into 80 GB of device memory"),
        (SIZES, {"weights_bytes": 80 * GB}, "80 GB of weights do not fit"),
        (
            SIZES,
            {"kv_bytes": 70 * GB},
            "70 GB of KV do not fit into the 66 GB that 14 GB of weights leave of 80 GB",
        ),
        (SIZES, {"activation_bytes": 20 * GB}, "50 GB of KV and 20 GB for steps do not fit into the 66 GB"),
        (SIZES, {"kv_bytes": 7 * MB}, "7 MB of KV hold no block of 8 MB"),
        (SIZES, {"kv_bytes": None}, "--kv-fraction"),
        (SIZES, {"kv_fraction": 0.5}, "give one of them"),
        (SIZES, {"weights_bytes": None}, "--weights is missing"),
        (SIZES, {"kv_bytes_per_token": None}, "--kv-bytes-per-token is missing"),
        (SIZES, {"kv_bytes_per_token": 0}, "--kv-bytes-per-token 0"),
        (SIZES, {"block_size": 24}, "block_size=24: a power of two, such as 16 or 32"),
        (SIZES, {"block_size": 0}, "block_size=0"),
        (SIZES, {"block_size": -16}, "block_size=-16"),
        (SIZES, {"window": 15}, "window=15: smaller than a block of 16 tokens"),
        (SIZES, {"sequence_tokens": 100_001}, "needs 6,251 blocks, the pool has 6,250"),
        (SIZES, {"tp": 2}, "--tp 2: needs a model"),
        (MODEL, {"memory_bytes": 16 * GB}, "16.06 GB of weights do not fit into 16 GB"),
        (MODEL, {"memory_bytes": 16_100 * MB}, "no room for one KV block of 2.1 MB"),
        (MODEL, {"tp": 3}, "--tp 3: does not divide the 32 attention heads"),
        (MODEL, {"tp": 0}, "--tp 0"),
        (MODEL, {"kv_fraction": 0.999}, "for steps do not fit into the"),
        (MODEL, {"kv_fraction": float("nan")}, "--kv-fraction nan"),
        (MODEL, {"sequence_tokens": 131_073}, "131,072 positions"),
        (MODEL, {"chunk_tokens": 0}, "--chunk 0"),
        (MODEL, {"model": replace(LLAMA, packed=True)}, "quantization_config"),
        (MODEL, {"model": replace(LLAMA, dtype=None)}, "give --weights or --weight-dtype"),
    ],
)
def test_what_cannot_be_is_one_line_with_its_numbers(question: Question, changes: dict, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        answer(replace(question, **changes))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
