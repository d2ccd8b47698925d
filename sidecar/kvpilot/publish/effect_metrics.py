"""Prometheus: what changes did to the inputs that their rules watch, beside what `verify` expected."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvpilot.journal.ledger import Ledger


def effect_metrics(ledger: Ledger) -> Iterator[Metric]:
    """Counts by outcome; of each rule's newest change that could be judged, both changes as shares."""
    count = CounterMetricFamily(
        "kvpilot_control_effects",
        "Changes by what came of them: the expected effect came, did_not_come, or is inconclusive.",
        labels=["policy", "rule", "outcome"],
    )
    for names, total in ledger.effect_counts.items():
        count.add_metric(list(names), total)
    yield count
    expected = GaugeMetricFamily(
        "kvpilot_control_effect_expected_ratio",
        "Share by which an input was to change with a rule's newest judged change; -0.1 is a fall by 10 %.",
        labels=["policy", "rule", "input"],
    )
    realised = GaugeMetricFamily(
        "kvpilot_control_effect_realised_ratio",
        "Share by which it changed; absent where it was 0 before.",
        labels=["policy", "rule", "input"],
    )
    for effect in ledger.judged.values():
        labels = [effect.policy, effect.rule, effect.input]
        expected.add_metric(labels, effect.ratio)
        if effect.after is not None and effect.before:
            realised.add_metric(labels, effect.after / effect.before - 1)
    yield expected
    yield realised
