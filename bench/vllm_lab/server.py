"""A real vLLM server as a child of this process, with the link beside it; it always dies with its context."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from kvpilot.demo.processes import free_port
from kvpilot.link.place import LinkPlace
from vllm_lab import environment, waiting
from vllm_lab.environment import VLLM_VERSION, LabError
from vllm_lab.models import Target, model

Speculation = Literal["none", "ngram", "draft_hit", "draft_miss"]

SERVED_MODEL = "tiny"
VALVE = "kvpilot.inside.valve.Valve"
START_WITHIN_S = 240.0

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@dataclass(frozen=True)
class Settings:
    """How a server is started. Sizes are tokens, requests and blocks; None leaves vLLM's own default."""

    target: Target = "target"
    speculation: Speculation = "none"
    speculative_tokens: int = 4
    dtype: str = "float32"
    max_model_len: int = 4096
    block_size: int | None = 32
    blocks: int | None = 512
    """The KV pool (`--num-gpu-blocks-override`); must hold one request of `max_model_len`."""
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    api_servers: int = 1
    valve: bool = False
    link: bool = True
    """Whether the link's variables are set; the drop-in is on PYTHONPATH all the same."""
    drop_in: bool = True
    """Whether our code is on PYTHONPATH at all."""
    callers: Mapping[str, Any] | None = None
    """The callers file, as JSON holds it."""
    engine_name: str = "vllm"
    arguments: Sequence[str] = ()
    environ: Mapping[str, str] = field(default_factory=dict)
    python_path: Sequence[Path] = ()
    """More directories for PYTHONPATH, before the drop-in."""


def package_metadata(folder: Path) -> Path:
    """A directory for PYTHONPATH that says that a package `vllm` is installed: `vllm serve` asks for its
    version, and builds under another name have none.
    """
    about = folder / "metadata" / f"vllm-{VLLM_VERSION}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
    return about.parent


