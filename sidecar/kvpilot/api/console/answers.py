"""The three things an engineer who was woken wants to know, in words: the state, what is done and why, what
comes next if nothing more is done.

From the status as plain data, so that page and terminal say the same. A level is `good`, `caution`, `bad`,
`quiet` (nothing to judge) or `acts` (rules hold knobs, which is what they are for).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kvpilot.api.console.words import number, reason, seconds, value_of
from kvpilot.inside.valve_leases import PROMPT_BYTES_PER_TOKEN

EXHAUSTED_SOON_S = 30.0
EXHAUSTED_LATER_S = 300.0
MOST_LINES = 4
TARGETS = {"itl_seconds": ("itl", "ITL"), "ttft_seconds": ("ttft", "TTFT")}
_SILENT = {
    "dead": "The engine is gone",
    "stalled": "The engine has work and makes no step",
    "wedged": "Answers do not leave the engine",
}

Status = Mapping[str, Any]
Answer = dict[str, Any]


def answers(status: Status, slo: Mapping[str, Any]) -> dict[str, Answer]:
    """Each with `level`, `title` and `lines`."""
    return {"state": _state(status, slo), "doing": _doing(status), "next": _next(status)}


def _answer(level: str, title: str, lines: Iterator[str] | list[str]) -> Answer:
    return {"level": level, "title": title, "lines": [line for line in lines if line]}


def _state(status: Status, slo: Mapping[str, Any]) -> Answer:
    engine = status["engine"]
    if engine["state"] == "waiting":
        return _answer("quiet", "No engine yet", [f"waiting for {engine.get('waiting_for') or 'its page'}"])
    if engine["state"] in _SILENT:
        lines = [f"It {engine['ended']}" if engine.get("ended") else "", *_alert_lines(status)]
        return _answer("bad", _SILENT[engine["state"]], lines)
    late = list(_late(status, slo))
    critical = [alert for alert in status["alerts"] if alert["severity"] == "critical"]
    if critical:
        return _answer("bad", critical[0]["summary"], [*late, _load(status)])
    if late:
        return _answer("bad", late[0], [*late[1:], *_alert_lines(status), _load(status)])
    if status["alerts"]:
        return _answer("caution", status["alerts"][0]["summary"], [_load(status)])
    if engine["state"] == "idle":
        return _answer("good", "Idle: nothing to serve", [_load(status)])
    judged = any(value_of(status["signals"].get(name)) is not None for name in TARGETS)
    title = "Serving within its targets" if judged else "Serving; no latency was measured yet"
    return _answer("good" if judged else "quiet", title, [_load(status)])


def _late(status: Status, slo: Mapping[str, Any]) -> Iterator[str]:
    """Each class and measure above its target, worst first."""
    found = []
    for klass, targets in slo.items():
        for name, (key, said) in TARGETS.items():
            value = value_of(status["signals"].get(name, {}).get("classes", {}).get(klass))
            if value is not None and value > targets[key]:
                text = f"{said} p95 of {klass} is {seconds(value)}, its target {seconds(targets[key])}"
                found.append((value / targets[key], text))
    yield from (text for _, text in sorted(found, reverse=True))


def _alert_lines(status: Status) -> list[str]:
    return [
        f"{alert['name']} for {seconds(alert['for_s'])}: {alert['summary']}" for alert in status["alerts"]
    ]


def _load(status: Status) -> str:
    signals = status["signals"]
    parts = []
    memory = status["memory"]
    if "missing" not in memory:
        parts.append(f"KV memory {memory['held'] / memory['blocks']:.0%} held")
    for name, form in (
        ("requests_running", "{:.0f} running"),
        ("requests_waiting", "{:.0f} waiting"),
        ("decode_tokens", "{:,.0f} tokens/s"),
        ("shed", "{:.1f} shed/s"),
    ):
        value = value_of(signals.get(name))
        if value is not None and not (name == "shed" and value == 0):
            parts.append(form.format(value))
    return ", ".join(parts)


def _doing(status: Status) -> Answer:
    pilot = status["pilot"]
    if pilot["off"]:
        off = pilot["off"]
        return _answer(
            "caution", "Off: nothing is moved", [f"{off['why'] or 'no reason given'} ({off['who']})"]
        )
    if status["engine"]["state"] == "waiting":
        return _answer("quiet", "Nothing: there is no engine", [])
    orders = [
        f"{order['knob']}{_scope(order)} = {number(order['value'])} for {seconds(order['left_s'])} more: "
        f"{order['why'] or 'no reason given'} ({order['who']})"
        for order in status["overrides"]
    ]
    if not pilot["armed"]:
        awaited = f"arms {pilot['arming']}" if pilot["arming"] else "not armed"
        return _answer("quiet", "Watching: rules only say what they would do", [awaited, *orders])
    held = list(_held(status))
    if orders:
        return _answer("caution", f"A person holds {_count(len(orders), 'knob')}", _few(orders + held))
    if held:
        return _answer("acts", f"Holds {_count(len(held), 'knob')} away from baseline", _few(held))
    pending = [f"{_rule(rule)} is pending" for rule in status["rules"] if rule["state"] == "pending"]
    return _answer("good", "Nothing: every knob is at baseline", pending[:3])


def _held(status: Status) -> Iterator[str]:
    """Each lease that takes a knob away from its baseline, and why: whoever asks reads the feed for more."""
    summaries = {policy["name"]: policy["summary"] for policy in status["policies"]["all"]}
    for lease in status["leases"]:
        baseline = status["knobs"].get(lease["knob"], {}).get("baseline")
        own = lease["policy"] == "override" or lease["knob"] == PROMPT_BYTES_PER_TOKEN
        if own or lease["value"] == baseline:
            continue
        home = "" if baseline is None else f"{number(baseline)} \u2192 "
        unconfirmed = "" if lease["confirmed"] else ", not confirmed yet"
        why = summaries.get(lease["policy"]) or _reason(lease, status["decisions"])
        change = f"{lease['knob']}{_scope(lease)} {home}{number(lease['value'])}{unconfirmed}"
        yield f"{change}: {why} ({_rule(lease)})"


def _reason(lease: Mapping[str, Any], decisions: list[Mapping[str, Any]]) -> str:
    """Of the newest decision behind it, where that is still shown."""
    holder = (lease["policy"], lease["rule"], lease["knob"])
    reasons = (row["reason"] for row in decisions if (row["policy"], row["rule"], row["knob"]) == holder)
    return next(reasons, "held since before what is shown")


def _next(status: Status) -> Answer:
    if status["engine"]["state"] in ("waiting", "dead"):
        title = "Flies the next engine that starts here"
        return _answer("quiet", title, ["leases of the one before ended with it"])
    signal = status["signals"].get("forecast.kv_exhaustion_seconds")
    p50 = value_of(signal)
    lines = [*_coming(status)]
    if p50 is None:
        return _answer("quiet", "Nobody can say how long KV memory lasts", [reason(signal), *lines])
    interval = _interval(status)
    if p50 == float("inf"):
        early = value_of(status["signals"].get("forecast.kv_exhaustion_p10_seconds"))
        if early is not None and early < EXHAUSTED_LATER_S:
            title = f"KV memory may run out {_within(early)}"
            return _answer("caution", title, ["one time in ten that soon; likelier it lasts", *lines])
        return _answer("good", "KV memory lasts", ["it does not run out in sight", *lines])
    level = "bad" if p50 < EXHAUSTED_SOON_S else "caution" if p50 < EXHAUSTED_LATER_S else "good"
    return _answer(level, f"KV memory runs out {_within(p50)}", [interval, *lines])


def _interval(status: Status) -> str:
    early = value_of(status["signals"].get("forecast.kv_exhaustion_p10_seconds"))
    late = value_of(status["signals"].get("forecast.kv_exhaustion_p90_seconds"))
    if early is None or late is None:
        return ""
    if late == float("inf"):
        return f"one time in ten {_within(early)}; it may also last"
    return f"eight times in ten between {seconds(early)} and {seconds(late)}"


def _within(time_s: float) -> str:
    """A forecast is no stopwatch."""
    return "within a second" if time_s < 1 else f"in {seconds(time_s)}"


def _few(texts: list[str]) -> list[str]:
    """The first of them, and how many more there are."""
    more = len(texts) - MOST_LINES
    return texts if more <= 1 else [*texts[:MOST_LINES], f"and {more} more"]


def _coming(status: Status) -> Iterator[str]:
    signals = status["signals"]
    wait = value_of(signals.get("forecast.queue_wait_seconds"))
    miss = value_of(signals.get("forecast.ttft_miss_ratio"))
    if wait is not None and wait != float("inf"):
        missed = "" if miss is None else f", and misses its TTFT {miss:.0%} of the time"
        waits = "does not wait" if wait < 0.001 else f"waits {seconds(wait)}"
        yield f"a request that comes now {waits}{missed}"
    elif wait is not None:
        yield "a request that comes now is not served in sight"
    for order in status["overrides"]:
        yield f"{order['knob']}{_scope(order)} is policies' again in {seconds(order['left_s'])}"
    ttl = max((lease["ttl_s"] for lease in status["leases"]), default=None)
    if ttl is not None:
        yield f"should the pilot stop, every knob is at baseline within {seconds(ttl)}"
    if status["pilot"]["off"]:
        yield "nothing is moved until `kvpilot on`"


def _rule(row: Mapping[str, Any]) -> str:
    return f"{row['policy']}/{row['rule']}"


def _scope(row: Mapping[str, Any]) -> str:
    return "" if row["scope"] == "all" else f" {row['scope']}"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
