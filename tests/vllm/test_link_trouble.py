"""Controls that cannot be believed, on a real vLLM: baseline within a ttl, one warning, serving goes on."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from flights import NGRAM, Flight
from pilot_process import PilotProcess, ended
from vllm_lab.leases import Hold, until

from kvpilot.link.page import HEADER_BYTES

if TYPE_CHECKING:
    from conftest import Hangar

ROOT = Path(__file__).parents[2]
TTL_S = 2.0
RECHECK_S = 1.0
"""An engine looks at most once a second whether its controls page is another file now."""
WARNING = "controls not obeyed"
STRANGER = 12_345


@pytest.fixture
def flight(hangar: "Hangar") -> Iterator[Flight]:
    server = hangar.server(NGRAM)
    controls = server.place.controls_directory(0) / "controls.kvp"
    controls.unlink(missing_ok=True)
    with Hold(server.place, ttl_s=TTL_S) as hold:
        yield Flight(server, hold)


def replace(page: Path, damage: Callable[[Path], None]) -> None:
    """Another file in the page's place. Never the same one cut short: that would kill its writer, us."""
    copy = page.with_name("copy")
    shutil.copy(page, copy)
    copy.chmod(0o640)
    damage(copy)
    copy.rename(page)


def scribble(page: Path) -> None:
    """Over the header, in place."""
    with page.open("r+b") as file:
        file.write(os.urandom(64))


def make_newer(page: Path) -> None:
    """The format version after the magic, in place."""
    data = page.read_bytes()
    with page.open("r+b") as file:
        file.seek(8)
        file.write((int.from_bytes(data[8:12], "little") + 1).to_bytes(4, "little"))


def empty_tables(page: Path) -> None:
    """Everything after the header is noise: neither table is whole."""
    data = page.read_bytes()
    page.write_bytes(data[:HEADER_BYTES] + os.urandom(len(data) - HEADER_BYTES))


DAMAGES = {
    "corrupt": scribble,
    "newer": make_newer,
    "noise": lambda page: replace(page, empty_tables),
    "truncated": lambda page: replace(page, lambda copy: os.truncate(copy, 1000)),
    "writable by others": lambda page: replace(page, lambda copy: copy.chmod(0o666)),
    "a link": lambda page: (page.rename(page.with_name("real")), page.symlink_to("real")),
}


def check_baseline_and_warnings(flight: Flight, damage: Callable[[Path], object], warnings: int) -> None:
    page = flight.server.place.controls_directory(0) / "controls.kvp"
    with flight.crowd(clients=6, prompt_tokens=60, max_tokens=500):
        flight.put(max_running=3, step_token_budget=200)
        warned = flight.server.log_text().count(WARNING)
        damage(page)
        until(lambda: flight.records.moved() == {}, RECHECK_S + TTL_S + 1, "baseline")
        time.sleep(2)
        assert flight.records.moved() == {}
        window = flight.watch(0.5)
    assert max(step.requests for step in window.iterations) > 3
    assert flight.server.log_text().count(WARNING) - warned == warnings


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_controls_that_cannot_be_read(flight: Flight, damage: Callable[[Path], object]) -> None:
    check_baseline_and_warnings(flight, damage, warnings=1)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_controls_of_a_stranger(flight: Flight) -> None:
    def give_away(page: Path) -> None:
        replace(page, lambda copy: os.chown(copy, STRANGER, -1))

    check_baseline_and_warnings(flight, give_away, warnings=1)
    assert f"owned by uid {STRANGER}, which is not trusted" in flight.server.log_text()


def test_controls_that_go_missing(flight: Flight) -> None:
    """An engine whose pilot has not come yet, or is being replaced, is nothing to warn of before a minute."""
    check_baseline_and_warnings(flight, lambda page: page.unlink(), warnings=0)


def test_controls_that_are_whole_again_are_obeyed(flight: Flight) -> None:
    page = flight.server.place.controls_directory(0) / "controls.kvp"
    with flight.crowd(clients=6, prompt_tokens=60, max_tokens=500):
        flight.put(max_running=3)
        good = page.with_name("good")
        os.link(page, good)
        replace(page, lambda copy: os.truncate(copy, 1000))
        until(lambda: flight.records.moved() == {}, RECHECK_S + TTL_S + 1, "baseline")
        good.rename(page)
        flight.until_in_force({"max_running": 3})


def test_a_second_pilot_refuses_and_names_the_first(flight: Flight, tmp_path: Path) -> None:
    pilot = PilotProcess(tmp_path, flight.server.link_environ, policies=ROOT / "policies")
    try:
        code, err = ended(pilot.pilot())
    finally:
        pilot.close()
    assert code == 1
    assert f"held by another pilot (host {os.uname().nodename}" in err
    assert f"pid {os.getpid()}" in err
