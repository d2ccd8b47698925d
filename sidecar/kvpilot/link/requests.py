"""What an engine says of each request that has ended: when, how long, and how it went. Never what it said.

A ring at the very end of the telemetry page, where the manifest has `request_columns`: a cache line whose
first word is the newest record's sequence, then `request_records` frames of a tenant and the columns, 8 bytes
each.
Prompts appear as lengths and, where prefixes are cached, as salted hashes of their first 1, 2, 4, ... blocks:
equal hashes mean equal text to that depth, and nothing else can be learned from them.
"""

import hashlib
import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvpilot.link.records import Frame

REQUEST_RECORDS = 4_096
"""Several seconds of an engine that ends a thousand a second."""
PREFIX_DEPTHS = 12
"""Depth *i* is of the first 2^i blocks."""
TENANT_BYTES = 40
FATES = ("unknown", "finished", "cancelled", "failed")

_PLAIN = (
    "received_ns",
    "first_ns",
    "ended_ns",
    "level",
    "prompt_tokens",
    "output_tokens",
    "fate",
    "preemptions",
)
REQUEST_COLUMNS = (*_PLAIN, *(f"prefix.{depth}" for depth in range(PREFIX_DEPTHS)))
MOST_COLUMNS = 64
_LINE = 64
_U64 = struct.Struct("<Q")


class EndedRequest(NamedTuple):
    """Times are the engine's clock. `first_ns` is 0 where no token came; `prefix` is empty where the engine
    caches none.
    """

    tenant: str
    received_ns: int
    first_ns: int
    ended_ns: int
    level: int
    prompt_tokens: int
    output_tokens: int
    fate: str
    preemptions: int
    prefix: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, ...]:
        """As `REQUEST_COLUMNS` have them."""
        prefix = (*self.prefix, *[0] * PREFIX_DEPTHS)[:PREFIX_DEPTHS]
        return (*self[1:7], FATES.index(self.fate), self.preemptions, *prefix)


def request_frame(columns: Sequence[str]) -> Frame:
    """One ended request."""
    return Frame(f"{TENANT_BYTES}s{'Q' * len(columns)}")


def ring_bytes(columns: Sequence[str], records: int) -> int:
    """Of the whole ring, its head included; it ends where the page ends."""
    size = _LINE + records * request_frame(columns).size
    return -(-size // _LINE) * _LINE


def ended_request(tenant: bytes, row: Mapping[str, int]) -> EndedRequest:
    """From a frame's values by column; columns that a writer lacks are 0, which is what unknown is here."""
    fate = row.get("fate", 0)
    received_ns, first_ns, ended_ns, level, prompt, output = (row.get(name, 0) for name in _PLAIN[:6])
    prefix = [row.get(f"prefix.{depth}", 0) for depth in range(PREFIX_DEPTHS)]
    while prefix and not prefix[-1]:
        prefix.pop()
    return EndedRequest(
        tenant.rstrip(b"\0").decode(errors="replace"),
        *(received_ns, first_ns, ended_ns, level, prompt, output),
        FATES[fate] if fate < len(FATES) else FATES[0],
        row.get("preemptions", 0),
        tuple(prefix),
    )


def prefix_hashes(prompt: Sequence[int], block_tokens: int, salt: bytes, tenant: str) -> tuple[int, ...]:
    """Of the prompt's first 1, 2, 4, ... whole blocks, as many as it has; never 0. O(tokens)."""
    digest = hashlib.blake2b(tenant.encode(), digest_size=8, key=salt)
    found, done = [], 0
    for depth in range(PREFIX_DEPTHS):
        end = block_tokens << depth
        if end > len(prompt):
            break
        digest.update(array("I", prompt[done:end]).tobytes())
        done = end
        found.append(_U64.unpack(digest.digest())[0] or 1)
    return tuple(found)
