"""Reads a file in memory without letting go of the interpreter.

`os.pread` lets other threads run while the kernel copies. In an engine other threads wait for just that
moment, and give the interpreter back when they are done or, 5 ms later, have to: a read of a microsecond then
costs the step loop hundreds. So the same system call is made by way of ctypes, which keeps the interpreter.

For files whose reading cannot block: nobody else runs meanwhile.
"""

import os
from typing import Any


def _load() -> Any:
    """The ctypes module and the C library's `pread`; None where there is no such thing."""
    try:
        import ctypes

        # Taken by item: a function object of our own, whose result type nobody else can change.
        pread = ctypes.PyDLL(None)["pread64"]
        pread.restype = ctypes.c_ssize_t
        return ctypes, pread
    except (ImportError, OSError, AttributeError):
        return None


_LOADED = _load()


class HeldReader:
    """Reads the beginning of files into one buffer of `size` bytes, again and again."""

    def __init__(self, size: int) -> None:
        buffer = bytearray(size)
        self.view = memoryview(buffer)
        """What the last read brought."""
        self._into = [self.view]
        self._fd: int | None = None
        self._arguments: tuple[Any, ...] = ()
        """Of the C call, made once a file."""
        if _LOADED is not None:
            ctypes, self._pread = _LOADED
            # Holds on to the buffer, which therefore stays where it is.
            self._held = (ctypes.c_char * size).from_buffer(buffer)

    def read(self, fd: int) -> int:
        """Read from the start of the file; how many bytes there were, at most `size`. Raises OSError."""
        if _LOADED is not None:
            if fd != self._fd:
                self._set_file(fd)
            got: int = self._pread(*self._arguments)
            if got >= 0:
                return got
        # Also for its error, which the C call keeps to itself.
        return os.preadv(fd, self._into, 0)

    def _set_file(self, fd: int) -> None:
        ctypes = _LOADED[0]
        self._fd = fd
        self._arguments = (
            ctypes.c_int(fd),
            ctypes.byref(self._held),
            ctypes.c_size_t(len(self.view)),
            ctypes.c_int64(0),
        )
