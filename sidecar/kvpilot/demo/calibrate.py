"""How fast is this engine on this machine? Measured first, so that load and SLOs mean the same anywhere.

Two figures, through the engine's own token times, at the engine's defaults: prompt tokens a second when one
long prompt is alone, and output tokens a second when a full batch decodes. Their ratio `r` is what an output
token costs in prompt tokens, which the score uses as well.
"""

import asyncio
import statistics
from dataclasses import dataclass
from typing import Any

import httpx

from kvpilot.clock import NS
from kvpilot.demo.processes import DemoError
from kvpilot.score import Slo
from kvpilot.workload.arrival import Speed

PROMPT_TOKENS = 1_024
PROMPT_REPEATS = 3
BATCH = 16
BATCH_PROMPT_TOKENS = (120, 120, 120, 700)
BATCH_OUTPUT_TOKENS = 64


@dataclass(frozen=True)
class Calibration:
    """`step_s` is the time between two tokens of a sequence in a full batch without prompts."""

    speed: Speed
    step_s: float


async def calibrate(base_url: str, model: str, prompt: Any) -> Calibration:
    """Measure; about three seconds. `prompt(domain, tokens, seed)` makes text. Raises DemoError."""
    async with httpx.AsyncClient(timeout=60.0, trust_env=False) as http:

        async def ask(prompt_tokens: int, output_tokens: int, seed: int) -> dict[str, Any]:
            domain = ("json", "python")[seed % 2]
            body = {
                "model": model,
                "prompt": prompt(domain, prompt_tokens, seed),
                "max_tokens": output_tokens,
                "ignore_eos": True,
                "temperature": 0.7,
                "seed": seed,
                "kvpilot_times": True,
            }
            answer = await http.post(f"{base_url}/v1/completions", json=body)
            if answer.status_code != 200:
                raise DemoError(
                    f"the engine answered {answer.status_code} while measuring: {answer.text[:200]}"
                )
            times: dict[str, Any] = answer.json()["kvpilot"]
            return times

        await ask(64, 8, 0)
        alone = [await ask(PROMPT_TOKENS, 1, seed) for seed in range(PROMPT_REPEATS)]
        together = await asyncio.gather(
            *(
                ask(BATCH_PROMPT_TOKENS[seed % len(BATCH_PROMPT_TOKENS)], BATCH_OUTPUT_TOKENS, seed // 4)
                for seed in range(BATCH)
            )
        )
    prefill_s = statistics.median((t["emitted"][0][0] - t["received_ns"]) / NS for t in alone)
    begin_ns = max(t["emitted"][0][0] for t in together)
    end_ns = min(t["emitted"][-1][0] for t in together)
    tokens = sum(count for t in together for at_ns, count in t["emitted"] if begin_ns < at_ns <= end_ns)
    if end_ns <= begin_ns or tokens == 0:
        raise DemoError("the engine never decoded a full batch while measuring: is --max-running below 16?")
    decode_tokens_per_s = tokens * NS / (end_ns - begin_ns)
    return Calibration(Speed(PROMPT_TOKENS / prefill_s, decode_tokens_per_s), BATCH / decode_tokens_per_s)


def slos(calibration: Calibration) -> dict[str, Slo]:
    """Targets relative to the machine: a few full-batch steps a token, a few prompts' time to the first."""
    step_s, prompt_token_s = calibration.step_s, 1.0 / calibration.speed.prefill_tokens_per_s
    return {
        "batch": Slo(ttft_s=900 * step_s, itl_s=24 * step_s, ttft_s_per_prompt_token=8 * prompt_token_s),
        "interactive": Slo(ttft_s=90 * step_s, itl_s=6 * step_s, ttft_s_per_prompt_token=4 * prompt_token_s),
    }
