"""`solve`: the value that a model gives for a target, or why there is none. Pure."""

import math

from kvpilot.policy.context import Context
from kvpilot.policy.rules import Solve
from kvpilot.signals import Missing

LOWEST_CLASS = "lowest"
MODEL_OF = {True: "the step-time model", False: "the service rate"}
"""What is missing, in words: by whether a chunk is solved for."""


def solve(wanted: Solve, target_s: float, context: Context) -> float | Missing:
    """Tokens: the largest chunk that keeps a step to `target_s`, or what a class's TTFT leaves to accept."""
    if not target_s > 0:
        return Missing("eval_error")
    if wanted.klass is None:
        value = context.forecasts.chunk_for(target_s)
    else:
        lowest = wanted.klass == LOWEST_CLASS and context.classes
        value = context.forecasts.credits(context.classes[0] if lowest else wanted.klass, target_s)
    if isinstance(value, Missing):
        return value
    return Missing("not_finite") if math.isnan(value) else value
