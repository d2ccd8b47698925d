"""Devices, models and formats: against published counts, transformers, and a real engine's profile."""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from kvengine.errors import ConfigError
from kvengine.kv.plan.devices import ALIASES, DEVICES, device_named
from kvengine.kv.plan.precision import KV_PRECISIONS, kv_precision, weight_dtype
from kvengine.kv.plan.published import PUBLISHED, published_named
from kvengine.kv.plan.shape import shape_in, shape_of
from kvengine.kv.plan.units import parse_bytes, written
from kvengine.kv.precisions import Precisions
from kvengine.model.config import ModelConfig
from kvengine.model.footprint import Footprint
from kvkernels.precision import PRECISIONS

SHIPPED = Path(__file__).parents[3] / "engine/kvengine/weights/target"
GIB = 2**30

PARAMETERS = {
    # As the published checkpoints count them: the total_size of their index, divided by two bytes.
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-8b": 8_190_735_360,
}


def shape(name: str, **changes: Any):
    return shape_of({**PUBLISHED[name], **changes}, name, name)


def test_parameters_are_the_published_ones() -> None:
    assert {name: shape(name).parameters for name in PUBLISHED} == PARAMETERS


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True, "head_dim": 24}),
        ("Mistral", {"sliding_window": 64}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"attention_bias": True, "head_dim": 16}),
    ],
)
def test_parameters_are_those_that_transformers_makes(kind: str, changes: dict[str, Any]) -> None:
    """Biases, tied embeddings and norms included, from the config.json that it writes."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=131,
        max_position_embeddings=256,
        pad_token_id=0,
        **changes,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    made = sum(parameter.numel() for parameter in model.parameters())
    assert shape_of(json.loads(config.to_json_string(use_diff=False)), kind, kind).parameters == made


def test_kv_bytes_a_token_by_hand() -> None:
    """32 layers, K and V, 8 heads of 128."""
    llama = shape("llama-3.1-8b")
    elements = 32 * 2 * 8 * 128
    sizes = {name: llama.kv_bytes_per_token(one, 1) for name, one in KV_PRECISIONS.items()}
    assert sizes == {
        "fp32": 4 * elements,
        "bf16": 2 * elements,
        "fp16": 2 * elements,
        "fp8": elements,
        "int8": elements,
        "int4": elements // 2,
    }
    assert llama.kv_bytes_per_token(KV_PRECISIONS["bf16"], 8) == 2 * elements // 8
    assert llama.kv_bytes_per_token(KV_PRECISIONS["bf16"], 32) == 2 * elements // 8, "copies of a head"


def test_kv_takes_the_bits_that_the_kernels_store() -> None:
    planned = {name: one.bits for name, one in KV_PRECISIONS.items()}
    assert {name: one.bits for name, one in PRECISIONS.items()}.items() <= planned.items()


def test_fine_scales_take_what_the_reference_engine_stores() -> None:
    """Of the shipped model, held against the engine's own sum; and by hand, where devices share heads."""
    config, mine = ModelConfig.load(SHIPPED), shape_in(SHIPPED)
    for name, precision in PRECISIONS.items():
        stored = Footprint(config, None, 16, 1024, Precisions(precision)).kv_bytes_per_token
        planned = KV_PRECISIONS[name]
        assert stored == mine.kv_bytes_per_token(planned, 1) + mine.fine_bytes_per_token(planned, 1)
    llama = shape("llama-3.1-8b")
    assert [llama.fine_bytes_per_token(KV_PRECISIONS["fp8"], tp) for tp in (1, 8, 32)] == [512, 64, 64]
    assert llama.fine_bytes_per_token(KV_PRECISIONS["int8"], 1) == 0


def test_weights_and_activations_as_vllm_measured_them() -> None:
    """Its profile of Llama-3-8B on an A100, 8,192 tokens and 256 sequences: vllm-project/vllm #10511."""
    llama = shape("llama-3.1-8b")
    assert round(llama.weights_bytes("bf16", 1) / GIB, 2) == 14.96
    assert round(llama.weights_bytes("bf16", 2) / GIB, 2) == 7.48
    for tp in (1, 2):
        estimate = llama.activation_bytes(8192, 256, "bf16", tp) / GIB
        assert 1.26 <= estimate <= 1.26 * 1.15, "an upper bound, not a loose one"


