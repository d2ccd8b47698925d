"""Traces of every format: read exactly, refused by line, and cut, sped, spliced and loaded without a loss."""

import contextlib
import gzip
import json
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_traces import TRACES, needs_traces

from kvpilot.workload.arrival import Speed
from kvpilot.workload.formats import parse_slice, read_clients, read_trace
from kvpilot.workload.lengths import parse_lengths
from kvpilot.workload.mooncake import BLOCK_TOKENS, parse_mooncake
from kvpilot.workload.servegen import CLIENTS_HEADER, TOKENS_HEADER, Clients, parse_servegen
from kvpilot.workload.trace import (
    Trace,
    TraceError,
    TraceRow,
    arrivals,
    at_load,
    oversized,
    sliced,
    sped,
    spliced,
)

SPEED = Speed(6000, 1500)
CLIENTS = """client,window_start_s,rate_rps,cv,pattern,arg1,arg2
7,0,4.0,1.1,Gamma,0.8,0.04
7,600,8.0,1.1,Gamma,0.8,0.04
9,0,1.0,3.0,Weibull,0.5,0.01
1,0,1.0,3.0,Weibull,0.5,0.01
"""
TOKENS = """client,volume_requests_est,kind,mean,p5,p25,p50,p75,p90,p95,p99,max
7,100,input_tokens,18.2,13,19,190,190,200,300,400,500
7,100,output_tokens,18.5,1,2,3,8,70,109,193,10912
9,100,input_tokens,18.2,13,19,190,190,200,300,400,500
9,100,output_tokens,18.5,1,2,3,8,70,109,193,10912
"""


