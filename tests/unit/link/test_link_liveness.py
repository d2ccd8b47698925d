"""Silence is classified, not assumed."""

from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.clock import NS
from kvpilot.link.liveness import (
    LOST_AFTER_S,
    SURPLUS_FOR_S,
    UNANSWERED_AFTER_S,
    Answers,
    Liveness,
    classify,
    stalled_after_s,
)

AT_WORK = {"lock_held": True, "running": 3, "waiting": 1, "seconds_since_step": 0.01, "p99_step_s": 0.05}
NOTHING = {"running": 0, "waiting": 0}
LOOK_S = 0.1


@pytest.mark.parametrize(
    ("state", "change"),
    [
        ("live", {}),
        ("dead", {"lock_held": False}),
        ("idle", {**NOTHING, "seconds_since_step": 3600.0}),
        ("live", {"seconds_since_step": 2.0}),
        ("stalled", {"seconds_since_step": 2.1}),
        ("stalled", {"seconds_since_step": 2.1, "running": 0}),
        ("live", {"seconds_since_step": 2.1, "p99_step_s": 1.0}),
        ("stalled", {"seconds_since_step": 5.1, "p99_step_s": 1.0}),
        ("stalled", {"seconds_since_step": 2.1, "p99_step_s": None}),
        ("live", {"awaited": 400}),
        ("wedged", {"awaited": 4, "stuck": True}),
        ("wedged", {**NOTHING, "stuck": True}),
        ("stalled", {"awaited": 4, "stuck": True, "seconds_since_step": 99.0}),
        ("live", {**NOTHING, "awaited": 1, "seconds_since_step": 3600.0}),
        ("dead", {"lock_held": False, **NOTHING}),
        ("dead", {"lock_held": False, "stuck": True, "seconds_since_step": 99.0}),
    ],
)
def test_states(state: str, change: dict[str, Any]) -> None:
    assert classify(**(AT_WORK | change)) == state


counts = st.integers(0, 3)
seconds = st.floats(0, 1e6)


@given(
    lock_held=st.booleans(),
    running=counts,
    waiting=counts,
    seconds_since_step=seconds,
    p99_step_s=st.none() | st.floats(0, 100),
    awaited=counts,
    stuck=st.booleans(),
)
def test_every_rank_is_in_exactly_one_state_and_each_means_what_it_says(**look: Any) -> None:
    state = classify(**look)
    assert state in get_args(Liveness)
    work = look["running"] + look["waiting"] > 0
    silent = look["seconds_since_step"] > stalled_after_s(look["p99_step_s"])
    means = {
        "dead": not look["lock_held"],
        "stalled": look["lock_held"] and work and silent,
        "wedged": look["lock_held"] and not (work and silent) and look["stuck"],
        "idle": look["lock_held"] and not work and not look["awaited"] and not look["stuck"],
    }
    means["live"] = not any(means.values())
    assert [name for name, holds in means.items() if holds] == [state]


@dataclass
class Watched:
    """`Answers` at ten looks a second."""

    answers: Answers = field(default_factory=Answers)
    now_ns: int = 50 * NS
    finished: int = 0

    def look(self, awaited: int | None, held: int | None, done: int = 0, byte_left: bool = False) -> bool:
        self.now_ns += round(LOOK_S * NS)
        self.finished += done
        return self.answers.observe(
            self.now_ns, awaited=awaited, held=held, finished=self.finished, byte_left=byte_left
        )

    def until_stuck(self, awaited: int, held: int | None, within_s: float = 100.0) -> float | None:
        """Seconds of looks like this one until it is stuck; None if it never is."""
        for number in range(1, round(within_s / LOOK_S) + 1):
            if self.look(awaited, held):
                return number * LOOK_S
        return None


@pytest.fixture
def watched() -> Watched:
    watched = Watched()
    watched.look(awaited=0, held=0)
    return watched


def test_an_answer_without_streaming_may_take_for_ever_while_the_engine_has_it(watched: Watched) -> None:
    assert watched.until_stuck(awaited=3, held=3, within_s=3600) is None
    assert watched.until_stuck(awaited=3, held=12, within_s=3600) is None


def test_a_request_that_the_engine_finished_is_answered_or_lost(watched: Watched) -> None:
    watched.look(awaited=2, held=2)
    watched.look(awaited=2, held=0, done=2)
    assert watched.until_stuck(awaited=2, held=0) == pytest.approx(UNANSWERED_AFTER_S, abs=2 * LOOK_S)


def test_requests_that_never_reach_the_engine_are_lost_later(watched: Watched) -> None:
    assert watched.until_stuck(awaited=1, held=0) == pytest.approx(LOST_AFTER_S, abs=2 * LOOK_S)


