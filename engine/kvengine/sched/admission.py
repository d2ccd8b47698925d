"""Who may come in: what is refused at the door, who waits in which order, who fits now and later.

`refusal` and `fits` are pure. The queue serves the highest class first and, within a class, the earliest
arrival; a preempted request goes back to its place by arrival, so it does not lose its turn. Push and remove
are O(log n) to find plus a memory move, the head is O(1).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvengine.kv.table import BlockTables
from kvengine.request import Request
from kvengine.sched.peak import PESSIMISM, PeakDemand
from kvpilot.inside.lengths import LengthPredictor

ASK_AGAIN_STEPS = 16
"""A request that was refused for the peak is looked at again after so many steps, if nobody left before."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for at most."""

    model_tokens: int
    """Positions the model knows."""
    pool_tokens: int
    """Positions that fit in the whole KV pool."""

    @property
    def tokens(self) -> int:
        """Most tokens of prompt and output together."""
        return min(self.model_tokens, self.pool_tokens)


def refusal(prompt_tokens: int, max_tokens: int, limits: Limits) -> str | None:
    """Why this request can never be served, in one line for its sender; None if it can."""
    if prompt_tokens < 1:
        return "The prompt is empty: send at least one token."
    if max_tokens < 1:
        return f"max_tokens is {max_tokens}: ask for at least 1."
    what = "the model's maximum context length"
    if limits.pool_tokens < limits.model_tokens:
        what = "the engine's whole KV memory"
    asked = f"the prompt has {prompt_tokens} tokens"
    if prompt_tokens >= limits.tokens:
        return f"Too long: {asked} and {what} is {limits.tokens}. Shorten the prompt."
    if prompt_tokens + max_tokens > limits.tokens:
        return (
            f"Too long: {asked}, max_tokens is {max_tokens}, and {what} is {limits.tokens}. "
            f"Ask for at most {limits.tokens - prompt_tokens} tokens."
        )
    return None


def fits(need_blocks: int, in_use_blocks: int, total_blocks: int, watermark: float, alone: bool) -> bool:
    """Whether a request that needs `need_blocks` may be admitted beside what is in use.

    A request that would be alone is always admitted: the door has checked that the pool holds it, and a
    watermark under its size must not starve it.
    """
    return alone or in_use_blocks + need_blocks <= watermark * total_blocks


class PeakAdmission:
    """Admits while a pessimistic quantile of the predicted peak of KV demand stays under the watermark."""

    def __init__(self, tables: BlockTables, lengths: LengthPredictor) -> None:
        self._tables = tables
        self._peak = PeakDemand(tables, lengths)
        self.floor = 0.0
        """A watermark in force below this share bounds what is held, and the peak is bounded by this share:
        whoever lowers the watermark by what it expects to be needed would else count growth twice.
        """
        self.pessimism = PESSIMISM
        """Standard normal deviate of the quantile."""
        self._read_in_step = self._admitted_since = 0
        self._refused: tuple[object, ...] = ()
        self._refused_in_step = 0

    def fits(self, request: Request, running: Sequence[Request], watermark: float, step: int) -> bool:
        """Whether `request` may run beside the others from `step` on; alone it always may."""
        if not running:
            return True
        latest = max([other.admission for other in running])
        case = (request.id, request.packing, watermark, len(running), latest)
        if case == self._refused and step - self._refused_in_step < ASK_AGAIN_STEPS:
            return False
        # Where to look follows from who runs; it is chosen anew after each eighth more, which adds up to
        # O(running + admitted) still.
        if self._read_in_step != step or 8 * self._admitted_since >= len(running):
            self._peak.read(running, request)
            self._read_in_step, self._admitted_since = step, 0
        limit = max(watermark, self.floor) * self._tables.pool.total
        # The prefix is looked up only if it matters.
        if self._peak.with_candidate(request, 0, self.pessimism) <= limit:
            return True
        held = self._tables.held_already(request)
        if held and self._peak.with_candidate(request, held, self.pessimism) <= limit:
            return True
        self._refused, self._refused_in_step = case, step
        return False

    def admitted(self, request: Request, step: int) -> None:
        """It runs from `step` on."""
        if self._read_in_step == step:
            self._peak.admitted(request)
            self._admitted_since += 1


class WaitingQueue:
    """Accepted requests without KV memory, with the sums that telemetry shows per class."""

    def __init__(self, levels: int = 1) -> None:
        self._order: list[tuple[int, int, int, Request]] = []
        """Ascending, next to serve last: (class level, -arrival, -id, request)."""
        self.waiting_by_level = [0] * levels
        self.prompt_tokens_by_level = [0] * levels
        self.prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Request]:
        """In serving order."""
        return (entry[3] for entry in reversed(self._order))

    @property
    def head(self) -> Request:
        """The next to serve; IndexError if there is none."""
        return self._order[-1][3]

    def push(self, request: Request) -> None:
        """Queue it, at the place that its class and arrival give it."""
        insort(self._order, (*self._place(request), request))
        self._count(request, 1)

    def pop(self) -> Request:
        """Take the head out."""
        request = self._order.pop()[3]
        self._count(request, -1)
        return request

    def remove(self, request: Request) -> bool:
        """Take it out, wherever it is; False if it does not wait."""
        index = bisect_left(self._order, self._place(request), key=lambda entry: entry[:3])
        if index == len(self._order) or self._order[index][3] is not request:
            return False
        del self._order[index]
        self._count(request, -1)
        return True

    @staticmethod
    def _place(request: Request) -> tuple[int, int, int]:
        return request.klass, -request.arrived_ns, -request.id

    def _count(self, request: Request, sign: int) -> None:
        level, tokens = request.klass, sign * len(request.prompt)
        self.waiting_by_level[level] += sign
        self.prompt_tokens_by_level[level] += tokens
        self.prompt_tokens += tokens
