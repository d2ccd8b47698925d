"""What a recording says about why its engine ended, as far as it goes and no further.

Each finding is a fact with its numbers. `strong` ones go with ends of that kind (a machine out of memory, a
hang); the others are circumstances. A look that found nothing is listed too: what did not happen is evidence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from kvpilot.clock import NS
from kvpilot.incident.recording import Recording
from kvpilot.incident.timeline import kv_used
from kvpilot.link.liveness import stalled_after_s
from kvpilot.link.records import StepRecord

RECENT_S = 10.0
"""The last moments, held against what came before."""
LOOK_S = 60.0
HOST_SHORT_BYTES = 256 << 20
HOST_SHORT_SHARE = 0.05
"""Of the most that was ever available while this page was written."""
DEVICE_FALLEN_SHARE = 0.5
KV_FULL = 0.98
PREEMPTIONS_MANY = 5
TIMES_SLOWER = 3.0
GROWN_BY = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact. `topic` is a stable name for programs."""

    topic: str
    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it: `found`, strongest first, and the topics that were looked at in vain."""

    found: tuple[Finding, ...]
    in_vain: tuple[str, ...]

    @property
    def strongest(self) -> Finding | None:
        """The first finding that may explain the end."""
        return next((finding for finding in self.found if finding.strong), None)


@dataclass(frozen=True, slots=True)
class Last:
    """The records of the last minute, and which of them are recent."""

    recording: Recording
    all: Sequence[StepRecord]
    earlier: Sequence[StepRecord]
    recent: Sequence[StepRecord]
    newest: StepRecord
    end_ns: int
    gone_ns: int | None
    """By when the engine was surely gone, on its own clock, where somebody saw that."""

    def moved(self, records: Sequence[StepRecord], name: str) -> float | None:
        """How far a counter moved over `records`."""
        values = [value for record in records if (value := record.get(name)) is not None]
        return values[-1] - values[0] if len(values) > 1 else None


def gather(recording: Recording, gone_ns: int | None = None) -> Evidence:
    """Everything that the recording says. `gone_ns`: when somebody else saw the engine gone."""
    timed = [record for record in recording.steps if record.get("time_ns") is not None]
    end_ns = recording.last_sign_ns
    if end_ns is None or not timed:
        return Evidence((), ())
    shown = [record for record in timed if record["time_ns"] >= end_ns - LOOK_S * NS] or timed[-1:]
    split = end_ns - RECENT_S * NS
    earlier = [record for record in shown if record["time_ns"] < split]
    recent = [record for record in shown if record["time_ns"] >= split] or shown[-1:]
    last = Last(recording, shown, earlier, recent, timed[-1], end_ns, gone_ns)
    findings, in_vain = [], []
    for topic, look in _LOOKS.items():
        finding = look(last)
        if finding is not None:
            findings.append(finding)
        elif topic in _WORTH_SAYING and _seen(last, topic):
            in_vain.append(_WORTH_SAYING[topic])
    findings.sort(key=lambda finding: not finding.strong)
    return Evidence(tuple(findings), tuple(in_vain))


def _host_memory(last: Last) -> Finding | None:
    name = "host_available_bytes"
    left = last.newest.get(name)
    most = max((record.get(name) or 0 for record in last.recording.steps), default=0)
    if left is None or left >= max(HOST_SHORT_BYTES, HOST_SHORT_SHARE * most):
        return None
    text = f"the machine, or a limit around the engine, had {_bytes(left)} of memory left"
    first = last.all[0].get(name) or 0
    if first > 2 * left:
        text += f", {_bytes(first)} {_ago(last, last.all[0])} before"
    return Finding("host_memory", f"{text}: the out-of-memory killer acts when that is gone", strong=True)


def _hung(last: Last) -> Finding | None:
    """Gone long after its last sign of life, with work: it did not die in the middle of stepping along."""
    if last.gone_ns is None or not _has_work(last):
        return None
    silent_s = (last.gone_ns - last.end_ns) / NS
    if silent_s <= stalled_after_s(_p99_s(last)):
        return None
    text = f"it had work and gave no sign of life for {silent_s:.1f} s before it was gone: it hung first"
    return Finding("hung", text, strong=True)


def _oom(last: Last) -> Finding | None:
    events = last.moved(last.all, "oom_total")
    if not events:
        return None
    return Finding("device_oom", f"{events:.0f} steps ran out of device memory in {_span(last)}", strong=True)


def _device_memory(last: Last) -> Finding | None:
    name = "device_free_bytes"
    before = [value for record in last.earlier if (value := record.get(name)) is not None]
    now = [value for record in last.recent if (value := record.get(name)) is not None]
    if not before or not now or min(now) >= DEVICE_FALLEN_SHARE * median(before):
        return None
    text = f"free device memory fell from {_bytes(median(before))} to {_bytes(min(now))} in the last "
    return Finding("device_memory", f"{text}{RECENT_S:.0f} s", strong=True)


def _kv_full(last: Last) -> Finding | None:
    used = [(record, kv_used(last.recording, record)) for record in last.all]
    if used[-1][1] is None or used[-1][1] < KV_FULL:
        return None
    since = last.newest
    for record, share in reversed(used):
        if share is None or share < KV_FULL:
            break
        since = record
    return Finding("kv_full", f"KV memory was full ({used[-1][1]:.0%}) for the last {_ago(last, since)}")


def _preemptions(last: Last) -> Finding | None:
    many = last.moved(last.recent, "preemptions_total") or 0
    before = last.moved(last.earlier, "preemptions_total") or 0
    if many < PREEMPTIONS_MANY:
        return None
    text = f"{many:.0f} requests were preempted in the last {RECENT_S:.0f} s"
    return Finding("preemptions", f"{text}, {before:.0f} in the {LOOK_S - RECENT_S:.0f} s before")


def _step_time(last: Last) -> Finding | None:
    before, now = _durations_ms(last.earlier), _durations_ms(last.recent)
    if not before or not now or median(now) < TIMES_SLOWER * median(before):
        return None
    text = f"steps took {median(now):.1f} ms at the median in the last {RECENT_S:.0f} s, {median(before):.1f}"
    return Finding("step_time", f"{text} ms before")


def _gap(last: Last) -> Finding | None:
    """The longest time with work and without a step, where that is long."""
    pairs = [(b["time_ns"] - a["time_ns"], b) for a, b in pairwise(last.all) if _busy(a)]
    gap_ns, after = max(pairs, key=lambda pair: pair[0], default=(0, last.newest))
    if gap_ns < stalled_after_s(_p99_s(last)) * NS:
        return None
    text = f"it had work and made no step for {gap_ns / NS:.1f} s, until {_ago(last, after)} before the end"
    return Finding("gap", text)


def _waiting(last: Last) -> Finding | None:
    now, before = last.newest.get("waiting"), last.all[0].get("waiting")
    if now is None or before is None or now < before + GROWN_BY:
        return None
    return Finding("queue", f"the queue grew from {before:.0f} to {now:.0f} requests in {_span(last)}")


def _failed(last: Last) -> Finding | None:
    failed = last.moved(last.all, "failed_total")
    return Finding("failed", f"{failed:.0f} requests ended in an error in {_span(last)}") if failed else None


def _state(last: Last) -> Finding | None:
    """What it was doing at the very end."""
    running, waiting = last.newest.get("running"), last.newest.get("waiting")
    if running is None and waiting is None:
        return None
    if not _has_work(last):
        return Finding("idle", "it was idle: nothing ran and nothing waited")
    held = f"{running or 0:.0f} requests ran and {waiting or 0:.0f} waited"
    boundary_ns, record_ns = last.recording.boundary_ns, last.newest["time_ns"]
    if boundary_ns is None or boundary_ns <= record_ns or last.recording.ending is not None:
        return Finding("work", held)
    p99_s = _p99_s(last)
    usual = "" if p99_s is None else f"; 99 % of steps took under {p99_s * 1e3:.1f} ms"
    began = (boundary_ns - record_ns) / 1e6
    return Finding("work", f"{held}; a step began {began:.1f} ms after the last record and none ended{usual}")


def _torn(last: Last) -> Finding | None:
    torn = last.recording.torn
    return Finding("torn", f"{torn} of the page's records are not whole and are left out") if torn else None


_LOOKS: dict[str, Callable[[Last], Finding | None]] = {
    "host_available_bytes": _host_memory,
    "hung": _hung,
    "oom_total": _oom,
    "device_free_bytes": _device_memory,
    "kv_blocks_free": _kv_full,
    "preemptions_total": _preemptions,
    "duration_ns": _step_time,
    "gap": _gap,
    "waiting": _waiting,
    "failed_total": _failed,
    "state": _state,
    "torn": _torn,
}
"""By the field that a look needs, strongest first."""

_WORTH_SAYING = {
    "host_available_bytes": "a machine short of memory",
    "oom_total": "steps out of device memory",
    "device_free_bytes": "falling device memory",
    "kv_blocks_free": "full KV memory",
    "preemptions_total": "many preemptions",
    "duration_ns": "steps growing slow",
    "failed_total": "failing requests",
}


def _seen(last: Last, topic: str) -> bool:
    return topic in last.newest


def _has_work(last: Last) -> bool:
    return _busy(last.newest)


def _busy(record: StepRecord) -> bool:
    return bool(record.get("running") or record.get("waiting"))


def _durations_ms(records: Sequence[StepRecord]) -> list[float]:
    return [ns / 1e6 for record in records if (ns := record.get("duration_ns"))]


def _p99_s(last: Last) -> float | None:
    durations = sorted(_durations_ms(last.all))
    return durations[min(len(durations) - 1, int(0.99 * len(durations)))] / 1e3 if durations else None


def _ago(last: Last, record: StepRecord) -> str:
    return f"{max(0.0, last.end_ns - record['time_ns']) / NS:.1f} s"


def _span(last: Last) -> str:
    return f"the last {_ago(last, last.all[0])}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
