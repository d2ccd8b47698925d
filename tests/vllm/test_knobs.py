"""Every knob on a real vLLM: it takes effect mid-flight under load and reverts, and no request notices.

Proven twice each time: by our step records, and by what vLLM itself counts and logs of its steps.
"""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from flights import BLOCKS, DRAFT, NGRAM, Flight, Window
from vllm_lab.leases import Hold, until
from vllm_lab.load import Ask, prompt, run
from vllm_lab.server import Settings

from kvpilot.link.fields import KNOB_PREFIX

if TYPE_CHECKING:
    from conftest import Hangar

KNOBS = {
    "step_token_budget",
    "prefill_chunk_tokens",
    "speculative_tokens",
    "max_running",
    "admission_watermark",
}


@pytest.fixture(scope="module", params=[DRAFT, NGRAM], ids=["draft-async", "ngram-sync"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.param


@pytest.fixture
def flight(hangar: "Hangar", settings: Settings) -> Iterator[Flight]:
    server = hangar.server(settings)
    with Hold(server.place) as hold:
        yield Flight(server, hold)


def test_all_knobs_are_offered_and_scheduling_is_as_claimed(flight: Flight, settings: Settings) -> None:
    assert {knob.name for knob in flight.records.manifest.knobs} >= KNOBS
    assert ("AsyncScheduler" in flight.server.log_text()) == (settings is DRAFT)


def test_step_token_budget(flight: Flight) -> None:
    with flight.crowd(clients=10, prompt_tokens=700, max_tokens=12):
        free = flight.watch()
        flight.put(step_token_budget=128)
        held = flight.watch()
        flight.back()
        after = flight.watch()
    assert max(step.tokens for step in free.iterations) > 128
    assert 64 < max(step.tokens for step in held.iterations) <= 128
    assert max(step.tokens for step in after.iterations) > 128
    assert most_prefilled(free) > 128 >= most_prefilled(held) > 64
    assert most_prefilled(after) > 128
    assert held.records[-1]["budget_limited_steps_total"] > held.records[0]["budget_limited_steps_total"]


def test_prefill_chunk(flight: Flight) -> None:
    """Over all requests of a step, as its name says everywhere."""

    def largest_chunk(window: Window) -> float:
        return max(step.context_tokens / step.context_requests for step in window.iterations if step[1])

    with flight.crowd(clients=12, prompt_tokens=700, max_tokens=30):
        free = flight.watch()
        flight.put(prefill_chunk_tokens=48)
        held = flight.watch()
        flight.back()
        after = flight.watch()
    assert largest_chunk(free) > 48
    assert 24 < largest_chunk(held) <= 48
    assert largest_chunk(after) > 48
    # What requests leave of the room that they have to decode, prompts may take.
    assert most_prefilled(held) <= 48 + 12 * 5 < most_prefilled(free)


def test_running_cap_drains_and_never_preempts(flight: Flight) -> None:
    def most_running(window: Window) -> int:
        return max(int(record["running"]) for record in window.records)

    with flight.crowd(clients=10, prompt_tokens=100, max_tokens=60):
        free = flight.watch()
        preempted = flight.server.metrics().value("vllm:num_preemptions_total")
        flight.put(max_running=2)
        until(
            lambda: flight.server.metrics().value("vllm:num_requests_running") <= 2, 20, "drained to the cap"
        )
        held = flight.watch()
        until(lambda: flight.server.metrics().value("vllm:num_requests_waiting") > 0, 5, "some wait")
        assert held.after.value("vllm:num_requests_running") <= 2
        assert held.after.value("vllm:num_preemptions_total") == preempted
        flight.back()
        after = flight.watch()
    assert max(step.requests for step in free.iterations) > 2
    assert max(step.requests for step in held.iterations) == 2
    assert max(step.requests for step in after.iterations) > 2
    assert most_running(free) > 2 == most_running(held)
    assert most_running(after) > 2


def test_speculation_off_less_and_on_again(flight: Flight, settings: Settings) -> None:
    with flight.crowd(clients=4, prompt_tokens=40, max_tokens=200):
        free = flight.watch()
        flight.put(speculative_tokens=0)
        off = flight.watch()
        flight.put(speculative_tokens=2)
        less = flight.watch()
        flight.back()
        after = flight.watch()
    assert free.drafted > 0 < after.drafted
    assert off.drafted == 0
    assert off.gained("vllm:spec_decode_num_drafts_total") == 0
    assert off.gained("vllm:generation_tokens_total") > 100
    assert all(step.generation_tokens == step.generation_requests for step in off.iterations)
    assert off.grown("drafted_tokens_total") == 0 < free.grown("drafted_tokens_total")
    assert less.drafted > 0
    per_round = less.drafted / less.gained("vllm:spec_decode_num_drafts_total")
    assert 1.5 < per_round <= 2.0
    assert max(step.generation_tokens / step.generation_requests for step in less.iterations if step[3]) <= 3
    most = settings.speculative_tokens + 1
    assert max(
        step.generation_tokens / step.generation_requests for step in free.iterations if step[3]
    ) == pytest.approx(most, abs=0.5)


def test_our_counts_of_drafts_are_vllms(flight: Flight) -> None:
    """From one quiet moment to the next, so that no step is under way when either side is read."""

    def counted() -> tuple[float, float, float]:
        scrape = flight.server.metrics()
        return (
            scrape.value("vllm:spec_decode_num_draft_tokens_total"),
            scrape.value("vllm:spec_decode_num_accepted_tokens_total"),
            scrape.value("vllm:generation_tokens_total"),
        )

    def recorded() -> tuple[float, float, float]:
        flight.records.poll()
        latest = flight.records.latest
        assert latest is not None
        names = ("drafted_tokens_total", "accepted_tokens_total", "decode_tokens_total")
        return tuple(latest[name] for name in names)  # type: ignore[return-value]

    def both() -> list[tuple[float, float, float]]:
        time.sleep(1.0)
        return [counted(), recorded()]

    run(flight.server.url, [Ask(prompt(40, 1), 10)])
    before = both()
    answers = run(flight.server.url, [Ask(prompt(40, seed), 100) for seed in range(2, 8)])
    assert all(answer.ok for answer in answers)
    after = both()
    vllms, ours = (
        [end - start for start, end in zip(*pair, strict=True)] for pair in zip(before, after, strict=True)
    )
    assert ours == vllms
    assert vllms[2] == 600


def test_admission_watermark(flight: Flight) -> None:
    """What is admitted beside others leaves that share of the pool free; growth may still use it."""
    with flight.crowd(clients=12, prompt_tokens=700, max_tokens=24):
        free = flight.watch(2.5)
        flight.put(admission_watermark=0.4)
        until(lambda: most_used(flight.records.poll()[-1:] or [flight.records.latest]) <= 0.5, 20, "drained")
        held = flight.watch(2.5)
        flight.back()
        after = flight.watch(2.5)
    assert max(step.kv_usage for step in free.iterations) > 0.6
    assert max(step.kv_usage for step in held.iterations) <= 0.5
    assert max(step.kv_usage for step in after.iterations) > 0.6
    assert most_used(held.records) <= 0.5 < most_used(free.records)


def test_a_low_cap_ends_preemptions(flight: Flight) -> None:
    """Requests that grow past the pool thrash; held to what fits, they do not."""
    with flight.crowd(clients=16, prompt_tokens=64, max_tokens=600):
        before = flight.server.metrics().value("vllm:num_preemptions_total")
        until(
            lambda: flight.server.metrics().value("vllm:num_preemptions_total") > before + 2,
            30,
            "preemptions",
        )
        free = flight.watch(3)
        flight.put(max_running=7)
        until(
            lambda: flight.server.metrics().value("vllm:num_requests_running") <= 7, 30, "drained to the cap"
        )
        flight.watch(1)  # What vLLM counted before comes late to its metrics.
        held = flight.watch(3)
    assert free.gained("vllm:num_preemptions_total") > 0 < free.grown("preemptions_total")
    assert max(step.requests for step in held.iterations) <= 7
    assert held.gained("vllm:num_preemptions_total") == 0
    assert held.grown("preemptions_total") == 0
    quiet = flight.server.metrics().value("vllm:num_preemptions_total")
    flight.records.poll()
    latest = flight.records.latest
    assert latest is not None
    assert latest["preemptions_total"] == quiet


class Mover:
    """Flips all knobs at random, several times a second, from a thread."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._rng = random.Random(7)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Mover":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._flight.hold.clear()

    def _run(self) -> None:
        while not self._stopping.wait(0.15):
            values = {
                "step_token_budget": self._rng.choice([8, 64, 300, 1024]),
                "prefill_chunk_tokens": self._rng.choice([8, 48, 200, 1024]),
                "speculative_tokens": self._rng.choice([0, 1, 2, 3]),
                "max_running": self._rng.choice([1, 2, 5, 16]),
                "admission_watermark": self._rng.choice([0.1, 0.5, 1.0]),
            }
            self._flight.hold.set(**{name: values[name] for name in self._rng.sample(sorted(values), 3)})


def test_greedy_outputs_are_the_same_with_knobs_moving(flight: Flight) -> None:
    asks = [Ask(prompt(30 + 37 * (number % 13), number), 120) for number in range(40)]
    still = run(flight.server.url, asks, at_once=10)
    flight.records.poll()
    with Mover(flight):
        moving = run(flight.server.url, asks, at_once=10)
    assert all(answer.ok for answer in [*still, *moving])
    seen = {tuple(record[KNOB_PREFIX + name] for name in sorted(KNOBS)) for record in flight.records.poll()}
    assert len(seen) > 5, "the knobs hardly moved"
    assert [answer.tokens for answer in moving] == [answer.tokens for answer in still]


def most_prefilled(window: Window) -> int:
    totals = [record["prefill_tokens_total"] for record in window.records]
    return int(max(later - earlier for earlier, later in itertools.pairwise(totals)))


def most_used(records: list) -> float:
    return max(
        (BLOCKS - 1 - record["kv_blocks_free"] - record["kv_blocks_cached"]) / (BLOCKS - 1)
        for record in records
        if record is not None
    )
