"""The overload that `vllm_overload.py` flies: who comes, what they were promised, how fast this server is."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import httpx

from kvpilot.clock import NS
from kvpilot.score import Slo
from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.azure import TraceRow
from kvpilot.workload.client import Patience
from vllm_lab.closed_loop import deal, prompt_ids
from vllm_lab.times import Times

GREEDY, SAMPLED = "greedy", "sampled"
"""What a request's domain says here: how it samples, and so whether drafts hit."""

INTERACTIVE_PROMPT_TOKENS = 400
INTERACTIVE_OUTPUT_TOKENS = (4, 128)
BATCH_PROMPT_TOKENS = (60, 200)
BATCH_OUTPUT_TOKENS = (150, 450)
TOGETHER = 10
REPEATS = 12
INTERACTIVE_CLIENTS = 256
BATCH_CLIENTS = 64
"""So many that a client mostly waits for its next request's time, not for its last answer: fewer would hold
an overload back by themselves, and what they never sent would count as unfinished whoever flies.
"""
BATCH_SHARE = 0.6
"""Of the offered work."""
RETRIES = 2


def temperature(arrival: Arrival) -> float:
    """Greedy answers are what the draft model predicts; at temperature 1 it is mostly wrong."""
    return 0.0 if arrival.domain == GREEDY else 1.0


@dataclass(frozen=True)
class Calibration:
    """`step_s`: time between two tokens of a sequence in a full batch whose drafts miss."""

    speed: Speed
    step_s: float

    def slos(self) -> dict[str, Slo]:
        """Relative to the machine: a few full-batch steps a token, a few prompts' time to the first. Both
        classes read along, so both are promised one pace; a batch client waits longer for its first token.
        """
        prompt_token_s = 1.0 / self.speed.prefill_tokens_per_s
        return {
            "batch": Slo(600 * self.step_s, 3.5 * self.step_s, 8 * prompt_token_s),
            "interactive": Slo(200 * self.step_s, 3.5 * self.step_s, 4 * prompt_token_s),
        }


def queues(
    rows: Sequence[TraceRow], seed: int, seconds: float, load: float, speed: Speed
) -> list[list[Arrival]]:
    """One list a client. Interactive requests come as in a stretch of the trace, pressed into `seconds`,
    prompts shortened by one factor to fit the small model, answers as recorded; batch clients ask again and
    again.
    """
    rng = random.Random(f"overload/{seed}")
    seeds = count(seed * 1_000_000)
    interactive = _interactive(rows, rng, seconds, (1 - BATCH_SHARE) * load * seconds, speed, seeds)
    batch = _batch(rng, seconds, BATCH_SHARE * load * seconds, speed, seeds)
    return [*deal(interactive, INTERACTIVE_CLIENTS), *deal(batch, BATCH_CLIENTS)]


def _interactive(
    rows: Sequence[TraceRow],
    rng: random.Random,
    seconds: float,
    work_s: float,
    speed: Speed,
    seeds: "count[int]",
) -> list[Arrival]:
    longest = sorted(row.prompt_tokens for row in rows)[int(0.99 * (len(rows) - 1))]
    factor = min(1.0, INTERACTIVE_PROMPT_TOKENS / longest)
    at = rng.randrange(len(rows) // 2)
    first_s, picked = rows[at].at_s, []
    while work_s > 0:
        row = rows[at % len(rows)]
        prompt = min(max(round(row.prompt_tokens * factor), 4), INTERACTIVE_PROMPT_TOKENS)
        output = min(max(row.output_tokens, INTERACTIVE_OUTPUT_TOKENS[0]), INTERACTIVE_OUTPUT_TOKENS[1])
        picked.append((row.at_s - first_s, prompt, output))
        work_s -= speed.seconds(prompt, output)
        at += 1
    squeeze = 0.98 * seconds / max(picked[-1][0], 1e-9)
    return [
        Arrival(s * squeeze, p, o, "interactive", "acme", _domain(s * squeeze, seconds), next(seeds))
        for s, p, o in picked
    ]


def _batch(
    rng: random.Random, seconds: float, work_s: float, speed: Speed, seeds: "count[int]"
) -> list[Arrival]:
    drawn = []
    while work_s > 0:
        drawn.append((rng.randint(*BATCH_PROMPT_TOKENS), rng.randint(*BATCH_OUTPUT_TOKENS)))
        work_s -= speed.seconds(*drawn[-1])
    times = [i / len(drawn) * seconds * 0.9 for i in range(len(drawn))]
    return [
        Arrival(s, p, o, "batch", "hooli", _domain(s, seconds), next(seeds))
        for s, (p, o) in zip(times, drawn, strict=True)
    ]


def _domain(at_s: float, seconds: float) -> str:
    return GREEDY if at_s < seconds / 2 else SAMPLED


def patience(slos: dict[str, Slo]) -> dict[str, Patience]:
    """Clients give up when the longest answer within its targets would have been there, the interactive ones
    after half as long again. Who is shed comes back when told to, twice, as OpenAI's own client does; the
    wait counts into the time to its first token.
    """
    interactive, batch = slos["interactive"], slos["batch"]
    return {
        "interactive": Patience(
            1.5 * (interactive.ttft_s + INTERACTIVE_OUTPUT_TOKENS[1] * interactive.itl_s), RETRIES
        ),
        "batch": Patience(batch.ttft_s + BATCH_OUTPUT_TOKENS[1] * batch.itl_s, RETRIES),
    }


async def calibrate(url: str, model: str, times: Times, vocabulary: int) -> Calibration:
    """How fast is this server at its defaults? Prompts alone, then a batch whose drafts miss."""
    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as http:
        numbers = count(1)

        async def ask(prompt_tokens: int, output_tokens: int) -> dict:
            number = next(numbers)
            arrival = Arrival(0.0, prompt_tokens, output_tokens, "batch", "", SAMPLED, 900_000_000 + number)
            body = {
                "model": model,
                "prompt": prompt_ids(arrival, vocabulary),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 1.0,
            }
            name = f"calibrate_{number}"
            answer = await http.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": name})
            answer.raise_for_status()
            took = times.take(name)
            assert took is not None, "the times plugin is not in this server"
            return took

        await asyncio.gather(*(ask(64, 32) for _ in range(8)))
        alone = [await ask(800, 1) for _ in range(REPEATS)]
        # The best of many: what the machine can do when nothing else is going on. A promise made on a slow
        # moment would be one that anybody keeps.
        rates = [
            _decoding(await asyncio.gather(*(ask(64, 128) for _ in range(TOGETHER)))) for _ in range(REPEATS)
        ]
    prefill_s = min((t["emitted"][0][0] - t["received_ns"]) / NS for t in alone)
    decode = max(rates)
    return Calibration(Speed(800 / prefill_s, decode), TOGETHER / decode)


def _decoding(together: Sequence[dict]) -> float:
    """Tokens a second while all of them decoded."""
    begin_ns = max(t["emitted"][0][0] for t in together)
    end_ns = min(t["emitted"][-1][0] for t in together)
    tokens = sum(n for t in together for at_ns, n in t["emitted"] if begin_ns < at_ns <= end_ns)
    return tokens * NS / (end_ns - begin_ns) if end_ns > begin_ns else 0.0
