"""One pilot process: put together, started in an order that fails early, stopped in one that lets go.

Nothing here decides. What can be wrong at start is found before anything is written to an engine, and is
raised as `StartError` with lines for people. At SIGTERM or SIGINT every lease is withdrawn first; the rest
has two seconds.
"""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Mapping
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from kvpilot.adapters.actuator import Actuator
from kvpilot.adapters.adoption import Adopted, adopt, left_in_force
from kvpilot.adapters.engine import EngineAdapter, Sight
from kvpilot.adapters.gpu_watch import GpuWatch
from kvpilot.adapters.other_ranks import OtherRanks
from kvpilot.adapters.pages import Controls, LinkFiles
from kvpilot.alerts.herald import Herald
from kvpilot.alerts.outbox import Outbox
from kvpilot.api.client import SocketError
from kvpilot.api.console.show import Show
from kvpilot.api.http import HttpError, build_app, build_server, listen
from kvpilot.api.operate import OperatingSocket
from kvpilot.clock import Clock
from kvpilot.config import Config
from kvpilot.flight import Flight
from kvpilot.journal.ledger import Ledger
from kvpilot.journal.records import Record
from kvpilot.journal.store import JournalError, JournalStore
from kvpilot.journal.writer import JournalWriter
from kvpilot.link.page import LinkError
from kvpilot.link.place import LinkPlace
from kvpilot.link.trust import trusted_uids
from kvpilot.orders import Orders
from kvpilot.pilot import Pilot, fly
from kvpilot.policy.load import PolicyErrors
from kvpilot.policy.rules import PolicySet
from kvpilot.policy_directory import PolicyDirectory, shipped
from kvpilot.publish.board import Board
from kvpilot.publish.collector import Collector
from kvpilot.publish.prometheus import MetricsPage
from kvpilot.recordings.configured import build_recorder

if TYPE_CHECKING:
    from kvpilot.publish.otlp import OtlpSender

RESCAN_S = 2
RETENTION_S = 600
CLOSE_WITHIN_S = 2.0
REJECTED = "KvpilotPoliciesRejected"

_log = logging.getLogger(__name__)


class StartError(Exception):
    """The pilot cannot start; `str()` is one line for each reason."""


