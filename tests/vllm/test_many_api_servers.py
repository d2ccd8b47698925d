"""Two API-server processes before one engine core: both shed what they are told, and touch nothing else."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from flights import CALLER, DRAFT
from vllm_lab import valves
from vllm_lab.leases import Hold, Records, until
from vllm_lab.load import Answer, Ask, Crowd, prompt, run
from vllm_lab.server import VllmServer

from kvpilot.link.controls import Scope

if TYPE_CHECKING:
    from conftest import Hangar

TWO = replace(DRAFT, speculation="none", api_servers=2, arguments=())
CALLERS = ("batch/acme", "batch/globex", "interactive/acme", "interactive/globex")
BATCH = Scope("class_at_most", 0)
GLOBEX = Scope("tenant", "globex")


@pytest.fixture
def server(hangar: "Hangar") -> VllmServer:
    return hangar.server(TWO)


@pytest.fixture
def hold(server: VllmServer) -> Iterator[Hold]:
    with Hold(server.place) as hold:
        yield hold


def ask(server: VllmServer, each: int) -> dict[str, list[Answer]]:
    """`each` short requests of every caller; answers by caller."""
    asks = [Ask(prompt(20, n), 3, headers={CALLER: CALLERS[n % 4]}) for n in range(4 * each)]
    answers = run(server.url, asks, at_once=8)
    return {caller: [one for one in answers if one.ask.headers[CALLER] == caller] for caller in CALLERS}


def outcomes(answers: list[Answer]) -> Counter[str]:
    return Counter("ok" if one.ok else "shed" if one.shed else one.error for one in answers)


def until_both_shed(server: VllmServer, share: float) -> None:
    def both() -> bool:
        seen = valves.snapshots(server.place)
        return len(seen) == 2 and all(max(one.fractions.values()) == share for one in seen)

    until(both, 5, f"both valves shed {share:g}")


def test_both_processes_have_a_page_and_share_the_load(server: VllmServer) -> None:
    def both_admitted() -> bool:
        """Which process takes a connection is the kernel's to say."""
        answers = ask(server, 20)
        assert all(outcomes(each) == {"ok": 20} for each in answers.values())
        pages = valves.snapshots(server.place)
        assert len(pages) == 2
        return all(sum(row.admitted for row in page.rows) > 0 for page in pages)

    until(both_admitted, 60, "both processes admitted somebody")


def test_a_class_is_shed_by_both_and_the_one_above_is_not(server: VllmServer, hold: Hold) -> None:
    before = valves.rows(server.place)
    hold.set(BATCH, shed_fraction=1.0)
    until_both_shed(server, 1.0)
    answers = ask(server, 10)
    for caller in CALLERS:
        expected = "shed" if caller.startswith("batch") else "ok"
        assert outcomes(answers[caller]) == {expected: 10}, caller
    refused = answers["batch/acme"][0]
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    after = valves.rows(server.place)
    for tenant in ("acme", "globex"):
        assert counted(after, "batch", tenant, "shed") - counted(before, "batch", tenant, "shed") == 10
        assert counted(after, "interactive", tenant, "shed") == counted(before, "interactive", tenant, "shed")


def test_a_tenant_is_shed_whatever_its_class(server: VllmServer, hold: Hold) -> None:
    hold.set(GLOBEX, shed_fraction=1.0)
    # No class is shed as a whole, so no class's share says when both valves know.
    until(lambda: outcomes(ask(server, 2)["batch/globex"]) == {"shed": 2}, 5, "globex is shed")
    time.sleep(0.3)
    answers = ask(server, 10)
    for caller in CALLERS:
        assert outcomes(answers[caller]) == {"shed" if caller.endswith("globex") else "ok": 10}, caller


def test_a_fraction_is_met_and_streams_under_way_are_untouched(server: VllmServer, hold: Hold) -> None:
    long = [Ask(prompt(30, seed), 600, headers={CALLER: "batch/acme"}) for seed in range(4)]
    undisturbed = [answer.tokens for answer in run(server.url, long)]
    with Crowd(server.url, 4, lambda number: long[number % 4]) as crowd:
        until(lambda: server.metrics().value("vllm:num_requests_running") >= 4, 10, "streams under way")
        hold.set(BATCH, shed_fraction=0.5)
        until_both_shed(server, 0.5)
        answers = run(
            server.url,
            [Ask(prompt(9, n), 2, headers={CALLER: "batch/globex"}) for n in range(200)],
            at_once=6,
        )
    assert crowd.failures == []
    assert [one for one in crowd.answers if one.ok and one.tokens not in undisturbed] == []
    shed = outcomes(answers)["shed"]
    assert outcomes(answers) == {"shed": shed, "ok": 200 - shed}
    assert 80 <= shed <= 120


def test_a_withdrawn_lease_opens_both_at_once(server: VllmServer, hold: Hold) -> None:
    hold.set(BATCH, shed_fraction=1.0)
    until_both_shed(server, 1.0)
    hold.clear()
    until(lambda: valves.shedding(server.place) == 0, 2, "both valves open")
    assert all(outcomes(each) == {"ok": 3} for each in ask(server, 3).values())


def test_tags_reach_the_engine_as_tenant_and_class_rows(server: VllmServer) -> None:
    records = Records(server.place)
    assert records.manifest.classes == ("batch", "interactive")
    assert not any(name.startswith("tenant") for name in records.manifest.unsupported_signals)
    asks = [Ask(prompt(200, n), 400, headers={CALLER: CALLERS[n % 4]}) for n in range(12)]

    def held() -> dict[str, int]:
        return {row.name: row.kv_blocks for row in records.reader.tenants()}

    most: Counter[str] = Counter()
    with Crowd(server.url, 8, lambda number: asks[number % 12]) as crowd:
        until(
            lambda: all(held().get(name, 0) > 0 for name in ("acme", "globex")), 20, "blocks of both tenants"
        )
        for _ in range(50):
            most |= Counter(held())
            time.sleep(0.02)
    assert crowd.failures == []
    assert most["acme"] > 6 < most["globex"]
    until(lambda: set(held().values()) <= {0}, 10, "nothing held once all have finished")


def counted(rows: dict, class_name: str, tenant: str, name: str) -> int:
    return rows.get((class_name, tenant), {}).get(name, 0)
