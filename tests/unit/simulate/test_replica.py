"""A whole flight in virtual time: nothing is lost, clients are as they are, legs share their luck."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import PROMISES, SHIPPED, Linear, arrivals, small

from kvpilot.clock import NS
from kvpilot.inside.hook import value_in_force
from kvpilot.journal.records import DecisionRecord
from kvpilot.policy.load import load_text
from kvpilot.policy.rules import PolicySet
from kvpilot.simulate.legs import load_policies
from kvpilot.simulate.replica import START_NS, Replica
from kvpilot.workload.arrival import Arrival
from kvpilot.workload.client import Patience
from kvpilot.workload.outcome import Fate

CLASSES = ("batch", "interactive")
ALWAYS = """
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {{name: always}}
spec:
  inputs: {{x: {{signal: requests_running, agg: last, maxAge: 60s}}}}
  onMissing: hold
  rules:
    - name: act
      when: x >= 0
      until: x > 1000000
      lease: 2s
      do: [{{knob: {knob}, set: {value}{scope}}}]
"""


def always(knob: str, value: float, scope: str = "") -> PolicySet:
    return PolicySet((load_text(ALWAYS.format(knob=knob, value=value, scope=scope)),))


def one(
    at_s: float, prompt: int = 100, output: int = 20, klass: str = "interactive", seed: int = 1
) -> Arrival:
    return Arrival(at_s, prompt, output, klass, "acme", "json", seed)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    per_s=st.floats(0.5, 40.0),
    blocks=st.integers(90, 400),
    piloted=st.booleans(),
    cached=st.booleans(),
    drafts=st.integers(0, 4),
    admission=st.sampled_from(("held", "predicted")),
)
def test_every_arrival_ends_once_and_nothing_is_lost(
    seed: int, per_s: float, blocks: int, piloted: bool, cached: bool, drafts: int, admission: str
) -> None:
    """Whatever the load, the pool and the policies: asserts inside the replica, sums outside."""
    coming = arrivals(seed, 4.0, per_s)
    sizes = {"blocks": blocks, "speculative_tokens": drafts}
    deployment = small(prefix_cache=cached, admission=admission, **sizes)
    policies = load_policies(SHIPPED, CLASSES) if piloted else None
    replica = Replica(deployment, Linear(), PROMISES, policies)
    outcomes = replica.fly(coming, drain_s=5.0)
    assert sorted(o.arrival.at_s for o in outcomes) == [a.at_s for a in coming]
    for outcome in outcomes:
        if outcome.fate is Fate.FINISHED:
            assert outcome.output_tokens == outcome.arrival.output_tokens
            assert (outcome.ttft_s or 0) > 0
            assert all(ns > 0 for ns, _ in outcome.gaps())
        assert outcome.ended_at_s >= outcome.arrival.at_s - 1e-9


def test_a_run_can_be_repeated_to_the_nanosecond() -> None:
    flights = []
    for _ in range(2):
        replica = Replica(small(), Linear(), PROMISES, load_policies(SHIPPED, CLASSES))
        flights.append((replica.fly(arrivals(3, 6.0, 12.0), 5.0), replica.cockpit.flown.leases))
    assert flights[0] == flights[1]


def test_legs_share_their_luck() -> None:
    """The drafts of a request stand at the same positions however many were proposed and when."""
    said = []
    for drafts, chunk in ((2, 2048), (4, 256)):
        replica = Replica(small(speculative_tokens=drafts, prefill_chunk_tokens=chunk), Linear(), PROMISES)
        outcomes = replica.fly([one(0.5, seed=9, output=60)], 5.0)
        counts = [count for _, count in outcomes[0].emitted][1:]
        ends, position = set(), 1
        for count in counts:
            position += count
            if count < drafts + 1:
                ends.add(position - 1)
        said.append((ends, drafts))
    # Where four drafts were cut short, two were cut short too, unless their rounds began elsewhere.
    assert said[1][0]
    assert said[1][0] & said[0][0]


def test_who_loses_patience_is_gone_and_frees_its_blocks() -> None:
    promises = replace(PROMISES, patience={"batch": Patience(1.0), "interactive": Patience(0.5)})
    replica = Replica(small(), Linear(step_s=0.1), promises)
    for arrival in (one(0.0, output=50), one(0.0, output=2)):
        replica.offer(arrival)
    replica.fly_to(2.0)
    outcomes = replica.land()
    fates = {o.arrival.output_tokens: (o.fate, o.ended_at_s) for o in outcomes}
    assert fates[50] == (Fate.ABANDONED, 0.5)
    assert fates[2][0] is Fate.FINISHED
    assert replica.engine.core.totals.cancelled == 1
    assert replica.engine.core.scheduler.pool.referenced == 0


def test_shed_clients_come_back_when_told_and_count_once() -> None:
    """A closed valve: interactive clients retry twice after Retry-After, batch clients go."""
    policies = always("shed_fraction", 1.0, ", scope: {classAtMost: 1}")
    patient = replace(PROMISES, patience={**PROMISES.patience, "interactive": Patience(200.0, retries=2)})
    replica = Replica(small(), Linear(), patient, policies)
    outcomes = replica.fly([one(1.0), one(1.0, klass="batch", seed=2)], 150.0)
    by_class = {o.arrival.klass: o for o in outcomes}
    assert {o.fate for o in outcomes} == {Fate.SHED}
    assert by_class["batch"].attempts == 1
    assert by_class["batch"].ended_at_s == 1.0
    assert by_class["interactive"].attempts == 3
    waited_s = by_class["interactive"].waited_s
    assert waited_s >= 2.0
    assert waited_s == int(waited_s), "Retry-After is whole seconds"
    counts = {row.class_name: row for row in replica.cockpit.pilot.engine.valve_rows()}
    assert counts["interactive"].offered == 3


def test_a_retry_keeps_its_first_arrival() -> None:
    """Shed at first, let in later: its TTFT runs from the first time that it came."""
    replica = Replica(small(queue_caps={"interactive": 0}), Linear(), PROMISES)
    replica.offer(one(1.0))
    replica.fly_to(1.5)
    replica.deployment = small()
    replica.fly_to(6.0)
    (outcome,) = replica.land()
    assert outcome.fate is Fate.FINISHED
    assert outcome.attempts == 2
    assert outcome.waited_s == 1.0
    assert outcome.ttft_s == pytest.approx(1.0 + Linear().step_s + 100 * Linear().prompt_token_s)


def test_the_queue_cap_of_a_static_setting_turns_away_who_finds_it_full() -> None:
    promises = replace(PROMISES, patience={"batch": Patience(30.0), "interactive": Patience(30.0)})
    replica = Replica(small(queue_caps={"batch": 2}, max_running=1), Linear(), promises)
    coming = [one(0.0, output=1500)] + [one(0.5, klass="batch", seed=i) for i in range(5)]
    fates = [o.fate for o in replica.fly(coming, 30.0) if o.arrival.klass == "batch"]
    assert fates.count(Fate.SHED) == 3
    assert fates.count(Fate.FINISHED) == 2


def test_leases_are_obeyed_and_expire_without_their_pilot() -> None:
    """The dead man's switch in virtual time: the last tick, one ttl, then baseline."""
    replica = Replica(small(), Linear(), PROMISES, always("prefill_chunk_tokens", 64))
    replica.offer(one(0.1, output=1900, klass="batch"))
    replica.fly_to(1.0)
    hook = replica.engine.loop._telemetry._hook
    assert hook._values["prefill_chunk_tokens"] == 64
    killed_s = replica.now_s
    replica.cockpit.tick = lambda: None
    replica.fly_to(killed_s + 1.5)
    assert hook._values["prefill_chunk_tokens"] == 64
    replica.fly_to(killed_s + 2.5)
    assert hook._values["prefill_chunk_tokens"] == 2048
    replica.land()


