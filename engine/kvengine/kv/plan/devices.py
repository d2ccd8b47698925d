"""Accelerators: memory, bandwidth, peak compute. For the planner, and for a roofline of a step's time.

`memory_bytes` is what the driver reports (`nvidia-smi`, memory.total), not the name on the box: an H200 of
"141 GB" reports 143,771 MiB, which is 150.8 GB. CUDA hands out a little less; see `serving.RESERVE_BYTES`.
Bandwidth and compute are datasheet peaks of matrix units, **without** sparsity; what kernels reach is less.
`flops` has no entry for a dtype that the matrix units do not multiply: unknown or slower is never zero.
"""

import difflib
from dataclasses import dataclass
from types import MappingProxyType

from kvengine.errors import ConfigError

_MIB = 2**20
_TERA = 10**12
_GB = 10**9


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator. `flops` is operations a second (a multiply-add is two) by dtype, dense."""

    name: str
    title: str
    memory_bytes: int
    bandwidth_bytes_per_s: int
    flops: MappingProxyType[str, int]
    source: str


def _device(name: str, title: str, memory_mib: int, gb_per_s: int, source: str, **tflops: float) -> Device:
    flops = MappingProxyType({dtype: round(value * _TERA) for dtype, value in tflops.items()})
    return Device(name, title, memory_mib * _MIB, gb_per_s * _GB, flops, source)


_AMPERE = {"tf32": 156, "bf16": 312, "fp16": 312, "int8": 624}
_HOPPER = {"tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9, "int8": 1978.9}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device(
            "a10g",
            "NVIDIA A10G 24 GB",
            23_028,
            600,
            "A10G datasheet as published by AWS (g5 instances); no fp8 units",
            tf32=35,
            bf16=70,
            fp16=70,
            int8=140,
        ),
        _device(
            "l4",
            "NVIDIA L4 24 GB",
            23_034,
            300,
            "L4 datasheet; it lists figures with sparsity, halved here",
            tf32=60,
            bf16=121,
            fp16=121,
            fp8=242.5,
            int8=242.5,
        ),
        _device(
            "l40s",
            "NVIDIA L40S 48 GB",
            46_068,
            864,
            "L40S datasheet",
            tf32=183,
            bf16=362.05,
            fp16=362.05,
            fp8=733,
            int8=733,
        ),
        _device(
            "a100-40gb",
            "NVIDIA A100 SXM 40 GB",
            40_960,
            1_555,
            "A100 datasheet, SXM; no fp8 units",
            **_AMPERE,
        ),
        _device(
            "a100-80gb",
            "NVIDIA A100 SXM 80 GB",
            81_920,
            2_039,
            "A100 80GB datasheet, SXM (PCIe: 1,935 GB/s); no fp8 units",
            **_AMPERE,
        ),
        _device(
            "h100",
            "NVIDIA H100 SXM 80 GB",
            81_559,
            3_350,
            "H100 datasheet, SXM; it lists figures with sparsity, halved here",
            **_HOPPER,
        ),
        _device(
            "h200",
            "NVIDIA H200 SXM 141 GB",
            143_771,
            4_800,
            "H200 datasheet, SXM; compute as H100",
            **_HOPPER,
        ),
        _device(
            "b200",
            "NVIDIA B200 SXM 180 GB",
            183_359,
            7_700,
            "HGX B200 datasheet; the DGX B200 page rounds to 8 TB/s; sparse figures halved here",
            tf32=1_100,
            bf16=2_250,
            fp16=2_250,
            fp8=4_500,
            int8=4_500,
        ),
    )
}

ALIASES = {"a100": "a100-80gb", "h100-80gb": "h100", "h200-141gb": "h200", "b200-180gb": "b200"}
"""Short and long names. An A100 without a size is the larger one; the plan says which it took."""


def device_named(name: str) -> Device:
    """Case and spaces do not matter. Raises ConfigError with the nearest name."""
    key = name.strip().lower().replace(" ", "-").replace("_", "-").removeprefix("nvidia-")
    found = DEVICES.get(ALIASES.get(key, key))
    if found is None:
        near = difflib.get_close_matches(key, [*DEVICES, *ALIASES], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"--device {name}: {hint}known are {', '.join(DEVICES)}; for another give --device-memory"
        )
    return found
