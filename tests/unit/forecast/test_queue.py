"""Service rate, queue wait, missed TTFTs and credits, on a queue whose truth is known."""

import math

import pytest
from forecast_queues import CLASSES, TICK_S, Arrived, PromptServer

from kvpilot.forecast.arrivals import Arrivals
from kvpilot.forecast.estimate import Estimate
from kvpilot.forecast.queue import QueueForecast, overtaking
from kvpilot.forecast.scores import Outcome, Verdict, judge
from kvpilot.forecast.service import ServiceRate
from kvpilot.signals import Missing


class Watched:
    """A server, and the estimators that see its counts."""

    def __init__(self, server: PromptServer) -> None:
        self.server = server
        self.service, self.arrivals = ServiceRate(), Arrivals()

    def tick(self) -> list[Arrived]:
        came = self.server.tick()
        server = self.server
        self.service.observe(server.at_s, server.served, server.waiting(), server.given_up)
        self.arrivals.observe(server.at_s, server.served, server.waiting(), server.rows(), server.admitted)
        return came

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.tick()

    def forecast(self) -> QueueForecast:
        return QueueForecast(
            self.service.tokens_per_s(),
            self.service,
            {row.name: float(row.waiting_prompt_tokens) for row in self.server.rows()},
            overtaking(self.arrivals, list(CLASSES)),
            {name: self.arrivals.request_tokens(name) or 250.0 for name in CLASSES},
        )


def waits(watched: Watched, seconds: float, klass: str, warm_s: float = 30.0) -> Verdict:
    """Forecasts for requests of a class when they came, beside what they then waited."""
    watched.run(warm_s)
    said: list[tuple[Estimate, Arrived]] = []
    for _ in range(round(seconds / TICK_S)):
        forecast = watched.forecast().wait(klass)
        came = [one for one in watched.tick() if one.klass == klass]
        if came and not isinstance(forecast, Missing) and forecast.p50 > 0.3:
            said.append((forecast, came[0]))
    outcomes = [Outcome(forecast, one.waited_s) for forecast, one in said if one.waited_s is not None]
    assert len(outcomes) > 50
    verdict = judge(outcomes)
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("noise", [0.15, 0.4])
def test_the_band_of_the_wait_covers_what_a_queue_of_one_class_waits(noise: float) -> None:
    server = PromptServer(noise=noise, share=0.0, load=0.85, bursts=1.6)
    verdict = waits(Watched(server), 600, "batch")
    assert verdict.inside > 0.7
    assert 0.3 < verdict.over_middle < 0.7


def test_the_band_learns_that_clients_give_up() -> None:
    """Far beyond capacity half of those ahead leave: the rate alone says twice the wait."""
    server = PromptServer(share=0.0, load=1.6, leave_after_s=6.0)
    watched = Watched(server)
    verdict = waits(watched, 300, "batch")
    assert watched.service.band.p50 < 0.9
    assert verdict.inside > 0.5


def test_a_lower_class_is_told_of_those_who_will_overtake_it() -> None:
    """Half of the service goes to later, higher requests: without that the wait would be halved."""
    server = PromptServer(load=0.85, share=0.5, bursts=1.6)
    watched = Watched(server)
    verdict = waits(watched, 600, "batch", warm_s=20)
    assert verdict.inside > 0.65
    assert 0.3 < verdict.over_middle < 0.7


def test_the_rate_is_measured_only_while_somebody_waits() -> None:
    """A server at a quarter of its capacity computes what comes: that is no rate of service."""
    idle = Watched(PromptServer(load=0.25, noise=0.0))
    idle.run(30)
    busy = Watched(PromptServer(load=1.3, noise=0.0))
    busy.run(30)
    rate = busy.service.tokens_per_s()
    assert rate == pytest.approx(8000, rel=0.05)
    naive = idle.server.served / idle.server.at_s
    assert naive < 0.4 * 8000
    seldom = idle.service.tokens_per_s()
    assert isinstance(seldom, Missing) or seldom > 0.6 * 8000


def test_the_rate_outlives_a_pause_and_a_bursts_first_tick_does_not_replace_it() -> None:
    watched = Watched(PromptServer(load=1.3, noise=0.0, pause=(20.0, 80.0)))
    watched.run(79.9)
    assert watched.server.waiting() == 0
    assert watched.service.tokens_per_s() == pytest.approx(8000, rel=0.05)
    age_s = watched.service.age_s(watched.server.at_s)
    assert age_s is not None
    assert age_s > 30
    watched.run(0.5)
    assert watched.service.tokens_per_s() == pytest.approx(8000, rel=0.25)


def test_before_the_first_backlog_nothing_is_known_but_that_an_empty_queue_is_no_wait() -> None:
    watched = Watched(PromptServer(load=0.01))
    watched.run(1)
    forecast = watched.forecast()
    assert forecast.wait("interactive") == (0.0, 0.0, 0.0)
    assert forecast.ttft_miss("interactive", 1.0) == Missing("no_samples")
    assert forecast.credits("batch", 1.0) == Missing("no_samples")