def test_the_pilot_ticks_ten_times_a_second_also_inside_long_steps() -> None:
    replica = Replica(small(), Linear(step_s=0.35), PROMISES, always("max_running", 7))
    replica.fly([one(0.0, output=10)], 5.0)
    assert replica.cockpit.pilot.board.ticks == pytest.approx(replica.now_s * 10, abs=2)
    decision = next(row for row in replica.cockpit.flown.journal if isinstance(row, DecisionRecord))
    assert decision.after == 7
    assert (decision.at_wall_ns - START_NS) % (NS // 10) == 0


def test_a_step_that_memory_cannot_hold_fails_its_requests_and_is_counted() -> None:
    deployment = small(headroom_bytes=10**6)
    replica = Replica(deployment, Linear(position_bytes=10.0), PROMISES)
    outcomes = replica.fly([one(0.0, prompt=1000, output=5), one(5.0, prompt=50, output=5)], 10.0)
    assert [o.fate for o in outcomes] == [Fate.FAILED, Fate.FINISHED]
    assert outcomes[0].http_status == 503
    assert outcomes[0].ended_at_s >= 2.0, "finding out takes time"
    assert replica.totals.oom == 1


def test_what_can_never_be_served_is_refused_as_the_engine_would() -> None:
    outcomes = Replica(small(), Linear(), PROMISES).fly([one(0.0, prompt=5000), one(0.1)], 10.0)
    assert [o.fate for o in outcomes] == [Fate.FAILED, Fate.FINISHED]
    assert outcomes[0].http_status == 400
    assert "Too long" in (outcomes[0].error or "")


def test_values_in_force_are_the_manifests() -> None:
    """What a lease asks for is clamped by the engine in virtual time too."""
    replica = Replica(small(), Linear(), PROMISES, always("max_running", 31))
    replica.fly([one(0.0)], 1.0)
    knob = replica.cockpit.pilot.board.tick.sight.manifest.knob("max_running")
    assert knob.maximum == 32
    assert value_in_force(knob, 1e6) == 32
