"""Recordings: what a page says after its engine is gone, however the page looks by then."""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_pages import IDENTITY
from recorded import MS, Flown
from rich.console import Console

from kvpilot.incident.case import IncidentError, open_file
from kvpilot.incident.export import as_json, write_csv
from kvpilot.incident.recording import read_file, recording
from kvpilot.incident.terminal import render
from kvpilot.link.page import LinkError


def shown(path: Path) -> str:
    case = open_file(path, None)
    out = Console(width=100, file=StringIO())
    out.print(render(case, 60))
    json.dumps(as_json(case, 60), allow_nan=False)
    write_csv(case, StringIO())
    return out.file.getvalue()  # type: ignore[attr-defined]


@contextmanager
def suppress_one_line(kind: type[Exception]) -> Iterator[list[str]]:
    """What `kind` said, which must be one line; anything else goes through."""
    problems: list[str] = []
    try:
        yield problems
    except kind as error:
        problems.append(str(error))
    assert all("\n" not in problem for problem in problems)


def test_every_step_that_the_page_holds_is_there_with_its_time_of_day() -> None:
    page = Flown(records=64).step(10, count=100).recording()
    assert [record.sequence for record in page.steps] == list(range(37, 101))
    assert page.torn == 0
    assert page.wall_ns(page.steps[-1]["time_ns"]) == IDENTITY.start_wall_ns + 1000 * MS


def test_sixteen_thousand_steps_are_kept() -> None:
    """The whole ring of a real engine, lapped."""
    page = Flown().step(1, count=17_000).recording()
    assert [record.sequence for record in page.steps] == list(range(17_000 - 16_384 + 1, 17_001))


def test_the_last_sign_of_life_may_be_a_boundary_or_a_last_word() -> None:
    flown = Flown(records=16).step(10)
    record_ns = flown.now_ns
    assert flown.recording().last_sign_ns == record_ns
    flown.begin(3)
    assert flown.recording().last_sign_ns == record_ns + 3 * MS
    assert flown.recording().last_record_ns == record_ns
    flown.now_ns += MS
    assert flown.end().recording().last_sign_ns == record_ns + 4 * MS


def test_a_boundary_that_cannot_be_is_damage() -> None:
    flown = Flown(records=16).step(10)
    flown.writer.mark_boundary(2**63)
    assert flown.recording().boundary_ns is None


def test_a_start_that_never_stepped_has_no_last_sign() -> None:
    page = Flown(records=16).recording()
    assert (page.steps, page.last_sign_ns, page.torn) == ((), None, 0)


def test_a_torn_record_is_counted_and_the_rest_is_there() -> None:
    flown = Flown(records=16).step(10, count=8)
    plan_ring = flown.writer._plan.ring
    flown.buffer[plan_ring + 64 + 3 * flown.writer._plan.layout.size + 9] ^= 1
    page = flown.recording()
    assert [record.sequence for record in page.steps] == [1, 2, 3, 5, 6, 7, 8]
    assert page.torn == 1


@pytest.fixture(scope="module")
def whole() -> bytes:
    """A page after a lap, with tenants, classes and an ending."""
    flown = Flown(records=256).step(10, count=300, decode_tokens_total=4)
    flown.writer.set_class(0, 1, 2)
    return bytes(flown.end("exception", "ValueError\na.py:f:1").buffer)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 400), where=st.sampled_from(["all", "head", "tail"]))
def test_random_damage_never_raises(whole: bytes, seed: int, flips: int, where: str) -> None:
    """Bits flipped anywhere: a recording that still makes sense, or one clear line."""
    rng, data = random.Random(seed), bytearray(whole)
    span = {"all": (0, len(data)), "head": (0, 4096), "tail": (32_768, len(data))}[where]
    for _ in range(flips):
        data[rng.randrange(*span)] ^= 1 << rng.randrange(8)
    page = None
    with suppress_one_line(LinkError) as problems:
        page = recording(bytes(data), Path("page.kvp"), alive=False, copied=True)
    if page is None:
        assert problems
        return
    assert all(record["steps_total"] == record.sequence for record in page.steps)
    assert len(page.steps) + page.torn <= 256


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), kept=st.floats(0, 1))
def test_damaged_and_shortened_files_are_shown_or_refused_in_one_line(
    whole: bytes, seed: int, kept: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, data = random.Random(seed), bytearray(whole[: round(kept * len(whole))])
    for _ in range(rng.choice((0, 0, 3, 50)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path = tmp_path_factory.mktemp("cut") / "page.kvp"
    path.write_bytes(data)
    text = None
    with suppress_one_line(IncidentError) as problems:
        text = shown(path)
    if text is None:
        assert str(path) in problems[0]
    else:
        assert text.startswith("the engine ")


@pytest.mark.parametrize("content", [b"", b"kvpilot\0" + bytes(5000), b"\xff" * 9000, b"hello"])
def test_what_is_no_page_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(LinkError, match=f"{path}: "):
        read_file(path)


def test_what_is_no_file_is_one_line_and_never_waits(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="not a file"):
        read_file(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(LinkError, match="not a file"):
        read_file(tmp_path / "fifo")
    with pytest.raises(LinkError, match="No such file"):
        read_file(tmp_path / "nowhere")


def test_a_page_of_a_newer_format_says_what_to_do(tmp_path: Path, whole: bytes) -> None:
    data = bytearray(whole)
    data[8] += 1
    (tmp_path / "page.kvp").write_bytes(data)
    with pytest.raises(LinkError, match=r"page format version .* install the same kvpilot release"):
        read_file(tmp_path / "page.kvp")
