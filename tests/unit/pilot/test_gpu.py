"""GPU truth: every reading by itself, the right device, and memory whose parts add up."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pilot_world import FIELDS, World, manifest
from recorded_nvml import GIB, GPU_IS_LOST, MIG_UUID, NOT_SUPPORTED, UUID, RecordedNvml
from test_publish import key, samples

from kvpilot.adapters.engine import Sight
from kvpilot.adapters.gpu import TROUBLE, Absent, Gpu, GpuSight
from kvpilot.adapters.gpu_memory import CONTEXT_MOST_BYTES, MemoryBook
from kvpilot.adapters.gpu_watch import GpuWatch, NoGpu, load_nvml
from kvpilot.clock import NS, SystemClock, VirtualClock
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.records import StepLayout, StepRecord

OTHER_UUID = UUID.replace("5f1c", "aaaa")
READINGS = (
    *("nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit"),
    *("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetTemperature", "nvmlDeviceGetClockInfo"),
    *("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMemoryInfo"),
    *("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
    *("nvmlEventSetCreate", "nvmlEventSetWait_v2", "nvmlDeviceGetName"),
)


def watch(nvml: RecordedNvml, *named: str) -> GpuWatch:
    watch = GpuWatch(VirtualClock(), named, lambda: nvml)
    watch.follow("cuda:0", ())
    return watch


def test_readings_are_in_base_units() -> None:
    (seen,) = watch(RecordedNvml()).look().sights
    assert (seen.uuid, seen.name, seen.mig) == (UUID, "NVIDIA H200", False)
    assert seen.readings == pytest.approx(
        {
            "memory_total_bytes": 140 * GIB,
            "memory_used_bytes": 100 * GIB,
            "memory_driver_bytes": GIB,
            "utilisation_ratio": 0.97,
            "memory_utilisation_ratio": 0.61,
            "power_watts": 643.21,
            "power_limit_watts": 700.0,
            "energy_joules": 9_123_456.789,
            "temperature_celsius": 61,
            "sm_clock_hertz": 1.98e9,
            "memory_clock_hertz": 3.201e9,
        }
    )
    assert seen.throttles == {"software_power_cap"}
    assert not seen.throttles & set(TROUBLE), "a power cap at full load is as it should be"
    assert seen.ecc == {"corrected": 3, "uncorrected": 0}


@given(st.sets(st.sampled_from(READINGS)))
def test_what_fails_is_missing_with_its_reason_and_the_rest_is_kept(failing: set[str]) -> None:
    """NVML that errors halfway: no other reading changes, and nothing missing becomes a number."""
    whole = watch(RecordedNvml()).look().sights[0]
    (seen,) = watch(RecordedNvml(**dict.fromkeys(failing, GPU_IS_LOST))).look().sights
    absent = {name for name, found in seen.readings.items() if isinstance(found, Absent)}
    assert {found.reason for found in seen.readings.values() if isinstance(found, Absent)} <= {"gpu_is_lost"}
    kept = {name: found for name, found in seen.readings.items() if name not in absent}
    assert kept.items() <= whole.readings.items()
    assert ("power_watts" in absent) == ("nvmlDeviceGetPowerUsage" in failing)
    assert ("utilisation_ratio" in absent) == ("nvmlDeviceGetUtilizationRates" in failing)
    assert isinstance(seen.ecc["corrected"], Absent) == ("nvmlDeviceGetTotalEccErrors" in failing)
    both = {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"}
    if both <= failing:
        assert seen.throttles == Absent("gpu_is_lost")


def test_an_older_driver_counts_its_own_memory_as_used() -> None:
    nvml = RecordedNvml()
    memory = nvml._nvmlDeviceGetMemoryInfo

    def only_old(handle: str, version: int | None = None) -> Any:
        if version is not None:
            raise nvml.NVMLError(13)
        return memory(handle)

    nvml._nvmlDeviceGetMemoryInfo = only_old  # type: ignore[method-assign]
    (seen,) = watch(nvml).look().sights
    assert seen.value("memory_used_bytes") == 101 * GIB
    assert seen.readings["memory_driver_bytes"] == Absent("function_not_found")


def test_the_engine_s_device_is_found_by_uuid() -> None:
    nvml = RecordedNvml((OTHER_UUID, UUID))
    one = watch(nvml)
    assert "2 devices are visible" in (one.look().why or "")
    one.follow("cuda", (UUID.removeprefix("GPU-"),))
    assert [each.uuid for each in one.look().sights] == [UUID]
    named = watch(nvml, OTHER_UUID)
    named.follow("cuda", (UUID,))
    assert [each.uuid for each in named.look().sights] == [OTHER_UUID], "kvpilot.yaml outranks the engine"
    assert "nvidia-smi -L" in (watch(nvml, "GPU-none").look().why or "")


def test_a_mig_instance_is_a_device_and_its_parent_tells_power_and_clocks() -> None:
    nvml = RecordedNvml((UUID, MIG_UUID))
    nvml.values |= {"nvmlDeviceGetMigMode": (1, 1), "nvmlDeviceGetMaxMigDeviceCount": 1}
    (seen,) = watch(nvml).look().sights
    assert (seen.uuid, seen.mig) == (MIG_UUID, True)
    assert seen.value("power_watts") == 643.21
    assert seen.readings["utilisation_ratio"] == Absent("not_supported_in_mig")


def test_without_a_gpu_there_is_a_reason() -> None:
    idle = GpuWatch(VirtualClock(), (), RecordedNvml)
    idle.follow("cpu", ())
    assert idle.look().why == "the engine computes on cpu"

    def absent() -> Any:
        raise NoGpu("NVML: NVML Shared Library Not Found")

    without = GpuWatch(VirtualClock(), (), absent)
    without.follow("cuda", ())
    assert without.look().why == "NVML: NVML Shared Library Not Found"


def test_a_driver_that_comes_later_is_found() -> None:
    clock, asked = VirtualClock(), []

    def load() -> Any:
        asked.append(clock.monotonic_ns())
        if len(asked) == 1:
            raise NoGpu("NVML: Driver Not Loaded")
        return RecordedNvml()

    late = GpuWatch(clock, (), load)
    late.follow("cuda", ())
    for _ in range(40):
        look = late.look()
        clock.advance(1)
    assert look.sights
    assert asked == [0, 30 * NS]


def test_xid_events_are_counted_and_alarm(tmp_path: Path) -> None:
    world, nvml = gpu_world()
    nvml.xids += [79, 79]
    world.pilot.gpus.look()
    world.tick()
    found = samples(world, tmp_path)
    assert found[key("kvpilot_gpu_xid_events_total", gpu=UUID, xid="79")] == 2
    assert ("KvpilotGpuXid", True) in world.alarms
    alert = {"alertname": "KvpilotGpuXid", "severity": "critical"}
    assert found[key("kvpilot_alert_firing", **alert)] == 1
    for _ in range(11):
        world.clock.advance(30)
        look(world)
    assert world.alarms[-1] == ("KvpilotGpuXid", False)


ALLOCATOR = {"device_reserved_bytes": 95 * GIB, "device_allocated_bytes": 93 * GIB}


DESCRIBED = replace(
    manifest((*FIELDS, *ALLOCATOR)), device="cuda", weights_bytes=16 * GIB, bytes_per_block=75 * GIB // 100
)


def gpu_world(**fields: float) -> tuple[World, RecordedNvml]:
    """An engine with 16 GiB of weights and a pool of 75 GiB on the recorded device."""
    world, nvml = World(), RecordedNvml()
    world.pilot.gpus = GpuWatch(world.clock, (), lambda: nvml)
    world.start_engine(DESCRIBED)
    world.tick(**(ALLOCATOR | fields))
    look(world)
    look(world)
    return world, nvml


def look(world: World, **fields: float) -> None:
    """A second of the NVML thread's life, and the tick that sees it."""
    world.pilot.gpus.look()
    world.tick(**fields)
    world.clock.advance(0.9)


