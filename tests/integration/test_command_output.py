"""The `kvpilot` script with streams that cannot take what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KVPILOT = [sys.executable, "-m", "kvpilot"]


@pytest.mark.parametrize("command", [["schema"], ["signals"], ["knobs", "--json"]])
def test_a_full_disk_is_one_line(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*KVPILOT, *command], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "kvpilot: the output cannot be written: No space left on device\n"


def test_a_terminal_that_knows_few_characters_shows_what_it_can(tmp_path: Path) -> None:
    (tmp_path / "漢.yaml").write_text("unknöwn: 1\n")
    done = subprocess.run(
        [*KVPILOT, "check", "."],
        cwd=tmp_path,
        capture_output=True,
        encoding="latin-1",
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "?.yaml:1:1: unknown key 'unknöwn'" in done.stdout
    assert done.stderr == ""


def test_nobody_reads_on() -> None:
    """`kvpilot signals | head -1`."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m kvpilot schema | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
