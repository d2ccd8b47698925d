"""Reading a pilot's frames from outside, as the page does: `kvpilot top`."""

import json
from collections.abc import Iterator
from typing import Any

import httpx

STREAM = "console/stream"
CONNECT_S = 3.0
READ_S = 3.0


class NoPilot(Exception):
    """Nobody answers there, or somebody else does; one line."""


def frames(url: str) -> Iterator[dict[str, Any]]:
    """Frames as they come, until the pilot ends. Raises NoPilot before the first, and when they stop."""
    address = f"{url.rstrip('/')}/{STREAM}"
    timeout = httpx.Timeout(READ_S, connect=CONNECT_S)
    try:
        with httpx.stream("GET", address, timeout=timeout, trust_env=False) as answer:
            if answer.status_code != httpx.codes.OK:
                raise NoPilot(f"{url}: it answers {answer.status_code} to {STREAM}: is that a kvpilot?")
            yield from _events(answer.iter_lines())
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise NoPilot(
            f"no pilot answers on {url} ({why}): is `kvpilot run` running with this configuration?"
        ) from None
    except httpx.InvalidURL as error:
        raise NoPilot(f"{url}: not an address ({error}): write http://HOST:PORT") from None
    raise NoPilot(f"the pilot on {url} has ended")


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: ") and name == "frame":
            try:
                yield json.loads(line.removeprefix("data: "))
            except ValueError:
                raise NoPilot("what comes is no frame: is that a kvpilot of this version?") from None
