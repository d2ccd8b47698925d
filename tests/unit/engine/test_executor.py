"""The executor: one pass for whatever a step holds, speculation that changes nothing, memory that ends."""

import random
from dataclasses import replace

import pytest
import torch
from llamas import engine_model, reference_model

from kvengine.errors import DeviceOutOfMemory, StartError
from kvengine.executor.torch import EagerExecutor
from kvengine.memory import MIB, DeviceMemory
from kvengine.model.footprint import Footprint
from kvengine.model.llama import Llama
from kvengine.model.weights import LlamaWeights
from kvengine.request import Request, SamplingParams
from kvengine.sched.batch import Batch, Slice, SliceResult

BLOCKS, BLOCK_SIZE = 80, 16


@pytest.fixture(scope="module")
def target() -> Llama:
    return engine_model(reference_model(kv_heads=2))


@pytest.fixture(scope="module")
def draft(target: Llama) -> Llama:
    """The target without its last layer: it agrees often, not always."""
    held = target._weights
    shortened = LlamaWeights(held.embedding, held.layers[:-1], held.norm, held.output)
    return Llama(replace(target.config, layers=2), shortened)


def executor(target: Llama, draft: Llama | None = None, memory: DeviceMemory | None = None) -> EagerExecutor:
    return EagerExecutor(target, draft, memory or DeviceMemory(256 * MIB), BLOCKS, BLOCK_SIZE)


