"""The engine as a whole, as signals: known to be so now, also while the engine itself is silent.

That is what alerts go by: other signals age while an engine says nothing, and a rule that names one sees
it missing. Pure.
"""

from kvpilot.adapters.windows import Key, Reading
from kvpilot.link.liveness import Liveness
from kvpilot.link.records import StepRecord
from kvpilot.signals import Missing

STALLED, WEDGED, SILENT = "engine_stalled", "output_wedged", "telemetry_silent_seconds"
RANK_LOAD: Key = ("rank_load_ratio", None)
CONDITION_SIGNALS = (STALLED, WEDGED, SILENT, RANK_LOAD[0])

_NOT_PROVIDED = Missing("not_provided")


def condition(
    record: StepRecord, liveness: Liveness, silent_s: float, has_valve: bool, at_ns: int
) -> dict[Key, Reading | Missing]:
    """All but the rank's load. An engine that tells no work is never seen to stall; what leaves a server only
    its valve sees.
    """
    tells_work = "running" in record and "waiting" in record
    idle = liveness == "idle"
    return {
        (STALLED, None): Reading(at_ns, float(liveness == "stalled")) if tells_work else _NOT_PROVIDED,
        (WEDGED, None): Reading(at_ns, float(liveness == "wedged")) if has_valve else _NOT_PROVIDED,
        (SILENT, None): Reading(at_ns, 0.0 if idle else silent_s) if tells_work else _NOT_PROVIDED,
    }
