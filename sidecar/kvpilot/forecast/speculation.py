"""Seconds per output token for each number of draft tokens: predicted step time over expected tokens.

Not measured by trying: tokens per second at two settings differ by the load of two moments long before they
differ by the setting. Cost comes from the step-time model, gain from measured acceptance.

Where steps are full (the token budget is used up by prompts), a step happens anyway, and what counts is the
time that decoding adds to it. A queue alone says nothing about that: under want of KV memory fewer drafts
only keep requests, and their memory, longer.
"""

from kvpilot.forecast.acceptance import expected_tokens
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.step_time import StepTimeModel
from kvpilot.forecast.work import Work
from kvpilot.signals import Missing

MOST_DRAFTS = 16
_LEAST_DECODES = 0.05
"""Mean sequences a step: below that nothing decodes."""

_NONE = Estimate(0.0, 0.0, 0.0)

PerDrafts = dict[int, Estimate | Missing]


def seconds_per_token(
    model: StepTimeModel | Missing, acceptance: Estimate | Missing, most: int, marginal: bool
) -> PerDrafts:
    """For 0..`most` drafts a sequence and step. `marginal`: count only what decoding adds to a step."""
    lengths = range(min(most, MOST_DRAFTS) + 1)
    if isinstance(model, Missing):
        return dict.fromkeys(lengths, model)
    if model.mean.decodes < _LEAST_DECODES:
        return dict.fromkeys(lengths, Missing("no_samples"))
    costs: PerDrafts = {0: _cost(model, _NONE, 0, marginal)}
    for drafts in lengths[1:]:
        if isinstance(acceptance, Missing):
            costs[drafts] = acceptance
        else:
            costs[drafts] = _cost(model, acceptance, drafts, marginal)
    return costs


def _cost(model: StepTimeModel, acceptance: Estimate, drafts: int, marginal: bool) -> Estimate:
    work = with_drafts(model.mean, drafts)
    taken = model.seconds(work)
    base_s = model.seconds(Work(work.prefill, chunk_positions=work.chunk_positions)).p50 if marginal else 0.0
    fewest, middle, most = (work.decodes * expected_tokens(chance, drafts) for chance in acceptance)
    return Estimate(
        max(0.0, taken.p10 - base_s) / most,
        max(0.0, taken.p50 - base_s) / middle,
        max(0.0, taken.p90 - base_s) / fewest,
    )


def with_drafts(work: Work, drafts: int) -> Work:
    """The same batch, with that many drafts a sequence."""
    drafted = work.decodes * drafts
    return work._replace(drafted=drafted, context=max(0.0, work.context - work.drafted) + drafted)
