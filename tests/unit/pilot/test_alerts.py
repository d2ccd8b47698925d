"""Alerts: Alertmanager's version 4 body, three tries, bounded, in order, and never in the way of a tick."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import stamina

from kvpilot.alerts.body import Alert, fingerprint, webhook_body
from kvpilot.alerts.herald import Herald
from kvpilot.alerts.outbox import QUEUE_ALERTS, TRIES, Outbox
from kvpilot.policy.notice import Notice

WALL = 1_763_686_757_392 * 1_000_000


@pytest.fixture(autouse=True)
def no_backoff() -> Iterator[None]:
    """Retries happen at once, and as often as in production."""
    with stamina.set_testing(True, attempts=TRIES, cap=True):
        yield


class Receiver:
    """A webhook on the loopback; `answers`: the status of each request in turn, the last for ever."""

    def __init__(self, answers: list[int]) -> None:
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                outer.bodies.append(json.loads(raw))
                self.send_response(answers[min(len(outer.bodies), len(answers)) - 1])
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    @contextmanager
    def serving(self) -> Iterator["Receiver"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


def deliver(urls: dict[str, str], post: Callable[[Outbox], None]) -> Outbox:
    """Post, then let everything get out."""

    async def run() -> Outbox:
        outbox = Outbox(urls, "http://pilot")
        post(outbox)
        await outbox.close(within_s=20)
        return outbox

    return asyncio.run(run())


def notice(firing: bool, receiver: str = "oncall") -> Notice:
    return Notice("kv-shedder", "shed-lowest-class", receiver, "warning", "KV fills", firing)


def test_the_body_is_alertmanagers_version_4() -> None:
    alert = Alert({"alertname": "A", "engine": "e", "rule": 'quo"te'}, {"summary": "s"}, WALL)
    body = json.loads(webhook_body("oncall", alert, "http://pilot"))
    assert set(body) == {
        *("receiver", "status", "alerts", "groupLabels", "commonLabels", "commonAnnotations"),
        *("externalURL", "version", "groupKey", "truncatedAlerts"),
    }
    assert set(body["alerts"][0]) == {
        *("status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint")
    }
    assert (body["version"], body["status"], body["receiver"]) == ("4", "firing", "oncall")
    assert body["alerts"][0]["startsAt"] == "2025-11-21T00:59:17.392Z"
    assert body["alerts"][0]["endsAt"] == "0001-01-01T00:00:00Z"
    assert body["groupKey"] == '{}:{alertname="A", engine="e", rule="quo\\"te"}'


def test_resolved_differs_in_status_and_end_alone() -> None:
    firing = Alert({"alertname": "A"}, {}, WALL)
    resolved = Alert({"alertname": "A"}, {}, WALL, WALL + 5_000_000_000)
    one, two = (json.loads(webhook_body("r", alert, "u")) for alert in (firing, resolved))
    assert (two["status"], two["alerts"][0]["status"]) == ("resolved", "resolved")
    assert two["alerts"][0]["endsAt"] == "2025-11-21T00:59:22.392Z"
    two["status"] = two["alerts"][0]["status"] = "firing"
    two["alerts"][0]["endsAt"] = one["alerts"][0]["endsAt"]
    assert one == two


def test_the_fingerprint_is_of_the_labels_in_any_order() -> None:
    assert fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    assert fingerprint({"a": "1", "b": "2"}) != fingerprint({"a": "12", "b": ""})


def test_an_effect_that_did_not_come_is_an_alert_of_its_own_and_may_be_for_everybody() -> None:
    with Receiver([200]).serving() as one, Receiver([200]).serving() as other:

        def post(outbox: Outbox) -> None:
            herald = Herald(outbox, "engine")
            herald.notify(notice(firing=True, receiver="one"), WALL)
            herald.notify(Notice("p", "shed-lowest-class", "", "warning", "no effect", True, "effect"), WALL)
            herald.notify(Notice("p", "shed-lowest-class", "", "warning", "no effect", False, "effect"), WALL)

        deliver({"one": one.url, "other": other.url}, post)
        found = {
            name: [(body["alerts"][0]["labels"]["alertname"], body["status"]) for body in receiver.bodies]
            for name, receiver in (("one", one), ("other", other))
        }
    effect = [("KvpilotShedLowestClassNoEffect", "firing"), ("KvpilotShedLowestClassNoEffect", "resolved")]
    assert found == {"one": [("KvpilotShedLowestClass", "firing"), *effect], "other": effect}


def test_firing_arrives_before_resolved_and_both_are_one_alert() -> None:
    with Receiver([200]).serving() as receiver:

        def post(outbox: Outbox) -> None:
            herald = Herald(outbox, "lab")
            herald.notify(notice(True), WALL)
            herald.notify(notice(False), WALL + 10**9)

        outbox = deliver({"oncall": receiver.url}, post)
    assert [body["status"] for body in receiver.bodies] == ["firing", "resolved"]
    assert len({body["groupKey"] for body in receiver.bodies}) == 1
    assert receiver.bodies[0]["alerts"][0]["labels"] == {
        "alertname": "KvpilotShedLowestClass",
        "engine": "lab",
        "policy": "kv-shedder",
        "rule": "shed-lowest-class",
        "severity": "warning",
    }
    assert receiver.bodies[0]["alerts"][0]["startsAt"] == receiver.bodies[1]["alerts"][0]["startsAt"]
    assert outbox.outcomes == {("oncall", "delivered"): 2}


@pytest.mark.parametrize(
    ("answers", "requests", "outcome"),
    [
        ([500, 503, 200], 3, "delivered"),
        ([500], 3, "failed"),
        ([429, 200], 2, "delivered"),
        ([400], 1, "refused"),
        ([302], 1, "refused"),
    ],
)
def test_three_tries_and_only_where_trying_again_can_help(
    answers: list[int], requests: int, outcome: str
) -> None:
    with Receiver(answers).serving() as receiver:
        outbox = deliver(
            {"oncall": receiver.url}, lambda outbox: Herald(outbox, "lab").notify(notice(True), WALL)
        )
    assert len(receiver.bodies) == requests
    assert outbox.outcomes == {("oncall", outcome): 1}


def test_a_dead_receiver_does_not_hold_up_another_and_is_named_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Receiver([200]).serving() as receiver:

        def post(outbox: Outbox) -> None:
            for _ in range(3):
                outbox.post("dead", Alert({"alertname": "A"}))
                outbox.post("oncall", Alert({"alertname": "A"}))

        outbox = deliver({"oncall": receiver.url, "dead": "http://127.0.0.1:1/"}, post)
    assert outbox.outcomes == {("oncall", "delivered"): 3, ("dead", "failed"): 3}
    assert len([record for record in caplog.records if "alerts to dead" in record.getMessage()]) == 1


def test_the_outbox_is_bounded_and_keeps_the_newest() -> None:
    with Receiver([200]).serving() as receiver:

        def post(outbox: Outbox) -> None:
            for number in range(QUEUE_ALERTS + 10):
                outbox.post("oncall", Alert({"alertname": str(number)}))
            assert outbox.waiting == QUEUE_ALERTS

        outbox = deliver({"oncall": receiver.url}, post)
    assert outbox.outcomes["oncall", "dropped"] == 10
    assert receiver.bodies[-1]["alerts"][0]["labels"]["alertname"] == str(QUEUE_ALERTS + 9)


def test_a_receiver_that_is_not_configured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def post(outbox: Outbox) -> None:
        herald = Herald(outbox, "lab")
        for firing in (True, False, True):
            herald.notify(notice(firing, "nobody"), WALL)

    assert deliver({}, post).outcomes == {("nobody", "dropped"): 3}
    assert [record.getMessage() for record in caplog.records] == [
        "alerts to nobody: no receiver of this name in kvpilot.yaml; its alerts go nowhere"
    ]


def test_trouble_of_the_pilots_own_goes_to_everybody_and_resolves() -> None:
    with Receiver([200]).serving() as receiver:

        def post(outbox: Outbox) -> None:
            herald = Herald(outbox, "lab")
            herald.trouble("KvpilotPoliciesRejected", None, WALL)
            herald.trouble("KvpilotPoliciesRejected", "2 mistakes", WALL)
            herald.trouble("KvpilotPoliciesRejected", None, WALL)
            herald.notify(notice(True), WALL)
            herald.resolve_all(WALL)

        deliver({"oncall": receiver.url}, post)
    assert [body["status"] for body in receiver.bodies] == ["firing", "resolved"] * 2