def test_it_is_found_under_load_that_goes_on(watched: Watched) -> None:
    """Clients that wait for ever pile up; the engine works for each new one."""
    awaited, looks = 4, 0
    while not watched.look(awaited, held=4, done=looks % 10 == 0):
        looks += 1
        awaited += looks % 10 == 0
    assert looks * LOOK_S == pytest.approx(UNANSWERED_AFTER_S + SURPLUS_FOR_S, abs=1.5)


def test_it_is_found_with_one_client_that_gives_up_early_and_tries_again(watched: Watched) -> None:
    """No request of its is ever five seconds old."""
    for _ in range(3):
        watched.look(awaited=1, held=1)
        watched.look(awaited=1, held=0, done=1)
        for _ in range(30):
            if watched.look(awaited=1, held=0):
                return
        watched.look(awaited=0, held=0)
    raise AssertionError("it never came about")


def test_a_moment_between_the_last_step_and_the_answer_is_nothing(watched: Watched) -> None:
    """An answer that took an hour: when it is complete, its last byte is still an hour old."""
    for _ in range(36_000):
        watched.look(awaited=1, held=1)
    assert not watched.look(awaited=1, held=0, done=1)
    assert not watched.look(awaited=0, held=0, byte_left=True)
    assert watched.until_stuck(awaited=1, held=0, within_s=20) is None


def test_a_client_that_left_as_its_answer_was_complete_is_no_evidence_against_the_next(
    watched: Watched,
) -> None:
    watched.look(awaited=2, held=2)
    watched.look(awaited=1, held=1, done=1)
    for _ in range(600):
        watched.look(awaited=1, held=1)
    assert not watched.look(awaited=1, held=0, done=1)
    assert not watched.look(awaited=0, held=0, byte_left=True)


def test_only_a_byte_ends_it(watched: Watched) -> None:
    watched.look(awaited=1, held=0, done=1)
    watched.until_stuck(awaited=1, held=0)
    assert watched.look(awaited=1, held=1)
    assert watched.look(awaited=1, held=0), "found once, it needs no second finding"
    assert watched.look(awaited=0, held=0)
    assert not watched.look(awaited=1, held=0, byte_left=True)
    assert watched.until_stuck(awaited=1, held=0) == pytest.approx(LOST_AFTER_S, abs=2 * LOOK_S)


def test_what_leaves_by_other_doors_is_no_evidence(watched: Watched) -> None:
    """Requests that no valve counts finish all day; then one comes whose way in takes a while."""
    for _ in range(1000):
        watched.look(awaited=0, held=1, done=1)
    assert watched.until_stuck(awaited=1, held=0, within_s=20) is None


def test_valves_that_cannot_be_believed_say_nothing(watched: Watched) -> None:
    watched.look(awaited=1, held=0, done=1)
    for _ in range(1000):
        assert not watched.look(awaited=None, held=0)
    watched.look(awaited=1, held=0)
    assert watched.until_stuck(awaited=1, held=0, within_s=20) is None


def test_beside_other_ranks_only_what_this_one_finished_is_evidence(watched: Watched) -> None:
    assert watched.until_stuck(awaited=9, held=None, within_s=600) is None
    watched.look(awaited=9, held=None, done=1)
    assert watched.until_stuck(awaited=9, held=None) == pytest.approx(UNANSWERED_AFTER_S, abs=2 * LOOK_S)


looks = st.lists(
    st.tuples(st.none() | counts, st.none() | counts, st.none() | st.integers(0, 2), st.booleans()),
    max_size=200,
)


@given(looks=looks, step_s=st.floats(0.01, 10))
def test_whatever_is_seen(looks: list[Any], step_s: float) -> None:
    """Never stuck without a surplus to begin with, never within a look at a byte, never early."""
    answers, now_ns, finished = Answers(), 0, 0
    quiet_s = 0.0
    for awaited, held, done, byte_left in looks:
        now_ns += round(step_s * NS)
        finished += done or 0
        was = answers.stuck
        stuck = answers.observe(
            now_ns,
            awaited=awaited,
            held=held,
            finished=None if done is None else finished,
            byte_left=byte_left,
        )
        quiet_s = 0.0 if byte_left or awaited is None else quiet_s + step_s
        if byte_left or awaited is None:
            assert not stuck
        elif stuck and not was:
            assert awaited > (held or 0)
            assert quiet_s >= UNANSWERED_AFTER_S
        else:
            assert stuck or not was


@given(held=st.lists(st.integers(0, 5), min_size=1, max_size=300), step_s=st.floats(0.01, 60))
def test_while_the_engine_has_as_many_as_are_awaited_nothing_is_wedged(
    held: list[int], step_s: float
) -> None:
    answers = Answers()
    for number, count in enumerate(held):
        assert not answers.observe(
            round(number * step_s * NS), awaited=count, held=count, finished=number, byte_left=False
        )
