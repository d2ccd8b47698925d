"""The operating socket: the one way to give orders. A unix socket of mode 0600; the kernel says who calls.

One JSON object a line in, one a line out, in order:

    {"do": "override", "knob": "max_running", "value": 8, "for_s": 600, "why": "...", "scope": "all"}
    {"do": "off", "why": "..."}     {"do": "on"}     {"do": "status"}
    -> {"ok": true, ...}            -> {"ok": false, "error": "one line"}

An order takes effect in the next tick. It works while HTTP does not.
"""

import asyncio
import json
import os
import pwd
import socket
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvpilot.adapters.valves import VALVE_KNOBS
from kvpilot.api.client import MAX_LINE_BYTES, SocketError
from kvpilot.flight import Flight
from kvpilot.journal.records import parse_scope
from kvpilot.orders import OrderError, unknown_knob
from kvpilot.publish.status import status

MODE = 0o600
_CREDENTIALS = struct.Struct("3i")


class OperatingSocket:
    """Listens while open."""

    def __init__(self, flight: Flight, path: Path) -> None:
        self._flight = flight
        self._path = path
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Begin to listen. Raises SocketError."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._clear()
            # Never, not for a moment, a socket that others could open.
            before = os.umask(0o777 & ~MODE)
            try:
                listening.bind(str(self._path))
            finally:
                os.umask(before)
            self._server = await asyncio.start_unix_server(self._serve, sock=listening, limit=MAX_LINE_BYTES)
        except SocketError:
            listening.close()
            raise
        except OSError as error:
            listening.close()
            reason = error.strerror or error
            raise SocketError(f"socket {self._path}: {reason}: write another as `socket: FILE`") from error

    def _clear(self) -> None:
        """Remove what a pilot that was killed has left. Raises SocketError for anything else."""
        try:
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise SocketError(f"socket {self._path}: a file is there: write another as `socket: FILE`")
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            # A pilot of another engine that has the same name would lose its socket unawares.
            with suppress(ConnectionRefusedError, FileNotFoundError):
                probe.connect(str(self._path))
                raise SocketError(
                    f"socket {self._path}: another pilot listens there: write another as `socket: FILE`"
                )
        with suppress(FileNotFoundError):
            self._path.unlink()

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            with suppress(FileNotFoundError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        who = _who(writer.get_extra_info("socket"))
        with suppress(ConnectionError, asyncio.CancelledError):
            while line := await _line(reader):
                writer.write(json.dumps(self.answer(line, who)).encode() + b"\n")
                await writer.drain()
        writer.close()

    def answer(self, line: bytes, who: str) -> dict[str, Any]:
        """Do what one line asks for."""
        try:
            order = json.loads(line)
            if not isinstance(order, dict):
                raise OrderError("an order is one JSON object a line")
            return {"ok": True, **self._obey(order, who)}
        except OrderError as error:
            return {"ok": False, "error": str(error)}
        except (ValueError, RecursionError) as error:
            return {"ok": False, "error": f"not an order: {error}"}

    def _obey(self, order: Mapping[str, Any], who: str) -> dict[str, Any]:
        orders = self._flight.pilot.orders
        match order.get("do"):
            case "status":
                return {"status": status(self._flight)}
            case "override":
                self._override(order, who)
            case "off":
                orders.turn(True, _text(order, "why"), who)
            case "on":
                orders.turn(False, _text(order, "why"), who)
            case other:
                raise OrderError(f"cannot do {other!r}: override, off, on and status are what there is")
        return {}

    def _override(self, order: Mapping[str, Any], who: str) -> None:
        tick = self._flight.pilot.board.tick
        knobs = tick.context.knobs if tick is not None and tick.context is not None else {}
        knob, value = _text(order, "knob"), order.get("value")
        if knobs and knob not in knobs:
            raise OrderError(unknown_knob(knob, knobs, "this engine has no knob"))
        try:
            scope = parse_scope(_text(order, "scope") or "all")
            number = None if value is None else _number(order, "value")
        except ValueError as error:
            raise OrderError(str(error)) from None
        for_s = 0.0 if value is None else _number(order, "for_s")
        limits = knobs.get(knob) or VALVE_KNOBS.get(knob)
        self._flight.pilot.orders.override(knob, scope, number, for_s, _text(order, "why"), who, limits)


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty at the end, or where a line is longer than any order."""
    try:
        return await reader.readline()
    except ValueError:
        return b""


def _who(connection: socket.socket) -> str:
    """The caller, as the kernel knows them."""
    size = _CREDENTIALS.size
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _text(order: Mapping[str, Any], key: str) -> str:
    value = order.get(key, "")
    if not isinstance(value, str) or len(value) > 1000:
        raise OrderError(f"{key} must be text of at most 1000 characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        # It would be obeyed and could not be journalled.
        raise OrderError(f"{key} must be text in UTF-8") from None
    return value


def _number(order: Mapping[str, Any], key: str) -> float:
    value = order.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OrderError(f"{key} must be a number")
    try:
        return float(value)
    except OverflowError:
        raise OrderError(f"{key} is beyond any number that could be meant") from None
