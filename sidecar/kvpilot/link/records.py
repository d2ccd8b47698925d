"""Fixed records that say by themselves whether they are whole.

A record is its own sequence number, a body, and a CRC-32 over both, all in 8-byte words:

    u64 sequence | body | u64 crc32(sequence, body)

A reader believes a record only if the CRC holds and the sequence is the one it looked for. So neither store
order nor a writer killed half-way can make it believe a mixture, and a blank page holds no record: the
CRC-32 of zeros is not zero.
"""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from kvpilot.link.fields import Field

_WORD = 8


class Frame:
    """Layout of one kind of record; `body` is a struct format (standard sizes, a multiple of 8 bytes)."""

    __slots__ = ("_covered", "_struct", "body_struct", "size", "words")

    def __init__(self, body: str) -> None:
        self._struct = struct.Struct("<Q" + body)
        if self._struct.size % _WORD:
            raise ValueError(f"body={body}: {self._struct.size} bytes are no multiple of {_WORD}")
        self._covered = self._struct.size
        self.size = self._covered + _WORD
        self.words = self.size // _WORD

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> tuple[Any, ...] | None:
        """`(sequence, *values)`, or None where the record at `offset` is short, torn or was never written."""
        end = offset + self._covered
        if offset < 0 or len(data) < end + _WORD:
            return None
        if zlib.crc32(data[offset:end]) != int.from_bytes(data[end : end + _WORD], "little"):
            return None
        return self._struct.unpack_from(data, offset)


class FrameWriter:
    """Writes records of one Frame into a page of words: the whole buffer of an mmap or a bytearray.

    One copy a record, then its CRC as one native 8-byte store: in between, the CRC does not hold.
    """

    __slots__ = ("_covered", "_pack", "_page", "_words")

    def __init__(self, frame: Frame, words: memoryview) -> None:
        # Slices of the buffer itself: a view more would be one more to release before a map can be closed.
        page: Any = words.obj
        if len(page) != words.nbytes:
            raise ValueError("records are written to a whole buffer, not to a part of one")
        self._page = page
        self._words = words
        self._pack = frame._struct.pack
        self._covered = frame._covered

    def write(self, word: int, sequence: int, *values: Any) -> None:
        """Write the record whose first word has index `word`. Raises struct.error for a misfit value."""
        self.write_parts(word, sequence, values)

    def write_parts(self, word: int, sequence: int, values: Sequence[Any], more: Sequence[Any] = ()) -> None:
        """`write` for values that lie in two sequences: the step loop's way, which copies them once."""
        record = self._pack(sequence, *values, *more)
        start = word * _WORD
        end = start + self._covered
        self._page[start:end] = record
        self._words[end // _WORD] = zlib.crc32(record)

    def write_packed(self, word: int, record: bytearray) -> None:
        """`write` for a record that is packed already: sequence and body."""
        start = word * _WORD
        end = start + self._covered
        self._page[start:end] = record
        self._words[end // _WORD] = zlib.crc32(record)


class PackedStep:
    """A step record in packed form, changed in place: what stays as it was costs a step nothing.

    Setters for fields that move together are made once: `set_load = step.setter("running", "waiting")`, and
    then `set_load(3, 0)`. Raises struct.error for a misfit value.
    """

    __slots__ = ("_index", "data", "fields", "set_sequence")

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = tuple(fields)
        self._index = {field.name: position for position, field in enumerate(fields)}
        self.data = bytearray(_WORD * (len(fields) + 1))
        self.set_sequence = partial(struct.Struct("<Q").pack_into, self.data, 0)
        """For the writer of records."""

    def setter(self, *names: str) -> Callable[..., None]:
        """Sets these fields, which follow one another in the record. Raises KeyError for one that is not in
        it, ValueError where they do not follow.
        """
        positions = [self._index[name] for name in names]
        first = positions[0]
        if positions != list(range(first, first + len(names))):
            raise ValueError(f"fields {', '.join(names)}: not one after another in the record")
        form = "".join("Q" if self.fields[position].type == "u64" else "d" for position in positions)
        return partial(struct.Struct("<" + form).pack_into, self.data, _WORD * (first + 1))


class StepLayout:
    """The step record of one manifest: 8 bytes a field, in the manifest's order."""

    __slots__ = ("frame", "index", "names")

    def __init__(self, fields: Sequence[Field]) -> None:
        self.names = tuple(field.name for field in fields)
        self.index = {name: position for position, name in enumerate(self.names)}
        if len(self.index) != len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"fields {', '.join(twice)}: each field at most once")
        self.frame = Frame("".join("Q" if field.type == "u64" else "d" for field in fields))

    @property
    def size(self) -> int:
        """Bytes of one record."""
        return self.frame.size

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> "StepRecord | None":
        """The record at `offset`, or None where it is short, torn or was never written."""
        record = self.frame.unpack(data, offset)
        return None if record is None else StepRecord(record[0], record[1:], self.index)


class StepRecord:
    """One step as the engine told it, by field name. A field that the engine lacks is absent, never 0."""

    __slots__ = ("_index", "_values", "sequence")

    def __init__(self, sequence: int, values: tuple[float, ...], index: dict[str, int]) -> None:
        self.sequence = sequence
        self._values = values
        self._index = index

    def __getitem__(self, name: str) -> float:
        return self._values[self._index[name]]

    def get(self, name: str) -> float | None:
        """The field's value, or None where this engine has no such field."""
        position = self._index.get(name)
        return None if position is None else self._values[position]

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def keys(self) -> Sequence[str]:
        """Field names in record order, so that `dict(record)` works."""
        return tuple(self._index)

    def __repr__(self) -> str:
        return f"StepRecord({self.sequence}, {dict(zip(self._index, self._values, strict=True))})"
