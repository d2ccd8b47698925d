"""The Triton decode kernel on Triton's own interpreter, against the reference: correctness, nothing about
speed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASE = Path(__file__).with_name("paged_decode_case.py")


def test_matches_the_reference_on_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(CASE)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2e-6
