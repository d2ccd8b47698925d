"""What a recording is made into: an engine's sizes, who came, what was promised, and what became of them.

Where an engine tells of each request, arrivals and their fates are exact. For those that a valve turned away,
and for all where it does not tell, they are made of counts taken ten times a second: the number is exact, the
moment is a tick's, a prompt is as long as the mean of those that came with it, and an answer that nobody saw
is drawn from the answers that were given. `limits` says which of that happened, in words.
"""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from kvpilot.clock import NS
from kvpilot.link.manifest import Manifest
from kvpilot.link.records import StepRecord
from kvpilot.link.requests import EndedRequest
from kvpilot.recordings.recorded import Held, Recorded
from kvpilot.recordings.segment import RecordingError
from kvpilot.score import EngineTotals, Slo
from kvpilot.simulate.deployment import Deployment
from kvpilot.simulate.plants.acceptance import Fixed
from kvpilot.simulate.replica import START_NS
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience
from kvpilot.workload.outcome import Fate, Outcome

PATIENCE_S = 600.0
"""Of clients none of whom was seen to hang up."""
DRAIN_S = 60.0
TICK_S = 0.1
USUAL_ACCEPTANCE = 0.7
_FATES = {"finished": Fate.FINISHED, "cancelled": Fate.ABANDONED, "failed": Fate.FAILED}


@dataclass(frozen=True, slots=True)
class Recalled:
    """Seconds count from the recording's beginning."""

    deployment: Deployment
    slos: Mapping[str, Slo]
    patience: Mapping[str, Patience]
    acceptance: Fixed
    arrivals: tuple[Arrival, ...]
    outcomes: tuple[Outcome, ...]
    """As recorded; empty where the engine does not tell of requests."""
    window_s: tuple[float, float]
    """Whoever came in it is judged."""
    totals: EngineTotals
    decided: tuple[Held, ...]
    """On a replica's clock."""
    limits: tuple[str, ...]


def recall(recorded: Recorded) -> Recalled:
    """Raises RecordingError where nobody came, or classes are not those that promises are for."""
    promised = tuple(each.name for each in recorded.promises)
    deployment = deployment_of(recorded.manifest, promised)
    slos = {
        each.name: Slo(each.ttft_s, each.itl_s, each.ttft_s_per_prompt_token) for each in recorded.promises
    }
    if set(deployment.classes) != set(slos):
        raise RecordingError(
            f"{recorded.path}: the engine's classes are {', '.join(deployment.classes)}, promises were made "
            f"to {', '.join(slos)}: give pilot and engine the same callers file"
        )
    limits = list[str]()
    outcomes = [*_told(recorded, deployment, limits), *_turned_away(recorded, deployment, limits)]
    arrivals = [outcome.arrival for outcome in outcomes]
    if not recorded.tells_requests:
        arrivals += _guessed(recorded, deployment, limits)
        outcomes = []
    if not arrivals:
        raise RecordingError(f"{recorded.path}: nobody came while this was recorded: nothing to replay")
    return Recalled(
        deployment=deployment,
        slos=slos,
        patience=_patience(recorded, deployment),
        acceptance=Fixed(acceptance_of(recorded.steps)),
        arrivals=tuple(sorted(arrivals, key=lambda one: one.at_s)),
        outcomes=tuple(outcomes),
        window_s=_window_s(recorded, arrivals, limits),
        totals=_totals(recorded),
        decided=tuple(replace_time(one, recorded.begin_ns) for one in recorded.held),
        limits=tuple(limits),
    )


def replace_time(held: Held, begin_ns: int) -> Held:
    """On the clock of a replica that begins where the recording does."""
    return held._replace(at_ns=held.at_ns - begin_ns + START_NS)


def deployment_of(manifest: Manifest, classes: tuple[str, ...] = ()) -> Deployment:
    """As the manifest describes it: baselines are what the operator configured. `classes`: where it names
    none.
    """
    knobs = {knob.name: knob for knob in manifest.knobs}

    def baseline(name: str, otherwise: float) -> float:
        return knobs[name].baseline if name in knobs else otherwise

    chunk = int(baseline("prefill_chunk_tokens", 2048))
    watermark = knobs.get("admission_watermark")
    ahead = watermark is not None and "predicted peak" in watermark.applied
    return Deployment(
        blocks=manifest.blocks,
        block_size=manifest.block_size,
        max_model_len=manifest.max_model_len,
        step_token_budget=max(chunk, int(baseline("step_token_budget", chunk))),
        prefill_chunk_tokens=chunk,
        speculative_tokens=int(baseline("speculative_tokens", 0)),
        max_running=int(baseline("max_running", 256)),
        admission_watermark=baseline("admission_watermark", 1.0),
        admission="predicted" if ahead else "held",
        prefix_cache="prefix_tokens_queried_total" in {field.name for field in manifest.fields},
        classes=manifest.classes or classes,
        in_order=manifest.queue_order == "class",
        memory_bytes=manifest.device_memory_bytes or 80 * 2**30,
        block_bytes=manifest.bytes_per_block or 1,
        activation_bytes_per_token=manifest.activation_bytes_per_token or 0,
        name=manifest.model,
    )


