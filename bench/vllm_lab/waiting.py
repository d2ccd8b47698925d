"""A plugin of the lab's own for vLLM: processes that wait for one another sleep instead of spinning.

vLLM's engine core and its worker wait for each other by calling `sched_yield` in a loop. With a core for each
that is the fastest way. On a machine of two cores and a recent Linux (seen on 6.18) a task that yields keeps
its core all the same: API server, clients and pilot wait for hundreds of milliseconds to seconds, requests
reach the engine one at a time, and every figure measures the kernel. A sleep of microseconds costs a step a
percent or two and gives the cores to whoever has work.
"""

import shutil
import time
from pathlib import Path

_PLUGIN = "kvpilot_lab_waiting"
_SLEEP_S = 2e-5


def register() -> None:
    """Called by vLLM in each of its processes (a `vllm.general_plugins` entry point)."""
    from vllm.distributed.device_communicators import shm_broadcast

    # A version that waits otherwise is left as it is.
    if hasattr(shm_broadcast, "sched_yield"):
        shm_broadcast.sched_yield = lambda: time.sleep(_SLEEP_S)


def install(folder: Path) -> Path:
    """Make `folder` a directory for PYTHONPATH that holds the plugin; returns it."""
    return as_plugin(Path(__file__), _PLUGIN, folder)


def as_plugin(source: Path, name: str, folder: Path) -> Path:
    """Install one file, which has a `register`, as a general plugin of vLLM in a directory for PYTHONPATH."""
    about = folder / f"{name}-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, folder / f"{name}.py")
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:register\n")
    return folder
