"""The one line: how an engine start ended, and the strongest evidence why."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from kvpilot.clock import NS
from kvpilot.incident.evidence import Evidence
from kvpilot.incident.recording import Recording
from kvpilot.link.ending import Ending

How = Literal["lives", "closed", "exception", "hook_failed", "unknown", "vanished", "copied"]

_VANISHED = "killed from outside (SIGKILL, the out-of-memory killer, loss of power) or crashed in native code"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`headline` is one sentence for people; `why` what speaks for a cause, if anything does."""

    how: How
    headline: str
    why: str


def judge(recording: Recording, evidence: Evidence) -> Verdict:
    """What can be said of the recording, and nothing more."""
    ending = recording.ending
    if ending is None:
        how: How = "lives" if recording.alive else "copied" if recording.copied else "vanished"
    else:
        how = ending.kind
    return Verdict(how, _headline(how, recording, ending), _why(how, evidence))


def _headline(how: How, recording: Recording, ending: Ending | None) -> str:
    at_ns = recording.last_sign_ns
    when = f"at {clock_time(recording.wall_ns(at_ns))}" if at_ns is not None else "before its first step"
    match how:
        case "lives":
            return f"lives; its last sign of life was {when}"
        case "vanished":
            return f"vanished without a word; its last sign of life was {when}"
        case "copied":
            return f"left no word in this page; its last sign of life was {when}"
    error, place = first_frame(ending)
    match how:
        case "closed":
            return f"closed in order {when}"
        case "exception":
            return f"died of {error}{place}{',' if place else ''} {when}"
        case "hook_failed":
            return (
                f"let go of its page {when} because kvpilot's own hook failed with {error}{place}; the engine"
                " served on, unrecorded"
            )
    return f"ended {when} in a way that this kvpilot does not know"


def first_frame(ending: Ending | None) -> tuple[str, str]:
    """The exception's type, and ` in function, file line N` of its innermost frame, if it is known."""
    error, *frames = (ending.what.splitlines() if ending else None) or ["an exception"]
    parts = frames[0].rsplit(":", 1) if frames else []
    file, _, function = parts[0].partition(":") if len(parts) == 2 else ("", "", "")
    return error, f" in {function}, {file} line {parts[1]}" if function else ""


def _why(how: How, evidence: Evidence) -> str:
    strongest = evidence.strongest
    match how:
        case "vanished":
            return f"{_VANISHED}; " + (strongest.text if strongest else "nothing that it recorded says why")
        case "copied":
            return "it lived when the page was copied, or had vanished: a copy cannot tell"
        case "exception" | "unknown":
            return strongest.text if strongest else ""
    return ""


def clock_time(wall_ns: int) -> str:
    """Wall time to the millisecond, UTC."""
    try:
        return datetime.fromtimestamp(wall_ns / NS, UTC).strftime("%H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return f"{wall_ns / NS:.3f} s after 1970"


def date_time(wall_ns: int) -> str:
    """Date and wall time to the second, UTC."""
    try:
        return datetime.fromtimestamp(wall_ns / NS, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return f"{wall_ns / NS:.0f} s after 1970"
