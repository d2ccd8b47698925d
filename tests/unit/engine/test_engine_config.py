"""Settings: what is understood, what is refused, and that nothing is lost on the way to the core process."""

import json
from pathlib import Path

import pytest

from kvengine.config import EngineConfig, ExternalMemory, parse_bytes, parse_external
from kvengine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1000", 1000), ("256MiB", 2**28), ("1.5 GiB", 3 * 2**29), ("80GB", 80 * 10**9), ("2kB", 2000)],
)
def test_sizes_are_binary_or_decimal_as_written(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-5MiB", "5 mib", "5M", "1e3", "nan"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(text)


def test_external_memory_has_a_size_and_a_moment() -> None:
    assert parse_external("64MiB@10s") == ExternalMemory(2**26, 10.0)
    for text in ("64MiB", "64MiB@10", "@10s", "64MiB@-1s"):
        with pytest.raises(ConfigError):
            parse_external(text)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 24}, "block_size=24: a power of two"),
        ({"max_running": 0}, "max_running=0"),
        ({"speculative_tokens": -1}, "speculative_tokens=-1"),
        ({"speculative_tokens": 17}, "at most 16"),
        ({"admission_watermark": 0.01}, "0.05 to 1"),
        ({"admission_watermark": float("nan")}, "0.05 to 1"),
        ({"prefill_chunk_tokens": 4096}, "--step-tokens"),
        ({"max_model_len": 1}, "max_model_len=1"),
        ({"kv_fraction": 0.0}, "kv_fraction=0.0"),
        ({"kv_fraction": 1.5}, "kv_fraction=1.5: a share"),
        ({"kv_fraction": -0.1}, "kv_fraction=-0.1"),
        ({"kv_fraction": float("nan")}, "kv_fraction=nan"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**settings)


def test_a_configuration_survives_the_wire() -> None:
    config = EngineConfig(
        model=Path("/models/a"), external=ExternalMemory(5, 1.5), classes=("batch", "interactive")
    )
    assert EngineConfig.from_wire(json.loads(json.dumps(config.to_wire()))) == config
    bare = EngineConfig(draft=None)
    assert EngineConfig.from_wire(json.loads(json.dumps(bare.to_wire()))) == bare
