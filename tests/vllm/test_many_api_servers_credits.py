"""Credits on a real vLLM with two API servers: by class and tenant, shared, and never accepted twice.

The server is that of `test_many_api_servers`.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from flights import CALLER
from test_many_api_servers import BATCH, CALLERS, GLOBEX, TWO, ask, outcomes
from vllm_lab import valves
from vllm_lab.leases import Hold, until
from vllm_lab.load import Ask, Crowd, prompt
from vllm_lab.server import VllmServer

from kvpilot.link.controls import Scope
from kvpilot.link.valve_page import LeaseEcho

if TYPE_CHECKING:
    from conftest import Hangar

PROMPT_TOKENS = 40
BYTES_PER_TOKEN = 8.0
GRANT = 100.0
"""Prompt tokens each tenth of a second."""


@pytest.fixture
def server(hangar: "Hangar") -> VllmServer:
    return hangar.server(TWO)


@pytest.fixture
def hold(server: VllmServer) -> Iterator[Hold]:
    with Hold(server.place) as hold:
        yield hold


def echoes(server: VllmServer, scope: Scope) -> list[LeaseEcho]:
    """What each process says of its credits in `scope`."""
    return [
        lease
        for one in valves.snapshots(server.place)
        for lease in one.leases
        if (lease.knob, lease.scope) == ("admission_credits", scope)
    ]


def both_share(server: VllmServer, scope: Scope) -> None:
    until(lambda: len(echoes(server, scope)) == 2, 10, "both valves have the credits")
    until(lambda: sum(echo.share for echo in echoes(server, scope)) > 0.95, 10, "all of them are claimed")


def charged(server: VllmServer, class_name: str) -> tuple[int, int]:
    """(tokens charged, requests turned away for want of credits) of one class, in all processes."""
    rows = [row for one in valves.snapshots(server.place) for row in one.rows]
    mine = [row for row in rows if row.class_name == class_name]
    return sum(row.admitted_tokens for row in mine), sum(row.shed_by["credits"] for row in mine)


def test_what_both_accept_of_a_class_is_what_was_granted(server: VllmServer, hold: Hold) -> None:
    hold.set(Scope(), prompt_bytes_per_token=BYTES_PER_TOKEN)
    hold.set(BATCH, admission_credits=GRANT)
    both_share(server, BATCH)
    asks = [
        Ask(prompt(PROMPT_TOKENS, n), 2, headers={CALLER: "interactive/acme" if n % 4 == 0 else "batch/acme"})
        for n in range(64)
    ]
    before, renewal = charged(server, "batch"), hold._renewal
    with Crowd(server.url, 8, lambda number: asks[number % 64]) as crowd:
        time.sleep(5)
        shares = [echo.share for echo in echoes(server, BATCH)]
    after, renewals = charged(server, "batch"), hold._renewal - renewal + 1
    tokens, shed = after[0] - before[0], after[1] - before[1]
    largest = 1000 / BYTES_PER_TOKEN  # no body here has more bytes
    assert sum(shares) <= 1 + 1e-6
    assert tokens <= GRANT * renewals + 2 * largest
    assert tokens >= 0.6 * GRANT * renewals
    assert shed > 0
    assert crowd.failures == []
    refused = [one for one in crowd.answers if one.shed]
    assert len(refused) == shed
    assert all("no credits are left" in one.body for one in refused)
    assert all(one.ask.headers[CALLER].startswith("batch") for one in refused)


def test_a_tenant_without_credits_is_turned_away_whatever_its_class(server: VllmServer, hold: Hold) -> None:
    hold.set(GLOBEX, admission_credits=0.0)
    until(lambda: len(echoes(server, GLOBEX)) == 2, 10, "both valves have the credits")
    answers = ask(server, 10)
    for caller in CALLERS:
        assert outcomes(answers[caller]) == {"shed" if caller.endswith("globex") else "ok": 10}, caller


def test_credits_and_fractions_both_apply(server: VllmServer, hold: Hold) -> None:
    hold.set(BATCH, shed_fraction=1.0)
    hold.set(GLOBEX, admission_credits=0.0)
    until(lambda: len(echoes(server, GLOBEX)) == 2, 10, "both valves have the credits")
    before = {why: shed_by(server, why) for why in ("fraction", "credits")}
    answers = ask(server, 10)
    for caller in CALLERS:
        assert outcomes(answers[caller]) == {"ok" if caller == "interactive/acme" else "shed": 10}, caller
    assert shed_by(server, "fraction") - before["fraction"] == 20
    assert shed_by(server, "credits") - before["credits"] == 10


def test_withdrawn_credits_limit_nobody(server: VllmServer, hold: Hold) -> None:
    hold.set(Scope(), admission_credits=0.0)
    until(lambda: len(echoes(server, Scope())) == 2, 10, "both valves have the credits")
    hold.clear()
    until(lambda: not echoes(server, Scope()), 2, "both valves open")
    assert all(outcomes(each) == {"ok": 3} for each in ask(server, 3).values())


def shed_by(server: VllmServer, why: str) -> int:
    return sum(row.shed_by[why] for one in valves.snapshots(server.place) for row in one.rows)
