"""Evidence: each finding appears with its cause, and not without; the verdict never says more."""

from collections.abc import Callable

import pytest
from recorded import GIB, Flown

from kvpilot.clock import NS
from kvpilot.incident.evidence import gather
from kvpilot.incident.verdict import judge

MIB = 1 << 20


def calm() -> Flown:
    """Forty seconds in which nothing happens."""
    return Flown().step(10, count=4000)


def topics(flown: Flown, gone_ns: int | None = None) -> list[str]:
    return [finding.topic for finding in gather(flown.recording(), gone_ns).found]


CAUSES: list[tuple[str, Callable[[Flown], Flown]]] = [
    ("host_memory", lambda flown: flown.step(10, count=5, host_available_bytes=30 * MIB)),
    ("device_oom", lambda flown: flown.step(10, count=2, oom_total=1)),
    ("device_memory", lambda flown: flown.step(10, count=5, device_free_bytes=GIB // 4)),
    ("kv_full", lambda flown: flown.step(10, count=150, kv_blocks_free=0, kv_blocks_cached=1)),
    ("preemptions", lambda flown: flown.step(10, count=9, preemptions_total=1)),
    ("step_time", lambda flown: flown.step(100, count=99)),
    ("gap", lambda flown: flown.step(5000).step(10, count=9)),
    ("queue", lambda flown: flown.step(10, waiting=30)),
    ("failed", lambda flown: flown.step(10, failed_total=3)),
]
STRONG = ("host_memory", "device_oom", "device_memory", "hung")


@pytest.mark.parametrize(("topic", "happen"), CAUSES, ids=[topic for topic, _ in CAUSES])
def test_what_happened_is_found_and_nothing_else(topic: str, happen: Callable[[Flown], Flown]) -> None:
    assert topics(calm()) == ["work"]
    found = gather(happen(calm()).recording()).found
    assert [finding.topic for finding in found] in ([topic, "work"], ["work", topic])
    assert [finding.strong for finding in found if finding.topic == topic] == [topic in STRONG]


def test_what_did_not_happen_is_said_too() -> None:
    in_vain = gather(calm().recording()).in_vain
    assert "a machine short of memory" in in_vain
    assert "full KV memory" in in_vain
    assert (
        "a machine short of memory"
        not in gather(calm().step(10, host_available_bytes=MIB).recording()).in_vain
    )


def test_what_the_engine_does_not_record_is_not_said_to_have_not_happened() -> None:
    flown = Flown("oom_total", "kv_blocks_free").step(10, count=200)
    in_vain = gather(flown.recording()).in_vain
    assert "steps out of device memory" not in in_vain
    assert "full KV memory" not in in_vain
    assert "many preemptions" in in_vain


def test_numbers_of_host_memory_are_said() -> None:
    (finding, *_) = gather(calm().step(10, host_available_bytes=30 * MIB).recording()).found
    assert "had 30.0 MiB of memory left, 8.0 GiB 40.0 s before" in finding.text


def test_a_small_machine_that_was_always_small_is_short_too() -> None:
    """Below a quarter GiB the out-of-memory killer is one allocation away, whatever it was before."""
    flown = Flown().step(10, count=100, host_available_bytes=200 * MIB)
    assert "host_memory" in topics(flown)


def test_a_hang_needs_a_witness_and_work() -> None:
    flown = calm().begin()
    end_ns = flown.recording().last_sign_ns
    assert end_ns is not None
    assert "hung" not in topics(flown)
    assert "hung" not in topics(flown, end_ns + NS)
    assert "hung" in topics(flown, end_ns + 31 * NS)
    idle = calm().step(10, running=0, waiting=0)
    assert topics(idle, idle.now_ns + 31 * NS) == ["idle"]


def test_a_step_that_began_and_did_not_end_is_told() -> None:
    (work,) = gather(calm().begin(2).recording()).found
    assert (
        "4 requests ran and 0 waited; a step began 2.0 ms after the last record and none ended" in work.text
    )
    assert "99 % of steps took under 10.0 ms" in work.text
    (work,) = gather(calm().begin(2).end("exception", "ValueError").recording()).found
    assert "began" not in work.text


def test_an_empty_page_has_no_evidence() -> None:
    evidence = gather(Flown(records=16).recording())
    assert (evidence.found, evidence.in_vain, evidence.strongest) == ((), (), None)


def verdict(flown: Flown, **how: bool) -> tuple[str, str, str]:
    page = flown.recording(**how)
    judged = judge(page, gather(page))
    return judged.how, judged.headline, judged.why


def test_vanished_without_evidence_says_so() -> None:
    how, headline, why = verdict(calm())
    assert how == "vanished"
    assert headline == "vanished without a word; its last sign of life was at 22:14:00.000"
    assert why.startswith("killed from outside (SIGKILL, the out-of-memory killer, loss of power)")
    assert why.endswith("nothing that it recorded says why")


def test_vanished_with_evidence_names_it() -> None:
    _, _, why = verdict(calm().step(10, host_available_bytes=30 * MIB))
    assert "30.0 MiB of memory left" in why
    assert "nothing" not in why


def test_circumstances_are_no_cause() -> None:
    """A full KV pool kills nobody: it is listed, and not called the reason."""
    _, _, why = verdict(calm().step(10, count=9, kv_blocks_free=0, kv_blocks_cached=0, preemptions_total=1))
    assert why.endswith("nothing that it recorded says why")


@pytest.mark.parametrize(
    ("kind", "what", "headline"),
    [
        ("closed", "", "closed in order at 22:14:00.000"),
        (
            "exception",
            "torch.OutOfMemoryError\nworker.py:Worker.run:77\nmain.py:main:3",
            "died of torch.OutOfMemoryError in Worker.run, worker.py line 77, at 22:14:00.000",
        ),
        ("exception", "KeyError", "died of KeyError at 22:14:00.000"),
        (
            "hook_failed",
            "struct.error\nhook.py:end:5",
            "let go of its page at 22:14:00.000 because kvpilot's own hook failed with struct.error in end, "
            "hook.py line 5; the engine served on, unrecorded",
        ),
    ],
)
def test_last_words_are_the_verdict(kind: str, what: str, headline: str) -> None:
    assert verdict(calm().end(kind, what))[:2] == (kind, headline)


def test_a_copy_cannot_tell_whether_its_engine_lives() -> None:
    how, _, why = verdict(calm(), copied=True)
    assert how == "copied"
    assert "a copy cannot tell" in why
    assert verdict(calm().end(), copied=True)[0] == "closed"


def test_the_living_are_said_to_live() -> None:
    how, headline, why = verdict(calm(), alive=True)
    assert (how, why) == ("lives", "")
    assert headline.startswith("lives; ")