@pytest.mark.parametrize("ttft_s", [1.0, 3.0])
def test_the_chance_to_miss_is_the_share_that_then_misses(ttft_s: float) -> None:
    watched = Watched(PromptServer(noise=0.25, share=0.0, load=1.0, leave_after_s=6.0))
    watched.run(30)
    said: list[tuple[float, Arrived]] = []
    for _ in range(4000):
        chance = watched.forecast().ttft_miss("batch", ttft_s)
        said += [(chance, one) for one in watched.tick()[:1] if not isinstance(chance, Missing)]
    known = [(chance, one.first_token_s > ttft_s) for chance, one in said if one.first_token_s is not None]
    assert len(known) > 1000
    for low, high in ((0.0, 0.2), (0.8, 1.01)):
        group = [missed for chance, missed in known if low <= chance < high]
        if len(group) > 50:
            share = sum(group) / len(group)
            assert low - 0.12 <= share <= high + 0.12, (low, len(group))
    said_mean = sum(chance for chance, _ in known) / len(known)
    true_mean = sum(missed for _, missed in known) / len(known)
    assert said_mean == pytest.approx(true_mean, abs=0.1)


def test_credits_let_in_what_can_still_be_served_in_time() -> None:
    """Admission by credits alone: the queue settles where its wait is the target, and service stays full."""
    server = PromptServer(load=2.0, share=0.0, noise=0.1)
    watched, late, spent = Watched(server), [], []
    target_s = 2.0
    for number in range(600):
        credits = watched.forecast().credits("batch", 0.95 * target_s)
        before = server.served
        came = watched.tick()
        queue = server._queues["batch"]
        left = math.inf if isinstance(credits, Missing) else credits
        for one in came:
            if left <= 0 and one in queue:
                queue.remove(one)
            left -= one.tokens
        spent.append(server.served - before)
        if number > 100:
            late += [
                one for one in server.finished if one.first_token_s and one.first_token_s > 1.25 * target_s
            ]
            server.finished.clear()
    served = sum(spent[100:])
    assert served > 0.93 * 500 * 0.1 * server.rate
    assert len(late) < 0.08 * served / 250


def test_credits_of_a_class_leave_out_what_higher_ones_need() -> None:
    service = ServiceRate()
    for tick in range(40):
        service.observe(tick * 0.1, tick * 800.0, 5000.0)
    forecast = QueueForecast(8000.0, service, {"batch": 4000.0, "interactive": 1000.0}, {"batch": 3000.0}, {})
    middle = service.band.p50
    assert forecast.credits("interactive", 2.0) == pytest.approx(16000 / middle - 1000)
    assert forecast.credits("batch", 2.0) == pytest.approx(10000 / middle - 5000)
    assert forecast.credits("batch", 0.1) == 0.0
    assert forecast.credits("nobody", 2.0) == Missing("not_provided")
    flooded = QueueForecast(8000.0, service, {"batch": 10.0, "interactive": 0.0}, {"batch": 9000.0}, {})
    wait = flooded.wait("batch")
    assert isinstance(wait, Estimate)
    assert math.isinf(wait.p50)


def test_in_one_queue_credits_of_any_class_keep_the_tightest_promise() -> None:
    """What is let in of the lowest class is ahead of everybody who comes later."""
    service = ServiceRate()
    for tick in range(40):
        service.observe(tick * 0.1, tick * 800.0, 5000.0)
    waiting, promises = {"batch": 500.0, "interactive": 300.0}, {"batch": 8.0, "interactive": 2.0}
    forecast = QueueForecast(8000.0, service, waiting, promises=promises, by_class=False)
    middle = service.band.p50
    assert forecast.credits("batch", 0.5 * 8.0) == pytest.approx(8000.0 * 0.5 * 2.0 / middle - 800)
    assert forecast.credits("interactive", 2.0) == pytest.approx(8000.0 * 2.0 / middle - 800)


def test_the_wait_over_the_promise_is_nothing_while_nobody_waits_and_else_unknown_without_a_rate() -> None:
    service, rate = ServiceRate(), Missing("no_samples")
    promises = {"batch": 20.0, "interactive": 2.0}

    def ratio(rate: float | Missing, by_class: bool = True, **waiting: float) -> float | Missing:
        queue = QueueForecast(rate, service, waiting, promises=promises, by_class=by_class)
        return queue.pressing_wait_ratio()

    assert ratio(rate, batch=0.0, interactive=0.0) == 0.0
    assert ratio(rate, batch=0.0, interactive=9.0) == rate
    assert ratio(4000.0, batch=6000.0, interactive=2000.0) == 0.25
    assert ratio(4000.0, by_class=False, batch=6000.0, interactive=2000.0) == 1.0


def test_forecasts_that_were_off_move_the_band() -> None:
    """Half of what waits was served by somebody else's clock: every forecast turned out twice as long."""
    service, served, waiting = ServiceRate(), 0.0, 9000.0
    assert service.band == (0.6, 1.0, 1.7)
    for tick in range(400):
        pace = 8000.0 if (tick // 20) % 2 else 2000.0
        served += pace * 0.1
        service.observe(tick * 0.1, served, waiting)
    assert service.band != (0.6, 1.0, 1.7)
    assert service.band.p10 < 0.9
    assert service.band.p90 > 1.3
    assert service.chance_above(service.band.p90) == pytest.approx(0.1, abs=0.06)
    assert service.chance_above(0.0) == 1.0
