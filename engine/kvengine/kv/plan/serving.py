"""An operator's question, and the plan that answers it: how much KV, how many tokens, how many sequences.

Every size is of one device. What a question gives outright (weights, KV bytes a token, activations) is
taken; the rest follows from the model. Unlike the engine, which an operator may oversubscribe on purpose, a
plan whose parts do not fit is refused, with the numbers.
"""

from dataclasses import dataclass

from kvengine.errors import ConfigError
from kvengine.kv.plan.division import Plan, check_block_size, plan
from kvengine.kv.plan.precision import Precision
from kvengine.kv.plan.shape import ModelShape
from kvengine.kv.plan.units import written

RESERVE_BYTES = 3 * 2**30
RESERVE_TP_BYTES = 5 * 2**30
"""Kept free on a device from the table, for what is neither weights nor KV nor activations. Measured by vLLM
on an A100 of 80 GB (vllm-project/vllm pull request 10511): 0.8 GiB that CUDA does not hand out and 1.8 GiB
outside torch (context, workspaces); 3.6 GiB with two devices, which also hold communication buffers.
"""
USUAL_TOKENS = 4096
"""Length of a sequence where the question gives none."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is known. None is "not given"; bytes are of one device."""

    memory_bytes: int
    reserve_bytes: int = 0
    block_size: int = 16
    chunk_tokens: int = 2048
    max_running: int = 256
    sequence_tokens: int | None = None
    kv_bytes: int | None = None
    kv_fraction: float | None = None
    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    activation_bytes: int | None = None
    window: int | None = None
    model: ModelShape | None = None
    tp: int = 1
    kv_precision: Precision | None = None
    weight_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """The answer. `weights + reserve + kv + activations + unused` is the memory, to the byte."""

    question: Question
    plan: Plan
    weights_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    """What is set aside for steps."""
    window: int | None
    sequence_tokens: int

    @property
    def after_weights_bytes(self) -> int:
        """What remains after weights and reserve: what a KV fraction is of."""
        return self.plan.memory_bytes - self.plan.resident_bytes

    @property
    def unused_bytes(self) -> int:
        return self.plan.headroom_bytes - self.activation_bytes

    @property
    def sequence_blocks(self) -> int:
        """That a sequence of this length holds, at the most."""
        return _blocks_held(self.sequence_tokens, self.window, self.plan.block_size)

    @property
    def max_sequences(self) -> int:
        """That fit at this length, sharing nothing."""
        return self.plan.blocks // self.sequence_blocks

    @property
    def tail_waste(self) -> float:
        """Mean share of a sequence's blocks that lies empty at its end."""
        return (self.plan.block_size - 1) / 2 / (self.sequence_blocks * self.plan.block_size)


def answer(question: Question) -> Serving:
    """Plan. Raises ConfigError, in one line, for what cannot be or does not fit."""
    _check(question)
    weights, per_token = _weights(question), _kv_bytes_per_token(question)
    window = question.window or (question.model.window if question.model else None)
    if window is not None and window < question.block_size:
        raise ConfigError(f"window={window}: smaller than a block of {question.block_size} tokens")
    activations = _activations(question)
    resident = weights + question.reserve_bytes
    _check_fit(question, weights, per_token, activations)
    division = plan(
        memory_bytes=question.memory_bytes,
        resident_bytes=resident,
        kv_bytes_per_token=per_token,
        block_size=question.block_size,
        worst_step_bytes=activations or 0,
        kv_fraction=question.kv_fraction,
        kv_bytes=question.kv_bytes,
    )
    if activations is None:
        # Nothing says what steps need: they have what KV leaves.
        activations = division.headroom_bytes
    serving = Serving(question, division, weights, per_token, activations, window, _sequence_tokens(question))
    if question.sequence_tokens is not None and serving.max_sequences < 1:
        raise ConfigError(
            f"--length {question.sequence_tokens}: a sequence needs {serving.sequence_blocks:,} blocks, "
            f"the pool has {division.blocks:,} ({division.kv_tokens:,} tokens)"
        )
    return serving


