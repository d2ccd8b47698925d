"""Where vLLM is installed, and how our code gets into it without touching that installation.

The environment is a stock one: `make vllm` builds it, nothing of ours is ever installed there. The drop-in is
what an init step makes in a pod: the tree of our wheel, with its metadata, in a directory for PYTHONPATH.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM_VERSION = "0.32.0"
ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpilot"

_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "sidecar", "engine", "kernels", "policies")
_KEPT_WHEELS = 8


class LabError(Exception):
    """The lab cannot go on; the message is one line for the person who ran it."""


def environment() -> Path:
    """The virtual environment with vLLM: VLLM_ENV, else the one that `make vllm` builds."""
    return Path(os.environ.get("VLLM_ENV") or CACHE / f"vllm-{VLLM_VERSION}")


def missing() -> str | None:
    """Why there is no usable vLLM here, in one line; None where there is one."""
    folder = environment()
    if not (folder / "bin/python").exists():
        return f"no vLLM in {folder}: run `make vllm`, or name an environment that has it in VLLM_ENV"
    return None


def python() -> Path:
    """The interpreter of vLLM's environment. Raises LabError where there is none."""
    problem = missing()
    if problem:
        raise LabError(problem)
    return environment() / "bin/python"


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, in `folder`. Raises LabError."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("kvpilot-*.whl"))
    if done.returncode or len(wheels) != 1:
        raise LabError(f"the wheel could not be built: {(done.stderr or done.stdout).strip()[-500:]}")
    return wheels[0]


def drop_in() -> Path:
    """A directory for PYTHONPATH with this checkout's wheel, unpacked; built once for each of its states."""
    place = CACHE / "wheels"
    folder = place / _sources_hash()
    if not folder.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            wheel = build_wheel(Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(scratch) / "tree")
            if not folder.is_dir():
                os.rename(Path(scratch) / "tree", folder)
        _forget_old(place)
    os.utime(folder)
    return folder


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        path = ROOT / source
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _forget_old(place: Path) -> None:
    """A server that still runs from an old tree has imported what it needs long ago."""
    folders = sorted((p for p in place.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    for folder in folders[:-_KEPT_WHEELS]:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    print(drop_in())
