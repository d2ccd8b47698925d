"""From the shape of `choose` to a choosing rule: its candidates, its probe, and the knob as an action."""

from kvpilot.link.controls import Scope
from kvpilot.policy.findings import Findings
from kvpilot.policy.rules import Action, Choose, Probe
from kvpilot.policy.schema import ChooseModel, ProbeModel
from kvpilot.policy.source import Path

FORECAST_OF = {"speculative_tokens": "forecast.seconds_per_token"}
"""Which knob's candidates a forecast compares."""


def build_choose(findings: Findings, path: Path, given: ChooseModel) -> tuple[Choose, Action] | None:
    """What to choose from, and its knob and bounds as an action; None after a mistake."""
    knob = findings.knob((*path, "knob"), given.knob)
    if knob is not None and FORECAST_OF.get(knob.name) != given.minimise:
        findings.at((*path, "knob"), f"{given.minimise} compares {' and '.join(FORECAST_OF)} only")
    for i, candidate in enumerate(given.candidates):
        if knob is not None:
            findings.plausible((*path, "candidates", i), candidate, knob)
        if candidate != round(candidate):
            findings.at((*path, "candidates", i), f"{candidate:g} is no whole number")
        if candidate in given.candidates[:i]:
            findings.at((*path, "candidates", i), f"{candidate:g} is there twice")
    unless = None if given.unless is None else findings.expression((*path, "unless"), given.unless, "bool")
    probe = None if given.probe is None else _probe(findings, (*path, "probe"), given, given.probe)
    if knob is None or (given.unless is not None and unless is None):
        return None
    choose = Choose(
        knob.name, tuple(given.candidates), given.minimise, given.hysteresis, unless=unless, probe=probe
    )
    low, high = min(given.candidates), max(given.candidates)
    return choose, Action(knob.name, Scope("all"), "choose", 0.0, low, high, None)


def _probe(findings: Findings, path: Path, choose: ChooseModel, given: ProbeModel) -> Probe:
    if given.candidate not in choose.candidates:
        findings.at((*path, "candidate"), f"{given.candidate:g} is none of the candidates")
    elif given.candidate == min(choose.candidates):
        findings.at((*path, "candidate"), "the lowest candidate: no choice below it silences a signal")
    if given.for_ <= 0:
        findings.at((*path, "for"), "must be above 0s")
    if given.every <= given.for_:
        findings.at((*path, "every"), "must be longer than `for`")
    return Probe(given.candidate, given.for_, given.every, given.jitter, given.backoff)
