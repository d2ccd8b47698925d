"""The outbox: alerts on their way to receivers, bounded, in order for each receiver, and never waited for.

A receiver that is slow or gone holds up its own queue alone. Three tries, then the alert is given up and
counted: what must not be lost belongs in the journal, which has it already.

Invariant: a resolved alert is sent only after its firing one was (or was given up), because one receiver's
queue is worked off by one task in order.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvpilot.alerts.body import Alert, webhook_body

if TYPE_CHECKING:
    import httpx

TRIES = 3
QUEUE_ALERTS = 256
TIMEOUT_S = 10.0
RETRIED_STATUS = frozenset({408, 429, *range(500, 600)})

_log = logging.getLogger(__name__)


class Outbox:
    """Queues by receiver name, and one task for each that has had anything to send.

    The HTTP client and the retries are imported with the first alert: most pilots never send one.
    """

    def __init__(self, receivers: Mapping[str, str], external_url: str) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        """Deliveries by (receiver, outcome): delivered, refused, failed, dropped."""
        self._urls = dict(receivers)
        self._external_url = external_url
        self._queues: dict[str, asyncio.Queue[Alert]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._warned: set[str] = set()

    @property
    def receivers(self) -> tuple[str, ...]:
        return tuple(self._urls)

    @property
    def waiting(self) -> int:
        """Alerts not yet sent or given up."""
        return sum(queue.qsize() for queue in self._queues.values())

    def post(self, receiver: str, alert: Alert) -> None:
        """Queue `alert`; never waits. Must be called from the event loop's thread."""
        if receiver not in self._urls:
            self.outcomes[receiver, "dropped"] += 1
            self._warn_once(receiver, "no receiver of this name in kvpilot.yaml; its alerts go nowhere")
            return
        queue = self._queues.get(receiver)
        if queue is None:
            queue = self._queues[receiver] = asyncio.Queue(QUEUE_ALERTS)
            self._tasks.append(asyncio.create_task(self._work(receiver, queue), name=f"alerts to {receiver}"))
        if queue.full():
            # The newest state of things is worth more than the oldest.
            queue.get_nowait()
            queue.task_done()
            self.outcomes[receiver, "dropped"] += 1
            self._warn_once(receiver, f"{QUEUE_ALERTS} alerts are waiting; the oldest are dropped")
        queue.put_nowait(alert)

    async def close(self, within_s: float) -> None:
        """Give what is queued `within_s` to get out, then stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(queue.join() for queue in self._queues.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, receiver: str, queue: "asyncio.Queue[Alert]") -> None:
        import httpx

        async with httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as client:
            while True:
                alert = await queue.get()
                try:
                    await self._deliver(client, receiver, alert)
                except Exception as error:  # A defect here must not end the deliveries that follow.
                    self._gave_up(receiver, "failed", f"{type(error).__name__}: {error}")
                finally:
                    queue.task_done()

    async def _deliver(self, client: "httpx.AsyncClient", receiver: str, alert: Alert) -> None:
        import httpx
        import stamina

        body = webhook_body(receiver, alert, self._external_url)
        headers = {"Content-Type": "application/json", "User-Agent": "kvpilot"}
        status = 0
        try:
            async for attempt in stamina.retry_context(on=httpx.HTTPError, attempts=TRIES, timeout=None):
                with attempt:
                    answer = await client.post(self._urls[receiver], content=body, headers=headers)
                    status = answer.status_code
                    if status in RETRIED_STATUS:
                        answer.raise_for_status()
        except httpx.HTTPStatusError:
            self._gave_up(receiver, "failed", f"answered {status} {TRIES} times")
        except httpx.HTTPError as error:
            self._gave_up(receiver, "failed", str(error) or type(error).__name__)
        else:
            if 200 <= status < 300:
                self.outcomes[receiver, "delivered"] += 1
                self._warned.discard(receiver)
            else:
                self._gave_up(receiver, "refused", f"answered {status}")

    def _gave_up(self, receiver: str, outcome: str, why: str) -> None:
        self.outcomes[receiver, outcome] += 1
        self._warn_once(receiver, why)

    def _warn_once(self, receiver: str, why: str) -> None:
        """One line for each receiver until it works again."""
        if receiver not in self._warned:
            self._warned.add(receiver)
            _log.warning("alerts to %s: %s", receiver, why)
