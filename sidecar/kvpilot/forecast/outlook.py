"""What one tick forecasts, as plain values: signals with their bands, and what `solve` and `choose` ask."""

from dataclasses import dataclass, field

from kvpilot.forecast.estimate import Estimate
from kvpilot.policy.context import Forecasts
from kvpilot.signals import Missing

Key = tuple[str, str | None]
"""(signal, class); class None is all of them."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """See the module docstring."""

    signals: dict[Key, float | Missing] = field(default_factory=dict)
    bands: dict[Key, Estimate] = field(default_factory=dict)
    """Of those signals that have one; the signal is its p50."""
    forecasts: Forecasts = field(default_factory=Forecasts)


def missing(why: str, classes: tuple[str, ...]) -> Outlook:
    """Every forecast missing for one reason."""
    absent = Missing(why)
    keys: list[Key] = [(name, None) for name in FORECAST_SIGNALS]
    keys += [(name, klass) for name in PER_CLASS_SIGNALS for klass in classes]
    return Outlook(
        dict.fromkeys(keys, absent),
        {},
        Forecasts(lambda target_s: absent, lambda name, ttft_s: absent, {}),
    )


FORECAST_SIGNALS = (
    "forecast.kv_exhaustion_seconds",
    "forecast.kv_exhaustion_p10_seconds",
    "forecast.kv_exhaustion_p90_seconds",
    "forecast.queue_wait_seconds",
    "forecast.queue_wait_p90_seconds",
    "forecast.ttft_miss_ratio",
    "forecast.ttft_ratio",
    "forecast.wait_ratio",
    "forecast.service_tokens_per_second",
    "forecast.step_seconds",
    "forecast.step_p97_seconds",
    "forecast.step_residual_ratio",
    "forecast.acceptance_ratio",
    "forecast.seconds_per_token",
    "forecast.device_headroom_bytes",
)
PER_CLASS_SIGNALS = (
    "forecast.queue_wait_seconds",
    "forecast.queue_wait_p90_seconds",
    "forecast.ttft_miss_ratio",
)