def _check(question: Question) -> None:
    check_block_size(question.block_size)
    for option, value in (
        ("--device-memory", question.memory_bytes),
        ("--kv-bytes-per-token", question.kv_bytes_per_token),
        ("--kv-memory", question.kv_bytes),
        ("--chunk", question.chunk_tokens),
        ("--max-running", question.max_running),
        ("--length", question.sequence_tokens),
        ("--window", question.window),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}: at least 1")
    fraction = question.kv_fraction
    if fraction is not None and question.kv_bytes is not None:
        raise ConfigError("--kv-memory and --kv-fraction: give one of them")
    if fraction is not None and not 0 < fraction < 1:
        raise ConfigError(
            f"--kv-fraction {fraction:g}: a share of what remains after weights, above 0 and below 1"
        )
    model = question.model
    if model is None:
        if question.tp != 1:
            raise ConfigError(f"--tp {question.tp}: needs a model; sizes given outright are of one device")
        return
    model.check_tp(question.tp)
    if question.sequence_tokens is not None and question.sequence_tokens > model.max_positions:
        raise ConfigError(
            f"--length {question.sequence_tokens}: {model.name} has {model.max_positions:,} positions"
        )


def _weights(question: Question) -> int:
    if question.weights_bytes is not None:
        return question.weights_bytes
    if question.model is None:
        raise ConfigError("--weights is missing: give it, or a model")
    dtype = question.weight_dtype or (None if question.model.packed else question.model.dtype)
    if dtype is None:
        raise ConfigError(
            f"{question.model.name}: config.json does not say how many bytes the weights take"
            f"{' (quantization_config)' if question.model.packed else ''}; give --weights or --weight-dtype"
        )
    return question.model.weights_bytes(dtype, question.tp)


def _kv_bytes_per_token(question: Question) -> int:
    if question.kv_bytes_per_token is not None:
        return question.kv_bytes_per_token
    if question.model is None or question.kv_precision is None:
        raise ConfigError("--kv-bytes-per-token is missing: give it, or a model")
    return question.model.kv_bytes_per_token(question.kv_precision, question.tp)


def _activations(question: Question) -> int | None:
    """None where nothing says; then KV must be given."""
    if question.activation_bytes is not None:
        return question.activation_bytes
    if question.model is not None:
        return question.model.activation_bytes(
            question.chunk_tokens, question.max_running, question.model.compute_dtype, question.tp
        )
    if question.kv_bytes is None and question.kv_fraction is None:
        raise ConfigError(
            "how much is KV? Give --kv-memory or --kv-fraction; or a model, or --activation-memory, "
            "and KV is what they leave"
        )
    return None


def _check_fit(question: Question, weights: int, per_token: int, activations: int | None) -> None:
    memory, reserve = question.memory_bytes, question.reserve_bytes
    kept = f" and {written(reserve)} kept free" if reserve else ""
    left = memory - weights - reserve
    if left <= 0:
        raise ConfigError(
            f"{written(weights)} of weights{kept} do not fit into {written(memory)} of device memory; "
            "take a larger device, more of them (--tp) or narrower weights"
        )
    kv = question.kv_bytes
    if kv is None and question.kv_fraction is not None:
        kv = round(left * question.kv_fraction)
    if kv is not None and kv + (activations or 0) > left:
        steps = f" and {written(activations)} for steps" if activations else ""
        raise ConfigError(
            f"{written(kv)} of KV{steps} do not fit into the {written(left)} that "
            f"{written(weights)} of weights{kept} leave of {written(memory)}"
        )
    block = per_token * question.block_size
    room = left - (activations or 0) if kv is None else kv
    if room < block:
        steps = f" and {written(activations)} for steps" if activations else ""
        raise ConfigError(
            f"no room for one KV block of {written(block)}: {written(weights)} of weights{kept}{steps} leave "
            f"{written(max(room, 0))} of {written(memory)}"
            if kv is None
            else f"{written(kv)} of KV hold no block of {written(block)} ({question.block_size} tokens)"
        )


def _sequence_tokens(question: Question) -> int:
    if question.sequence_tokens is not None:
        return question.sequence_tokens
    return min(USUAL_TOKENS, question.model.max_positions) if question.model else USUAL_TOKENS


def _blocks_held(tokens: int, window: int | None, block_size: int) -> int:
    """A window that slides over block borders touches one block more than it fills."""
    whole = -(-tokens // block_size)
    if window is None:
        return whole
    return min(whole, (window + block_size - 2) // block_size + 1)
