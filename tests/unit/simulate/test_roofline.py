"""The roofline: against a measured profile, and against what any accelerator must obey."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from roofline import PROFILE, compared, residuals
from shared_traces import needs_traces

from kvengine.errors import ConfigError
from kvengine.kv.plan.devices import DEVICES, device_named
from kvpilot.simulate.plants.named import Machine, model_named
from kvpilot.simulate.plants.plant import Features
from kvpilot.simulate.plants.roofline import Roofline

H100 = Machine("h100", "llama-3-8b")
PLANT = H100.plant()

features = st.builds(
    lambda prefill, decodes, context, position, drafts: Features(
        prefill, decodes, decodes * context, prefill * (prefill + position), decodes * drafts
    ),
    st.integers(0, 8192),
    st.integers(0, 256),
    st.integers(1, 8192),
    st.integers(0, 32_768),
    st.integers(0, 5),
)


@needs_traces
def test_matrices_take_what_an_h100_took() -> None:
    """Llama-2-7B's four matrices, 1 to 4,096 tokens, tp 1 to 8: Vidur's profile."""
    rows = list(compared(PROFILE))
    single = residuals([row for row in rows if row.operation != "layer"])
    layer = residuals([row for row in rows if row.operation == "layer"])
    print(f"{len(rows)} points: a matrix {single}, four of a layer {layer}")
    assert len(rows) == 5 * 1044
    assert single["median"] < 0.10
    assert single["p90"] < 0.25
    assert layer["median"] < 0.10
    assert layer["p90"] < 0.20


@given(features)
def test_more_work_never_takes_less_time_or_memory(one: Features) -> None:
    base_s, base_bytes = PLANT.step_seconds(one), PLANT.activation_bytes(one)
    assert 0 < base_s < 1000
    for name in ("context_tokens", "chunk_positions", "decode_sequences"):
        more = one._replace(**{name: getattr(one, name) + 64})
        assert PLANT.step_seconds(more) >= base_s
        assert PLANT.activation_bytes(more) >= base_bytes


def test_decoding_waits_for_memory_and_prompts_for_arithmetic() -> None:
    """One token and eight take nearly the same time; twice the prompt takes nearly twice."""
    one, eight = PLANT.step_seconds(Features(0, 1, 100)), PLANT.step_seconds(Features(0, 8, 800))
    assert eight < 1.05 * one
    weights_s = model_named("llama-3-8b").weights_bytes("bf16", 1) / DEVICES["h100"].bandwidth_bytes_per_s
    assert weights_s < one < 2 * weights_s
    short, long = (PLANT.step_seconds(Features(n, 0, 0, n * n)) for n in (2048, 4096))
    assert 1.9 * short < long < 2.3 * short


def test_a_chunk_deep_in_a_prompt_costs_more_than_the_first() -> None:
    first = PLANT.step_seconds(Features(512, 0, 0, 512 * 512))
    deep = PLANT.step_seconds(Features(512, 0, 0, 512 * 32_768))
    assert deep > 1.5 * first


def test_many_short_prompts_in_a_step_attend_each_to_itself() -> None:
    """Half of each square, whatever they come to together."""
    nothing = PLANT.step_seconds(Features(2048, 0, 0, 0))
    eight = PLANT.step_seconds(Features(2048, 0, 0, 8 * 256 * 256)) - nothing
    sixteen = PLANT.step_seconds(Features(2048, 0, 0, 16 * 256 * 256)) - nothing
    launches_s = 32 * 4e-6
    assert sixteen - launches_s == pytest.approx(2 * (eight - launches_s), rel=0.01)
    assert eight > launches_s


def test_tensor_parallel_divides_the_work_and_pays_for_the_links() -> None:
    one, four = Machine("h100", "llama-3.1-70b"), Machine("h100", "llama-3.1-70b", tp=4)
    step = Features(2048, 32, 64_000, 2048 * 2048)
    ratio = one.plant().step_seconds(step) / four.plant().step_seconds(step)
    assert 2.5 < ratio < 4
    # Over PCIe the reductions eat most of what four devices compute.
    pcie = [Roofline(device_named("l40s"), model_named("llama-3-8b"), tp).step_seconds(step) for tp in (1, 4)]
    assert pcie[0] / pcie[1] < ratio
    with pytest.raises(ConfigError, match="does not divide"):
        Machine("h100", "llama-3-8b", tp=3).plant()


def test_a_draft_model_costs_a_pass_for_every_depth_and_n_grams_only_their_verification() -> None:
    none, two, four = (Features(0, 32, 32_000, 0, 32 * k) for k in (0, 2, 4))
    drafting = Machine("h100", "llama-3-8b", "llama-3.2-1b").plant()
    steps = [drafting.step_seconds(each) for each in (none, two, four)]
    assert steps[0] == PLANT.step_seconds(none)
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1], rel=0.15)
    assert PLANT.step_seconds(four) < steps[1]


def test_noise_is_seeded_and_right_on_average() -> None:
    step = Features(512, 32, 32_000, 512 * 512)
    noisy = [H100.plant(sigma=0.1, seed=3) for _ in range(2)]
    drawn = [[plant.step_seconds(step) for _ in range(400)] for plant in noisy]
    assert drawn[0] == drawn[1]
    assert drawn[0] != [H100.plant(sigma=0.1, seed=4).step_seconds(step) for _ in range(400)]
    assert sorted(drawn[0])[200] == pytest.approx(PLANT.step_seconds(step), rel=0.03)


def test_memory_and_activations_are_the_planners() -> None:
    """A step as large as the plan's worst fits exactly; one token more does not."""
    serving = H100.memory()
    headroom = serving.after_weights_bytes - serving.plan.kv_bytes
    worst = Features(H100.chunk_tokens - 255, 255, 255_000, H100.chunk_tokens**2)
    needs = PLANT.activation_bytes(worst)
    assert needs == serving.activation_bytes <= headroom
    assert PLANT.activation_bytes(worst._replace(prefill_tokens=4 * H100.chunk_tokens)) > headroom
    scores = H100.plant(score_bytes=2.0)
    assert scores.activation_bytes(worst) == needs + 2 * worst.chunk_positions


def test_unknown_names_are_one_line() -> None:
    for machine in (Machine("h900", "llama-3-8b"), Machine("h100", "llama-9")):
        with pytest.raises(ConfigError) as caught:
            machine.plant()
        assert "\n" not in str(caught.value)