def parts(world: World) -> dict[str, float]:
    assert world.pilot.gpu_signals.parts is not None
    return dict(world.pilot.gpu_signals.parts.parts)


def test_used_memory_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    world, nvml = gpu_world()
    nvml.processes = [(4711, 96 * GIB), (4712, 3 * GIB)]
    look(world)
    found = parts(world)
    assert sum(found.values()) == 100 * GIB
    assert found["weights"] == 16 * GIB
    assert found["fragmentation"] == 2 * GIB
    assert found["others"] == 3 * GIB
    assert found["activations"] == pytest.approx(2 * GIB, abs=100)
    assert found["context"] == 2 * GIB
    assert found["unexplained"] == 0
    shown = samples(world, tmp_path)
    assert shown[key("kvpilot_gpu_memory_part_bytes", gpu=UUID, part="others")] == 3 * GIB
    assert sum(v for (name, _), v in shown.items() if name == "kvpilot_gpu_memory_part_bytes") == 100 * GIB


def test_what_grows_beside_the_allocator_is_unexplained_and_alarms(tmp_path: Path) -> None:
    world, nvml = gpu_world()
    nvml.memory.used = 96 * GIB
    look(world)
    assert parts(world)["unexplained"] == 0
    nvml.memory.used = 100 * GIB
    for _ in range(58):
        look(world)
    found = samples(world, tmp_path)
    assert found[key("kvpilot_device_unexplained_bytes")] == 4 * GIB
    assert world.alarms == [], "not before a minute"
    for _ in range(5):
        look(world)
    assert world.alarms == [("KvpilotDeviceMemoryUnexplained", True)]
    nvml.memory.used = 96 * GIB
    for _ in range(7):
        look(world)
    assert world.alarms[-1] == ("KvpilotDeviceMemoryUnexplained", False)


