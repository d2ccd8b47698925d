"""The step record against an account kept beside it, of random flights: arrivals, aborts, preemptions,
drafts, knobs moved, synchronous and not.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from flown import Flown
from plane import BLOCK, Make

Fly = Callable[..., Flown]

SMALL = Make(drafts=3, blocks=24, max_num_seqs=6, max_num_batched_tokens=96, max_model_len=256)
VARIANTS = {
    "sync": SMALL,
    "async": replace(SMALL, asynchronous=True),
    "async-no-drafts": replace(SMALL, asynchronous=True, drafts=0),
    "no-cache": replace(SMALL, caching=False),
}


@dataclass
class Account:
    """What a flight did, worked out from what was scheduled and what came back, one request at a time."""

    flight: Flown
    prefill: int = 0
    positions: int = 0
    decodes: int = 0
    context: int = 0
    again: int = 0
    steps: int = 0
    drafts: list[tuple[int, int]] = field(default_factory=list)
    """Of each round that counted: drafts, and how many hit."""
    _reached: dict[str, int] = field(default_factory=dict)
    _again_until: dict[str, int] = field(default_factory=dict)
    _in_prompt: set[str] = field(default_factory=set)

    def scheduled(self, output: Any) -> dict[str, int]:
        """Take in one scheduled step; returns its sums, to be added when its output is back."""
        requests = self.flight.scheduler.requests
        sums = dict.fromkeys(("prefill", "positions", "decodes", "context", "again"), 0)
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._in_prompt |= {new.req_id for new in output.scheduled_new_reqs} | set(cached.resumed_req_ids)
        for request_id in output.preempted_req_ids or ():
            known = self._reached.pop(request_id, 0)
            self._again_until[request_id] = max(known, self._again_until.get(request_id, 0))
            if request_id not in output.num_scheduled_tokens:
                self._in_prompt.discard(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            request, start = requests[request_id], starts[request_id]
            end = start + count
            known = min(end, request.num_tokens)
            if request_id in self._in_prompt:
                sums["prefill"] += known - start
                sums["positions"] += (known - start) * known
                sums["again"] += max(0, min(end, self._again_until.get(request_id, 0)) - start)
                if end >= self._again_until.get(request_id, 0):
                    self._again_until.pop(request_id, None)
                if end >= request.num_tokens:
                    self._in_prompt.discard(request_id)
            else:
                sums["decodes"] += 1
                sums["context"] += end
        return sums


class Watched(Flown):
    """Keeps the account while it flies, and compares every record with the scheduler itself."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.account = Account(self)
        self.pending: list[dict[str, int]] = []
        self.preempted = 0
        self._watch_preemption()

    def _watch_preemption(self) -> None:
        scheduler, account = self.scheduler, self.account
        preempt = scheduler._preempt_request

        def watched(request: Any, *arguments: Any, **named: Any) -> None:
            self.preempted += 1
            account._reached[request.request_id] = min(request.num_computed_tokens, request.num_tokens)
            preempt(request, *arguments, **named)

        scheduler._preempt_request = watched

    def _run(self, scheduled: Any) -> Any:
        self.pending.append(self.account.scheduled(scheduled))
        return super()._run(scheduled)

    def _land(self, scheduled: Any, output: Any) -> None:
        index = output.req_id_to_index
        alive = {id for id in scheduled.num_scheduled_tokens if id in self.scheduler.requests}
        rounds = [
            (len(tokens), len(output.sampled_token_ids[index[request_id]]) - 1)
            for request_id, tokens in scheduled.scheduled_spec_decode_tokens.items()
            if request_id in alive
        ]
        super()._land(scheduled, output)
        if not scheduled.total_num_scheduled_tokens:
            if self.pending:
                self.pending.pop(0) if not any(self.pending[0].values()) else None
            return
        for name, amount in self.pending.pop(0).items():
            setattr(self.account, name, getattr(self.account, name) + amount)
        self.account.drafts += rounds
        self.account.steps += 1
        self.compare()

    def compare(self) -> None:
        record, account, scheduler = self.last, self.account, self.scheduler
        assert record["steps_total"] == account.steps
        assert record["prefill_tokens_total"] == account.prefill
        assert record["chunk_positions_total"] == account.positions
        assert record["decode_sequences_total"] == account.decodes
        assert record["context_tokens_total"] == account.context
        assert record["decode_tokens_total"] == sum(map(len, self.outputs.values()))
        assert record["draft_rounds_total"] == len(account.drafts)
        assert record["drafted_tokens_total"] == sum(drafts for drafts, _ in account.drafts)
        assert record["accepted_tokens_total"] == sum(hits for _, hits in account.drafts)
        assert record["rejected_rounds_total"] == sum(hits < drafts for drafts, hits in account.drafts)
        assert record["preemptions_total"] == self.preempted
        assert record["recomputed_tokens_total"] == account.again
        assert record["running"] == len(scheduler.running)
        assert record["waiting"] == len(scheduler.waiting) + len(scheduler.kv_holding_waiting)
        self.compare_blocks(record)
        if record["demand_step"] == record["steps_total"]:
            self.compare_scan(record)

    def compare_blocks(self, record: Any) -> None:
        pool = self.scheduler.kv_cache_manager.block_pool
        assert record["kv_blocks_free"] + record["kv_blocks_cached"] == pool.get_num_free_blocks()
        if record["blocks_step"] == record["steps_total"]:
            idle = [b for b in pool.blocks if b.ref_cnt == 0 and b.block_hash is not None]
            assert record["kv_blocks_cached"] == len(idle)
            assert record["kv_blocks_shared"] == sum(b.ref_cnt > 1 for b in pool.blocks if not b.is_null)

    def compare_scan(self, record: Any) -> None:
        scheduler = self.scheduler
        waiting = [*scheduler.waiting, *scheduler.kv_holding_waiting]
        assert record["waiting_prompt_tokens"] == sum(request.num_prompt_tokens for request in waiting)
        empty = 0
        blocks = scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
        for request in scheduler.running:
            held = request.num_computed_tokens - request.num_in_flight_tokens
            empty += sum(1 for slot in range(len(blocks[request.request_id]) * BLOCK) if slot >= held)
        assert record["tail_waste_tokens"] == empty
        assert record["demand_16_p10_blocks"] <= record["demand_16_p50_blocks"]


