"""docs/vllm.md, run as it stands: its commands, in its order, in a shell, against a real vLLM."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from vllm_lab import environment, valves
from vllm_lab.leases import Records, until
from vllm_lab.load import Ask, prompt, run
from vllm_lab.models import model
from vllm_lab.overlay import Overlay
from vllm_lab.server import OFFLINE, SERVED_MODEL, package_metadata

from kvpilot.demo.processes import free_port
from kvpilot.link.place import LinkPlace

if TYPE_CHECKING:
    from conftest import Hangar

PAGE = Path(__file__).parents[2] / "docs/vllm.md"
BIN = Path(sys.executable).parent
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
(CONFIG,) = re.findall(r"```yaml\n(# kvpilot.yaml\n.*?)```", PAGE.read_text(), re.DOTALL)
INSTALL, SERVE, FLY, STATUS, ENGINES, UNPACK, FOUND = COMMANDS


@pytest.fixture(scope="module")
def overlay(hangar: "Hangar", tmp_path_factory: pytest.TempPathFactory) -> Overlay:
    hangar.close()
    return Overlay(tmp_path_factory.mktemp("overlay") / "venv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment.build_wheel(tmp_path_factory.mktemp("wheel"))


@contextlib.contextmanager
def background(command: str, environ: Mapping[str, str], folder: Path, log: Path) -> Iterator[None]:
    """The command in a shell of its own, until the context ends."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            ["bash", "-c", command],
            env=dict(environ),
            cwd=folder,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def shell(command: str, environ: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", command], env=dict(environ), cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}{done.stdout}{done.stderr}"
    return done.stdout


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    return False


def test_from_a_running_vllm_to_a_shadowing_pilot(overlay: Overlay, wheel: Path, tmp_path: Path) -> None:
    before = overlay.freeze()
    shell(INSTALL, {**overlay.environ(), "KVPILOT": str(wheel)}, tmp_path)
    added = set(overlay.freeze()) - set(before)
    assert set(before) <= set(overlay.freeze())
    assert [line.split(" ")[0] for line in added] == ["kvpilot"]

    port = free_port()
    options = f"--port {port} --served-model-name {SERVED_MODEL} --dtype float32 --enforce-eager"
    limits = "--max-model-len 1024 --block-size 32 --num-gpu-blocks-override 64 --max-num-seqs 8"
    vllms = {
        **overlay.environ(),
        **OFFLINE,
        "PYTHONPATH": str(package_metadata(tmp_path)),
        "MODEL": str(model("target")),
        "OPTIONS": f"--host 127.0.0.1 {options} {limits}",
    }
    ours = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "XDG_STATE_HOME": str(tmp_path / "state")}
    (tmp_path / "kvpilot.yaml").write_text(CONFIG)
    log = tmp_path / "vllm.log"
    with background(SERVE, vllms, tmp_path, log):
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(f"{url}/health"), 240, "vLLM answers")
        with background(FLY, ours, tmp_path, tmp_path / "pilot.log"):
            until(lambda: answers("http://127.0.0.1:9477/healthz"), 30, "the pilot answers")
            asks = [Ask(prompt(200, seed), 600) for seed in range(24)]
            assert all(answer.ok for answer in run(url, asks))
            check_shadowed(tmp_path, ours)
    assert "kvpilot is attached to" in log.read_text()
    shell("pip uninstall --yes kvpilot", overlay.environ(), tmp_path)
    assert overlay.freeze() == before


def check_shadowed(folder: Path, environ: Mapping[str, str]) -> None:
    """It saw everything, would have acted, and moved nothing."""
    seen = json.loads(shell(f"{STATUS.strip()} --json", environ, folder))
    assert seen["engine"]["state"] in ("live", "idle")
    assert seen["engine"]["valves"] == 1
    assert seen["leases"] == []
    # Some policies are for knobs that vLLM has not.
    verdicts = {decision["verdict"] for decision in seen["decisions"]}
    assert verdicts <= {"shadowed", "unsupported"}
    assert "shadowed" in verdicts
    assert "vllm" in shell(STATUS, environ, folder)
    place = LinkPlace(folder / "link/telemetry", folder / "link/controls", "chat", frozenset({os.geteuid()}))
    records = Records(place)
    assert len(records.poll()) > 100
    assert all(values == records.baselines() for values in map(records.knobs_of, records.seen))
    assert sum(row["admitted"] for row in valves.rows(place).values()) == 24
    assert "max_running" in shell(ENGINES, environ, folder)


def test_the_drop_in_is_the_wheel_and_vllm_finds_it(overlay: Overlay, wheel: Path, tmp_path: Path) -> None:
    """By the stock environment's own interpreter, into which nothing was installed."""
    environ = {**os.environ, "PATH": f"{environment.python().parent}:{os.environ['PATH']}"}
    shell(UNPACK, {**environ, "WHEEL": str(wheel)}, tmp_path)
    assert (tmp_path / "drop-in/kvpilot/inside/vllm/__init__.py").exists()
    assert (tmp_path / f"drop-in/kvpilot-{version('kvpilot')}.dist-info/METADATA").exists()
    assert "value='kvpilot.inside.vllm:register'" in shell(FOUND, environ, tmp_path)
