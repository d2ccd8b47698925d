"""The watch over the engine: which of its states a person must hear of, when that fires, and when it is over.

| alert | severity | fires when the engine has been | is over |
|---|---|---|---|
| KvpilotEngineDead | critical; warning if it closed in order | dead for 2 s | with another start of it |
| KvpilotEngineStalled | warning | stalled for 2 s | when it has not been for 5 s |
| KvpilotOutputWedged | critical | wedged | when it has not been for 5 s |
| KvpilotEngineRestarted | warning | seen to start again | 5 minutes later |
| KvpilotHookFailed | warning | left by kvpilot's own hook, for 2 s | with another start of it |

Two seconds, so that a server which starts again at once is one alert and not two; five, so that a state which
comes and goes is one alert and not many; five minutes, so that an engine which keeps dying is one that lasts.
A wedge fires at once: it is found by seconds of evidence. Another start ends whatever the last one was in.

Pure: sights in, changes out. What fires is also in `firing`, whether or not anybody is told.
"""

from dataclasses import dataclass

from kvpilot.adapters.engine import Ended, Sight
from kvpilot.clock import NS
from kvpilot.incident.verdict import first_frame

DEAD, STALLED, WEDGED = "KvpilotEngineDead", "KvpilotEngineStalled", "KvpilotOutputWedged"
RESTARTED, HOOK_FAILED = "KvpilotEngineRestarted", "KvpilotHookFailed"

FIRES_AFTER_NS = {DEAD: 2 * NS, HOOK_FAILED: 2 * NS, STALLED: 2 * NS, WEDGED: 0}
OVER_AFTER_NS = {STALLED: 5 * NS, WEDGED: 5 * NS}
RESTARTED_FOR_NS = 300 * NS

_RUNBOOK = {
    DEAD: "Its requests are lost. Restart the server, unless something does; `kvpilot incident show`"
    " tells its last steps.",
    STALLED: "A device that hangs, a step that is being compiled, or an engine that somebody paused. If it"
    " does not end by itself, restart the server.",
    WEDGED: "Requests wait for ever, while the health endpoint may still say 200. Restart the API server;"
    " SIGTERM may not be enough: then SIGKILL its process group.",
    RESTARTED: "What the earlier start was serving is lost; knobs are at baseline until rules act again."
    " `kvpilot incident show` tells its last steps.",
    HOOK_FAILED: "The engine serves on at its baselines, unseen. Its log has the reason, once; restart it"
    " when convenient.",
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something about the engine that a person must hear of. `description` says what to do."""

    name: str
    severity: str
    summary: str
    description: str
    since_ns: int


@dataclass(frozen=True, slots=True)
class Change:
    """An alarm that fires, or is over."""

    alarm: Alarm
    firing: bool


class EngineWatch:
    """See the module docstring. Looks in order of time."""

    def __init__(self) -> None:
        self.firing: dict[str, Alarm] = {}
        self.restarts = 0
        """Starts of the engine that followed another one this pilot saw."""
        self._state: str | None = None
        self._since_ns = 0
        self._last_ns: dict[str, int] = {}
        """When each alarm that fires was last the state of things."""

    def observe(self, sight: Sight) -> list[Change]:
        """What this look changes."""
        if sight.manifest is None:
            return []
        changes = self._turn(sight) if sight.restarted else []
        state = _alarm_of(sight)
        if state != self._state:
            self._state, self._since_ns = state, sight.at_ns
        if state is not None:
            self._last_ns[state] = sight.at_ns
            if state not in self.firing and sight.at_ns - self._since_ns >= FIRES_AFTER_NS[state]:
                changes.append(self._fire(state, *_words(state, sight), sight.at_ns))
        return changes + self._end(sight.at_ns)

    def _turn(self, sight: Sight) -> list[Change]:
        """Another start: what the last one was in is over."""
        changes = [Change(self.firing.pop(name), False) for name in list(self.firing) if name != RESTARTED]
        self._state = None
        if sight.before is not None:
            self.restarts += 1
            self._last_ns[RESTARTED] = sight.at_ns
            summary = (
                f"the engine started again as {sight.nonce:016x}; "
                f"{sight.before.nonce:016x} {describe(sight.before)}"
            )
            changes.append(self._fire(RESTARTED, "warning", summary, sight.at_ns))
        return changes

    def _fire(self, name: str, severity: str, summary: str, at_ns: int) -> Change:
        since_ns = self.firing[name].since_ns if name in self.firing else at_ns
        self.firing[name] = Alarm(name, severity, summary, _RUNBOOK[name], since_ns)
        return Change(self.firing[name], True)

    def _end(self, at_ns: int) -> list[Change]:
        limits = {**OVER_AFTER_NS, RESTARTED: RESTARTED_FOR_NS}
        over = [
            name for name in self.firing if name in limits and at_ns - self._last_ns[name] >= limits[name]
        ]
        return [Change(self.firing.pop(name), False) for name in over]


def _alarm_of(sight: Sight) -> str | None:
    """The alarm that the engine's state calls for now."""
    match sight.liveness:
        case "dead":
            ending = sight.ended.ending if sight.ended else None
            return HOOK_FAILED if ending is not None and ending.kind == "hook_failed" else DEAD
        case "stalled":
            return STALLED
        case "wedged":
            return WEDGED
    return None


def _words(name: str, sight: Sight) -> tuple[str, str]:
    """Severity and summary."""
    engine, record, valve = f"engine {sight.nonce:016x}", sight.record, sight.valve
    held = [f"{record.get(field) or 0:g} {field}" for field in ("running", "waiting")] if record else []
    if name == STALLED:
        return "warning", f"{engine} has {' and '.join(held)} and makes no step"
    if name == WEDGED:
        awaited = valve.awaited if valve else None
        seen = f"{awaited or 'no'} requests are awaited at its valves, it has {' and '.join(held) or 'none'}"
        return "critical", f"answers of {engine} do not leave: {seen}"
    ended = sight.ended or Ended(sight.nonce, None)
    in_order = ended.ending is not None and ended.ending.kind in ("closed", "hook_failed")
    return "warning" if in_order else "critical", f"{engine} {describe(ended)}"


def describe(ended: Ended) -> str:
    """How an engine start ended, as the end of a sentence about it."""
    ending = ended.ending
    if ended.replaced and ending is None:
        return "still lives beside it"
    if ending is None:
        return "vanished without a word, as by SIGKILL or the out-of-memory killer"
    match ending.kind:
        case "closed":
            return "closed in order"
        case "exception":
            return "died of {}{}".format(*first_frame(ending))
        case "hook_failed":
            return "serves on unseen: kvpilot's own hook failed"
    return "ended in a way that this kvpilot does not know"
