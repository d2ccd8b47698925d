"""How the servers of these tests are started, and what one test does with one of them."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vllm_lab import iterations
from vllm_lab.iterations import Iteration, Iterations
from vllm_lab.leases import Hold, Records, until
from vllm_lab.load import Ask, Crowd, prompt
from vllm_lab.server import Scrape, Settings, VllmServer

from kvpilot.link.records import StepRecord

CALLER = "x-kvpilot-caller"
CALLERS = {
    "classes": {"batch": 0, "interactive": 1},
    "default": "batch",
    "header": CALLER,
    "tenants": ["acme", "globex"],
}
BLOCKS = 160
BLOCK_TOKENS = 32
DRAFT = Settings(
    target="target",
    speculation="draft_hit",
    speculative_tokens=3,
    max_model_len=2048,
    block_size=BLOCK_TOKENS,
    blocks=BLOCKS,
    max_num_seqs=16,
    max_num_batched_tokens=1024,
    valve=True,
    callers=CALLERS,
    arguments=(
        iterations.ARGUMENT,
        "--scheduler-cls",
        "vllm.v1.core.sched.async_scheduler.AsyncScheduler",
    ),
)
"""A draft model that is always right, under the scheduler that GPUs have by default. On the CPU vLLM picks
the synchronous one unless it is told, and never runs two steps at once."""
NGRAM = replace(
    DRAFT,
    target="looping",
    speculation="ngram",
    speculative_tokens=4,
    arguments=(iterations.ARGUMENT,),
)
"""N-gram lookup, nearly always right on this target, under the synchronous scheduler, as everywhere."""

SETTLE_S = 0.3
"""After a knob is in force: steps scheduled before it, and lines of the log, are still under way."""


@dataclass
class Window:
    """What happened in a stretch of time, by our records and by vLLM's own log and counters."""

    records: list[StepRecord]
    iterations: list[Iteration]
    before: Scrape
    after: Scrape

    def gained(self, counter: str) -> float:
        """How much one of vLLM's counters grew."""
        return self.after.value(counter) - self.before.value(counter)

    def grown(self, field: str) -> int:
        """How much a cumulative field of the records grew."""
        return int(self.records[-1][field] - self.records[0][field])

    @property
    def drafted(self) -> float:
        """Draft tokens that vLLM counted."""
        return self.gained("vllm:spec_decode_num_draft_tokens_total")


class Flight:
    """One server with leases in hand, every step in view, and load on demand."""

    def __init__(self, server: VllmServer, hold: Hold) -> None:
        self.server = server
        self.hold = hold
        self.records = Records(server.place)
        self._iterations = Iterations(server.log)

    def put(self, **knobs: float) -> None:
        """Hold these, and wait until the engine says that they are in force."""
        self.hold.set(**knobs)
        self.until_in_force(knobs)

    def back(self) -> None:
        """Withdraw everything, and wait until the engine says so."""
        self.hold.clear()
        self.until_in_force(self.records.baselines())

    def until_in_force(self, knobs: dict[str, float], within_s: float = 10.0) -> float:
        """Seconds until the newest step had these values. Needs running requests: no step, no record."""
        return until(
            lambda: self.records.knobs().items() >= knobs.items(),
            within_s,
            f"{knobs} in force, not {self.records.knobs()}",
        )

    def watch(self, seconds: float = 1.0) -> Window:
        """What happens from now on, for that long."""
        self._catch_up()
        self.records.poll()
        self._iterations.poll()
        before = self.server.metrics()
        time.sleep(seconds)
        after = self.server.metrics()
        records = self.records.poll()
        steps = self._iterations.poll()
        assert len(records) > 5, f"{len(records)} steps only; vLLM's log ends:\n{self.server.log_end()}"
        assert len(steps) > 5
        return Window(records, steps, before, after)

    def _catch_up(self) -> None:
        """Let vLLM's log and counters, which another process writes, come to where the engine is now."""
        self.records.poll()
        latest = self.records.latest
        reached = latest["steps_total"] - 1 if latest is not None else 0
        until(
            lambda: any(step.number >= reached for step in self._iterations.poll()),
            20,
            "vLLM's log caught up",
        )
        time.sleep(SETTLE_S)

    def iterations(self) -> list[Iteration]:
        """Steps that vLLM logged since the last look."""
        return self._iterations.poll()

    @contextmanager
    def crowd(self, clients: int, prompt_tokens: int, max_tokens: int) -> Iterator[Crowd]:
        """Clients that send one request after another, no two alike; every one must be answered whole."""
        first = random.Random().randrange(1 << 40)

        def make(number: int) -> Ask:
            return Ask(
                prompt(prompt_tokens, first + number), max_tokens, headers={CALLER: "interactive/acme"}
            )

        with Crowd(self.server.url, clients, make) as crowd:
            until(
                lambda: self.server.metrics().value("vllm:num_requests_running") > 0, 20, "running requests"
            )
            yield crowd
        assert crowd.answers
        assert not crowd.failures, crowd.failures[0].error
