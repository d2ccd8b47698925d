"""The device's account: never over its limit, nothing lost, and the error a device raises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvengine.memory import MIB, DeviceMemory


def test_going_over_raises_what_a_device_raises_and_takes_nothing() -> None:
    memory = DeviceMemory(100 * MIB)
    memory.charge(90 * MIB, "weights")
    with pytest.raises(
        torch.OutOfMemoryError, match=r"a step's workspace needs 11.0 MiB, 10.0 MiB free of 100.0"
    ):
        memory.charge(11 * MIB, "a step's workspace")
    assert memory.allocated_bytes == 90 * MIB
    memory.charge(10 * MIB, "exactly what is free")
    assert memory.free_bytes == 0


def test_held_is_given_back_however_the_block_ends() -> None:
    memory = DeviceMemory(1000)
    with memory.held(600, "a step"):
        assert memory.reading().free == 400
    assert memory.free_bytes == 1000
    with pytest.raises(KeyError), memory.held(600, "a step"):
        raise KeyError
    with pytest.raises(torch.OutOfMemoryError), memory.held(1001, "a step"):
        pytest.fail("ran without its memory")
    assert memory.allocated_bytes == 0
    assert memory.peak_bytes == 600


def test_a_neighbour_takes_from_the_same_account() -> None:
    memory = DeviceMemory(1000)
    memory.charge(700, "weights")
    assert memory.set_external(200) == 200
    assert memory.free_bytes == 100
    with pytest.raises(torch.OutOfMemoryError):
        memory.charge(101, "a step")
    assert memory.set_external(5000) == 300  # it cannot take what the engine holds
    assert memory.free_bytes == 0
    assert memory.set_external(0) == 0
    assert memory.free_bytes == 300


@pytest.mark.parametrize("size_bytes", [-1, 11])
def test_release_of_what_is_not_held_is_misuse(size_bytes: int) -> None:
    memory = DeviceMemory(100)
    memory.charge(10, "weights")
    with pytest.raises(ValueError, match=str(size_bytes)):
        memory.release(size_bytes)


OPERATIONS = st.lists(st.tuples(st.sampled_from(["charge", "release", "external"]), st.integers(0, 150)))


@given(OPERATIONS)
def test_the_account_never_goes_over(operations: list[tuple[str, int]]) -> None:
    """Whatever happens in whatever order: parts are never negative and never sum to more than the limit."""
    memory = DeviceMemory(100)
    held: list[int] = []
    external = 0
    for operation, size in operations:
        if operation == "charge":
            try:
                memory.charge(size, "something")
                held.append(size)
            except torch.OutOfMemoryError:
                assert size > 100 - sum(held) - external
        elif operation == "release" and held:
            memory.release(held.pop(size % len(held)))
        elif operation == "external":
            external = memory.set_external(size)
        assert memory.allocated_bytes == sum(held)
        assert memory.free_bytes == 100 - sum(held) - external >= 0
