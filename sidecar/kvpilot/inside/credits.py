"""Credits: how many prompt tokens a valve may accept until the lease that grants them is renewed.

A request is let in while anything is left, and then charged whole: it may overdraw by its own size, and no
more, for the next one finds nothing left. What it overdrew is owed, and paid from the grants that follow. So
between two renewals the tokens charged exceed the grant by less than one request's charge, over any run of
them they exceed the sum of grants by less than one request's charge, and a request larger than a whole grant
waits for its turn like any other. Size plays no part in who is let in. Credits left over are not kept: a
grant says what can be served now.

What a request is charged is known before its body: its length over the measured bytes per token.
"""

import math
from collections import deque

BYTES_PER_TOKEN = 4.0
"""Where nobody has measured."""
BODY_BYTES = 1024
"""Taken for a body of unknown length until one of known length has been seen."""
MAX_TOKENS = 1 << 18
"""Most that one request is charged: a body full of images, or a false Content-Length, must not put its whole
class into debt for minutes."""
_KEPT_BODIES = 101


class Bucket:
    """The credits of one lease in one process, in prompt tokens. Invariant: `left` is at most the last
    grant."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = 0.0
        """What may still be accepted; below 0 what is owed."""

    def refill(self, grant: float) -> None:
        """The lease was renewed."""
        self.left = min(self.left, 0.0) + max(grant, 0.0)

    @property
    def is_open(self) -> bool:
        """Whether another request may be let in."""
        return self.left > 0

    def charge(self, tokens: int) -> None:
        """A request was let in."""
        self.left -= tokens


class PromptSizes:
    """What bodies are taken for."""

    def __init__(self) -> None:
        self._bodies: deque[int] = deque(maxlen=_KEPT_BODIES)

    def body_bytes(self, length: int | None) -> int:
        """The length, or for an unknown one the median of those seen of late. O(1) where it is known."""
        if length is not None:
            self._bodies.append(length)
            return length
        return sorted(self._bodies)[len(self._bodies) // 2] if self._bodies else BODY_BYTES

    @staticmethod
    def tokens(body_bytes: int, bytes_per_token: float) -> int:
        """The charge: at least 1, at most MAX_TOKENS."""
        return min(max(math.ceil(body_bytes / bytes_per_token), 1), MAX_TOKENS)
