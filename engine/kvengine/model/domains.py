"""Text of the two prompt domains: seeded, plain ASCII (with the byte tokenizer one character is one token).

`json` is a stream of synthetic service log lines; `python` is the source of the standard library that every
Python carries. The shipped target was trained on both, the shipped draft on `json` alone, so speculation pays
on one domain and loses on the other. Prompts never repeat training text: log lines come from other seeds and
source from files the trainer leaves out.

A prompt costs O(tokens), plus reading one or two source files for `python`.
"""

from __future__ import annotations

import random
import sysconfig
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

DOMAINS = ("json", "python")

_HELD_OUT_ONE_IN = 8
_MIN_SOURCE_BYTES = 4096
_FIRST_DAY = datetime(2026, 1, 1, tzinfo=UTC)

_LEVELS = {"info": 80, "debug": 10, "warn": 7, "error": 3}
_STATUS = {"info": ("200", "200", "200", "201", "204"), "debug": ("200", "304"), "warn": ("404", "429")}
# service -> (route, method, message) that belong together, so that a line is predictable once it has begun
_ACTIONS = {
    "auth": (("/login", "POST", "session opened"), ("/logout", "POST", "session closed")),
    "billing": (("/invoices", "GET", "invoices listed"), ("/charges", "POST", "charge accepted")),
    "cart": (("/items", "GET", "items listed"), ("/items", "PUT", "item added to the cart")),
    "mail": (("/outbox", "POST", "message queued for delivery"), ("/inbox", "GET", "inbox read")),
    "search": (("/query", "GET", "query answered"), ("/suggest", "GET", "suggestions served")),
    "storage": (
        ("/blobs", "PUT", "blob written to the store"),
        ("/blobs", "GET", "blob read from the cache"),
    ),
}
_FAILURES = {"warn": "request refused, the client may retry", "error": "upstream did not answer in time"}


class DomainTextMissing(RuntimeError):
    """The text a domain is made of is not on this machine."""


def prompt(domain: str, n_tokens: int, seed: int) -> str:
    """Exactly `n_tokens` ASCII characters of the domain; the same arguments give the same text."""
    rng = random.Random(f"prompt/{domain}/{seed}")
    if domain == "json":
        text = "".join(_take(log_lines(rng), n_tokens + 1))
        return text[:n_tokens]
    if domain == "python":
        return _source_excerpt(n_tokens, rng)
    raise ValueError(f"domain={domain!r}: choose one of {', '.join(DOMAINS)}")


def log_lines(rng: random.Random) -> Iterator[str]:
    """An endless log of one small site: its hosts and services stay the same, its clock moves forward."""
    now = _FIRST_DAY + timedelta(milliseconds=rng.randrange(365 * 86_400_000))
    services = rng.sample(sorted(_ACTIONS), 3)
    hosts = [f"web-{number}" for number in rng.sample(range(1, 9), 2)]
    while True:
        now += timedelta(milliseconds=rng.randrange(1, 900))
        level = rng.choices(list(_LEVELS), list(_LEVELS.values()))[0]
        service = rng.choice(services)
        route, method, message = rng.choice(_ACTIONS[service])
        stamp = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        yield (
            f'{{"time":"{stamp}","level":"{level}","host":"{rng.choice(hosts)}","service":"{service}",'
            f'"route":"/api/{service}{route}","method":"{method}",'
            f'"status":{rng.choice(_STATUS.get(level, ("500", "503")))},"ms":{rng.randrange(2, 100)},'
            f'"request":"{rng.randrange(16**4):04x}","message":"{_FAILURES.get(level, message)}"}}\n'
        )


def source_files(*, held_out: bool) -> list[Path]:
    """Standard library files that prompts are cut from (`held_out`) or that the trainer may read."""
    return [
        path for path in _library() if (zlib.crc32(path.name.encode()) % _HELD_OUT_ONE_IN == 0) == held_out
    ]


def read_ascii(path: Path) -> str:
    """The file without what ASCII cannot hold: one character must stay one byte and one token."""
    return path.read_bytes().decode("ascii", "ignore").replace("\r", "")


@cache
def _library() -> tuple[Path, ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.glob("*.py")) if path.stat().st_size >= _MIN_SOURCE_BYTES]
    if len(files) < _HELD_OUT_ONE_IN:
        raise DomainTextMissing(
            f"no standard library source in {folder}: this Python was packaged without it; "
            "use a Python with sources or the json domain only"
        )
    return tuple(files)


def _source_excerpt(n_tokens: int, rng: random.Random) -> str:
    files = source_files(held_out=True) or list(_library())
    at = rng.randrange(len(files))
    text = read_ascii(files[at])
    start = text.find("\n", rng.randrange(max(1, len(text) - n_tokens))) + 1
    text = text[start:]
    while len(text) < n_tokens:
        at = (at + 1) % len(files)
        text += read_ascii(files[at])
    return text[:n_tokens]


def _take(lines: Iterator[str], n_chars: int) -> Iterator[str]:
    taken = 0
    while taken < n_chars:
        line = next(lines)
        taken += len(line)
        yield line
