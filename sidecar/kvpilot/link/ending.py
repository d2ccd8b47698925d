"""How an engine start ended, in its own words: the flight recorder's last line.

A section of the telemetry page that is written once. All zero means that nobody could write it: the process
vanished, as it does when SIGKILL or the out-of-memory killer comes. What an exception said is left out, since
its message may hold a prompt; its type, and where it was raised, say enough.
"""

from collections import deque
from types import TracebackType
from typing import Literal, NamedTuple

from kvpilot.link.records import Frame

EndingKind = Literal["closed", "exception", "hook_failed", "unknown"]
_KINDS: tuple[EndingKind, ...] = ("closed", "exception", "hook_failed")

WHAT_BYTES = 1_024
FRAMES = 12
"""Frames kept of one traceback, innermost first."""
_CAUSES = 3
"""Exceptions kept of one chain: the last one and what led to it."""

ENDING_FRAME = Frame(f"4Q{WHAT_BYTES}s")


class Ending(NamedTuple):
    """`hook_failed`: kvpilot's own hook gave up and let go of the page; the engine served on."""

    kind: EndingKind
    at_ns: int
    """The engine's monotonic clock; 0 where it was not told."""
    at_wall_ns: int
    """Nanoseconds since the Unix epoch; 0 where they were not told."""
    what: str = ""
    """For an exception: see `without_message`."""

    def pack(self) -> tuple[int, int, int, int, bytes]:
        """The values of an ENDING_FRAME; `what` is cut at a whole line."""
        what = _clip_lines(self.what.encode("utf-8", "replace"), WHAT_BYTES)
        kind = _KINDS.index(self.kind) + 1 if self.kind in _KINDS else 0
        return kind, self.at_ns, self.at_wall_ns, len(what), what

    @classmethod
    def unpack(cls, kind: int, at_ns: int, at_wall_ns: int, size: int, what: bytes) -> "Ending":
        """Inverse of `pack`; a kind that is not known here is `unknown`."""
        known = _KINDS[kind - 1] if 1 <= kind <= len(_KINDS) else "unknown"
        return cls(known, at_ns, at_wall_ns, what[:size].decode("utf-8", "replace"))


def without_message(error: BaseException) -> str:
    """An exception and what caused it, without what they said: the type's qualified name, then a line
    `file:function:line` for each of its innermost frames, innermost first.
    """
    lines: list[str] = []
    current: BaseException | None = error
    for depth in range(_CAUSES):
        if current is None:
            break
        lines.append(f"{'caused by ' if depth else ''}{_type_name(current)}")
        lines += _frames(current.__traceback__)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n".join(lines)


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _frames(traceback: TracebackType | None) -> list[str]:
    kept: deque[str] = deque(maxlen=FRAMES)
    while traceback is not None:
        code = traceback.tb_frame.f_code
        file = code.co_filename.rpartition("/")[2]
        kept.appendleft(f"{file}:{code.co_qualname}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return list(kept)


def _clip_lines(text: bytes, size: int) -> bytes:
    if len(text) <= size:
        return text
    whole, newline, _ = text[: size + 1].rpartition(b"\n")
    return whole if newline else text[:size].decode("utf-8", "ignore").encode()
