"""The law by its properties: exact fractions, nobody above the class named, lapses that open, jitter in
bounds."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from valve_world import ALL, TTL_NS, Pilot

from kvpilot.clock import NS
from kvpilot.inside.valve_law import OPENING_NS, SHED_FRACTION, ValveLaw
from kvpilot.link.controls import CONTROLS_BYTES, Lease, Scope

fractions = st.floats(0.0, 1.0)
tenants = st.sampled_from(["", "acme", "globex", "initech"])


def shedding(*wishes: tuple[Scope, float], ttl_ns: int = TTL_NS, now_ns: int = NS) -> tuple[ValveLaw, Pilot]:
    """A law that has just seen these leases renewed at `now_ns`."""
    law, pilot = ValveLaw(random.Random(1)), Pilot()
    law.observe(pilot.write(*wishes, ttl_ns=ttl_ns), now_ns - 1)
    law.observe(pilot.write(*wishes, ttl_ns=ttl_ns), now_ns)
    return law, pilot


def shed_of(law: ValveLaw, count: int, level: int = 0, tenant: str = "acme", now_ns: int = NS) -> int:
    return sum(not law.admit(level, tenant, 100, now_ns).admitted for _ in range(count))


class TestFraction:
    @settings(max_examples=60, deadline=None)
    @given(fractions, st.lists(st.tuples(st.integers(0, 2), tenants), max_size=200))
    def test_exact_to_within_one_over_any_run_of_each_class_and_tenant(
        self, fraction: float, requests: list[tuple[int, str]]
    ) -> None:
        law, _ = shedding((ALL, fraction))
        history: dict[tuple[int, str], list[bool]] = {}
        for level, tenant in requests:
            decision = law.admit(level, tenant, 100, NS)
            history.setdefault((level, tenant), []).append(not decision.admitted)
        for shed in history.values():
            for start in range(len(shed)):
                total = 0
                for length, one in enumerate(shed[start:], 1):
                    total += one
                    assert abs(total - fraction * length) < 1 + 1e-6

    @settings(deadline=None)
    @given(st.lists(fractions, min_size=1, max_size=30), st.integers(1, 5))
    def test_a_moving_fraction_is_followed_exactly(self, path: list[float], each: int) -> None:
        law, pilot = shedding((ALL, 0.0))
        owed, shed = 0.0, 0
        for step, fraction in enumerate(path):
            now_ns = NS + step * NS // 10
            law.observe(pilot.write((ALL, fraction)), now_ns)
            shed += shed_of(law, each, now_ns=now_ns)
            owed += each * fraction
            assert abs(shed - owed) < 1 + 1e-6

    def test_no_drift_over_a_million_requests(self) -> None:
        law, _ = shedding((ALL, 0.1))
        assert shed_of(law, 1_000_000) == pytest.approx(100_000, abs=1)

    def test_one_request_each_of_many_tenants_is_shed_too(self) -> None:
        """Without spread first steps nobody would be: each accumulator would owe less than one."""
        law, _ = shedding((ALL, 0.3))
        shed = sum(shed_of(law, 1, tenant=f"t{i}") for i in range(1000))
        assert shed == pytest.approx(300, abs=10)

    def test_tenants_beyond_the_bound_are_still_shed_at_the_fraction(self) -> None:
        law, _ = shedding((ALL, 0.5))
        shed = sum(shed_of(law, 1, tenant=f"t{i}") for i in range(20_000))
        assert shed == pytest.approx(10_000, abs=10)
        assert len(law._fractions._owed) < 5000

    @pytest.mark.parametrize(("value", "shed"), [(0.0, 0), (1.0, 50), (7.0, 50), (-1.0, 0)])
    def test_none_and_all(self, value: float, shed: int) -> None:
        law, _ = shedding((ALL, value))
        assert shed_of(law, 50) == shed

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([0, 1, 100, 10**9])), max_size=40), fractions)
    def test_size_makes_no_difference(self, sizes: list[tuple[int]], fraction: float) -> None:
        law, _ = shedding((ALL, fraction))
        same, _ = shedding((ALL, fraction))
        for (size,) in sizes:
            assert law.admit(0, "", size, NS).admitted == same.admit(0, "", 5, NS).admitted


class TestScope:
    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 7), fractions), max_size=4),
        st.integers(0, 7),
        tenants,
        st.integers(1, 20),
    )
    def test_no_class_above_the_one_named_is_ever_shed(
        self, wishes: list[tuple[int, float]], level: int, tenant: str, count: int
    ) -> None:
        law, _ = shedding(*((Scope("class_at_most", highest), f) for highest, f in dict(wishes).items()))
        strongest = max([f for highest, f in dict(wishes).items() if highest >= level], default=0.0)
        assert law.fraction(level, tenant, NS) == strongest
        if not strongest:
            assert shed_of(law, count, level, tenant) == 0

    def test_a_tenant_alone(self) -> None:
        law, _ = shedding((Scope("tenant", "acme"), 1.0))
        assert shed_of(law, 5, level=3, tenant="acme") == 5
        assert shed_of(law, 5, level=0, tenant="globex") == 0

    def test_the_largest_fraction_that_fits_holds(self) -> None:
        law, _ = shedding((ALL, 0.2), (Scope("class_at_most", 0), 0.6), (Scope("tenant", "acme"), 0.4))
        assert law.fraction(0, "acme", NS) == 0.6
        assert law.fraction(1, "acme", NS) == 0.4
        assert law.fraction(1, "globex", NS) == 0.2

    def test_other_knobs_shed_nobody(self) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        for now_ns in (1, 2):
            law.observe(pilot.write((ALL, 1.0), knob="max_running"), now_ns)
        assert shed_of(law, 5) == 0


class TestLapse:
    @settings(deadline=None)
    @given(st.integers(NS // 10, 120 * NS), st.floats(0.01, 1.0), st.floats(0, 1.2))
    def test_opens_linearly_from_the_moment_of_lapse(self, ttl_ns: int, value: float, share: float) -> None:
        """Even if nobody looked in between, and never later than ttl + 10 s (ttl at most 60 s)."""
        law, _ = shedding((ALL, value), ttl_ns=ttl_ns)
        lapse_ns = NS + min(ttl_ns, 60 * NS)
        assert law.fraction(0, "", lapse_ns - 1) == value
        at_ns = lapse_ns + round(share * OPENING_NS)
        assert law.fraction(0, "", at_ns) == pytest.approx(value * max(1 - share, 0), abs=1e-6)
        assert shed_of(law, 20, now_ns=lapse_ns + OPENING_NS) == 0

    def test_looking_at_the_same_page_does_not_hold_it_shut(self) -> None:
        law, pilot = shedding((ALL, 1.0))
        for tenth in range(1, 60):
            law.observe(bytes(pilot.page), NS + tenth * NS // 10)
        assert law.fraction(0, "", NS + TTL_NS + 5 * NS) == pytest.approx(0.5)

    def test_what_a_first_look_finds_is_history(self) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        law.observe(pilot.write((ALL, 1.0)), NS)
        assert shed_of(law, 5) == 0

    def test_a_renewal_while_opening_shuts_again(self) -> None:
        law, pilot = shedding((ALL, 1.0))
        late_ns = NS + TTL_NS + 5 * NS
        law.observe(bytes(pilot.page), late_ns - 1)
        law.observe(pilot.write((ALL, 1.0)), late_ns)
        assert law.fraction(0, "", late_ns) == 1.0

    def test_a_withdrawn_lease_is_gone_at_once(self) -> None:
        law, pilot = shedding((ALL, 1.0))
        law.observe(pilot.write(), NS + NS // 10)
        assert law.fraction(0, "", NS + NS // 10) == 0.0

    def test_a_lease_that_is_listed_but_not_renewed_lapses_beside_one_that_is(self) -> None:
        law, pilot = shedding((Scope("tenant", "acme"), 1.0), (Scope("tenant", "globex"), 1.0))
        stale = Lease(SHED_FRACTION, Scope("tenant", "acme"), 1.0, TTL_NS, pilot.renewal, 17)
        for tenth in range(1, 71):
            fresh = Lease(SHED_FRACTION, Scope("tenant", "globex"), 1.0, TTL_NS, 100 + tenth, 17)
            law.observe(pilot.write_leases(stale, fresh), NS + tenth * NS // 10)
        assert law.fraction(0, "globex", 8 * NS) == 1.0
        assert law.fraction(0, "acme", 8 * NS) == pytest.approx(0.5)

    def test_a_restarted_pilots_first_table_does_not_throw_a_lapsed_lease_open(self) -> None:
        law, pilot = shedding((ALL, 1.0))
        law.observe(pilot.write(), NS + TTL_NS + 2 * NS)
        assert law.fraction(0, "", NS + TTL_NS + 2 * NS) == pytest.approx(0.8)

    def test_a_smaller_fraction_holds_at_once(self) -> None:
        law, pilot = shedding((ALL, 1.0))
        law.observe(pilot.write((ALL, 0.25)), NS + NS // 10)
        assert law.fraction(0, "", NS + NS // 10) == 0.25

    @pytest.mark.parametrize("page", [b"", b"x" * CONTROLS_BYTES, b"\0" * CONTROLS_BYTES])
    def test_an_unreadable_page_counts_as_a_lapse(self, page: bytes) -> None:
        law, pilot = shedding((ALL, 0.8), ttl_ns=30 * NS)
        for tenth in range(50):
            law.observe(page, 2 * NS + tenth * NS // 10)
        assert law.page_error
        assert law.fraction(0, "", 7 * NS) == pytest.approx(0.4)
        assert law.fraction(0, "", 12 * NS) == 0.0
        law.observe(bytes(pilot.page), 12 * NS)
        assert law.page_error is None
        assert law.fraction(0, "", 12 * NS) == 0.8  # readable again, and the lease has not run out

    @pytest.mark.parametrize("readable_s", [3, 4, 8, 11, 12, 40])
    def test_a_page_readable_again_after_the_term_does_not_shut_what_has_opened(
        self, readable_s: int
    ) -> None:
        """Unreadable from 2 s, run out at 3 s: it opens from 2 s on, whatever is read later."""
        law, pilot = shedding((ALL, 0.8))
        law.observe(b"", 2 * NS)
        law.observe(bytes(pilot.page), readable_s * NS)
        expected = 0.8 * max(1 - (readable_s - 2) / 10, 0)
        assert law.fraction(0, "", readable_s * NS) == pytest.approx(expected)

    @settings(deadline=None)
    @given(
        st.binary(max_size=200), st.integers(0, CONTROLS_BYTES), st.lists(st.integers(0, 10**12), max_size=5)
    )
    def test_no_page_can_raise(self, junk: bytes, at: int, times: list[int]) -> None:
        law, pilot = shedding((ALL, 0.5))
        page = bytes(pilot.page[:at]) + junk + bytes(pilot.page[at + len(junk) :])
        for now_ns in times:
            law.observe(page, now_ns)
            assert law.admit(0, "", 0, now_ns).status in (200, 429)


class TestRefusal:
    @settings(deadline=None)
    @given(st.integers(0, 2**32), st.floats(0, 10_000))
    def test_retry_after_is_jittered_by_half_within_1_to_60_s(self, seed: int, lasted_s: float) -> None:
        law = ValveLaw(random.Random(seed))
        pilot = Pilot()
        law.observe(pilot.write((ALL, 1.0)), 0)
        law.observe(pilot.write((ALL, 1.0)), 1)
        now_ns = 1
        while now_ns < lasted_s * NS:
            now_ns += 10 * NS if lasted_s > 100 else NS
            law.observe(bytes(pilot.page), now_ns - NS // 2)
            law.observe(pilot.write((ALL, 1.0), ttl_ns=60 * NS), now_ns)
        decision = law.admit(0, "", 0, now_ns)
        middle = min(9 * (1 + (now_ns - 1) / NS), 40.0)
        assert decision.status == 429
        assert 1.0 <= middle / 2 <= decision.retry_after_s <= middle * 1.5 <= 60.0

    def test_clients_do_not_return_together(self) -> None:
        law, _ = shedding((ALL, 1.0))
        waits = {law.admit(0, "", 0, NS).retry_after_s for _ in range(100)}
        assert len(waits) > 90
        assert max(waits) - min(waits) > 1.5

    def test_same_seed_same_answers(self) -> None:
        one, other = (shedding((ALL, 1.0))[0] for _ in range(2))
        assert [one.admit(0, "", 0, NS) for _ in range(5)] == [other.admit(0, "", 0, NS) for _ in range(5)]

    def test_the_reason_names_the_decision(self) -> None:
        law, _ = shedding((ALL, 1.0))
        assert "100% of such requests are being shed (decision 17)" in law.admit(0, "", 0, NS).reason

    def test_draining_is_503_without_any_lease(self) -> None:
        law = ValveLaw(random.Random(1))
        law.drain()
        decision = law.admit(7, "acme", 0, NS)
        assert (decision.admitted, decision.status) == (False, 503)
        assert 1 <= decision.retry_after_s <= 60
