"""What a device's memory is divided into: exact arithmetic."""

import pytest

from kvengine.errors import ConfigError, StartError
from kvengine.kv.plan import Plan, StepMemory, StepSize, plan

GB = 10**9
MB = 10**6


def test_the_source_s_example_exactly() -> None:
    """80 GB device, 14 GB weights, 50 GB KV at 0.5 MB a token: 100,000 tokens, 8 MB a block, 6,250 blocks."""
    division = plan(
        memory_bytes=80 * GB,
        resident_bytes=14 * GB,
        kv_bytes_per_token=MB // 2,
        block_size=16,
        worst_step_bytes=16 * GB,
    )
    assert division.kv_bytes == 50 * GB
    assert division.kv_tokens == 100_000
    assert division.block_bytes == 8 * MB
    assert division.blocks == 6_250
    assert division.headroom_bytes == 16 * GB
    assert not division.oversubscribed


def test_kv_fraction_is_a_share_of_what_remains_after_weights() -> None:
    by_fraction = plan(
        memory_bytes=80 * GB,
        resident_bytes=14 * GB,
        kv_bytes_per_token=MB // 2,
        block_size=16,
        worst_step_bytes=16 * GB,
        kv_fraction=0.6,
    )
    assert by_fraction.kv_bytes == 39_600 * MB
    assert by_fraction.blocks == 4_950


def test_default_leaves_room_for_the_worst_step() -> None:
    division = plan(
        memory_bytes=1_000_000,
        resident_bytes=100_001,
        kv_bytes_per_token=100,
        block_size=16,
        worst_step_bytes=250_000,
    )
    assert division.headroom_bytes >= 250_000
    assert division.headroom_bytes - 250_000 < division.block_bytes
    assert not division.oversubscribed


def test_an_operator_can_oversubscribe() -> None:
    division = plan(
        memory_bytes=1_000_000,
        resident_bytes=100_000,
        kv_bytes_per_token=100,
        block_size=16,
        worst_step_bytes=250_000,
        kv_fraction=0.85,
    )
    assert division.oversubscribed
    assert 0 <= division.headroom_bytes < 250_000


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"kv_fraction": 1.0}, ConfigError, "kv_fraction=1.0"),
        ({"kv_fraction": 0.0}, ConfigError, "kv_fraction=0.0"),
        ({"kv_fraction": 0.001}, StartError, "no KV block"),
        ({"worst_step_bytes": 900_000}, StartError, "lower the step's tokens"),
        ({"resident_bytes": 2_000_000}, StartError, "raise the memory"),
        ({"block_size": 24}, ConfigError, "block_size=24: a power of two, such as 16 or 32"),
        ({"kv_bytes": 900_001}, StartError, "do not fit into the 0.9 MiB that weights leave"),
    ],
)
def test_what_cannot_work_is_one_clear_line(changes: dict, error: type[Exception], says: str) -> None:
    settings = {
        "memory_bytes": 1_000_000,
        "resident_bytes": 100_000,
        "kv_bytes_per_token": 100,
        "block_size": 16,
        "worst_step_bytes": 250_000,
    }
    with pytest.raises(error, match=says) as raised:
        plan(**{**settings, **changes})
    assert "\n" not in str(raised.value)


def test_kv_can_be_given_outright() -> None:
    division = plan(
        memory_bytes=1_000_000,
        resident_bytes=100_000,
        kv_bytes_per_token=100,
        block_size=16,
        worst_step_bytes=250_000,
        kv_bytes=500_000,
    )
    assert (division.blocks, division.kv_bytes) == (312, 499_200)
    assert division.headroom_bytes == 400_800


def test_the_plan_in_one_sentence() -> None:
    mib = 2**20
    division = Plan(64 * mib, 6 * mib, 16, mib // 2, 80, 16 * mib)
    assert division.sentence == (
        "64.0 MiB of memory = 6.0 MiB weights and buffers + 40.0 MiB KV "
        "(80 blocks of 16 tokens = 1280 tokens) + 18.0 MiB for steps"
    )
    tight = Plan(64 * mib, 6 * mib, 16, mib // 2, 100, 16 * mib)
    assert tight.sentence.endswith("; OVERSUBSCRIBED: the largest step needs 16.0 MiB")


def test_step_bytes_are_linear_in_the_step() -> None:
    memory = StepMemory(
        token_bytes=100, logits_row_bytes=1000, drawn_row_bytes=5000, context_token_bytes=7, fixed_bytes=3
    )
    assert memory.step_bytes(StepSize(0, 0, 0, 0)) == 3
    assert memory.step_bytes(StepSize(10, 2, 1, 4)) == 3 + 1000 + 2000 + 5000 + 28