def _told(recorded: Recorded, deployment: Deployment, limits: list[str]) -> Iterator[Outcome]:
    """Those that the engine has told of."""
    times = [int(step["time_ns"]) for step in recorded.steps if step["duration_ns"] > 0]
    cut = 0
    answers = _answers(recorded)
    for number, one in enumerate(recorded.requests):
        dice = random.Random(f"recalled/{number}")
        output = one.output_tokens
        if one.fate != "finished":
            longer = [tokens for tokens in answers.get(one.level, ()) if tokens >= output]
            output, cut = (dice.choice(longer) if longer else output), cut + 1
        arrival = Arrival(
            at_s=max(0.0, (one.received_ns - recorded.begin_ns) / NS),
            prompt_tokens=max(1, one.prompt_tokens),
            output_tokens=max(1, output),
            klass=deployment.classes[min(one.level, len(deployment.classes) - 1)],
            tenant=one.tenant,
            domain="",
            seed=dice.getrandbits(31),
            prefix=_blocks(one.prefix),
            prefix_block_tokens=deployment.block_size,
        )
        fate = _FATES.get(one.fate, Fate.FAILED)
        yield Outcome(
            arrival=arrival,
            fate=fate,
            attempts=1,
            waited_s=0.0,
            ended_at_s=(one.ended_ns - recorded.begin_ns) / NS,
            received_ns=one.received_ns if fate is Fate.FINISHED else 0,
            emitted=_emitted(one, times) if fate is Fate.FINISHED else (),
        )
    if cut:
        limits.append(f"{cut} requests did not finish: how long their answers would have been is drawn")


def _answers(recorded: Recorded) -> dict[int, list[int]]:
    """Lengths of whole answers, by level."""
    found: dict[int, list[int]] = {}
    for one in recorded.requests:
        if one.fate == "finished":
            found.setdefault(one.level, []).append(one.output_tokens)
    return found


def _blocks(hashes: Sequence[int]) -> tuple[int, ...]:
    """Ids of a prompt's leading blocks, from hashes of its first 1, 2, 4, ...: equal where those are."""
    found = list[int]()
    for depth, value in enumerate(hashes):
        found += [(value << 12) | place for place in range(len(found), 1 << depth)]
    return tuple(found)


