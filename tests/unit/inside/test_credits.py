"""Credits by their properties: what is accepted never exceeds what was granted by more than one request,
nobody waits for ever, nobody above the class named is touched, and a lapse opens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from valve_world import ALL, TTL_NS, Pilot, obeying, renewed

from kvpilot.clock import NS
from kvpilot.inside.credits import BODY_BYTES, MAX_TOKENS, Bucket, PromptSizes
from kvpilot.inside.valve_law import SHED_FRACTION, ValveLaw
from kvpilot.inside.valve_leases import ADMISSION_CREDITS, OPENING_NS, PROMPT_BYTES_PER_TOKEN
from kvpilot.link.controls import Scope

BATCH = Scope("class_at_most", 0)
ACME = Scope("tenant", "acme")
tokens = st.integers(1, 500)
grants = st.integers(0, 4000).map(lambda quarters: quarters / 4)


def ask(law: ValveLaw, size: int, now_ns: int = NS, level: int = 0, tenant: str = "") -> bool:
    """Whether a request of `size` prompt tokens is let in."""
    decision = law.admit(level, tenant, 4 * size, now_ns)
    assert decision.tokens == size
    return decision.admitted


class TestConservation:
    @settings(deadline=None)
    @given(st.lists(st.one_of(tokens, grants.map(lambda grant: ("grant", grant))), max_size=120))
    def test_between_two_renewals_and_over_all_of_them_at_most_one_request_too_much(
        self, events: list[int | tuple[str, float]]
    ) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        law.observe(pilot.grant((ALL, 0.0)), NS - 1)
        law.observe(pilot.grant((ALL, 0.0)), NS)
        now_ns, grant, here, granted, accepted, largest = NS, 0.0, 0, 0.0, 0, 0
        for event in events:
            if isinstance(event, tuple):
                now_ns += NS // 10
                grant, here = event[1], 0
                granted += grant
                law.observe(pilot.grant((ALL, grant)), now_ns)
            elif ask(law, event, now_ns):
                here, accepted, largest = here + event, accepted + event, max(largest, event)
                assert here - event < grant
                assert accepted - event < granted
        assert accepted < granted + largest or not accepted

    @settings(deadline=None)
    @given(st.lists(tokens, max_size=30), st.floats(1, 1000))
    def test_a_grant_is_used_while_anything_is_left(self, sizes: list[int], grant: float) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ALL, grant))
        left = grant
        for size in sizes:
            assert ask(law, size) == (left > 0)
            left -= size if left > 0 else 0

    @settings(deadline=None)
    @given(st.integers(101, 5_000), st.integers(30, 100))
    def test_a_request_larger_than_a_whole_grant_gets_its_turn_and_is_paid_for(
        self, size: int, grant: int
    ) -> None:
        pilot = Pilot()
        law = obeying(pilot, (ADMISSION_CREDITS, ALL, grant))
        now_ns, granted, accepted = NS, grant, 0
        for _ in range(200):
            while ask(law, size, now_ns):
                accepted += size
            now_ns += NS // 10
            law.observe(pilot.grant((ALL, grant)), now_ns)
            granted += grant
        # Debt is paid, and no more than debt: what was granted, to within one request.
        assert granted - grant <= accepted < granted - grant + size

    def test_what_is_left_over_is_not_kept(self) -> None:
        pilot = Pilot()
        law = obeying(pilot, (ADMISSION_CREDITS, ALL, 100.0))
        for tenth in range(1, 20):
            law.observe(pilot.grant((ALL, 100.0)), NS + tenth * NS // 10)
        now_ns = NS + 19 * NS // 10
        assert [ask(law, 60, now_ns) for _ in range(4)] == [True, True, False, False]

    def test_reading_one_renewal_often_is_one_grant(self) -> None:
        pilot = Pilot()
        law = obeying(pilot, (ADMISSION_CREDITS, ALL, 100.0))
        admitted = 0
        for millisecond in range(100):
            law.observe(bytes(pilot.page), NS + millisecond)
            admitted += ask(law, 50, NS + millisecond)
        assert admitted == 2

    def test_no_credits_at_all_lets_nobody_in(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ALL, 0.0))
        assert not ask(law, 1)

    @settings(deadline=None)
    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_a_senseless_grant_is_none(self, grant: float) -> None:
        bucket = Bucket()
        bucket.refill(grant)
        assert bucket.left == max(grant, 0.0)


class TestScope:
    @settings(deadline=None)
    @given(
        st.dictionaries(st.integers(0, 7), grants, max_size=4),
        st.lists(st.tuples(st.integers(0, 7), tokens), max_size=60),
    )
    def test_no_class_above_the_one_named_is_touched(
        self, wishes: dict[int, float], requests: list[tuple[int, int]]
    ) -> None:
        """Not even while everybody below is turned away; and it spends nothing of what those may have."""
        leases = [(ADMISSION_CREDITS, Scope("class_at_most", level), wishes[level]) for level in wishes]
        law, alone = obeying(Pilot(), *leases), obeying(Pilot(), *leases)
        top = max(wishes, default=-1)
        for level, size in requests:
            admitted = ask(law, size, level=level)
            if level > top:
                assert admitted
            else:
                assert admitted == ask(alone, size, level=level)

    def test_a_tenant_alone(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ACME, 0.0))
        assert not ask(law, 1, level=7, tenant="acme")
        assert ask(law, 1, level=0, tenant="globex")

    def test_tenant_and_class_both_apply_and_both_are_charged(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ACME, 100.0), (ADMISSION_CREDITS, BATCH, 250.0))
        assert ask(law, 100, tenant="acme")
        assert not ask(law, 1, tenant="acme")  # the tenant's are used up
        assert ask(law, 100, level=1, tenant="globex")  # neither
        assert ask(law, 150, tenant="globex")  # 100 + 150 of the class
        assert not ask(law, 1, tenant="globex")
        assert not ask(law, 1, level=1, tenant="acme")

    def test_one_that_is_refused_by_one_lease_costs_the_other_nothing(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ACME, 0.0), (ADMISSION_CREDITS, BATCH, 10.0))
        for _ in range(5):
            assert not ask(law, 10, tenant="acme")
        assert ask(law, 10, tenant="globex")


class TestBesideFractions:
    @settings(deadline=None)
    @given(st.floats(0, 1), st.integers(0, 40), st.integers(1, 60))
    def test_what_is_let_in_is_the_fewest_that_either_lets_in(
        self, fraction: float, credits: int, count: int
    ) -> None:
        law = obeying(Pilot(), (SHED_FRACTION, ALL, fraction), (ADMISSION_CREDITS, ALL, float(credits)))
        only = obeying(Pilot(), (SHED_FRACTION, ALL, fraction))
        by_fraction = sum(ask(only, 1) for _ in range(count))
        assert sum(ask(law, 1) for _ in range(count)) == min(by_fraction, credits)

    def test_each_form_names_itself(self) -> None:
        both = obeying(Pilot(), (SHED_FRACTION, BATCH, 1.0), (ADMISSION_CREDITS, ALL, 0.0))
        low, high = both.admit(0, "", 4, NS), both.admit(1, "", 4, NS)
        assert (low.why, high.why) == ("fraction", "credits")
        assert "no credits are left" in high.reason
        assert "decision 17" in high.reason
        both.drain()
        assert both.admit(1, "", 4, NS).why == "draining"


class TestOrders:
    """Only a person may be less protective: an order on a narrow scope outranks a policy on a wide one."""

    @pytest.mark.parametrize(
        ("knob", "loose", "tight"), [(SHED_FRACTION, 0.0, 1.0), (ADMISSION_CREDITS, 1e6, 0.0)]
    )
    def test_an_order_holds_where_it_matches_and_nowhere_else(
        self, knob: str, loose: float, tight: float
    ) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        for now_ns in (NS - 1, NS):
            law.observe(renewed(pilot, (knob, ALL, tight), (knob, ACME, loose), orders=[ACME]), now_ns)
        assert [ask(law, 50, tenant="acme") for _ in range(3)] == [True] * 3
        assert not ask(law, 50, tenant="globex")

    def test_among_orders_the_most_protective_holds(self) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        leases = [(SHED_FRACTION, ALL, 1.0), (SHED_FRACTION, BATCH, 0.5), (SHED_FRACTION, ACME, 0.25)]
        for now_ns in (NS - 1, NS):
            law.observe(renewed(pilot, *leases, orders=[BATCH, ACME]), now_ns)
        assert law.fraction(0, "acme", NS) == 0.5
        assert law.fraction(1, "acme", NS) == 0.25
        assert law.fraction(1, "globex", NS) == 1.0

    def test_an_order_on_one_knob_says_nothing_of_another(self) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        leases = [(SHED_FRACTION, ACME, 0.0), (ADMISSION_CREDITS, ALL, 0.0)]
        for now_ns in (NS - 1, NS):
            law.observe(renewed(pilot, *leases, orders=[ACME]), now_ns)
        assert law.admit(0, "acme", 4, NS).why == "credits"


class TestLapse:
    @settings(deadline=None)
    @given(st.floats(0, 1))
    def test_opens_linearly(self, opened: float) -> None:
        """Nothing is left at the moment of lapse: of those in scope, a falling share is turned away."""
        law = obeying(Pilot(), (ADMISSION_CREDITS, ALL, 50.0))
        assert ask(law, 50)
        assert not ask(law, 50, NS + TTL_NS - 1)
        now_ns = NS + TTL_NS + round(opened * OPENING_NS)
        admitted = sum(ask(law, 50, now_ns) for _ in range(100))
        assert admitted == pytest.approx(100 * opened, abs=1.01)

    def test_a_dead_pilots_last_grant_shuts_nobody_out_for_a_long_term(self) -> None:
        """However long the lease, it opens two seconds after its last renewal, and only once."""
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        for now_ns in (NS - 1, NS):
            law.observe(pilot.grant((ALL, 0.0), ttl_ns=60 * NS), now_ns)
        for tenths in range(10, 600):
            now_ns = NS + tenths * NS // 10
            law.observe(bytes(pilot.page), now_ns)
            opened = min(max(tenths / 10 - 2, 0) / 10, 1)
            assert law.echoes(now_ns)[0].opened == pytest.approx(opened)
        assert all(ask(law, 10**4, NS + 2 * NS + OPENING_NS) for _ in range(20))

    def test_what_is_left_at_the_lapse_may_be_used(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ALL, 100.0))
        assert [ask(law, 50, NS + TTL_NS) for _ in range(4)] == [True, True, False, False]

    def test_those_let_in_by_an_opening_are_nobodys_debt(self) -> None:
        pilot = Pilot()
        law = obeying(pilot, (ADMISSION_CREDITS, ALL, 50.0))
        late_ns = NS + TTL_NS + OPENING_NS * 9 // 10
        for _ in range(50):
            ask(law, 500, late_ns)
        law.observe(bytes(pilot.page), late_ns)
        law.observe(pilot.grant((ALL, 50.0)), late_ns + 1)
        # Only what the lease had let in: one request of 500.
        assert law.credits_left(0, "", late_ns + 1) == 50.0 - 450.0

    def test_after_the_opening_there_is_no_limit(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ALL, 0.0))
        assert all(ask(law, 10**4, NS + TTL_NS + OPENING_NS) for _ in range(20))

    def test_an_unreadable_page_counts_as_a_lapse(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, ALL, 0.0))
        law.observe(b"", NS + NS // 2)
        half_ns = NS + NS // 2 + OPENING_NS // 2
        assert sum(ask(law, 1, half_ns) for _ in range(100)) == pytest.approx(50, abs=1)

    def test_a_withdrawn_lease_is_gone_at_once(self) -> None:
        pilot = Pilot()
        law = obeying(pilot, (ADMISSION_CREDITS, ALL, 0.0))
        law.observe(pilot.grant(), NS + NS // 10)
        assert ask(law, 10**4, NS + NS // 10)

    def test_what_a_first_look_finds_is_history(self) -> None:
        law, pilot = ValveLaw(random.Random(1)), Pilot()
        law.observe(pilot.grant((ALL, 0.0)), NS)
        assert ask(law, 1)


class TestCharge:
    def test_by_the_bytes_per_token_that_the_pilot_measured(self) -> None:
        law = obeying(Pilot(), (PROMPT_BYTES_PER_TOKEN, ALL, 2.5), (ADMISSION_CREDITS, ALL, 10.0))
        assert law.admit(0, "", 1000, NS).tokens == 400
        assert law.bytes_per_token(NS + TTL_NS) == 4.0  # nobody renews it
        assert law.admit(0, "", 1000, NS + TTL_NS).tokens == 250

    @pytest.mark.parametrize("value", [0.0, -3.0])
    def test_a_senseless_measurement_is_not_believed(self, value: float) -> None:
        assert obeying(Pilot(), (PROMPT_BYTES_PER_TOKEN, ALL, value)).bytes_per_token(NS) == 4.0

    def test_a_body_of_unknown_length_counts_as_the_median(self) -> None:
        law = ValveLaw(random.Random(1))
        assert law.admit(0, "", None, NS).body_bytes == BODY_BYTES
        for length in (100, 9_000, 700, 10**9, 0):
            law.admit(0, "", length, NS)
        assert law.admit(0, "", None, NS).body_bytes == 700
        assert law.admit(0, "", None, NS).body_bytes == 700  # what was guessed is no measurement

    @settings(deadline=None)
    @given(st.integers(0, 2**62), st.floats(0.25, 1024))
    def test_no_request_is_free_and_none_costs_more_than_a_long_prompt(
        self, body_bytes: int, bytes_per_token: float
    ) -> None:
        charge = PromptSizes.tokens(body_bytes, bytes_per_token)
        assert 1 <= charge <= MAX_TOKENS
        if bytes_per_token < body_bytes < MAX_TOKENS * bytes_per_token:
            assert charge == pytest.approx(body_bytes / bytes_per_token, abs=1)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
    def test_the_median_is_of_late_and_bounded(self, lengths: list[int]) -> None:
        sizes = PromptSizes()
        for length in lengths:
            sizes.body_bytes(length)
        late = sorted(lengths[-101:])
        assert sizes.body_bytes(None) == late[len(late) // 2]


class TestRefusal:
    def test_retry_after_grows_while_it_goes_on_and_starts_anew_after_five_quiet_seconds(self) -> None:
        pilot = Pilot()
        law = obeying(pilot, (ADMISSION_CREDITS, ALL, 0.0))
        now_ns = NS
        for _ in range(400):
            now_ns += NS // 10
            law.observe(pilot.grant((ALL, 0.0)), now_ns)
            waits = [law.admit(0, "", 4, now_ns).retry_after_s for _ in range(20)]
        assert min(waits) >= 19.0

        def after_quiet(tenths: int) -> float:
            nonlocal now_ns
            for _ in range(tenths):
                now_ns += NS // 10
                law.observe(pilot.grant((ALL, 0.0)), now_ns)
            return law.admit(0, "", 4, now_ns).retry_after_s

        assert after_quiet(50) >= 19.0, "that some found credits for a while is no end of it"
        assert after_quiet(51) <= 13.5


class TestEcho:
    def test_what_is_left_and_what_is_in_force(self) -> None:
        law = obeying(Pilot(), (ADMISSION_CREDITS, BATCH, 100.0), (SHED_FRACTION, ACME, 0.5))
        ask(law, 130)
        echoes = {(echo.knob, echo.scope): echo for echo in law.echoes(NS)}
        credits, fraction = echoes[ADMISSION_CREDITS, BATCH], echoes[SHED_FRACTION, ACME]
        assert (credits.value, credits.left, credits.share, credits.opened) == (100.0, -30.0, 1.0, 0.0)
        assert (fraction.value, fraction.opened, fraction.decision_id) == (0.5, 0.0, 17)
        assert law.credits_left(0, "", NS) == -30.0
        assert law.credits_left(1, "", NS) != law.credits_left(1, "", NS)  # no limit is no number
        half_ns = NS + TTL_NS + OPENING_NS // 2
        assert [echo.opened for echo in law.echoes(half_ns)] == [0.5, 0.5]
        over_ns = NS + TTL_NS + OPENING_NS
        assert law.credits_left(0, "", over_ns) != law.credits_left(0, "", over_ns)