def test_narrow_weights_keep_embeddings_wide() -> None:
    llama = shape("llama-3.1-8b")
    embeddings_and_norms = 2 * 128_256 * 4096 + (2 * 32 + 1) * 4096
    assert (
        llama.weights_bytes("fp8", 1) == (llama.parameters - embeddings_and_norms) + 2 * embeddings_and_norms
    )


def test_a_window_counts_where_the_model_uses_it() -> None:
    assert shape("mistral-7b-v0.1").window == 4096
    assert shape("mistral-7b-v0.3").window is None
    assert shape("qwen2.5-7b").window is None, "its file names a window that is not in use"
    half = shape("qwen2.5-7b", use_sliding_window=True, max_window_layers=14)
    assert (half.window, half.windowed_layers) == (None, 14)
    everywhere = shape("qwen2.5-7b", use_sliding_window=True, max_window_layers=0)
    assert (everywhere.window, everywhere.windowed_layers) == (131_072, 28)
    kinds = ["sliding_attention", "full_attention"] * 16
    assert shape("mistral-7b-v0.1", layer_types=kinds).windowed_layers == 16


def test_a_directory_is_read_as_a_name_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["qwen3-8b"]))
    assert shape_in(tmp_path).parameters == shape_in(tmp_path / "config.json").parameters == 8_190_735_360
    shipped = shape_in(SHIPPED)
    assert (shipped.name, shipped.dtype) == ("target", "fp16")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'; the planner counts llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: a whole number"),
        ({"vocab_size": "32000"}, "vocab_size='32000': a whole number"),
        ({"num_key_value_heads": 5}, "5 KV heads do not divide 32 heads"),
        ({"torch_dtype": "int3"}, "torch_dtype int3"),
    ],
)
def test_a_config_that_cannot_be_counted_is_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        shape("llama-3.1-8b", **changes)
    assert says in str(raised.value)
    assert str(raised.value).startswith("llama-3.1-8b: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not JSON"), ("[]", "not a JSON object"), (None, "No such file")]
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        shape_in(tmp_path)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda one: one.name)
def test_a_device_is_plausible_and_says_where_it_comes_from(device) -> None:
    box_gb = int(device.title.split()[-2])
    # A driver holds something back, and the box counts in either kind of gigabyte.
    assert 0.93 * box_gb * GIB <= device.memory_bytes <= 1.02 * box_gb * GIB
    assert 0.25e12 <= device.bandwidth_bytes_per_s <= 8e12
    assert device.flops["bf16"] == device.flops["fp16"]
    assert 1.9 <= device.flops["int8"] / device.flops["bf16"] <= 2.1
    assert "fp8" not in device.flops or device.flops["fp8"] == device.flops["int8"]
    assert ("no fp8" in device.source) == ("fp8" not in device.flops)
    assert "datasheet" in device.source
    assert isinstance(device.flops, MappingProxyType)


def test_devices_and_models_are_found_as_people_write_them() -> None:
    assert {"a10g", "l4", "l40s", "a100-40gb", "a100-80gb", "h100", "h200", "b200"} == set(DEVICES)
    assert device_named("H200") is device_named("nvidia h200") is DEVICES["h200"]
    assert device_named("a100").memory_bytes == 80 * GIB
    assert set(ALIASES.values()) <= set(DEVICES)
    assert published_named("meta-llama/Llama-3.1-8B")[0] == "llama-3.1-8b"
    assert kv_precision("fp8_e4m3").name == "fp8"
    assert weight_dtype("torch.bfloat16") == "bf16"


@pytest.mark.parametrize(
    ("ask", "name", "says"),
    [
        (device_named, "h20", "did you mean h200?"),
        (device_named, "tpu", "known are a10g"),
        (published_named, "llama-3.1-7b", "did you mean llama-3.1"),
        (kv_precision, "fp9", "did you mean fp8?"),
        (kv_precision, "", "known are fp32"),
        (weight_dtype, "int4", "known are fp32, bf16, fp16, fp8, int8"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(ask, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ask(name)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0.5MB", 500_000), ("0.1GB", 10**8), ("1.5TiB", 3 * 2**39), ("141 GB", 141 * 10**9), ("0.3kB", 300)],
)
def test_sizes_are_exact(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(39_600 * 10**6, "39.6 GB"), (8 * 10**6, "8 MB"), (0, "0 B"), (999, "999 B"), (3 * 10**12, "3 TB")],
)
def test_sizes_are_written_in_the_unit_that_suits(size_bytes: int, text: str) -> None:
    assert written(size_bytes) == text
