"""Workloads as plain values: the same arrivals from the same value, bursts, shared texts, refusals."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvpilot.workload.arrival import Arrival, Speed
from kvpilot.workload.generator import BURSTS, generate
from kvpilot.workload.mixes import MIXES
from kvpilot.workload.prompt import token_ids
from kvpilot.workload.spec import Part, Spell, TraceAbsent, Workload

SPEED = Speed(38_000, 8_000)


def of(*parts: Part) -> Workload:
    return Workload(name="w", parts=parts)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(sorted(MIXES)),
    st.integers(0, 999),
    st.floats(0.2, 2.0),
    st.floats(0.3, 8.0),
    st.booleans(),
)
def test_a_mix_offers_its_load_in_order_and_again(
    mix: str, seed: int, load: float, cv: float, bursty: bool
) -> None:
    arrivals = generate(seed, 20, load, SPEED, MIXES[mix], BURSTS if bursty else (), cv)
    assert arrivals == generate(seed, 20, load, SPEED, MIXES[mix], BURSTS if bursty else (), cv)
    assert all(a.at_s <= b.at_s for a, b in pairwise(arrivals))
    assert 0 <= arrivals[0].at_s <= arrivals[-1].at_s <= 20
    work_s = sum(SPEED.seconds(a.prompt_tokens, a.output_tokens) for a in arrivals)
    assert work_s >= load * 20


def test_a_larger_cv_clusters_arrivals() -> None:
    def gaps_cv(cv: float) -> float:
        arrivals = generate(1, 300, 1.0, SPEED, MIXES["chat"], (), cv)
        gaps = [b.at_s - a.at_s for a, b in pairwise(arrivals)]
        mean = sum(gaps) / len(gaps)
        return (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean

    assert gaps_cv(1.0) == pytest.approx(1.0, abs=0.1)
    assert gaps_cv(0.3) == pytest.approx(0.3, abs=0.05)
    assert gaps_cv(4.0) == pytest.approx(4.0, rel=0.25)


def test_mixes_are_the_sizes_that_services_published() -> None:
    def means(mix: str) -> tuple[float, float]:
        arrivals = generate(1, 600, 1.0, SPEED, MIXES[mix], ())
        n = len(arrivals)
        return sum(a.prompt_tokens for a in arrivals) / n, sum(a.output_tokens for a in arrivals) / n

    assert means("chat") == pytest.approx((1155, 211), rel=0.1)
    assert means("code") == pytest.approx((2048, 28), rel=0.15)
    assert means("document")[0] == pytest.approx(15_000, rel=0.25)
    hog = generate(1, 600, 1.0, SPEED, MIXES["hog"], ())
    by_hog = sum(a.work(SPEED.r) for a in hog if a.tenant == "hog")
    assert 0.35 < by_hog / sum(a.work(SPEED.r) for a in hog) < 0.6


def test_a_tenants_text_is_shared_by_its_prompts_alone() -> None:
    arrivals = generate(1, 60, 1.0, SPEED, MIXES["document"], ())
    shared = [a for a in arrivals if a.prefix]
    assert 0.8 < len(shared) / len(arrivals) < 1
    one = shared[0]
    same = next(a for a in shared[1:] if (a.tenant, a.klass) == (one.tenant, one.klass))
    other = next(a for a in shared if a.tenant != one.tenant)
    assert token_ids(one)[:8192] == token_ids(same)[:8192]
    assert token_ids(one)[8192:] != token_ids(same)[8192:]
    assert token_ids(one)[:1] != token_ids(other)[:1]
    # Their first prompts are work, the texts in the others are not.
    assert len(arrivals) > 1.5 * len(generate(1, 60, 1.0, SPEED, MIXES["mixed"], ())) / 3


def test_prompts_have_their_length_and_agree_where_their_ids_do() -> None:
    def prompt(tokens: int, prefix: tuple[int, ...], seed: int = 1) -> list[int]:
        return token_ids(Arrival(0.0, tokens, 1, "c", "t", "d", seed, prefix, 512 if prefix else 0))

    assert [len(prompt(n, p)) for n, p in ((1, ()), (700, (1, 2)), (2000, (1, 2)))] == [1, 700, 2000]
    assert prompt(700, (1, 2)) == prompt(700, (1, 2), seed=9)
    assert prompt(2000, (1, 2))[:1024] == prompt(1500, (1, 2), seed=9)[:1024]
    assert prompt(2000, (1, 2))[1024:1500] != prompt(1500, (1, 2), seed=9)[1024:]
    assert prompt(1024, (1, 2))[512:] != prompt(1024, (1, 3))[512:]
    assert prompt(100, ()) == prompt(100, ()) != prompt(100, (), seed=2)
    assert all(0 <= one < 2**32 for one in prompt(5000, tuple(range(9))))


def test_parts_follow_one_another() -> None:
    calm, storm = Part(seconds=20, load=0.5, mix="chat"), Part(seconds=10, load=2.0, mix="code")
    arrivals = of(calm, storm, calm).arrivals(3, SPEED)
    assert arrivals == of(calm, storm, calm).arrivals(3, SPEED)
    assert all(a.at_s <= b.at_s for a, b in pairwise(arrivals))
    work_s = [0.0, 0.0, 0.0]
    for one in arrivals:
        part = 0 if one.at_s < 20 else 1 if one.at_s < 30 else 2
        work_s[part] += SPEED.seconds(one.prompt_tokens, one.output_tokens)
    assert work_s == pytest.approx([10, 20, 10], rel=0.15)


def test_trace_parts_are_cut_and_loaded_and_an_absent_one_is_said(tmp_path: Path) -> None:
    lines = [f"2023-11-16 18:{m:02}:{s:02},{100 + s},{5 + m}" for m in range(10) for s in range(60)]
    text = "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines])
    (tmp_path / "a.csv").write_text(text + "\n")
    part = Part(seconds=5, load=1.0, trace="a.csv", start=120, end=180)
    arrivals = of(part).arrivals(1, SPEED, tmp_path)
    assert {one.output_tokens for one in arrivals} == {7}
    assert arrivals[-1].at_s <= 5
    for directory in (None, tmp_path / "nowhere"):
        with pytest.raises(TraceAbsent, match=r"a\.csv"):
            of(part).arrivals(1, SPEED, directory)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mix": "chat", "trace": "a.csv"},
        {},
        {"mix": "chats"},
        {"trace": "../a.csv"},
        {"trace": "a.csv", "cv": 3},
        {"mix": "chat", "start": 5},
        {"trace": "a.csv", "start": 5, "end": 5},
        {"mix": "chat", "load": 0},
        {"mix": "chat", "seconds": -1},
        {"mix": "chat", "bursts": [{"start": 0.5, "length": 0.2, "factor": 0.5}]},
        {"mix": "chat", "surprise": 1},
    ],
)
def test_what_is_no_workload_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Part.model_validate({"seconds": 5, "load": 1.0, **wrong})


def test_bursts_multiply_the_load_inside_them() -> None:
    spell = Spell(start=0.5, length=0.25, factor=6)
    arrivals = of(Part(seconds=400, load=1.0, mix="chat", bursts=(spell,))).arrivals(5, SPEED)
    counts = [sum(100 * i <= one.at_s < 100 * (i + 1) for one in arrivals) for i in range(4)]
    assert max(counts) > 3 * min(counts)
