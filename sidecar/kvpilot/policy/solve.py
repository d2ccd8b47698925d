"""`solve`: the value that a model gives for a target, or why there is none. Pure."""

import math

from kvpilot.policy.context import Context
from kvpilot.policy.expr import HIGHEST, LOWEST
from kvpilot.policy.rules import Solve
from kvpilot.signals import Missing

MODEL_OF = {True: "the step-time model", False: "the service rate"}
"""What is missing, in words: by whether a chunk is solved for."""


def solve(wanted: Solve, target_s: float, context: Context) -> float | Missing:
    """Tokens: the largest chunk that keeps a step to `target_s`, or what a class's TTFT leaves to accept."""
    if not target_s > 0:
        return Missing("eval_error")
    if wanted.klass is None:
        value = context.forecasts.chunk_for(target_s)
    else:
        value = context.forecasts.credits(_name(wanted.klass, context), target_s)
    if isinstance(value, Missing):
        return value
    return Missing("not_finite") if math.isnan(value) else value


def _name(klass: str, context: Context) -> str:
    """What the engine calls the class."""
    if not context.classes:
        return klass
    return {LOWEST: context.classes[0], HIGHEST: context.classes[-1]}.get(klass, klass)