class Service:
    """One process's pilot. Construction takes the controls, the journal and the HTTP address, or nothing."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        environ: Mapping[str, str] = os.environ,
        config_path: Path | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        assert config.engine.telemetry is not None, "load() has checked this"
        assert config.engine.controls is not None, "load() has checked this"
        name = config.engine_name
        directory = PolicyDirectory(
            config.policies or shipped(), [each.name for each in config.classes], clock
        )
        try:
            policies = directory.load()
            place = LinkPlace(config.engine.telemetry, config.engine.controls, name, trusted_uids(environ))
            # First: a second pilot must hear who flies already, not that its port is taken.
            self._controls = Controls.open(place, clock, config.rank, config.flies_valves)
            self._listening = self._listen(config)
            self._store = self._open_journal(config)
        except (PolicyErrors, LinkError, HttpError, JournalError) as error:
            raise StartError(str(error)) from error
        self._journal = JournalWriter(self._store)
        self._otlp = self._open_otlp(config)
        self._recorder = build_recorder(config)
        self._address = "{}:{}".format(*self._listening.getsockname()[:2])
        outbox = Outbox({each.name: each.url for each in config.receivers}, f"http://{self._address}")
        self._herald = Herald(outbox, name, config.rank)
        pilot = self._build_pilot(place, directory)
        # One pilot shows ranks that have none: the one that flies the valves.
        others = OtherRanks(place, config.rank, pilot.board.views) if config.flies_valves else None
        around = (config.rank, others, place, config_path)
        self.flight = Flight(name, pilot, directory, outbox, self._journal, *around)
        self._show = Show(self.flight, clock)
        self._socket = OperatingSocket(self.flight, self._path_of_socket())
        more = () if self._otlp is None else (self._otlp.add_to,)
        self._page = MetricsPage(self.flight, Collector(self.flight, more, traced=self._otlp is not None))
        self._stopping = False
        self._use(policies)
        self._say_orders()

    def _listen(self, config: Config) -> socket.socket:
        try:
            return listen(config.api.host, config.api.port)
        except HttpError:
            self._controls.close()
            raise

    def _open_journal(self, config: Config) -> JournalStore:
        assert config.journal is not None, "load() has filled this in"
        try:
            return JournalStore(config.journal)
        except JournalError:
            self._controls.close()
            raise

    def _open_otlp(self, config: Config) -> "OtlpSender | None":
        """Nothing at all unless an endpoint is configured."""
        if config.otlp.endpoint is None:
            return None
        try:
            from kvpilot.publish.otlp import OtlpSender
        except ImportError:
            self._controls.close()
            self._listening.close()
            self._store.close()
            raise StartError("otlp: the exporter is not installed: pip install 'kvpilot[otlp]'") from None
        return OtlpSender(config.otlp, config.engine_name, config.rank, self._clock)

    def _record(self, row: Record) -> None:
        """Decisions and what comes of them: to the journal and, where there is an endpoint, to traces."""
        self._journal.add(row)
        if self._otlp is not None:
            self._otlp.add(row)

    def _path_of_socket(self) -> Path:
        assert self._config.socket is not None, "load() has filled this in"
        return self._config.socket

    def _build_pilot(self, place: LinkPlace, directory: PolicyDirectory) -> Pilot:
        config, clock = self._config, self._clock
        store, wall_ns = self._store, clock.wall_ns()
        return Pilot(
            clock=clock,
            engine=EngineAdapter(LinkFiles(place, config.rank), str(place.telemetry_directory(config.rank))),
            # Beyond whatever an earlier pilot counted to, so that the first table is news to every reader.
            actuator=Actuator(self._controls, renewal=wall_ns // 1_000),
            orders=Orders(
                clock,
                self._journal.add,
                directory.off_file,
                store.overrides_in_force(wall_ns),
                store.switch(),
                config.shadow,
            ),
            ledger=Ledger(self._record, store.last_number()),
            board=Board(tuple(each.name for each in config.classes)),
            slo=config.slo,
            arm=config.arm,
            notify=self._herald.notify,
            take_over=self._take_over,
            alarm=self._herald.change,
            gpus=GpuWatch(clock, config.gpu.devices),
            record=self._recorder.take if self._recorder is not None else None,
        )

    def _take_over(self, sight: Sight) -> list[Adopted]:
        leases = left_in_force(self._controls, sight)
        # A pilot meets engines that start later too; what was left was left to the first.
        self._controls.engine_left = self._controls.valve_left = None
        if not leases:
            return []
        policies = self.flight.pilot.policies
        return adopt(leases, self._store.decision, policies, sight.nonce, sight.at_ns)

    def _use(self, policies: PolicySet) -> None:
        self._herald.policies = policies
        self.flight.pilot.use(policies)
        names = ", ".join(f"{each.name} ({each.mode})" for each in policies.policies)
        self.flight.pilot.ledger.event("policies", names, self._clock.wall_ns())
        _log.info("policies: %s", names)

    def _say_orders(self) -> None:
        """Orders survive a restart: whoever starts a pilot must hear of them."""
        orders = self.flight.pilot.orders
        for order in orders.in_force(self._clock.monotonic_ns()):
            _log.warning("override in force: %s = %g: %s (%s)", order.knob, order.value, order.why, order.who)
        if self._config.shadow:
            _log.warning("shadow: rules only say what they would do, and nothing is moved")
        elif orders.off is not None:
            _log.warning("off: %s (%s); `kvpilot on` lets policies act", orders.off.why, orders.off.who)

    async def run(self) -> None:
        """Fly until told to stop, or until the terminal is closed. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop)
        try:
            await self._socket.open()
        except SocketError as error:
            self._release()
            raise StartError(str(error)) from error
        self._journal.start()
        if self._recorder is not None:
            self._recorder.start()
        gpus, others = self.flight.pilot.gpus, self.flight.others
        if gpus is not None:
            gpus.start()
        if self._otlp is not None:
            self._otlp.start()
        server = build_server(build_app(self.flight, self._clock, self._page, self._show))
        serving = asyncio.create_task(server.serve(sockets=[self._listening]))
        showing = asyncio.create_task(self._show.run())
        scheduler = self._schedule()
        rank = f" rank {self._config.rank}" if self._config.rank else ""
        valves = "" if self._config.flies_valves else "; valves are another pilot's"
        _log.info("flying %s%s; http://%s%s", self.flight.engine_name, rank, self._address, valves)
        # Everything imported so far stays: a full collection over it would cost a tick its deadline.
        gc.collect()
        gc.freeze()
        try:
            await fly(self.flight.pilot, self._clock, lambda: self._stopping)
        finally:
            _log.info("landing: all leases withdrawn")
            scheduler.shutdown(wait=False)
            await self._socket.close()
            showing.cancel()
            self._show.close()
            server.should_exit = True
            self._herald.resolve_all(self._clock.wall_ns())
            await self.flight.outbox.close(CLOSE_WITHIN_S)
            await serving
            if gpus is not None:
                gpus.close()
            if others is not None:
                others.close()
            self._release()

    def stop(self) -> None:
        """Land at the next tick."""
        self._stopping = True

    def _release(self) -> None:
        if self._otlp is not None:
            self._otlp.close(CLOSE_WITHIN_S)
        self._journal.close(CLOSE_WITHIN_S)
        if self._recorder is not None:
            self._recorder.close(CLOSE_WITHIN_S)
        self.flight.pilot.engine.close()
        self._controls.close()
        self._listening.close()

    def _schedule(self) -> AsyncIOScheduler:
        """Slow jobs. This scheduler reads the wall clock, so nothing in it may act on an engine."""
        rules = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        scheduler = AsyncIOScheduler(timezone=UTC, job_defaults=rules)
        scheduler.add_job(self.rescan, "interval", seconds=RESCAN_S, id="policy rescan")
        if self._otlp is not None:
            seconds = self._config.otlp.interval
            scheduler.add_job(self._offer_metrics, "interval", seconds=seconds, id="otlp metrics")
        scheduler.add_job(self._journal.prune, "interval", seconds=RETENTION_S, id="journal retention")
        scheduler.start()
        return scheduler

    async def _offer_metrics(self) -> None:
        """What the metrics page shows now, for the thread that sends it."""
        if self._otlp is not None:
            from kvpilot.publish.otlp import Batch

            _, tick, collected = await self._page.gathered()
            self._otlp.offer(Batch.of(collected, tick, self._clock.wall_ns()))

    async def rescan(self) -> None:
        """Take a changed policy directory whole, or not at all."""
        wall_ns = self._clock.wall_ns()
        try:
            # In a thread: compiling expressions takes longer than a tick may be late.
            policies = await asyncio.to_thread(self.flight.directory.load_if_changed)
        except PolicyErrors as errors:
            for problem in errors.problems:
                _log.warning("policies rejected: %s", problem)
            summary = f"{len(errors.problems)} mistakes, the first: {errors.problems[0]}"
            self.flight.pilot.ledger.event("policies rejected", summary, wall_ns)
            self._herald.trouble(REJECTED, summary, wall_ns)
            return
        if policies is not None:
            self._use(policies)
            self._herald.trouble(REJECTED, None, wall_ns)
