"""The pilot: ten times a second, in one direction, observe -> forecast -> decide -> act -> verify -> publish.

`Pilot.tick` is the whole of it. Stages take plain values and return plain values; only observing, acting and
publishing touch the world. Nothing in a tick waits for a disk, a network or a person.

Invariants: every lease written is in the tick's outcome, or adopted and waiting for its rule, or what the
pilot itself measured of bytes per prompt token; what is in none of them is withdrawn in the same tick; a tick
that fails renews nothing, and the engine is back at baseline one ttl later. A start of the engine inherits
nothing from the one before: leases end with the start they were written for, and rules begin afresh. An
engine that stalls or is wedged is left as it is: rules see its signals age, and then missing.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from kvpilot.adapters.actuator import Actuator
from kvpilot.adapters.adoption import Adopted, hand_over, renewed
from kvpilot.adapters.engine import EngineAdapter, Sight
from kvpilot.adapters.gpu_signals import GpuSignals
from kvpilot.adapters.gpu_watch import GpuWatch
from kvpilot.adapters.offered import OfferedLoad
from kvpilot.adapters.prompt_bytes import PromptBytes
from kvpilot.adapters.valves import VALVE_KNOBS
from kvpilot.adapters.windows import Key, Reading, Windows
from kvpilot.alerts.device_watch import DeviceWatch
from kvpilot.alerts.watch import Change, EngineWatch, describe
from kvpilot.clock import NS, Clock
from kvpilot.config import Arm
from kvpilot.forecast import outlook
from kvpilot.forecast.forecaster import Forecaster
from kvpilot.forecast.outlook import Outlook
from kvpilot.journal.ledger import Ledger
from kvpilot.orders import Orders
from kvpilot.policy.context import Context, Slo
from kvpilot.policy.evaluate import Inputs, evaluate
from kvpilot.policy.expr import LOWEST
from kvpilot.policy.notice import Notice
from kvpilot.policy.rules import TOP_TENANT, PolicySet
from kvpilot.policy.state import State
from kvpilot.publish.board import Board, Tick
from kvpilot.recordings.recorder import Moment
from kvpilot.signals import Missing

TICK_NS = NS // 10

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Pilot:
    """One engine's pilot. `notify` must not wait."""

    clock: Clock
    engine: EngineAdapter
    actuator: Actuator
    orders: Orders
    ledger: Ledger
    board: Board
    slo: Slo
    arm: Arm
    notify: Callable[[Notice, int], None]
    take_over: Callable[[Sight], list[Adopted]]
    """Called once for each engine start: leases in force that this pilot goes on from."""
    alarm: Callable[[Change, int], None]
    """Called when an alarm of the engine fires or is over; must not wait."""
    policies: PolicySet = field(default_factory=lambda: PolicySet(()))
    watch: EngineWatch = field(default_factory=EngineWatch)
    gpus: GpuWatch | None = None
    """Looks at the engine's GPUs in a thread of its own; the tick takes its newest look."""
    gpu_signals: GpuSignals = field(default_factory=GpuSignals)
    devices: DeviceWatch = field(default_factory=DeviceWatch)
    record: Callable[[Moment], object] | None = None
    """Takes what a tick saw and did, for the rolling recording; must not wait."""
    _state: State = field(default_factory=State)
    _windows: Windows = field(default_factory=Windows)
    _forecaster: Forecaster = field(init=False)
    _prompt_bytes: PromptBytes = field(default_factory=PromptBytes)
    _adopted: list[Adopted] = field(default_factory=list)
    _offered: OfferedLoad = field(default_factory=OfferedLoad)
    _asks_for_top: bool = False
    _said: str | None = None
    _armed: bool | None = None

    def __post_init__(self) -> None:
        self._forecaster = Forecaster(self.slo)

    def use(self, policies: PolicySet) -> None:
        """Fly these policies from the next tick on; rules whose text is unchanged keep their state."""
        self.policies = policies
        self.ledger.use(policies, self.slo, self.clock.wall_ns())
        self._asks_for_top = any(
            action.scope == TOP_TENANT
            for policy in policies.policies
            for rule in policy.rules
            for action in rule.actions
        )
        self._windows.require(spec for policy in policies.policies for spec in policy.inputs.values())

    def tick(self) -> Tick:
        """See the module docstring."""
        now_ns, wall_ns = self.clock.monotonic_ns(), self.clock.wall_ns()
        # observe
        sight = self.engine.observe(now_ns, {*self._windows.wanted, *self.board.wanted(now_ns)})
        self._meet(sight, wall_ns)
        off = self.orders.off
        if sight.manifest is None:
            return self._publish(Tick(now_ns, wall_ns, sight, off=off), sight.readings)
        # forecast
        ahead = self._forecast(sight)
        readings = {
            **sight.readings,
            **_as_readings(ahead, sight.at_ns),
            **self._look_at_gpus(sight, wall_ns),
        }
        gone = sight.liveness == "dead" or sight.before is not None
        if gone:
            # For one tick at least: what rules hold is given up before they see the next start.
            self._windows.clear("restarted" if sight.before is not None else "too_old")
        else:
            self._windows.take(readings)
        inputs = self._inputs(now_ns)
        # What was seen above can only be an echo of earlier ticks: it is judged before this one writes.
        echoes = self.actuator.confirm(sight)
        # decide
        context = self._context(sight, ahead, off=gone or off is not None)
        self._adopted, state = hand_over(self._adopted, self._state, self.policies, inputs, context)
        outcome = evaluate(self.policies, state, inputs, context)
        self._state = outcome.state
        if context.off:
            self._adopted = []
        self._prompt_bytes.observe(sight)
        leases = self._prompt_bytes.leases(renewed(self._adopted, outcome.leases))
        # act
        numbers = self.ledger.record(outcome, sight.nonce, wall_ns, self._ages(now_ns))
        self.actuator.write(leases, numbers, sight.nonce, now_ns)
        self.ledger.count_changes(leases, context.knobs)
        # verify
        self.ledger.confirm(echoes)
        # publish
        for notice in outcome.notices:
            self.notify(notice, wall_ns)
        arming = None if context.armed else self._awaited(sight)
        tick = Tick(
            *(now_ns, wall_ns, sight, context.armed, arming, off, inputs, context, outcome, leases),
            bands=ahead.bands,
            decided=self.ledger.newest if outcome.decisions else None,
        )
        self._say_armed(context.armed, arming)
        return self._publish(tick, readings)

    def withdraw(self) -> None:
        """Leave the engine to itself: take every lease back, now."""
        tick = self.board.tick
        if tick is not None and tick.sight.manifest is not None:
            self.actuator.write((), {}, tick.sight.nonce, self.clock.monotonic_ns())

    def _ages(self, now_ns: int) -> Callable[[str, str], float | None]:
        """How old inputs are: asked for what is journalled only."""
        inputs = {policy.name: policy.inputs for policy in self.policies.policies}

        def age(policy: str, name: str) -> float | None:
            spec = inputs.get(policy, {}).get(name)
            return None if spec is None else self._windows.age_s(spec, now_ns)

        return age

    def _meet(self, sight: Sight, wall_ns: int) -> None:
        """Say once what is waited for, or who has come; another engine start means empty windows."""
        manifest = sight.manifest
        state = sight.waiting_for or f"engine {sight.nonce:016x} is {sight.liveness}"
        if manifest is not None and sight.restarted:
            self._forecaster.begin(manifest)
            if self.gpus is not None:
                self.gpus.follow(manifest.device, manifest.device_uuids)
            self.actuator.forget_engine()
            self._adopted = self.take_over(sight)
            if self._adopted:
                self.ledger.inherit(each.wish for each in self._adopted)
                self.actuator.inherit({each.target: each.number for each in self._adopted})
            model = (
                f"{manifest.engine} {manifest.engine_version}, {manifest.model}, {manifest.blocks} KV blocks"
            )
            if sight.before is not None:
                model += f", after {sight.before.nonce:016x} {describe(sight.before)}"
            state = f"engine {sight.nonce:016x} is {sight.liveness}"
            _log.info("%s: %s; %d leases adopted", state, model, len(self._adopted))
            self.ledger.event(
                "engine", f"{sight.nonce:016x} {model}, {len(self._adopted)} leases adopted", wall_ns
            )
            self._compare_classes(manifest.classes)
        elif state != self._said and (sight.waiting_for or sight.liveness in ("dead", "stalled", "wedged")):
            detail = f"{state}: it {describe(sight.ended)}" if sight.ended is not None else state
            _log.warning("waiting: %s", detail) if sight.waiting_for else _log.warning("%s", detail)
            self.ledger.event("engine", detail, wall_ns)
        self._said = state
        self._tell(self.watch.observe(sight), wall_ns)

    def _tell(self, changes: Iterable[Change], wall_ns: int) -> None:
        for change in changes:
            state = "fires" if change.firing else "is over"
            self.ledger.event("alert", f"{change.alarm.name} {state}: {change.alarm.summary}", wall_ns)
            self.alarm(change, wall_ns)

    def _look_at_gpus(self, sight: Sight, wall_ns: int) -> dict[Key, Reading | Missing]:
        """The newest look of the thread that reads NVML; without one the signals are missing."""
        look = self.gpus.latest if self.gpus is not None else None
        readings = self.gpu_signals.readings(look, sight)
        if look is not None:
            parts = self.gpu_signals.parts
            unexplained = parts.unexplained if parts is not None else None
            self._tell(self.devices.observe(sight.at_ns, look.sights, unexplained), wall_ns)
        return readings

    def _compare_classes(self, engines: tuple[str, ...]) -> None:
        """Levels in scopes mean the engine's classes: other names mean that promises go to nobody."""
        targets = self.slo.items()
        ours = tuple(name for name, each in targets if isinstance(each, Mapping) and name != LOWEST)
        if engines and engines != ours:
            _log.warning(
                "classes: kvpilot.yaml has %s, this engine has %s (lowest first): "
                "give both the same callers file, or rename the classes",
                ", ".join(ours),
                ", ".join(engines),
            )

    def _awaited(self, sight: Sight) -> str:
        """What `arm` still waits for."""
        finished = (sight.record.get("finished_total") if sight.record is not None else None) or 0
        left_s, left = self.arm.after - sight.age_s, self.arm.finished - finished
        waits = [f"in {left_s:.0f} s"] if left_s > 0 else []
        waits += [f"after {left:.0f} more finished requests"] if left > 0 else []
        return " and ".join(waits)

    def _say_armed(self, armed: bool, arming: str | None) -> None:
        """Once for each change: a pilot that does not act must say so."""
        if armed != self._armed:
            self._armed = armed
            _log.info("armed: rules act" if armed else f"arms {arming}; until then rules run shadowed")

    def _forecast(self, sight: Sight) -> Outlook:
        """What lies ahead; nothing is forecast for an engine that is silent with work on its hands."""
        assert sight.manifest is not None
        if sight.liveness in ("dead", "stalled"):
            return outlook.missing("too_old", sight.manifest.classes)
        counts = sight.valve.counts if sight.valve is not None else {}
        admitted = {name: count for (what, name), count in counts.items() if what == "admitted" and name}
        awaited = sight.valve.awaited if sight.valve is not None else None
        self._forecaster.observe(sight.at_ns, sight.records, sight.rows, admitted, awaited)
        return self._forecaster.look()

    def _inputs(self, now_ns: int) -> Inputs:
        return {
            (policy.name, name): self._windows.value(spec, now_ns)
            for policy in self.policies.policies
            for name, spec in policy.inputs.items()
        }

    def _context(self, sight: Sight, ahead: Outlook, off: bool) -> Context:
        assert sight.manifest is not None
        knobs = {knob.name: knob for knob in sight.manifest.knobs}
        if sight.valve is not None:
            knobs = VALVE_KNOBS | knobs
        knobs = {name: knob for name, knob in knobs.items() if self.actuator.moves(name)}
        finished = sight.record.get("finished_total") if sight.record is not None else None
        return Context(
            now_ns=sight.at_ns,
            knobs=knobs,
            values=self.actuator.values_in_force(sight),
            slo=self.slo,
            armed=sight.age_s >= self.arm.after and (finished or 0) >= self.arm.finished,
            off=off,
            overrides=self.orders.in_force(sight.at_ns),
            forecasts=ahead.forecasts,
            classes=sight.manifest.classes,
            top_tenant=self.engine.top_tenant() if self._asks_for_top else None,
            offered=self._offered.observe(sight),
            unconfirmed=self.actuator.unconfirmed.keys(),
        )

    def _publish(self, tick: Tick, readings: dict[Key, Reading | Missing]) -> Tick:
        began_ns = self.clock.monotonic_ns()
        self.board.hang(tick, readings)
        if self.record is not None:
            self.record(Moment(tick, self.engine.ended_requests(), self.engine.valve_rows()))
        self.board.publishing.observe((self.clock.monotonic_ns() - began_ns) / NS)
        return tick


