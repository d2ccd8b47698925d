"""The console's server side: one frame for all, nobody waited for, nothing but reading."""

import asyncio
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pilot_world import World, policy
from test_publish import flight, get

from kvboards import palette
from kvpilot.api.console.assets import STATIC, load_assets
from kvpilot.api.console.history import MOST_POINTS
from kvpilot.api.console.show import Show
from kvpilot.api.console.stream import EventStream
from kvpilot.api.console.viewers import MOST_BEHIND, MOST_VIEWERS, Viewers


@pytest.fixture
def flown() -> World:
    world = World(policy())
    world.start_engine()
    world.ticks(1, waiting=11, running=1, kv_blocks_free=40)
    return world


def test_one_frame_is_made_for_all_and_none_for_nobody(flown: World, tmp_path: Path) -> None:
    show = Show(flight(flown, tmp_path), flown.clock)
    show.beat()

    async def watch() -> list[bytes]:
        viewers = [show.viewers.join() for _ in range(20)]
        show.beat()
        return [await viewer.take() for viewer in viewers if viewer is not None]

    frames = asyncio.run(watch())
    assert len(frames) == 20
    assert len({id(frame) for frame in frames}) == 1, "made once, and shared"
    _, line, *_ = frames[0].decode().splitlines()
    told = json.loads(line.removeprefix("data: "))
    assert told["engine"]["name"] == "lab"
    assert told["memory"]["free"] == 40


def test_who_is_slow_skips_and_then_is_dropped_and_others_never_notice() -> None:
    async def watch() -> None:
        viewers = Viewers()
        quick, slow = viewers.join(), viewers.join()
        assert quick is not None
        assert slow is not None
        for number in range(MOST_BEHIND):
            viewers.show(b"%d" % number)
            assert await quick.take() == b"%d" % number
        assert not slow.over.is_set()
        assert await slow.take() == b"%d" % (MOST_BEHIND - 1), "the newest, not the oldest"
        for number in range(MOST_BEHIND + 1):
            viewers.show(b"%d" % number)
            await quick.take()
        assert slow.over.is_set()
        assert not quick.over.is_set()
        assert (len(viewers), viewers.dropped) == (1, 1)

    asyncio.run(watch())


def test_there_is_an_end_to_how_many_may_watch() -> None:
    async def watch() -> None:
        viewers = Viewers()
        assert all(viewers.join() is not None for _ in range(MOST_VIEWERS))
        assert viewers.join() is None

    asyncio.run(watch())


async def _serve(stream: EventStream, stuck: bool, sent: list[bytes]) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        if stuck and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        sent.append(message.get("body", b""))

    await stream({"type": "http"}, receive, send)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_stream_whose_client_reads_nothing_is_cut_off(stuck: bool) -> None:
    async def watch() -> None:
        viewers, sent = Viewers(), list[bytes]()
        viewer = viewers.join()
        assert viewer is not None
        serving = asyncio.create_task(_serve(EventStream(viewers, viewer, b"first"), stuck, sent))
        for number in range(MOST_BEHIND + 2):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            viewers.show(b"%d" % number)
        await asyncio.sleep(0)
        if stuck:
            await asyncio.wait_for(serving, 5)
        else:
            assert sent[1] == b"first"
            assert not serving.done()
            viewers.close()
            await asyncio.wait_for(serving, 5)
        assert len(viewers) == 0

    asyncio.run(watch())


def test_history_is_bounded_and_missing_is_never_zero(flown: World, tmp_path: Path) -> None:
    show = Show(flight(flown, tmp_path), flown.clock)
    for _ in range(2 * MOST_POINTS + 10):
        show.beat()
    assert len(show.history.points) == MOST_POINTS
    newest = dict(zip(show.history.columns, show.history.points[-1], strict=True))
    assert newest["kv_occupancy"] == 0.6
    assert newest["ttft_seconds/batch"] is None


def test_a_frame_that_fails_costs_no_viewer(flown: World, tmp_path: Path) -> None:
    """`run` goes on after a defect: it is counted, and the next frame comes."""
    show = Show(flight(flown, tmp_path), flown.clock)
    board, show.history = flown.pilot.board, None  # type: ignore[assignment]

    async def run() -> None:
        running = asyncio.create_task(show.run())
        while not show.failures:
            await asyncio.sleep(0)
        assert not running.done()
        running.cancel()

    board.tick = None
    asyncio.run(run())


def test_the_page_is_served_with_a_policy_that_lets_nothing_in(flown: World, tmp_path: Path) -> None:
    page = get(flown, tmp_path, "/")
    assert page.status_code == 200
    policy_ = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy_
    assert not re.search(r"unsafe|https?:|\*", policy_)
    for name in load_assets():
        answer = get(flown, tmp_path, f"/console/{name}")
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        *("/console/nothing.js", "/console/%2e%2e/%2e%2e/http.py", "/console/"),
        *("/console/vendor/VENDOR.json", "/console/decisions/x", "/console/decisions/99999999"),
        *("/console/decisions/" + "9" * 30, "/console/incidents", "/console/incidents/%2e%2e"),
    ],
)
def test_what_is_not_there_is_one_clear_line(flown: World, tmp_path: Path, path: str) -> None:
    answer = get(flown, tmp_path, path)
    assert answer.status_code == 404
    assert len(answer.json()["error"].splitlines()) == 1


def test_scripts_never_make_markup_of_text_and_ask_nobody_else() -> None:
    for path in STATIC.glob("*.js"):
        source = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", source), path
        assert "http" not in source.replace("http://www.w3.org/2000/svg", ""), path


def test_vendored_files_are_what_was_published_and_have_a_licence() -> None:
    vendor = STATIC / "vendor"
    described = json.loads((vendor / "VENDOR.json").read_text())
    listed = {name: digest for each in described for name, digest in each["sha256"].items()}
    found = {
        path.relative_to(vendor).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in vendor.rglob("*")
        if path.is_file() and path.name != "VENDOR.json"
    }
    assert found == listed
    assert all((vendor / each["licence_file"]).is_file() for each in described)


def test_colours_mean_what_they_mean_on_the_dashboards() -> None:
    css = (STATIC / "console.css").read_text()
    for name in ("good", "measured", "held", "caution", "bad", "expected", "shadow", "reference"):
        assert f"--{name}: {getattr(palette, name.upper())};" in css, name


@pytest.mark.parametrize("theme", [0, 1, 2])
def test_text_stands_out_from_its_ground(theme: int) -> None:
    """WCAG AA: 4.5 to 1, in the light theme and in both spellings of the dark one."""
    css = (STATIC / "console.css").read_text()
    block = css.split("--page:")[theme + 1]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", "--page:" + block.split("}")[0]))
    for text in ("ink", "soft"):
        for ground in ("page", "card", "well"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (theme, text, ground)


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