class Scrape:
    """One reading of /metrics."""

    def __init__(self, text: str) -> None:
        self.samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name which carry these labels. Raises KeyError where there is none."""
        found = [
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not found:
            raise KeyError(f"no sample {name} {labels or ''} in vLLM's metrics")
        return sum(found)


class VllmServer:
    """`with VllmServer(Settings(...)) as server:` starts, waits until it answers, and always stops."""

    def __init__(self, settings: Settings | None = None, folder: Path | None = None) -> None:
        self.settings = settings or Settings()
        # Short, because vLLM's own socket paths go below it; in memory, because the link's pages do.
        shared = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="kvlab-", dir=shared if shared.is_dir() else None))
        self.log = (folder or self.folder) / "vllm.log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        for name in ("telemetry", "controls"):
            (self.folder / name).mkdir(mode=0o750)
        self.link_environ = {
            "KVPILOT_TELEMETRY": str(self.folder / "telemetry"),
            "KVPILOT_CONTROLS": str(self.folder / "controls"),
            "KVPILOT_ENGINE": self.settings.engine_name,
        }
        if self.settings.callers is not None:
            callers = self.folder / "callers.json"
            callers.write_text(json.dumps(self.settings.callers))
            self.link_environ["KVPILOT_CALLERS"] = str(callers)
        self._child: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []

    # Starting and stopping.

    def __enter__(self) -> "VllmServer":
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start without waiting."""
        command, environ = self.command(), self.environ()
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=self.folder,
                start_new_session=True,
            )

    def wait_until_ready(self, within_s: float = START_WITHIN_S) -> None:
        """Return once /health answers 200. Raises LabError with the log's end otherwise."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if self._child is None or self._child.poll() is not None:
                raise LabError(f"vLLM did not start; its log ends:\n{self.log_end()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code == 200:
                    self._remember_family()
                    return
            time.sleep(0.2)
        raise LabError(f"vLLM did not answer within {within_s:g} s; its log ends:\n{self.log_end()}")

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to the group and to whatever left it. Removes the link's directories."""
        if self._child is not None:
            self._remember_family()
            if self._child.poll() is None:
                self._child.terminate()
                # Whoever is killed leaves its shared memory behind: first let all of them go by themselves.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(15)
                    psutil.wait_procs(self._family, timeout=5)
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL to the group and to whatever left it, without a word first. `start` may follow."""
        if self._child is None:
            return
        self._remember_family()
        trackers = [process for process in self._family if _tracks_memory(process)]
        _kill([process for process in self._family if process not in trackers])
        # They remove the shared memory of those that were killed, and go.
        psutil.wait_procs(trackers, timeout=5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        _kill(trackers)
        self._child.wait()
        self._child, self._family = None, []

    def command(self) -> list[str]:
        """What is run."""
        settings = self.settings
        # The command line proper is the one that can start several API servers.
        module = "vllm.entrypoints.cli.main" if settings.api_servers > 1 else None
        entry = [module, "serve"] if module else ["vllm.entrypoints.openai.api_server"]
        options: dict[str, Any] = {
            "--model": model(settings.target),
            "--served-model-name": SERVED_MODEL,
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": settings.dtype,
            "--max-model-len": settings.max_model_len,
            "--max-num-seqs": settings.max_num_seqs,
            "--max-num-batched-tokens": settings.max_num_batched_tokens,
            "--block-size": settings.block_size,
            "--num-gpu-blocks-override": settings.blocks,
            "--speculative-config": self._speculation(),
            "--middleware": VALVE if settings.valve else None,
            "--api-server-count": settings.api_servers if settings.api_servers > 1 else None,
        }
        given = [text for key, value in options.items() if value is not None for text in (key, str(value))]
        return [str(environment.python()), "-m", *entry, *given, "--enforce-eager", *settings.arguments]

    def environ(self) -> dict[str, str]:
        """The child's whole environment."""
        settings = self.settings
        path = [*settings.python_path, waiting.install(self.folder / "waiting")]
        path += [environment.drop_in()] if settings.drop_in else []
        if settings.api_servers > 1:
            path.append(package_metadata(self.folder))
        ours = {"PYTHONPATH": os.pathsep.join(map(str, path)), "VLLM_RPC_BASE_PATH": str(self.folder)}
        link = self.link_environ if settings.link else {}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("KVPILOT_")}
        return {**inherited, **OFFLINE, **ours, **link, **settings.environ}

    def _speculation(self) -> str | None:
        how, tokens = self.settings.speculation, self.settings.speculative_tokens
        if how == "none":
            return None
        if how == "ngram":
            lookup = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
            return json.dumps({"method": "ngram", "num_speculative_tokens": tokens, **lookup})
        draft = {"method": "draft_model", "model": str(model(how)), "num_speculative_tokens": tokens}
        return json.dumps(draft)

    # Looking at it.

    @property
    def place(self) -> LinkPlace:
        """Where its pages lie."""
        place = LinkPlace.from_environ(self.link_environ)
        assert place is not None
        return place

    @property
    def pid(self) -> int:
        """The process that was started."""
        assert self._child is not None
        return self._child.pid

    def alive(self) -> bool:
        """Whether the process that was started still runs."""
        return self._child is not None and self._child.poll() is None

    def processes(self, title: str) -> list[psutil.Process]:
        """Its processes by vLLM's titles: `APIServer`, `EngineCore`, `Worker`, oldest first."""
        self._remember_family()
        found = []
        # A lone API server is the process that was started, and keeps its name.
        lone = self.pid if title == "APIServer" and self.settings.api_servers == 1 else None
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                titled = process.pid == lone or f"::{title}" in " ".join(process.cmdline())
                if titled and process.is_running():
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def engine_core(self) -> psutil.Process:
        """The engine core's process. Raises LabError where there is none."""
        found = self.processes("EngineCore")
        if not found:
            raise LabError(f"no EngineCore process; vLLM's log ends:\n{self.log_end()}")
        return found[-1]

    def metrics(self) -> Scrape:
        """vLLM's own counters now."""
        answer = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False, follow_redirects=True)
        return Scrape(answer.raise_for_status().text)

    def log_text(self) -> str:
        """All it said so far."""
        return self.log.read_text(errors="replace")

    def log_end(self, lines: int = 25) -> str:
        """The last lines it said."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _remember_family(self) -> None:
        """Children that outlive their parents can no longer be found through them."""
        if self._child is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self._child.pid)
            known = {process.pid for process in self._family}
            family = [leader, *leader.children(recursive=True)]
            self._family += [process for process in family if process.pid not in known]


def _tracks_memory(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
