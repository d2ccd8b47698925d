"""Follows the engine's GPUs: a thread of its own, about once a second, because NVML may take tens of ms.

Which devices: those that kvpilot.yaml names, else those that the engine's manifest names, else the only one
there is. The tick takes the newest look and never waits for one. Without a GPU, without the library or
without a driver there is a reason instead, which is shown, and looked into again twice a minute.
"""

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpilot.adapters.gpu import Gpu, GpuSight, Handle, Nvml
from kvpilot.clock import NS, Clock

LOOK_S = 1.0
RETRY_NS = 30 * NS

_log = logging.getLogger(__name__)


class NoGpu(Exception):
    """There is no device to look at; `str()` is the reason, one line."""


@dataclass(frozen=True, slots=True)
class GpuLook:
    """The newest look at all of the engine's devices. `why` says why there is none."""

    at_ns: int
    sights: tuple[GpuSight, ...] = ()
    why: str | None = None


def load_nvml() -> Nvml:
    """The library, initialised. Raises NoGpu."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise NoGpu("nvidia-ml-py is not installed: pip install 'kvpilot[gpu]'") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NoGpu(f"NVML: {error}") from None
    return nvml


class GpuWatch:
    """`named` are UUIDs from kvpilot.yaml; they outrank what the engine says of itself."""

    def __init__(self, clock: Clock, named: Sequence[str] = (), load: Callable[[], Nvml] = load_nvml) -> None:
        self._clock = clock
        self._named = tuple(named)
        self._load = load
        self._nvml: Nvml | None = None
        self._gpus: list[Gpu] = []
        self._opened: tuple[str, ...] | None = None
        self._retry_ns: int | None = None
        self._wanted: tuple[str, ...] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._said: str | None = None
        self.latest = GpuLook(0, why="no engine yet")

    def follow(self, device: str, uuids: Sequence[str]) -> None:
        """Which device the engine says it computes on. Any thread; never waits."""
        if self._named or uuids or device.startswith(("cuda", "gpu")):
            self._wanted = self._named or tuple(map(_whole, uuids))
        else:
            self._wanted = None
            self.latest = GpuLook(self._clock.monotonic_ns(), why=f"the engine computes on {device}")

    def start(self) -> None:
        """Look from now on, in a thread."""
        self._thread = threading.Thread(target=self._run, name="gpu", daemon=True)
        self._thread.start()

    def close(self, within_s: float = 1.0) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(within_s)

    def look(self) -> GpuLook:
        """Look now, in this thread, and keep what was seen as the latest."""
        wanted, now_ns = self._wanted, self._clock.monotonic_ns()
        if wanted is None:
            return self.latest
        try:
            self._open(wanted, now_ns)
            self.latest = GpuLook(now_ns, tuple(gpu.look(now_ns) for gpu in self._gpus))
        except NoGpu as error:
            self.latest = GpuLook(now_ns, why=str(error))
        self._say(self.latest)
        return self.latest

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:  # A driver may do anything; the thread must live for the next look.
                self._forget()
                self.latest = GpuLook(self._clock.monotonic_ns(), why=f"NVML: {error}")
        self._forget()

    def _open(self, wanted: tuple[str, ...], now_ns: int) -> None:
        if self._opened == wanted and self._gpus:
            return
        if self._opened == wanted and self._retry_ns is not None and now_ns < self._retry_ns:
            raise NoGpu(self.latest.why or "NVML: failed")
        self._forget()
        self._opened, self._retry_ns = wanted, now_ns + RETRY_NS
        if self._nvml is None:
            self._nvml = self._load()
        self._gpus = _open_all(self._nvml, wanted)

    def _forget(self) -> None:
        for gpu in self._gpus:
            gpu.close()
        self._gpus = []

    def _say(self, look: GpuLook) -> None:
        """Once for each change."""
        said = look.why or "gpu: " + ", ".join(f"{each.name} {each.uuid}" for each in look.sights)
        if said != self._said:
            self._said = said
            _log.info("%s", f"gpu: {said}; its readings are missing" if look.why else said)


def _open_all(nvml: Nvml, wanted: tuple[str, ...]) -> list[Gpu]:
    try:
        if not wanted:
            return [Gpu(nvml, _only(nvml))]
        return [Gpu(nvml, _by_uuid(nvml, uuid)) for uuid in wanted]
    except nvml.NVMLError as error:
        raise NoGpu(f"NVML: {error}") from None


def _by_uuid(nvml: Nvml, uuid: str) -> Handle:
    try:
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        raise NoGpu(f"NVML: {uuid}: {error}: `nvidia-smi -L` lists the UUIDs that are here") from None


def _only(nvml: Nvml) -> Handle:
    """The device, or the MIG instance, that is here alone."""
    handles = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        handles += _instances(nvml, handle) or [handle]
    if len(handles) == 1:
        return handles[0]
    if not handles:
        raise NoGpu("NVML: no device is visible here")
    raise NoGpu(
        f"{len(handles)} devices are visible and the engine does not say which is its own: "
        "write `gpu: {devices: [UUID]}` (`nvidia-smi -L` lists them)"
    )


def _instances(nvml: Nvml, handle: Handle) -> list[Handle]:
    """MIG instances of a device; none where it is not divided."""
    found: list[Handle] = []
    with contextlib.suppress(nvml.NVMLError):
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
        if current:
            for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                with contextlib.suppress(nvml.NVMLError):
                    found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return found


def _whole(uuid: str) -> str:
    """As NVML writes it: libraries leave the prefix out."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
