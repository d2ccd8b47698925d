"""The operating socket: who may, what it answers, and that rubbish does no harm."""

import asyncio
import getpass
import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from pilot_world import MemoryValve, World, policy

from kvpilot import commands
from kvpilot.api.client import SocketError, ask
from kvpilot.api.operate import OperatingSocket
from kvpilot.flight import Flight


def socket_of(world: World, path: Path) -> OperatingSocket:
    return OperatingSocket(Flight("lab", world.pilot, None, None, None), path)  # type: ignore[arg-type]


@pytest.fixture
def world() -> World:
    world = World(policy())
    world.start_engine()
    world.ticks(1, waiting=11, running=1)
    return world


def answer(world: World, line: bytes | dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps(line).encode() if isinstance(line, dict) else line
    return socket_of(world, Path("unused")).answer(raw, "kim")


def over(**changes: Any) -> dict[str, Any]:
    order = {"do": "override", "knob": "prefill_chunk_tokens", "value": 128, "for_s": 60, "why": "test"}
    return {**order, **changes}


def test_orders_are_obeyed_at_the_next_tick(world: World) -> None:
    assert answer(world, over()) == {"ok": True}
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 128
    assert answer(world, {"do": "off", "why": "test"}) == {"ok": True}
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 512
    assert answer(world, {"do": "status"})["status"]["pilot"]["off"] == {"why": "test", "who": "kim"}
    assert answer(world, {"do": "on"}) == {"ok": True}
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 128


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"rubbish\n", "not an order: "),
        (b"[]\n", "an order is one JSON object a line"),
        (b"\xff\n", "not an order: "),
        (b"[" * 50_000, "not an order: "),
        ({"do": "explode"}, "cannot do 'explode'"),
        ({}, "cannot do None"),
        (over(knob="max_running"), "this engine has no knob 'max_running'; there are prefill_chunk_tokens"),
        (over(knob=7), "knob must be text"),
        (over(value=9999), "prefill_chunk_tokens=9999: this engine takes 16 to 2048"),
        (over(value="9"), "value must be a number"),
        (over(value=True), "value must be a number"),
        (over(for_s=None), "for_s must be a number"),
        (over(value=10**400), "value is beyond any number"),
        (over(why=""), "an override needs a reason"),
        (over(why="x" * 2000), "why must be text of at most 1000"),
        (over(why="\udcff"), "why must be text in UTF-8"),
        (over(scope="tenant=\udcff"), "scope must be text in UTF-8"),
        (over(scope="classAtMost=0"), "takes no scope"),
        (over(scope="some"), "'some' is not a scope"),
        ({"do": "off"}, "off needs a reason"),
    ],
)
def test_an_order_that_cannot_be_followed_is_answered_in_one_line(
    world: World, line: bytes | dict[str, Any], error: str
) -> None:
    found = answer(world, line)
    assert found["ok"] is False
    assert error in found["error"]
    assert "\n" not in found["error"]
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 64


