"""Reading without letting go of the interpreter."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpilot.link import held_read
from kvpilot.link.held_read import HeldReader


@pytest.fixture(params=["ctypes", "without"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HeldReader:
    if request.param == "without":
        monkeypatch.setattr(held_read, "_LOADED", None)
    return HeldReader(64)


def open_file(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY)


def test_the_beginning_of_a_file_again_and_again(reader: HeldReader, tmp_path: Path) -> None:
    long, short = open_file(tmp_path / "long", b"a" * 100), open_file(tmp_path / "short", b"bb")
    assert reader.read(long) == 64
    assert bytes(reader.view) == b"a" * 64
    assert reader.read(short) == 2
    assert bytes(reader.view[:3]) == b"bba"
    os.pwrite(os.open(tmp_path / "long", os.O_WRONLY), b"c", 0)
    assert reader.read(long) == 64
    assert bytes(reader.view[:2]) == b"ca"


def test_an_error_is_raised_as_such(reader: HeldReader, tmp_path: Path) -> None:
    gone = open_file(tmp_path / "gone", b"")
    os.close(gone)
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.read(gone)


@pytest.fixture
def greedy_thread() -> Iterator[list[int]]:
    """Another thread takes the interpreter whenever it can get it; nobody is ever made to give it up."""
    turns = [0]
    over = threading.Event()

    def take_turns() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=take_turns, daemon=True)
    sys.setswitchinterval(60)
    thread.start()
    yield turns
    over.set()
    sys.setswitchinterval(interval)
    thread.join(10)


def test_nobody_else_gets_a_turn(greedy_thread: list[int], tmp_path: Path) -> None:
    reader, file = HeldReader(64), open_file(tmp_path / "page", b"x" * 64)
    before = greedy_thread[0]
    for _ in range(1_000):
        reader.read(file)
    assert greedy_thread[0] == before
    deadline = time.monotonic() + 20
    while greedy_thread[0] == before and time.monotonic() < deadline:
        os.preadv(file, [reader.view], 0)
    assert greedy_thread[0] > before, "this test cannot see what it is about"
