"""How many bytes of a request's body make one prompt token, measured: what credits are charged by.

Bodies let in by the valves, over prompt tokens that the engine computed, in the last WINDOW_NS. A prompt
token that the prefix cache held was not computed, so callers whose prompts are cached are charged less, as
they should be. The pilot writes it as a lease of its own while credits are granted, and only then; without
the lease a valve takes `credits.BYTES_PER_TOKEN`.
"""

import math
from collections import deque
from collections.abc import Iterable

from kvpilot.adapters.engine import Sight
from kvpilot.clock import NS
from kvpilot.inside.valve_leases import ADMISSION_CREDITS, PROMPT_BYTES_PER_TOKEN
from kvpilot.knobs import KNOBS
from kvpilot.link.controls import Scope
from kvpilot.policy.lease import LeaseWish
from kvpilot.policy.rules import DEFAULT_LEASE_NS

WINDOW_NS = 60 * NS
SAMPLE_NS = NS
MIN_TOKENS = 1000
"""Below that many computed in the window nothing is learned: what was measured last stays."""
MOVES_BY = 0.05
"""A new measurement replaces one that differs from it by more than this part."""
PILOT = "pilot"
"""The policy name of what the pilot itself holds; `measured` its rule."""


class PromptBytes:
    """One engine's measurement. `value` is None until there is one."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._samples: deque[tuple[int, float, float]] = deque()

    def observe(self, sight: Sight) -> None:
        """Take in one sight of engine and valves."""
        if sight.restarted:
            self._samples.clear()
        tokens = sight.record.get("prefill_tokens_total") if sight.record is not None else None
        if tokens is None or sight.valve is None or sight.manifest is None:
            return
        # Of several ranks behind the same valves each computes its part.
        tokens *= sight.manifest.world.get("dp", 1)
        if self._samples and sight.at_ns - self._samples[-1][0] < SAMPLE_NS:
            return
        self._samples.append((sight.at_ns, sight.valve.admitted_bytes, tokens))
        while self._samples[0][0] < sight.at_ns - WINDOW_NS:
            self._samples.popleft()
        _, old_bytes, old_tokens = self._samples[0]
        if tokens - old_tokens >= MIN_TOKENS:
            self._take((sight.valve.admitted_bytes - old_bytes) / (tokens - old_tokens))

    def _take(self, measured: float) -> None:
        low, high = KNOBS[PROMPT_BYTES_PER_TOKEN].plausible
        measured = round(min(max(measured, low), high), 2)
        if self.value is None or not math.isclose(measured, self.value, rel_tol=MOVES_BY):
            self.value = measured

    def leases(self, held: Iterable[LeaseWish]) -> tuple[LeaseWish, ...]:
        """`held`, and the measurement where credits are granted and nobody else says what they are worth."""
        held = tuple(held)
        knobs = {wish.knob for wish in held}
        if self.value is None or ADMISSION_CREDITS not in knobs or PROMPT_BYTES_PER_TOKEN in knobs:
            return held
        wish = LeaseWish(
            PROMPT_BYTES_PER_TOKEN, Scope("all"), self.value, DEFAULT_LEASE_NS, PILOT, "measured"
        )
        return (*held, wish)
