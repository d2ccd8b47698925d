"""The controls page: leases on knobs, from the pilot to an engine rank, or to the valves of an engine.

    header (the writer) | slot 0 | slot 1          slot: sequence, nonce, count, entry size, CRC-32, entries

The writer fills the older slot; the CRC covers sequence, nonce and entries; the reader takes the valid slot
of higher sequence. A writer killed half-way therefore leaves the previous table readable. Entries may grow
at their end: a reader steps by the slot's entry size and ignores what it does not know.

`LeaseBook` is the reader's half, a pure object that decides which leases are in force by its own clock alone.
"""

import math
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kvpilot.clock import NS
from kvpilot.link.page import HEADER_BYTES, Identity, LinkError, PageHeader

CONTROLS_BYTES = 4_096
"""One page of memory: what an engine copies at a step boundary."""
SLOT_BYTES = (CONTROLS_BYTES - HEADER_BYTES) // 2
TTL_MAX_NS = 60 * NS
ENGINE_ANY = 0
"""Nonce of a slot that is for no engine start in particular: valve leases outlive an engine core."""

_NAME_BYTES = 32
_SLOT = struct.Struct("<QQIIQ")
_ENTRY = struct.Struct(f"<{_NAME_BYTES}s{_NAME_BYTES}sQqdQQQ")
MAX_LEASES = (SLOT_BYTES - _SLOT.size) // _ENTRY.size
_U64 = struct.Struct("<Q")
_SEQUENCES = struct.Struct(f"<Q{SLOT_BYTES - 8}xQ")

ScopeKind = Literal["all", "class_at_most", "tenant"]
SCOPE_KINDS: tuple[ScopeKind, ...] = ("all", "class_at_most", "tenant")
"""In pages a scope is a number: its place here, counted from 1."""
_KIND = 0xFF
_ORDER = 0x100
"""A lease's scope word: the kind in its lowest byte, flags above it; unknown flags are ignored."""


class Scope(NamedTuple):
    """Whom a lease is about. `argument`: nothing for `all`, a class level, or a tenant's name."""

    kind: ScopeKind = "all"
    argument: int | str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A knob's value for `ttl_ns` at most, unless `renewal` changes in time."""

    knob: str
    scope: Scope
    value: float
    ttl_ns: int
    renewal: int
    decision_id: int = 0
    order: bool = False
    """A person's: where it matches a request, leases of policies on the same knob do not count."""


class Slot(NamedTuple):
    """A valid slot. `ignored` counts entries that make no sense here."""

    sequence: int
    nonce: int
    leases: tuple[Lease, ...]
    ignored: int


def encode_slot(sequence: int, nonce: int, leases: Sequence[Lease]) -> bytes:
    """The bytes of a slot. Raises LinkError for more leases, or longer names, than it holds."""
    if len(leases) > MAX_LEASES:
        raise LinkError(f"{len(leases)} leases: a controls page holds at most {MAX_LEASES}")
    entries = b"".join(_encode_lease(lease) for lease in leases)
    head = _SLOT.pack(sequence, nonce, len(leases), _ENTRY.size, 0)[:-8]
    return head + _U64.pack(zlib.crc32(entries, zlib.crc32(head))) + entries


def _encode_lease(lease: Lease) -> bytes:
    kind, argument = lease.scope
    knob, tenant = lease.knob.encode(), argument.encode() if isinstance(argument, str) else b""
    for name in (knob, tenant):
        if len(name) > _NAME_BYTES:
            raise LinkError(f"name {name.decode()!r} in a lease: at most {_NAME_BYTES} bytes")
    level = argument if isinstance(argument, int) else 0
    return _ENTRY.pack(
        knob,
        tenant,
        SCOPE_KINDS.index(kind) + 1 | (_ORDER if lease.order else 0),
        level,
        lease.value,
        lease.ttl_ns,
        lease.renewal,
        lease.decision_id,
    )


