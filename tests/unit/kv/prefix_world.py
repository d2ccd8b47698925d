"""Requests of several tenants over one small pool, and a ledger of what each block's KV really is.

The ledger is the judge: it is written when positions are computed, by whoever computes them, and knows
nothing of fingerprints, labels or lives. A table whose block holds anything but its own namespace's own text
is a leak.
"""

from collections.abc import Callable
from typing import Any

from kvengine.kv.pool import BlockPool
from kvengine.kv.table import BlockTables
from kvengine.kv.tree import PrefixTree
from kvengine.request import Request, SamplingParams

BLOCK = 2

Owner = tuple[str | None, str]
"""Tenant and adapter."""


class World:
    """One pool, its tree and tables, and every request that holds blocks."""

    def __init__(self, blocks: int = 12, fingerprint: Callable[[Any], int] = hash, pinned: int = 0) -> None:
        self.pool = BlockPool(blocks)
        self.tree = PrefixTree(
            self.pool, BLOCK, "model", max_pinned_blocks=pinned, salt=b"s", fingerprint=fingerprint
        )
        self.tables = BlockTables(self.pool, BLOCK, self.tree)
        self.running: list[Request] = []
        self.ledger: dict[int, tuple[Owner, tuple[int, ...]]] = {}
        """KV slot -> whose, and the text up to and with the token in it."""
        self.made = 0

    def arrive(self, tenant: str | None, tokens: list[int], adapter: str = "") -> Request:
        self.made += 1
        request = Request(self.made, tokens, SamplingParams(99), tenant=tenant, adapter=adapter)
        self.tables.adopt(request)
        self.running.append(request)
        self.judge(request)
        return request

    def compute(self, request: Request, count: int, following: int | None = None) -> bool:
        """Up to `count` more positions, then perhaps a token more; False if there are no blocks for them."""
        end = min(request.computed + count, len(request.tokens))
        if not self.tables.cover(request, end):
            return False
        self._copy()
        for position in range(request.computed, end):
            self.ledger[self.slot(request, position)] = (
                owner(request),
                tuple(request.tokens[: position + 1]),
            )
        request.computed = end
        if following is not None and end == len(request.tokens):
            request.tokens.append(following)
        self.tables.register(request)
        self.judge(request)
        return True

    def fork(self, request: Request) -> Request:
        self.made += 1
        other = Request(
            self.made, request.prompt, request.sampling, tenant=request.tenant, adapter=request.adapter
        )
        other.tokens = list(request.tokens)
        self.tables.fork(request, other)
        self.running.append(other)
        return other

    def end(self, request: Request) -> None:
        self.running.remove(request)
        self.tables.clear(request)

    def judge(self, request: Request) -> None:
        """Every computed position is this namespace's own text."""
        for position in range(request.computed):
            held = self.ledger[self.slot(request, position)]
            assert held == (owner(request), tuple(request.tokens[: position + 1])), "somebody else's KV"

    def check(self) -> None:
        for request in self.running:
            self.judge(request)
        held = [block for request in self.running for block in request.blocks]
        self.pool.check([*held, *self.tree.pinned])
        assert self.pool.free + self.pool.cached + self.pool.referenced == self.pool.total

    @staticmethod
    def slot(request: Request, position: int) -> int:
        return request.blocks[position // BLOCK] * BLOCK + position % BLOCK

    def _copy(self) -> None:
        before = dict(self.ledger)
        for source, destination in self.tables.take_copies():
            for i in range(BLOCK):
                if source * BLOCK + i in before:
                    self.ledger[destination * BLOCK + i] = before[source * BLOCK + i]


def owner(request: Request) -> Owner:
    return request.tenant, request.adapter
