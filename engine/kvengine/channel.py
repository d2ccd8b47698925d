"""The wire between the API process and the core process: JSON frames over a non-blocking socket pair.

Neither side waits for the other. What the kernel's buffer does not take stays in an outbox here, bounded
by what running requests may still emit; whoever owns the channel flushes it when the socket has room again.
A frame is a u32 length and that many bytes of JSON. The peer is our own process, so frames are not validated.
"""

import json
import math
import select
import socket
import struct
from typing import Any

from kvengine.errors import ChannelClosed

_LENGTH = struct.Struct("!I")
_READ_BYTES = 1 << 18


class Channel:
    """One end. Messages are JSON values and arrive whole and in order, or not at all."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._inbox = bytearray()
        self._outbox = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> bool:
        """Whether `flush` has something to do once the socket is writable."""
        return bool(self._outbox)

    def send(self, message: Any) -> None:
        """Hand over a message; never blocks. Raises ChannelClosed."""
        data = json.dumps(message, separators=(",", ":")).encode()
        self._outbox += _LENGTH.pack(len(data))
        self._outbox += data
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now. Raises ChannelClosed."""
        try:
            while self._outbox:
                del self._outbox[: self._socket.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> list[Any]:
        """Messages that have arrived; never blocks. Raises ChannelClosed once all were handed over."""
        closed = self._fill()
        messages = []
        inbox, start = self._inbox, 0
        while len(inbox) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(inbox, start)[0]
            if end > len(inbox):
                break
            messages.append(json.loads(inbox[start + _LENGTH.size : end]))
            start = end
        del inbox[:start]
        if closed and not messages:
            raise ChannelClosed("the other process closed it")
        return messages

    def wait(self, timeout_s: float) -> None:
        """Block until there is something to receive (or to flush and room for it), or the time is over."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        # Up: a wait cut short ends before what it waits for, and is asked for again until then.
        poll.poll(max(0, math.ceil(timeout_s * 1000)))

    def close(self) -> None:
        self._socket.close()

    def _fill(self) -> bool:
        """Read what there is; whether the other side is gone."""
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return False
            except OSError:
                return True
            if not data:
                return True
            self._inbox += data