def _trace(gaps: list[tuple[float, int, int, list[int]]]) -> Trace:
    times = accumulate(gap for gap, *_ in gaps)
    rows = [
        TraceRow(at_s, prompt, output, tuple(ids[: -(-prompt // 512)]))
        for at_s, (_, prompt, output, ids) in zip(times, gaps, strict=True)
    ]
    rows = [row._replace(at_s=row.at_s - rows[0].at_s) for row in rows]
    return Trace("t", "mooncake", tuple(rows), BLOCK_TOKENS)


traces = st.lists(
    st.tuples(
        st.floats(0, 30), st.integers(0, 9000), st.integers(0, 2000), st.lists(st.integers(0, 9), max_size=6)
    ),
    min_size=1,
    max_size=40,
).map(_trace)


def mooncake_line(**changes: object) -> str:
    return json.dumps(
        {"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [3, 4], **changes}
    )


def test_mooncake_rows_keep_their_prefix_blocks() -> None:
    lines = [mooncake_line(timestamp=1000), "", mooncake_line(timestamp=1500, hash_ids=[3, 9])]
    first, second = parse_mooncake(lines)
    assert first == TraceRow(0.0, 600, 7, (3, 4))
    assert second == TraceRow(0.5, 600, 7, (3, 9))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "t:2: not JSON"),
        ("[1]", "t:2: not a JSON object"),
        (mooncake_line(input_length=None), "t:2: input_length=None"),
        (mooncake_line(output_length=-1), "t:2: output_length=-1"),
        (mooncake_line(timestamp=float("nan")), "t:2: timestamp=nan"),
        (mooncake_line(input_length=True), "t:2: input_length=True"),
        (mooncake_line(hash_ids=[1, 2, 3]), "t:2: 3 hash_ids for 600 tokens"),
        (mooncake_line(hash_ids="abc"), "t:2: hash_ids: a list"),
        (mooncake_line(timestamp=1), "t:2: earlier"),
    ],
)
def test_a_bad_mooncake_line_is_named(line: str, says: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_mooncake([mooncake_line(), line], "t")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("clients", "tokens", "says"),
    [
        ("a,b\n", TOKENS, "c:1: the header"),
        (CLIENTS, "a,b\n", "t:1: the header"),
        (CLIENTS.replace("Weibull", "Pareto"), TOKENS, "c:4: pattern 'Pareto'"),
        (CLIENTS.replace("8.0", "many"), TOKENS, "c:3: not a window"),
        (CLIENTS.replace("8.0", "0"), TOKENS, "c:3: not a window"),
        (CLIENTS + "7,0\n", TOKENS, "c:6: 2 cells"),
        (CLIENTS, TOKENS.replace("13,19", "19,13"), "t:2: not ascending"),
        (CLIENTS, TOKENS.replace("input_tokens", "tokens"), "t:2: kind 'tokens'"),
        (CLIENTS, TOKENS.splitlines()[0], "t: no lengths of any client"),
        (CLIENTS.splitlines()[0], TOKENS, "c: no rows"),
    ],
)
def test_bad_servegen_files_are_named_by_line(clients: str, tokens: str, says: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_servegen(clients.splitlines(), tokens.splitlines(), "c", "t")
    assert says in str(caught.value)


@given(st.text(), st.text())
def test_any_text_is_rows_or_a_trace_error(text: str, other: str) -> None:
    headed = [",".join(CLIENTS_HEADER), *text.splitlines()], [",".join(TOKENS_HEADER), *other.splitlines()]
    for attempt in (
        lambda: parse_mooncake(text.splitlines()),
        lambda: parse_lengths([f"num_prefill_tokens,num_decode_tokens\n{text}"]),
        lambda: parse_servegen(*headed, "c", "t"),
    ):
        with contextlib.suppress(TraceError):
            assert attempt()


def servegen() -> Clients:
    return parse_servegen(CLIENTS.splitlines(), TOKENS.splitlines(), "c", "t")


def test_servegen_clients_become_tenants_with_their_rates_and_lengths() -> None:
    clients = servegen()
    assert clients.without_lengths == 1
    rows = clients.rows(1, 0, 1200, mean_rps=5.0)
    assert rows == clients.rows(1, 0, 1200, mean_rps=5.0) != clients.rows(2, 0, 1200, mean_rps=5.0)
    assert all(a.at_s <= b.at_s for a, b in pairwise(rows))
    assert 0 <= rows[0].at_s <= rows[-1].at_s < 1200
    count = {tenant: sum(row.tenant == tenant for row in rows) for tenant in ("client-7", "client-9")}
    # 4 and 8 a second for ten minutes each against 1 for ten: 12 to 1, thinned alike.
    assert len(rows) == pytest.approx(5.0 * 1200, rel=0.15)
    assert count["client-7"] == pytest.approx(12 / 13 * len(rows), rel=0.1)
    prompts = sorted(row.prompt_tokens for row in rows)
    assert prompts[len(prompts) // 2] == pytest.approx(190, abs=15)
    assert all(1 <= row.output_tokens <= 10912 and 1 <= row.prompt_tokens <= 500 for row in rows)
    with pytest.raises(TraceError, match="no client sends"):
        clients.rows(1, 5000, 5600, mean_rps=5.0)


def test_lengths_without_times_come_one_a_second() -> None:
    lines = ["num_prefill_tokens,num_decode_tokens,x", *(f"{i},1.0,0" for i in range(2000))]
    rows = parse_lengths(lines)
    assert [row.prompt_tokens for row in rows] == list(range(2000))
    assert rows[-1].at_s == pytest.approx(2000, rel=0.1)
    for bad in (["a,b"], lines[:1], [lines[0], "1,-2,0"], [lines[0], "nan,2"], [lines[0], "7"]):
        with pytest.raises(TraceError):
            parse_lengths(bad)


@given(traces, st.floats(0, 100), st.floats(0.1, 100))
def test_slices_partition_and_speed_only_scales(trace: Trace, at_s: float, speed: float) -> None:
    parts = []
    for span in ((0.0, at_s), (at_s, None)):
        with contextlib.suppress(TraceError):
            parts.append(sliced(trace, *span).rows)
    lengths = [row[1:] for row in trace.rows]
    assert [row[1:] for part in parts for row in part] == lengths
    assert sped(trace, speed).seconds == pytest.approx(trace.seconds / speed)
    assert [row[1:] for row in sped(trace, speed).rows] == lengths


@given(st.lists(traces, min_size=1, max_size=3))
def test_a_splice_loses_nothing_and_shares_nothing_across_traces(parts: list[Trace]) -> None:
    whole = spliced(parts)
    assert len(whole.rows) == sum(len(part.rows) for part in parts)
    times = [row.at_s for row in whole.rows]
    assert times == sorted(times)
    at = 0
    ids = []
    for part in parts:
        mine = whole.rows[at : at + len(part.rows)]
        assert [row[1:3] for row in mine] == [row[1:3] for row in part.rows]
        ids.append({one for row in mine for one in row.prefix})
        at += len(part.rows)
    assert sum(map(len, ids)) == len(set().union(*ids))


@given(traces, st.integers(0, 99))
def test_arrivals_are_the_rows(trace: Trace, seed: int) -> None:
    made = arrivals(trace, seed)
    assert made == arrivals(trace, seed)
    assert [a.at_s for a in made] == [row.at_s for row in trace.rows]
    assert [(a.prompt_tokens, a.output_tokens, a.prefix) for a in made] == [
        (max(row.prompt_tokens, 1), max(row.output_tokens, 1), row.prefix) for row in trace.rows
    ]
    assert oversized(made, 4096, 10**9) == sum(a.prompt_tokens + a.output_tokens > 4096 for a in made)
    assert oversized(made, 10**9, 1) == len(made)


@settings(deadline=None, max_examples=60)
@given(traces, st.integers(0, 99), st.floats(5, 60), st.floats(0.2, 2.0))
def test_a_stretch_at_a_load_holds_that_load(trace: Trace, seed: int, seconds: float, load: float) -> None:
    plain = Trace("t", "azure", tuple(row._replace(prefix=()) for row in trace.rows))
    made = at_load(plain, seed, seconds, load, SPEED)
    assert made == at_load(plain, seed, seconds, load, SPEED)
    work_s = sum(SPEED.seconds(a.prompt_tokens, a.output_tokens) for a in made)
    largest = max(SPEED.seconds(max(r.prompt_tokens, 1), max(r.output_tokens, 1)) for r in trace.rows)
    least = SPEED.seconds(1, 1)
    assert work_s >= load * seconds
    assert work_s <= load * seconds + largest + least * len(made)
    times = [a.at_s for a in made]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= seconds


def test_what_a_cache_would_spare_is_no_work() -> None:
    """Equal prompts over and over: only their last, unshared tokens cost, so many more make the load."""
    rows = tuple(TraceRow(float(i), 1025, 1, (1, 2)) for i in range(10))
    shared = Trace("t", "mooncake", rows, 512)
    apart = Trace("t", "azure", tuple(row._replace(prefix=()) for row in rows))
    assert len(at_load(shared, 1, 30, 1.0, SPEED)) > 50 * len(at_load(apart, 1, 30, 1.0, SPEED))


def test_formats_are_told_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,2\n")
    (tmp_path / "m.jsonl").write_text(mooncake_line() + "\n")
    (tmp_path / "l.csv.gz").write_bytes(gzip.compress(b"num_prefill_tokens,num_decode_tokens\n3,4\n"))
    (tmp_path / "x_clients.csv.gz").write_bytes(gzip.compress(CLIENTS.encode()))
    (tmp_path / "x_tokens.csv").write_text(TOKENS)
    kinds = [
        read_trace(tmp_path / name).kind for name in ("a.csv", "m.jsonl", "l.csv.gz", "x_clients.csv.gz")
    ]
    assert kinds == ["azure", "mooncake", "lengths", "servegen"]
    assert read_clients(tmp_path / "x_clients.csv.gz").windows.keys() == {"7", "9"}
    late = read_trace(tmp_path / "x_clients.csv.gz", start_s=600, end_s=900, speed=2)
    assert {row.tenant for row in late.rows} == {"client-7"}
    assert late.rows[-1].at_s < 150


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("none.csv", None, "No such file"),
        ("empty", b"", "empty; expected Azure"),
        ("foreign.csv", b"a,b\n1,2\n", ":1: 'a,b': expected Azure"),
        ("binary", b"\xff\xfe\x00", "not text"),
        ("torn.gz", gzip.compress(b"x" * 999)[:20], "damaged gzip"),
        ("not.gz", b"\x1f\x8bnonsense", "damaged gzip"),
        ("alone_clients.csv", CLIENTS.encode(), "lengths beside it, as alone_tokens.csv"),
    ],
)
def test_foreign_files_are_one_line_that_says_what_was_expected(
    tmp_path: Path, name: str, data: bytes | None, says: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TraceError) as caught:
        read_trace(tmp_path / name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slices_are_written_as_start_and_end() -> None:
    assert parse_slice("600:1200") == (600, 1200)
    assert parse_slice("600:") == (600, None)
    assert parse_slice(":90.5") == (0, 90.5)
    for wrong in ("600", "9:3", "a:b", "-1:4", "nan:4"):
        with pytest.raises(TraceError, match="START:END"):
            parse_slice(wrong)


@needs_traces
def test_the_published_traces_are_what_their_readme_says() -> None:
    code = read_trace(TRACES / "azure2023_code.csv")
    assert (len(code.rows), round(code.seconds)) == (8819, 3436)
    tool = read_trace(TRACES / "mooncake_fast25_synthetic.jsonl")
    assert len(tool.rows) == 3993
    assert sum(row.prompt_tokens for row in tool.rows) / 3993 == pytest.approx(15_325, abs=1)
    seen: set[int] = set()
    hits = 0
    for row in tool.rows:
        hits += sum(one in seen for one in row.prefix)
        seen.update(row.prefix)
    assert hits / sum(len(row.prefix) for row in tool.rows) == pytest.approx(0.64, abs=0.01)
    tenants = read_trace(TRACES / "servegen_language_msmall_clients.csv.gz", 36_000, 37_200)
    assert len({row.tenant for row in tenants.rows}) > 10
    assert len(read_trace(TRACES / "vidur_arxiv_summarization_lengths.csv").rows) == 28_257