def test_memory_is_divided_only_while_the_allocator_stands_still() -> None:
    """A pool that grows between NVML's look and the engine's record must not teach a context of nothing."""
    world, nvml = gpu_world()
    before = parts(world)
    look(world, device_reserved_bytes=99 * GIB)
    assert parts(world) == before
    nvml.memory.used = 104 * GIB
    look(world)
    assert parts(world)["unexplained"] == before["unexplained"]


GIBS = st.integers(0, 140)


@given(GIBS, GIBS, GIBS, st.dictionaries(st.integers(1, 9), st.none() | st.integers(0, 80), max_size=4))
def test_parts_add_up_whatever_is_read(
    used: int, reserved: int, allocated: int, processes: dict[int, int | None]
) -> None:
    layout = StepLayout(tuple(STEP_FIELDS[name] for name in ALLOCATOR))
    record = StepRecord(1, (reserved * GIB, allocated * GIB), layout.index)
    book = MemoryBook()
    found = None
    for at_ns in (1, 2):
        gpu = GpuSight(
            UUID,
            at_ns,
            readings={"memory_used_bytes": float(used * GIB)},
            processes={pid: None if held is None else held * GIB for pid, held in processes.items()},
        )
        found = book.take(gpu, Sight(at_ns, manifest=DESCRIBED, nonce=1, record=record))
    assert found is not None
    assert sum(found.parts.values()) == used * GIB
    assert 0 <= found.parts["context"] <= CONTEXT_MOST_BYTES
    own = ("weights", "kv", "activations", "fragmentation", "others")
    assert min(found.parts[part] for part in own) >= 0


def test_a_new_start_of_the_engine_is_learnt_afresh() -> None:
    world, _nvml = gpu_world()
    assert parts(world)["context"] == 2 * GIB
    world.start_engine(DESCRIBED)
    world.tick(**ALLOCATOR)
    assert world.pilot.gpu_signals.parts is None


def test_missing_is_never_zero(tmp_path: Path) -> None:
    world, nvml = gpu_world()
    nvml.fails["nvmlDeviceGetPowerUsage"] = NOT_SUPPORTED
    nvml.fails["nvmlDeviceGetMemoryInfo"] = NOT_SUPPORTED
    look(world)
    for _ in range(20):
        world.tick()
    found = samples(world, tmp_path)
    absent = {"gpu": UUID, "reading": "power_watts", "reason": "not_supported"}
    assert found[key("kvpilot_gpu_missing", **absent)] == 1
    assert key("kvpilot_gpu_power_watts", gpu=UUID) not in found
    assert key("kvpilot_device_unexplained_bytes") not in found
    assert found[key("kvpilot_signal_available", signal="device_unexplained_bytes")] == 0
    assert found[key("kvpilot_gpu_busy_ratio")] == 0.97
    cpu = World()
    cpu.start_engine()
    cpu.ticks(1)
    assert samples(cpu, tmp_path)[key("kvpilot_signal_available", signal="gpu_throttled")] == 0


def test_heat_is_a_signal() -> None:
    world, nvml = gpu_world()
    nvml.values["nvmlDeviceGetCurrentClocksEventReasons"] = 0x40 | 0x4
    look(world)
    readings = world.pilot.gpu_signals.readings(world.pilot.gpus.latest, world.sight())
    assert readings["gpu_throttled", None].value == 1.0  # type: ignore[union-attr]


@pytest.mark.gpu
def test_a_real_device() -> None:
    try:
        nvml = load_nvml()
    except NoGpu as reason:
        pytest.skip(str(reason))
    gpu = Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
    seen = gpu.look(SystemClock().monotonic_ns())
    gpu.close()
    assert seen.uuid.startswith(("GPU-", "MIG-"))
    total, used = seen.value("memory_total_bytes"), seen.value("memory_used_bytes")
    assert total is not None
    assert used is not None
    assert 0 <= used <= total
    assert 0 < (seen.value("power_watts") or 1) < 3000
