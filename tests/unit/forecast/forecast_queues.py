"""A queue of prompts with strict class priority and one server, whose truth is known: who waited how long."""

import math
import random
from collections import deque
from dataclasses import dataclass, field

from kvpilot.link.telemetry_page import ClassRow

CLASSES = ("batch", "interactive")
TICK_S = 0.1


@dataclass
class Arrived:
    """One request; `waited_s` is known once it is served."""

    klass: str
    tokens: int
    at_s: float
    waited_s: float | None = None
    first_token_s: float | None = None


@dataclass
class PromptServer:
    """Serves `rate` prompt tokens a second (with noise by the second), the highest class first."""

    rate: float = 8000.0
    load: float = 1.3
    """Arriving tokens over served ones, outside of `pause`."""
    share: float = 0.5
    """Of requests that are interactive."""
    noise: float = 0.15
    seed: int = 1
    pause: tuple[float, float] = (0.0, 0.0)
    """A time without arrivals."""
    leave_after_s: float = math.inf
    """Patience: who waited longer is gone."""
    bursts: float = 1.0
    """Load in the first half of every 20 s over the mean; the second half has the rest."""
    at_s: float = 0.0
    served: float = 0.0
    given_up: float = 0.0
    """Tokens of those who left."""
    finished: list[Arrived] = field(default_factory=list)
    admitted: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._queues: dict[str, deque[Arrived]] = {name: deque() for name in CLASSES}
        self._left = self._due = 0.0
        self._current: Arrived | None = None
        self._pace = 1.0

    def tick(self) -> list[Arrived]:
        """A tenth of a second; who came in it."""
        dice, came = self._dice, []
        if round(self.at_s / TICK_S) % 10 == 0:
            self._pace = math.exp(dice.gauss(0, self.noise))
        if not self.pause[0] <= self.at_s < self.pause[1]:
            part = self.bursts if self.at_s % 20 < 10 else 2 - self.bursts
            self._due += dice.expovariate(1.0) * part * self.load * self.rate * TICK_S
            while self._due > 0:
                tokens = max(8, int(math.exp(dice.gauss(5.5, 0.8))))
                klass = "interactive" if dice.random() < self.share else "batch"
                came.append(Arrived(klass, tokens, self.at_s))
                self._queues[klass].append(came[-1])
                self.admitted[klass] += 1
                self._due -= tokens
        for queue in self._queues.values():
            while queue and self.at_s - queue[0].at_s > self.leave_after_s:
                self.given_up += queue.popleft().tokens
        self._serve(self.rate * self._pace * TICK_S)
        self.at_s += TICK_S
        return came

    def _serve(self, tokens: float) -> None:
        spent = 0.0
        while spent < tokens:
            if self._current is None:
                queue = self._queues["interactive"] or self._queues["batch"]
                if not queue:
                    return
                self._current = queue.popleft()
                self._left = self._current.tokens
                self._current.waited_s = self.at_s + spent / tokens * TICK_S - self._current.at_s
            done = min(self._left, tokens - spent)
            spent += done
            self.served += done
            self._left -= done
            if self._left <= 0:
                now_s = self.at_s + spent / tokens * TICK_S
                self._current.first_token_s = now_s - self._current.at_s
                self.finished.append(self._current)
                self._current = None

    def rows(self) -> tuple[ClassRow, ...]:
        return tuple(
            ClassRow(name, len(queue), sum(one.tokens for one in queue))
            for name, queue in self._queues.items()
        )

    def waiting(self) -> float:
        return float(sum(row.waiting_prompt_tokens for row in self.rows()))
