"""The ending: what an engine leaves as its last word, and what it must never say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_pages import Telemetry

from kvpilot.link.ending import FRAMES, WHAT_BYTES, Ending, without_message

SECRET = "a prompt that nobody may read"


def caught(raiser) -> BaseException:
    try:
        raiser()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def fail() -> None:
    raise ValueError(SECRET)


def fail_because() -> None:
    try:
        fail()
    except ValueError as error:
        raise pytest.UsageError(SECRET) from error


def test_a_page_whose_engine_said_nothing_has_no_ending() -> None:
    assert Telemetry().reader.ending() is None


@given(st.sampled_from(["closed", "exception", "hook_failed"]), st.integers(0, 2**64 - 1), st.text())
def test_what_is_written_is_read(kind: str, at_ns: int, what: str) -> None:
    page = Telemetry()
    what = what.encode("utf-8", "replace").decode()
    page.writer.write_ending(Ending(kind, at_ns, 7, what))
    assert page.reader.ending() == Ending(kind, at_ns, 7, what)


def test_the_first_word_stands() -> None:
    """An engine that dies by an exception is closed on its way out."""
    page = Telemetry()
    page.writer.write_ending(Ending("exception", 1, 2, "ValueError"))
    page.writer.write_ending(Ending("closed", 3, 4))
    assert page.reader.ending() == Ending("exception", 1, 2, "ValueError")


def test_it_touches_nothing_else() -> None:
    page = Telemetry()
    page.write(3)
    before = bytes(page.buffer)
    page.writer.write_ending(Ending("exception", 2**64 - 1, 2**64 - 1, "x" * 5000))
    changed = [i for i, (a, b) in enumerate(zip(before, page.buffer, strict=True)) if a != b]
    assert changed[0] >= page.plan.ending
    assert changed[-1] < page.plan.page_bytes


def test_a_kind_of_a_later_release_is_unknown_and_not_an_error() -> None:
    assert Ending.unpack(9, 1, 2, 3, b"abc\0").kind == "unknown"


@given(st.integers(0, 1100), st.integers(1, 255))
def test_damage_means_no_ending(position: int, flip: int) -> None:
    page = Telemetry()
    page.writer.write_ending(Ending("exception", 1, 2, "ValueError"))
    position = min(position, page.plan.page_bytes - page.plan.ending - 1)
    page.buffer[page.plan.ending + position] ^= flip
    assert page.reader.ending() in (None, Ending("exception", 1, 2, "ValueError"))


def test_an_exception_is_its_types_and_places_and_not_its_words() -> None:
    what = without_message(caught(fail_because)).splitlines()
    assert what[0] == "pytest.UsageError"
    assert what[1].startswith("test_link_ending.py:fail_because:")
    assert what[2].startswith("test_link_ending.py:caught:")
    assert what[3] == "caused by ValueError"
    assert what[4].startswith("test_link_ending.py:fail:")
    assert SECRET not in "".join(what)


def test_an_exception_without_a_traceback_is_its_type() -> None:
    assert without_message(KeyError(SECRET)) == "KeyError"


def test_a_deep_recursion_keeps_its_innermost_frames() -> None:
    def descend(depth: int) -> None:
        if depth:
            descend(depth - 1)
        fail()

    lines = without_message(caught(lambda: descend(400))).splitlines()
    assert len(lines) == FRAMES + 1
    assert ":fail:" in lines[1]
    assert ".<locals>.descend:" in lines[2]


def test_what_is_too_long_is_cut_at_a_whole_line() -> None:
    page = Telemetry()
    lines = [f"file.py:function:{n}" for n in range(200)]
    page.writer.write_ending(Ending("exception", 1, 2, "\n".join(lines)))
    ending = page.reader.ending()
    assert ending is not None
    kept = ending.what.splitlines()
    assert kept == lines[: len(kept)]
    assert WHAT_BYTES - 30 < len(ending.what) <= WHAT_BYTES
