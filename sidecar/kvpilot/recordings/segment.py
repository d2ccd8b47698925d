"""One file of a recording: a line that says what it is, then chunks that say whether they are whole.

    kvpilot-recording 1\n
    {"engine": ..., "promises": ...}\n
    (u32 length | u32 crc32 | payload)*

A payload is zlib of a JSON head, a newline, and columns of 64-bit numbers, each as differences from row to
row. A file is only appended to. Whatever ends its writer leaves at most one chunk that is not whole at its
end: readers cut there, and say how much.
"""

import json
import struct
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"kvpilot-recording "
VERSION = 1
SUFFIX = ".kvr"
_FRAME = struct.Struct("<II")
_MOST_BYTES = 64 << 20
_MASK = (1 << 64) - 1

Row = Sequence[float]
Wanted = Callable[[Mapping[str, Any]], bool]


class RecordingError(ValueError):
    """No recording is to be had from this; one line that says why."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What was written together. `floats` are the columns that are not whole numbers."""

    kind: str
    head: Mapping[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    floats: frozenset[str] = frozenset()
    rows: Sequence[Row] = ()

    def pack(self) -> bytes:
        """The chunk with its frame. Raises struct.error, OverflowError for what is no 64-bit number."""
        about = {**self.head, "kind": self.kind, "rows": len(self.rows), "columns": list(self.columns)}
        about["floats"] = sorted(self.floats)
        parts = [json.dumps(about, separators=(",", ":")).encode(), b"\n"]
        for name, column in zip(self.columns, zip(*self.rows, strict=True), strict=False):
            parts.append(_packed(column, name in self.floats))
        payload = zlib.compress(b"".join(parts), 6)
        return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _packed(column: Sequence[float], fractional: bool) -> bytes:
    words = array("Q", struct.pack(f"<{len(column)}d", *column)) if fractional else column
    before, found = 0, array("Q")
    for word in words:
        found.append((int(word) - before) & _MASK)
        before = int(word)
    return found.tobytes()


def _unpacked(data: bytes, fractional: bool) -> list[float]:
    words = array("Q")
    words.frombytes(data)
    values = [value & _MASK for value in accumulate(words)]
    if not fractional:
        return list(values)
    return list(struct.unpack(f"<{len(values)}d", array("Q", values).tobytes()))


def begin(file: BinaryIO, about: Mapping[str, Any]) -> int:
    """Write the two lines of a new file; returns their length."""
    head = MAGIC + f"{VERSION}\n".encode() + json.dumps(about, separators=(",", ":")).encode() + b"\n"
    return file.write(head)


@dataclass(frozen=True, slots=True)
class Segment:
    """One file as it was read."""

    about: Mapping[str, Any]
    chunks: tuple[Chunk, ...]
    torn_bytes: int
    """At the end, that belong to no whole chunk."""


def read_segment(path: Path, wanted: Wanted = lambda head: True) -> Segment:
    """Chunks that are not `wanted`, by their head, come without their rows. Raises RecordingError for a file
    of another kind or version, or without a whole first line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordingError(
            f"{path}: {error.strerror}: name a recording, as `kvpilot run` keeps one"
        ) from error
    if not data.startswith(MAGIC):
        raise RecordingError(f"{path}: no recording of a flight: it does not begin with {MAGIC.decode()!r}")
    first, _, rest = data.partition(b"\n")
    said = first[len(MAGIC) :].decode(errors="replace")
    if said != str(VERSION):
        raise RecordingError(
            f"{path}: version {said[:12]} of a recording, this kvpilot reads {VERSION}: replay it with the "
            "release that wrote it"
        )
    body, newline, rest = rest.partition(b"\n")
    try:
        about = json.loads(body) if newline else None
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise RecordingError(f"{path}: truncated: not even its first lines are whole")
    chunks, used = _chunks(rest, wanted)
    return Segment(about, tuple(chunks), len(rest) - used)


def _chunks(data: bytes, wanted: Wanted) -> tuple[list[Chunk], int]:
    """Whole chunks, and the bytes that they take; whatever follows one that is not whole is not looked at."""
    found, at = list[Chunk](), 0
    while len(data) - at >= _FRAME.size:
        length, crc = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if length > _MOST_BYTES or len(payload) < length or zlib.crc32(payload) != crc:
            break
        found.append(_chunk(payload, wanted))
        at += _FRAME.size + length
    return found, at


def _chunk(payload: bytes, wanted: Wanted) -> Chunk:
    head, _, body = zlib.decompress(payload).partition(b"\n")
    about = json.loads(head)
    columns, count, floats = tuple(about["columns"]), about["rows"], frozenset(about["floats"])
    if not wanted(about):
        return Chunk(about["kind"], about, columns, floats)
    size = 8 * count
    values = [
        _unpacked(body[place * size : (place + 1) * size], name in floats)
        for place, name in enumerate(columns)
    ]
    rows = list(zip(*values, strict=True)) if columns else []
    return Chunk(about["kind"], about, columns, floats, rows)