def _emitted(one: EndedRequest, times: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """When its tokens came: the first as told, the others with the engine's steps until the last."""
    rest = one.output_tokens - 1
    if rest <= 0:
        return ((one.first_ns, 1),)
    within = times[bisect_right(times, one.first_ns) : bisect_right(times, one.ended_ns)]
    within = within or [one.ended_ns]
    count = min(rest, len(within))
    chosen = [within[(place + 1) * len(within) // count - 1] for place in range(count)]
    shares = [(place + 1) * rest // count - place * rest // count for place in range(count)]
    return ((one.first_ns, 1), *zip(chosen, shares, strict=True))


def _turned_away(recorded: Recorded, deployment: Deployment, limits: list[str]) -> Iterator[Outcome]:
    answers, shed = _answers(recorded), 0
    everybody = [tokens for each in answers.values() for tokens in each] or [_mean_answer(recorded)]
    for place, row in enumerate(recorded.counted):
        for number in range(row.offered - row.admitted):
            dice = random.Random(f"shed/{place}/{number}")
            prompt = (row.offered_tokens - row.admitted_tokens) / (row.offered - row.admitted)
            at_s = max(0.0, (row.at_ns - recorded.begin_ns) / NS - TICK_S * dice.random())
            output = dice.choice(answers.get(row.level) or everybody)
            arrival = _arrival(deployment, at_s, prompt, output, row.level, row.tenant, dice)
            shed += 1
            yield Outcome(arrival, Fate.SHED, 1, 0.0, at_s, 429)
    if shed:
        limits.append(
            f"{shed} were turned away: each is taken for an arrival of its own, with an answer as long as "
            "one that was given; a client that came back is counted each time"
        )


def _guessed(recorded: Recorded, deployment: Deployment, limits: list[str]) -> Iterator[Arrival]:
    """Of an engine that does not tell of requests: from the valves' counts, else from the steps'."""
    output = _mean_answer(recorded)
    if recorded.has_valve:
        limits.append(
            f"{recorded.manifest.engine} does not tell of each request: arrivals are the valves' counts, to "
            f"a tick, and every answer is of the mean length, {output} tokens; nothing recorded to compare "
            "with"
        )
        for place, row in enumerate(recorded.counted):
            for number in range(row.admitted):
                dice = random.Random(f"admitted/{place}/{number}")
                at_s = max(0.0, (row.at_ns - recorded.begin_ns) / NS - TICK_S * dice.random())
                prompt = row.admitted_tokens / row.admitted
                yield _arrival(deployment, at_s, prompt, output, row.level, row.tenant, dice)
        return
    limits.append(
        f"{recorded.manifest.engine} does not tell of each request and no valve counted any: arrivals are "
        f"what steps took in, all prompts and answers of the mean length; nothing recorded to compare with"
    )
    came = list(_taken_in(recorded))
    computed = recorded.steps[-1]["prefill_tokens_total"] - recorded.steps[0]["prefill_tokens_total"]
    prompt = computed / max(1, sum(count for _, count in came))
    for place, (at_s, count) in enumerate(came):
        for number in range(count):
            dice = random.Random(f"step/{place}/{number}")
            yield _arrival(deployment, at_s, prompt, output, len(deployment.classes) - 1, "", dice)


def _arrival(
    deployment: Deployment,
    at_s: float,
    prompt: float,
    output: int,
    level: int,
    tenant: str,
    dice: random.Random,
) -> Arrival:
    klass = deployment.classes[min(level, len(deployment.classes) - 1)]
    return Arrival(at_s, max(1, round(prompt)), max(1, output), klass, tenant, "", dice.getrandbits(31))


def _taken_in(recorded: Recorded) -> Iterator[tuple[float, int]]:
    """(seconds, requests that came) by steps: more in the engine, or gone from it."""

    def there(step: Mapping[str, float]) -> float:
        names = ("running", "waiting", "finished_total", "cancelled_total", "failed_total")
        return sum(step[name] for name in names if name in step)

    for before, after in pairwise(recorded.steps):
        count = int(there(after) - there(before))  # type: ignore[arg-type]
        if count > 0:
            yield max(0.0, (after["time_ns"] - recorded.begin_ns) / NS), count


def _mean_answer(recorded: Recorded) -> int:
    first, last = recorded.steps[0], recorded.steps[-1]
    if "decode_tokens_total" not in last or "finished_total" not in last:
        return 128
    ended = last["finished_total"] - first["finished_total"]
    return max(1, round((last["decode_tokens_total"] - first["decode_tokens_total"]) / max(1, ended)))


def _patience(recorded: Recorded, deployment: Deployment) -> dict[str, Patience]:
    """Who hung up shows how long clients of a class wait. Nobody comes back: whoever did is an arrival."""
    waits: dict[int, list[float]] = {}
    for one in recorded.requests:
        if one.fate == "cancelled":
            waits.setdefault(one.level, []).append((one.ended_ns - one.received_ns) / NS)
    return {
        name: Patience(max(0.1, median(waits[level])) if level in waits else PATIENCE_S)
        for level, name in enumerate(deployment.classes)
    }


def acceptance_of(steps: Sequence[StepRecord]) -> float:
    """The rate of independent drafts that gives as many accepted in a round as were recorded."""
    names = ("draft_rounds_total", "drafted_tokens_total", "accepted_tokens_total")
    first, last = steps[0], steps[-1]
    if any(name not in last for name in names):
        return USUAL_ACCEPTANCE
    rounds, drafted, accepted = (last[name] - first[name] for name in names)
    if not rounds or not drafted:
        return USUAL_ACCEPTANCE
    depth, least, most = max(1, round(drafted / rounds)), 0.0, 1.0
    for _ in range(30):
        rate = (least + most) / 2
        if sum(rate ** (place + 1) for place in range(depth)) < accepted / rounds:
            least = rate
        else:
            most = rate
    return (least + most) / 2


def _window_s(recorded: Recorded, arrivals: Iterable[Arrival], limits: list[str]) -> tuple[float, float]:
    """Those who were still being served when the recording ends cannot be judged."""
    last = recorded.steps[-1]
    end_s = max((one.at_s for one in arrivals), default=0.0) + 1e-6
    left = int((last.get("running") or 0) + (last.get("waiting") or 0))
    if left and recorded.requests:
        served = sorted((one.ended_ns - one.received_ns) / NS for one in recorded.requests)
        long_s = served[int(0.95 * (len(served) - 1))]
        end_s = min(end_s, (recorded.end_ns - recorded.begin_ns) / NS - long_s)
        limits.append(
            f"{left} requests were in the engine when the recording ends and are not in it; judged is who "
            f"came in the first {end_s:.0f} s"
        )
    # Whoever had come before the recording begins comes at once, and is not judged.
    return 1e-9, max(end_s, 1e-6)


def _totals(recorded: Recorded) -> EngineTotals:
    first, last = recorded.steps[0], recorded.steps[-1]

    def grown(name: str) -> int:
        return int(last[name] - first[name]) if name in last else 0

    held = [
        recorded.manifest.blocks - step["kv_blocks_free"] - (step.get("kv_blocks_cached") or 0)
        for step in recorded.steps
        if "kv_blocks_free" in step
    ]
    most = max(held) / recorded.manifest.blocks if held else None
    return EngineTotals(
        grown("oom_total"),
        grown("preemptions_total"),
        grown("recomputed_tokens_total"),
        kv_occupancy_max=most,
    )


def newest_steps(recorded: Recorded, most: int) -> Recorded:
    """For calibration, which need not see them all."""
    return replace(recorded, steps=recorded.steps[-most:])