def _as_readings(ahead: Outlook, at_ns: int) -> dict[Key, Reading | Missing]:
    """Forecasts, as signals like any other."""
    return {
        key: value if isinstance(value, Missing) else Reading(at_ns, value)
        for key, value in ahead.signals.items()
    }


async def fly(pilot: Pilot, clock: Clock, stopping: Callable[[], bool]) -> None:
    """Tick on monotonic deadlines until `stopping`, then withdraw. Missed ticks are counted, not replayed."""
    deadline_ns = clock.monotonic_ns()
    failed: str | None = None
    board = pilot.board
    while not stopping():
        began_ns = clock.monotonic_ns()
        board.lateness.observe((began_ns - deadline_ns) / NS)
        try:
            pilot.tick()
            failed = None
        except Exception as error:
            # A defect of ours must not end the pilot, and must not act: nothing was renewed in this tick.
            board.failures += 1
            if failed != str(error):
                _log.exception("a tick failed; leases are not renewed while this lasts")
            failed = str(error)
        ended_ns = clock.monotonic_ns()
        board.durations.observe((ended_ns - began_ns) / NS)
        deadline_ns += TICK_NS
        missed = max(0, ended_ns - deadline_ns) // TICK_NS
        board.missed += missed
        deadline_ns += missed * TICK_NS
        await clock.sleep_until(deadline_ns)
    pilot.withdraw()