def decode_slot(data: bytes | memoryview) -> Slot | None:
    """Inverse of `encode_slot`; None for a torn, short or empty slot."""
    if len(data) < _SLOT.size:
        return None
    sequence, nonce, count, entry_bytes, crc = _SLOT.unpack_from(data)
    end = _SLOT.size + count * entry_bytes
    if not sequence or entry_bytes < _ENTRY.size or end > len(data):
        return None
    head = zlib.crc32(data[: _SLOT.size - 8])
    if zlib.crc32(data[_SLOT.size : end], head) != crc:
        return None
    entries = [_decode_lease(data, _SLOT.size + i * entry_bytes) for i in range(count)]
    leases = tuple(lease for lease in entries if lease is not None)
    return Slot(sequence, nonce, leases, count - len(leases))


def _decode_lease(data: bytes | memoryview, offset: int) -> Lease | None:
    """None for an entry that cannot be obeyed: not finite, no time to live, senseless names or scope."""
    knob, tenant, kind, level, value, ttl_ns, renewal, decision_id = _ENTRY.unpack_from(data, offset)
    kind, flags = kind & _KIND, kind & ~_KIND
    if not math.isfinite(value) or not ttl_ns or not 1 <= kind <= len(SCOPE_KINDS):
        return None
    try:
        name, tenant_name = knob.rstrip(b"\0").decode(), tenant.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return None
    scope_kind = SCOPE_KINDS[kind - 1]
    argument = {"all": None, "class_at_most": level, "tenant": tenant_name}[scope_kind]
    return Lease(name, Scope(scope_kind, argument), value, ttl_ns, renewal, decision_id, bool(flags & _ORDER))


def newest_slot(page: bytes | memoryview) -> Slot | None:
    """The valid slot of higher sequence, if any."""
    slots = [decode_slot(page[start : start + SLOT_BYTES]) for start in _SLOT_STARTS]
    return max((slot for slot in slots if slot is not None), default=None, key=lambda slot: slot.sequence)


_SLOT_STARTS = (HEADER_BYTES, HEADER_BYTES + SLOT_BYTES)


