"""What every page of the link begins with: a header that says whose page it is and how to read the rest.

256 bytes, little-endian, written before anyone can find the page and never again. Readers refuse another
magic, version or kind with one clear line. Host, container and start time are for messages to people only.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

MAGIC = b"kvpilot\0"
VERSION = 1
"""Frozen: `docs/link.md` says what may grow without another one."""
HEADER_BYTES = 256
SECTIONS = 6

PageKind = Literal["telemetry", "controls", "valve"]
_KINDS: tuple[PageKind, ...] = ("telemetry", "controls", "valve")
_NAME_BYTES = 64
_HEADER = struct.Struct(f"<8sII8Q{SECTIONS}Q{_NAME_BYTES}s{_NAME_BYTES - 8}s")
_CRC = struct.Struct("<Q")
assert _HEADER.size + _CRC.size <= HEADER_BYTES


class LinkError(Exception):
    """The link cannot be used; the message is one line: what, where, what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who writes a page, for messages: pids mean nothing across pid namespaces."""

    host: str
    container: str
    start_wall_ns: int
    start_monotonic_ns: int


@dataclass(frozen=True, slots=True)
class PageHeader:
    """The fixed part. `sections` are byte offsets whose meaning depends on the kind; unused ones are 0."""

    kind: PageKind
    page_bytes: int
    nonce: int
    """Random, never 0, new at every start of the writer; 0 in controls pages."""
    identity: Identity
    body_bytes: int = 0
    """Length of the JSON (a manifest) that follows the header."""
    body_crc: int = 0
    record_bytes: int = 0
    record_count: int = 0
    sections: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """HEADER_BYTES bytes."""
        sections = (*self.sections, *(0,) * (SECTIONS - len(self.sections)))
        fixed = _HEADER.pack(
            MAGIC,
            VERSION,
            _KINDS.index(self.kind) + 1,
            self.page_bytes,
            self.nonce,
            self.identity.start_wall_ns,
            self.identity.start_monotonic_ns,
            self.body_bytes,
            self.body_crc,
            self.record_bytes,
            self.record_count,
            *sections,
            _clip(self.identity.host, _NAME_BYTES),
            _clip(self.identity.container, _NAME_BYTES - 8),
        )
        return (fixed + _CRC.pack(zlib.crc32(fixed))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes | memoryview, expected: PageKind) -> "PageHeader":
        """Inverse of `pack`. Raises LinkError: not a page, another version, another kind, or damaged."""
        raw = bytes(data[:HEADER_BYTES])
        if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
            raise LinkError(f"not a kvpilot {expected} page")
        (_, version, kind, page_bytes, nonce, wall, monotonic, body, body_crc, record, count, *rest) = (
            _HEADER.unpack_from(raw)
        )
        if version != VERSION:
            raise LinkError(
                f"page format version {version}, but this kvpilot knows version {VERSION} only: "
                "install the same kvpilot release beside the engine and in it"
            )
        if zlib.crc32(raw[: _HEADER.size]) != _CRC.unpack_from(raw, _HEADER.size)[0]:
            raise LinkError(f"damaged header of a kvpilot {expected} page")
        if not 1 <= kind <= len(_KINDS) or _KINDS[kind - 1] != expected:
            raise LinkError(f"a kvpilot page, but not of kind {expected}")
        identity = Identity(_text(rest[-2]), _text(rest[-1]), wall, monotonic)
        return cls(expected, page_bytes, nonce, identity, body, body_crc, record, count, tuple(rest[:-2]))


def _clip(text: str, size: int) -> bytes:
    """`text` in at most `size` bytes of UTF-8, never half a character."""
    return text.encode()[:size].decode(errors="ignore").encode()


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
