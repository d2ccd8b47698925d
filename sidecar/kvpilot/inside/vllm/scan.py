"""What needs a look at every request: what waits, what the running ones waste and will need, who holds what.

A scan is paced by its own cost: it may take one part in 2,000 of the time, and happens every 20 ms at most.
With nothing running and nothing waiting there is nothing to look at, and everything is 0 at once.
"""

from typing import TYPE_CHECKING, Any

from kvpilot.clock import Clock
from kvpilot.inside.hook import StepHook
from kvpilot.inside.lengths import LengthPredictor
from kvpilot.inside.vllm.layout import Layout
from kvpilot.inside.vllm.lives import Lives
from kvpilot.inside.vllm.tenants import Tenants
from kvpilot.link.fields import HORIZONS, QUANTILES

if TYPE_CHECKING:
    from kvpilot.inside.vllm.record import Record

_LEAST_PAUSE_NS = 20_000_000
_SHARE = 2_000

DEMAND_FIELDS = tuple(f"demand_{horizon}_{q}_blocks" for horizon in HORIZONS for q in QUANTILES)
_NO_DEMAND = (0.0,) * len(DEMAND_FIELDS)


class Scan:
    """The latest look, and when the next one is due."""

    def __init__(
        self,
        scheduler: Any,
        layout: Layout,
        lives: Lives,
        lengths: LengthPredictor,
        hook: StepHook,
        clock: Clock,
        levels: int,
    ) -> None:
        self.step = 0
        self.waiting_prompt_tokens = 0
        self.tail_waste_tokens = 0
        self.demand: tuple[float, ...] = _NO_DEMAND
        self._scheduler = scheduler
        self._layout = layout
        self._lives = lives
        self._lengths = lengths
        self._hook = hook
        self._clock = clock
        self._levels = levels
        self.tenants = Tenants(hook)
        self._rows: list[tuple[int, int]] = [(-1, -1)] * levels
        self.due_ns = 0
        """When to look again."""

    def look(self, running: int, waiting: int, step: int, now_ns: int) -> bool:
        """Look, if it is time. `running` and `waiting` are this moment's counts. True where anything that
        `show` tells may have changed.
        """
        if not running and not waiting:
            self._nothing(step, now_ns)
            return True
        if now_ns < self.due_ns:
            return self._gone(running, waiting)
        self.step = step
        self._waiting()
        self._running()
        self.tenants.show(self._lives, self._scheduler, self._layout, now_ns)
        cost_ns = self._clock.monotonic_ns() - now_ns
        self.due_ns = now_ns + max(_LEAST_PAUSE_NS, _SHARE * cost_ns)
        return True

    def _gone(self, running: int, waiting: int) -> bool:
        """What is gone is gone: no need to look for that."""
        gone = False
        if not waiting and self.waiting_prompt_tokens:
            self.waiting_prompt_tokens = 0
            self._show_classes([(0, 0)] * self._levels)
            gone = True
        if not running and self.tail_waste_tokens:
            self.tail_waste_tokens = 0
            gone = True
        return gone

    def show(self, record: "Record") -> None:
        """Put into the record what was seen."""
        record.put("waiting_prompt_tokens", self.waiting_prompt_tokens)
        record.put("tail_waste_tokens", self.tail_waste_tokens)
        record.put_demand(self.step, self.demand)

    def _nothing(self, step: int, now_ns: int) -> None:
        self.step = step
        self.waiting_prompt_tokens = self.tail_waste_tokens = 0
        self.demand = _NO_DEMAND
        self._show_classes([(0, 0)] * self._levels)
        self.tenants.show(self._lives, self._scheduler, self._layout, now_ns)
        self.due_ns = 0

    def _waiting(self) -> None:
        count, tokens = [0] * self._levels, [0] * self._levels
        lives = self._lives
        for queue in waiting_queues(self._scheduler):
            for request in queue:
                life = lives.get(request.request_id)
                level = life.level if life is not None else 0
                count[level] += 1
                tokens[level] += request.num_prompt_tokens
        self.waiting_prompt_tokens = sum(tokens)
        self._show_classes(list(zip(count, tokens, strict=True)))

    def _show_classes(self, rows: list[tuple[int, int]]) -> None:
        for level, row in enumerate(rows):
            if row != self._rows[level]:
                self._rows[level] = row
                self._hook.set_class(level, *row)

    def _running(self) -> None:
        layout, running = self._layout, self._scheduler.running
        if not layout.tables:
            return
        slots = 0
        for table in layout.tables:
            slots += layout.block_size * sum([len(table.get(request.request_id, ())) for request in running])
        # Tokens of steps under way have no output yet; their slots are not filled.
        filled = sum([request.num_computed_tokens - in_flight_tokens(request) for request in running])
        self.tail_waste_tokens = max(0, slots - len(layout.tables) * filled)
        lives = [self._lives.get(request.request_id) for request in running]
        held = [
            (request.num_tokens, request.num_output_tokens, life.tenant if life is not None else "")
            for request, life in zip(running, lives, strict=True)
        ]
        demands = self._lengths.demand(held, layout.block_size, HORIZONS)
        groups = len(layout.tables)
        self.demand = tuple(groups * value for demand in demands for value in demand)


def waiting_queues(scheduler: Any) -> list[Any]:
    """Every queue of requests that wait, in this version's names; the empty ones left out."""
    queues = [getattr(scheduler, name, None) for name in ("waiting", "kv_holding_waiting", "skipped_waiting")]
    # A priority queue yields a sorted copy; its heap, unsorted, is all that is needed.
    return [getattr(queue, "_heap", queue) for queue in queues if queue]


def in_flight_tokens(request: Any) -> int:
    """Tokens of `request` that are being computed in steps whose output is not back."""
    tokens: int = getattr(request, "num_in_flight_tokens", None) or 0
    return tokens