def requests(count: int, temperature: float = 0.0, top_p: float = 1.0, longest: int = 70) -> list[Request]:
    """Prompts of many lengths, each with blocks for 60 tokens more, shuffled over the pool."""
    rng = random.Random(11)
    free = rng.sample(range(BLOCKS), BLOCKS)
    made = []
    for number in range(count):
        prompt = [rng.randrange(97) for _ in range(3 + number * (longest - 3) // max(1, count - 1))]
        request = Request(number, prompt, SamplingParams(40, temperature, top_p, seed=number))
        request.blocks = [free.pop() for _ in range(-(-(len(prompt) + 60) // BLOCK_SIZE))]
        made.append(request)
    return made


def commit(engine: EagerExecutor, slices: list[Slice]) -> list[SliceResult]:
    """A step, and what the core does with its results."""
    results = engine.execute(Batch(slices))
    for piece, result in zip(slices, results, strict=True):
        piece.request.computed = piece.start + piece.count + result.accepted
        piece.request.tokens += result.tokens
    return results


def prefill(engine: EagerExecutor, request: Request, chunk: int = 512) -> None:
    while (left := len(request.tokens) - request.computed) > 1 or not request.output_count:
        count = min(chunk, left)
        commit(engine, [Slice(request, request.computed, count, samples=count == left)])


def decode(request: Request, drafts: int = 0) -> Slice:
    return Slice(request, request.computed, 1, drafts, samples=True, decode=True)


def output(request: Request) -> list[int]:
    return request.tokens[len(request.prompt) :]


def generate(engine: EagerExecutor, made: list[Request], tokens: int, drafts: int = 0) -> tuple[int, int]:
    """All prompts, then all decoding together; drafted and accepted."""
    for request in made:
        prefill(engine, request)
    drafted = accepted = 0
    while running := [request for request in made if request.output_count < tokens]:
        wanted = [min(drafts, tokens - request.output_count - 1) for request in running]
        for result in commit(engine, [decode(*pair) for pair in zip(running, wanted, strict=True)]):
            drafted, accepted = drafted + result.drafted, accepted + result.accepted
    return drafted, accepted


@pytest.mark.parametrize("drafts", [1, 4])
def test_greedy_with_drafts_is_plain_greedy(target: Llama, draft: Llama, drafts: int) -> None:
    plain, speculative = requests(6), requests(6)
    generate(executor(target), plain, 40)
    drafted, accepted = generate(executor(target, draft), speculative, 40, drafts)
    assert 20 <= accepted <= drafted - 20  # both verdicts happened, or the test says nothing
    assert [output(request) for request in speculative] == [output(request) for request in plain]


def test_greedy_is_transformers_greedy(target: Llama) -> None:
    made = requests(3)
    generate(executor(target), made, 12)
    reference = reference_model(kv_heads=2)
    for request in made:
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([request.prompt]),
                attention_mask=torch.ones(1, len(request.prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        assert output(request) == expected[0, len(request.prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_mixed_step_is_separate_steps(target: Llama, draft: Llama, temperature: float) -> None:
    """Prefill chunks, plain decodes and decodes with drafts, in any order: each emits what it would alone."""

    def prepared(engine: EagerExecutor) -> list[Slice]:
        made = requests(7, temperature, 0.9)
        for request in made[:5]:
            prefill(engine, request)
            commit(engine, [decode(request)])
        return [
            decode(made[0], 3),
            Slice(made[5], 0, 20),
            decode(made[1]),
            decode(made[2], 1),
            Slice(made[6], 0, len(made[6].prompt), samples=True),
            decode(made[3], 3),
            decode(made[4]),
        ]

    engine = executor(target, draft)
    together = commit(engine, prepared(engine))
    engine = executor(target, draft)
    apart = [commit(engine, [piece])[0] for piece in prepared(engine)]
    assert together == apart
    assert [len(result.tokens) >= 1 for result in together] == [True, False, True, True, True, True, True]
    assert [result.drafted for result in together] == [3, 0, 0, 1, 0, 3, 0]


@pytest.mark.parametrize("chunk", [1, 7, 16, 17])
def test_chunked_prefill_emits_what_whole_prompts_do(target: Llama, chunk: int) -> None:
    whole, chunked = requests(3, 0.8), requests(3, 0.8)
    for made, size in ((whole, 512), (chunked, chunk)):
        engine = executor(target)
        for request in made:
            prefill(engine, request, size)
        for _ in range(5):
            commit(engine, [decode(request) for request in made])
    assert [output(request) for request in chunked] == [output(request) for request in whole]


def test_sampling_is_the_request_s_own_whatever_the_batch(target: Llama) -> None:
    together, apart = requests(4, 0.9, 0.95), requests(4, 0.9, 0.95)
    generate(executor(target), together, 20)
    for request in apart:
        generate(executor(target), [request], 20)
    assert [output(request) for request in together] == [output(request) for request in apart]
    assert len({tuple(output(request)) for request in together}) == 4


def test_speculation_may_come_and_go(target: Llama, draft: Llama) -> None:
    """Switched on late the draft catches up by itself; switched off and on again it goes on."""
    plain, switched = requests(4), requests(4)
    generate(executor(target), plain, 40)
    engine = executor(target, draft)
    for request in switched:
        prefill(engine, request)
    accepted = step = 0
    while running := [request for request in switched if request.output_count < 40]:
        drafts = 3 if 5 <= step < 10 or step >= 15 else 0
        step += 1
        wanted = [min(drafts, 39 - request.output_count) for request in running]
        results = commit(engine, [decode(*pair) for pair in zip(running, wanted, strict=True)])
        accepted += sum(result.accepted for result in results)
    assert accepted > 0
    assert [output(request) for request in switched] == [output(request) for request in plain]


def test_without_a_draft_model_drafts_are_not_made(target: Llama) -> None:
    made = requests(2)
    assert generate(executor(target), made, 10, drafts=4) == (0, 0)


def test_a_draft_that_reaches_less_far_is_refused(target: Llama, draft: Llama) -> None:
    short = Llama(draft.config, draft._weights, max_tokens=64)
    with pytest.raises(StartError, match="reaches 64 positions"):
        executor(target, short)


def state(request: Request) -> tuple:
    return (
        list(request.tokens),
        list(request.blocks),
        request.computed,
        request.draft_computed,
        request.rng.getstate(),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_out_of_memory_leaves_everything_as_it_was(target: Llama, draft: Llama, temperature: float) -> None:
    """A step that does not fit fails alone: same state, same account, and it runs once there is room."""
    memory = DeviceMemory(64 * MIB)
    engine = executor(target, draft, memory)
    made = requests(5, temperature, 0.9)
    for request in made[:4]:
        prefill(engine, request)
    commit(engine, [decode(request, 2) for request in made[:4]])
    held, before = memory.allocated_bytes, [state(request) for request in made]
    slices = [
        *(decode(request, 3) for request in made[:4]),
        Slice(made[4], 0, len(made[4].prompt), samples=True),
    ]
    pool = [layer.clone() for layer in engine._target_kv.blocks]
    memory.set_external(memory.free_bytes - 200_000)
    with pytest.raises(DeviceOutOfMemory, match="a step's workspace needs") as raised:
        engine.execute(Batch(slices))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert "\n" not in str(raised.value)
    assert [state(request) for request in made] == before
    assert memory.allocated_bytes == held
    assert all(torch.equal(*pair) for pair in zip(pool, engine._target_kv.blocks, strict=True))
    memory.set_external(0)
    undisturbed = executor(target, draft)
    again = requests(5, temperature, 0.9)
    for request in again[:4]:
        prefill(undisturbed, request)
    commit(undisturbed, [decode(request, 2) for request in again[:4]])
    twin = {request.id: request for request in again}
    expected = commit(undisturbed, [replace(piece, request=twin[piece.request.id]) for piece in slices])
    assert commit(engine, slices) == expected


def test_a_larger_chunk_is_what_goes_over(target: Llama) -> None:
    """Memory grows with the step's tokens: of the same prompt a small chunk fits and a large one does not."""
    memory = DeviceMemory(64 * MIB)
    engine = executor(target, memory=memory)
    request = requests(2, longest=300)[1]
    step = engine.footprint.step
    memory.set_external(memory.free_bytes - step.fixed_bytes - 150 * step.token_bytes)
    with pytest.raises(DeviceOutOfMemory, match="step of 300 tokens"):
        engine.execute(Batch([Slice(request, 0, 300, samples=True)]))
    prefill(engine, request, 140)
    assert request.output_count == 1


def test_an_engine_that_does_not_fit_says_so(target: Llama) -> None:
    resident_bytes = Footprint(target.config, None, BLOCK_SIZE, target.max_tokens).resident_bytes
    with pytest.raises(DeviceOutOfMemory, match=r"at start: .*KV blocks needs"):
        executor(target, memory=DeviceMemory(resident_bytes + MIB // 2))
    with pytest.raises(DeviceOutOfMemory, match=r"at start: .*weights and buffers needs"):
        executor(target, memory=DeviceMemory(resident_bytes - 1))