def test_the_socket_is_its_owners_alone_and_the_kernel_names_the_caller(world: World, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "pilot.sock"

    async def run() -> None:
        served = socket_of(world, path)
        await served.open()
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        await asyncio.to_thread(ask, path, over())
        with pytest.raises(SocketError, match="cannot do 'x'"):
            await asyncio.to_thread(ask, path, {"do": "x"})
        await served.close()

    asyncio.run(run())
    (order,) = world.pilot.orders.in_force(world.clock.monotonic_ns())
    assert order.who == getpass.getuser()
    assert not path.exists()
    with pytest.raises(SocketError, match="no pilot listens on"):
        ask(path, over())


def test_off_without_a_pilot_names_the_file_that_does_the_same(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    config = tmp_path / "kvpilot.yaml"
    config.write_text(
        "engine: {name: lab, telemetry: t, controls: c}\n"
        "classes: [{name: default, ttft: 1s, itl: 50ms}]\n"
        "policies: rules\nsocket: nobody.sock\n"
    )
    with pytest.raises(SystemExit, match=f"no pilot listens.*`touch {tmp_path}/rules/off` does the same"):
        commands.off("an incident", config)


def test_several_lines_are_answered_in_order_and_an_endless_one_ends_the_call(
    world: World, tmp_path: Path
) -> None:
    path = tmp_path / "pilot.sock"

    async def run() -> list[bytes]:
        served = socket_of(world, path)
        await served.open()
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b'{"do": "x"}\n{"do": "off", "why": "y"}\n' + b"z" * 200_000)
        answers = [await reader.readline(), await reader.readline(), await reader.readline()]
        writer.close()
        # The call is over; the socket still serves others.
        await asyncio.to_thread(ask, path, {"do": "status"})
        await served.close()
        return answers

    first, second, third = asyncio.run(asyncio.wait_for(run(), 10))
    assert json.loads(first)["ok"] is False
    assert json.loads(second)["ok"] is True
    assert third == b""


def test_an_order_longer_than_any_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(SocketError, match="an order has at most 65536 bytes; this one has 7"):
        ask(tmp_path / "unused", over(why="x" * 70_000))


def test_what_a_killed_pilot_left_is_replaced(world: World, tmp_path: Path) -> None:
    path = tmp_path / "pilot.sock"

    async def run() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
            killed.bind(str(path))
        served = socket_of(world, path)
        await served.open()
        await asyncio.to_thread(ask, path, {"do": "status"})
        await served.close()

    asyncio.run(run())


def test_a_socket_on_which_another_pilot_listens_is_left_alone(world: World, tmp_path: Path) -> None:
    path = tmp_path / "pilot.sock"

    async def run() -> None:
        first, second = socket_of(world, path), socket_of(world, path)
        await first.open()
        with pytest.raises(SocketError, match="another pilot listens there"):
            await second.open()
        await asyncio.to_thread(ask, path, {"do": "status"})
        await first.close()

    asyncio.run(run())


def test_a_file_that_is_no_socket_is_never_removed(world: World, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(SocketError, match="a file is there"):
        asyncio.run(socket_of(world, path).open())
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("scope", "error"),
    [
        ("classAtMost=8", "class levels are 0 to 7"),
        ("classAtMost=99999999999999999999", "class levels are 0 to 7"),
        ("tenant=" + "x" * 33, "at most 32 bytes"),
    ],
)
def test_a_scope_that_no_page_can_hold_is_refused_and_the_pilot_flies_on(
    world: World, scope: str, error: str
) -> None:
    MemoryValve(world)
    world.ticks(2)
    found = answer(world, over(knob="shed_fraction", value=0.5, scope=scope))
    assert found["ok"] is False
    world.tick()
    assert world.knob("prefill_chunk_tokens") == 64
    assert error in found["error"]


def test_more_orders_than_a_page_can_hold_are_refused(world: World) -> None:
    MemoryValve(world)
    world.ticks(2)
    given = [
        answer(world, over(knob="shed_fraction", value=0.5, scope=f"tenant=t{number}"))
        for number in range(20)
    ]
    assert [each["ok"] for each in given] == [True] * 8 + [False] * 12
    assert "8 overrides are in force" in given[-1]["error"]
    assert len(world.tick().leases) == 9
    assert answer(world, over(knob="shed_fraction", value=0.4, scope="tenant=t1"))["ok"], "one for another"


def test_a_path_that_cannot_be_is_one_clear_line(world: World, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 200)
    with pytest.raises(SocketError, match=r"write another as `socket: FILE`"):
        asyncio.run(socket_of(world, path).open())


@pytest.mark.parametrize("scope", ["all", "classAtMost=0", "tenant=acme"])
def test_a_person_may_grant_credits_where_there_is_a_valve(world: World, scope: str) -> None:
    order = over(knob="admission_credits", value=500, scope=scope)
    assert "no knob 'admission_credits'" in answer(world, order)["error"]
    valve = MemoryValve(world)
    world.ticks(2)
    assert answer(world, order) == {"ok": True}
    for _ in range(3):
        world.tick()
        valve.look()
    (echo,) = valve.law.echoes(world.clock.monotonic_ns())
    assert (echo.knob, echo.value, echo.order) == ("admission_credits", 500.0, True)
    assert answer(world, {**order, "value": None}) == {"ok": True}
    world.tick()
    valve.look()
    assert valve.law.echoes(world.clock.monotonic_ns()) == []


@pytest.mark.parametrize(
    ("order", "error"),
    [
        (over(knob="admission_credits", value=-1), "takes 0 to 1.07374e+09"),
        (over(knob="prompt_bytes_per_token", value=0), "takes 0.25 to 1024"),
        (over(knob="prompt_bytes_per_token", value=3, scope="tenant=acme"), "takes no scope"),
    ],
)
def test_senseless_credits_are_refused(world: World, order: dict[str, Any], error: str) -> None:
    MemoryValve(world)
    world.ticks(2)
    assert error in answer(world, order)["error"]