class ControlsWriter:
    """Writes one controls page of CONTROLS_BYTES; goes on where an earlier writer of the page stopped."""

    def __init__(self, buffer: "bytearray | memoryview | object", identity: Identity) -> None:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        if len(view) != CONTROLS_BYTES:
            raise LinkError(f"controls buffer of {len(view)} bytes: {CONTROLS_BYTES} needed")
        earlier = newest_slot(view)
        self.sequence = earlier.sequence if earlier else 0
        self._view = view
        self._words = view.cast("Q")
        view[:HEADER_BYTES] = PageHeader("controls", CONTROLS_BYTES, 0, identity).pack()

    def write(self, leases: Sequence[Lease], nonce: int = ENGINE_ANY) -> int:
        """Replace the table, for the engine start `nonce` (valves: ENGINE_ANY). Returns its sequence.

        Raises LinkError, and leaves the page as it was, for leases that do not fit.
        """
        sequence = self.sequence + 1
        data = encode_slot(sequence, nonce, leases)
        start = _SLOT_STARTS[sequence % 2]
        self._view[start + 8 : start + len(data)] = data[8:]
        self._words[start // 8] = sequence
        self.sequence = sequence
        return sequence

    def close(self) -> None:
        """Let go of the buffer; nothing may be written afterwards."""
        self._words.release()
        self._view.release()


_Key = tuple[str, Scope]


class LeaseBook:
    """Which leases are in force: the dead man's switch.

    A lease is honoured from the moment at which this reader has itself seen its renewal counter change
    between two reads at most one ttl apart, until min(ttl, 60 s) later by the reader's own clock. What a
    first look, or a look after a longer pause, finds is history. A lease that a newer table no longer lists
    is released at once; while no table can be read, leases run out. `nonce` None reads the valves' tables.
    """

    def __init__(self, nonce: int | None) -> None:
        self._nonce = ENGINE_ANY if nonce is None else nonce
        self._words: tuple[int, int] | None = None
        self._read_ns: int | None = None
        self._slot_sequence = 0
        """Highest seen of this writer; `_renewals` are its table's."""
        self._malformed = 0
        self._renewals: dict[_Key, int] = {}
        self._expiries: dict[_Key, tuple[int, Lease]] = {}
        self.sequence = 0
        """Sequence of the newest table that was addressed to this reader."""
        self.ignored: Counter[str] = Counter()
        """What was not obeyed, by reason: unreadable, foreign, malformed, history."""
        self.error: str | None = None
        """One line about why the page cannot be read, for as long as it cannot."""
        self.next_expiry_ns: int | None = None
        """When the first lease in force runs out, if nothing renews it."""

    def observe(self, page: bytes | memoryview, now_ns: int) -> bool:
        """Take in one read of the page. True where anything that can be asked of it may have changed."""
        if len(page) < CONTROLS_BYTES:
            return self._unreadable("a controls page that is cut short")
        words = _SEQUENCES.unpack_from(page, HEADER_BYTES)
        if words == self._words:
            self._read_ns = now_ns
            return False
        try:
            PageHeader.unpack(page, "controls")
        except LinkError as error:
            return self._unreadable(str(error))
        slot = newest_slot(page)
        if slot is None and words != (0, 0):
            return self._unreadable("no valid table in the controls page")
        self.error = None
        # A slot that is not whole yet is looked at again: its CRC may land after its sequence.
        self._words = words if slot is None or slot.sequence == max(words) else None
        if slot is not None:
            self._learn(slot, now_ns)
        if self._words is not None:
            # Half a look is none: how long a slot that is not whole has lain there nobody can say.
            self._read_ns = now_ns
        return True

    def _unreadable(self, why: str) -> bool:
        self._words = None
        if self.error == why:
            return False
        self.error = why
        self.ignored["unreadable"] += 1
        return True

    def _learn(self, slot: Slot, now_ns: int) -> None:
        """Compare a table with the one seen before it."""
        if self._slot_sequence - 1 <= slot.sequence <= self._slot_sequence:
            # Nothing new, or what the other slot still holds while damage hides the newest: no news, and its
            # counters are not remembered, or the end of the damage would look like a renewal.
            return
        # Older than both slots ever were: a writer began anew, and what it has written so far is history.
        anew = slot.sequence < self._slot_sequence
        pause_ns = None if anew or self._read_ns is None else now_ns - self._read_ns
        self._slot_sequence = slot.sequence
        self.ignored["malformed"] += max(0, slot.ignored - self._malformed)
        self._malformed = slot.ignored
        if slot.nonce != self._nonce:
            self.ignored["foreign"] += 1
            self._renewals = {}
            return
        self.sequence = slot.sequence
        listed = {(lease.knob, lease.scope): lease for lease in slot.leases}
        self._expiries = {key: kept for key, kept in self._expiries.items() if key in listed}
        for key, lease in listed.items():
            if self._renewals.get(key) == lease.renewal:
                continue
            ttl_ns = min(lease.ttl_ns, TTL_MAX_NS)
            if pause_ns is not None and pause_ns <= ttl_ns:
                self._expiries[key] = (now_ns + ttl_ns, lease)
            else:
                self.ignored["history"] += 1
        self._renewals = {key: lease.renewal for key, lease in listed.items()}
        self._set_next_expiry()

    def _set_next_expiry(self) -> None:
        self.next_expiry_ns = min((expiry for expiry, _ in self._expiries.values()), default=None)

    def in_force(self, now_ns: int) -> list[Lease]:
        """Leases in force now; those that ran out are forgotten."""
        if self.next_expiry_ns is not None and now_ns >= self.next_expiry_ns:
            self._expiries = {key: kept for key, kept in self._expiries.items() if now_ns < kept[0]}
            self._set_next_expiry()
        return [lease for _, lease in self._expiries.values()]