def fly_at_random(flight: Flown, seed: int, steps: int = 250) -> None:
    rng = random.Random(seed)
    shared = [rng.randrange(4, 500) for _ in range(48)]
    flight.accept = lambda _id, drafts: rng.randint(0, drafts)
    asked = 0
    for _ in range(steps):
        if rng.random() < 0.5 and asked < 60:
            prompt = [
                *shared[: BLOCK * rng.randint(0, 3)],
                *(rng.randrange(4, 500) for _ in range(rng.randint(1, 70))),
            ]
            flight.ask(f"r{asked}", prompt, rng.randint(1, 90))
            asked += 1
        if rng.random() < 0.04 and flight.scheduler.requests:
            flight.abort(rng.choice(sorted(flight.scheduler.requests)))
        if rng.random() < 0.05:
            knobs = {
                "max_running": rng.randint(2, 6),
                "step_token_budget": rng.randint(4, 96),
                "prefill_chunk_tokens": rng.randint(4, 96),
                "speculative_tokens": rng.randint(0, 3),
                "admission_watermark": rng.uniform(0.3, 1),
            }
            flight.hold(**dict(rng.sample(sorted(knobs.items()), rng.randint(0, 3))))
        flight.step()
    flight.drain()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_record_is_what_the_scheduler_did(
    fly: Fly, monkeypatch: pytest.MonkeyPatch, variant: str, seed: int
) -> None:
    monkeypatch.setattr("conftest.Flown", Watched)
    flight = fly(VARIANTS[variant], seed)
    found = flight.knob_state()
    fly_at_random(flight, seed)
    record = flight.last
    assert flight.preempted > 0, "no flight without a preemption shows anything"
    assert record["running"] == record["waiting"] == record["tail_waste_tokens"] == 0
    assert record["waiting_prompt_tokens"] == 0
    assert record["kv_blocks_free"] + record["kv_blocks_cached"] == flight.make.blocks - 1
    ends = {name: record[f"{name}_total"] for name in ("finished", "cancelled", "failed")}
    assert ends == {
        "finished": sum(reason == "length" for reason in flight.finished.values()),
        "cancelled": flight.aborted,
        "failed": 0,
    }
    assert flight.attachment.failures == flight.hook.failures == 0
    flight.hold()
    flight.ask("last", 20, 2)
    flight.drain()
    assert flight.is_as_found(found)
