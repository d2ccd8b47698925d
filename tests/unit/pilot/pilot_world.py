"""A pilot, an engine and a valve in one virtual world: real pages in memory, real hook, no files.

The engine here is a hook that a test steps by hand with whatever fields it likes.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvpilot.adapters.actuator import Actuator
from kvpilot.adapters.adoption import Adopted
from kvpilot.adapters.engine import EngineAdapter, Sight
from kvpilot.adapters.pages import Controls
from kvpilot.clock import NS, VirtualClock
from kvpilot.config import Arm
from kvpilot.inside.hook import StepHook, with_hook_fields
from kvpilot.inside.valve_law import ValveLaw
from kvpilot.journal.ledger import Ledger
from kvpilot.journal.records import Record
from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.page import HEADER_BYTES, Identity, PageHeader
from kvpilot.link.telemetry import TelemetryWriter, plan_page
from kvpilot.link.valve_layout import VALVE_PAGE_BYTES
from kvpilot.link.valve_writer import ValvePageWriter
from kvpilot.orders import Orders
from kvpilot.pilot import TICK_NS, Pilot
from kvpilot.policy.load import load_text
from kvpilot.policy.notice import Notice
from kvpilot.policy.rules import PolicySet
from kvpilot.publish.board import Board, Tick

IDENTITY = Identity("host", "", 0, 0)
CLASSES = ("batch", "interactive")
FIELDS = (
    *(
        "time_ns",
        "duration_ns",
        "steps_total",
        "running",
        "waiting",
        "waiting_prompt_tokens",
        "finished_total",
    ),
    *("kv_blocks_free", "kv_blocks_cached", "tail_waste_tokens", "preemptions_total", "drafted_tokens_total"),
    *("accepted_tokens_total", "device_free_bytes", "decode_tokens_total"),
)
KNOBS = (
    ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 512, 16, "per step"),
    ManifestKnob("speculative_tokens", "tokens", 0, 8, 4, 1, "per step"),
)


def manifest(fields: tuple[str, ...] = FIELDS, knobs: tuple[ManifestKnob, ...] = KNOBS) -> Manifest:
    return Manifest(
        engine="test",
        engine_version="1",
        model="tiny",
        block_size=16,
        blocks=100,
        bytes_per_block=1,
        max_model_len=2048,
        device="cpu",
        knobs=knobs,
        fields=tuple(STEP_FIELDS[name] for name in fields),
        classes=CLASSES,
        activation_bytes_per_token=1000,
    )


@dataclass
class MemoryPage:
    """A page in memory; `alive` is its writer's lock."""

    buffer: bytearray
    kind: str
    alive: bool = True

    @property
    def header(self) -> PageHeader:
        return PageHeader.unpack(self.buffer[:HEADER_BYTES], self.kind)  # type: ignore[arg-type]

    def read_at(self, offset: int, size: int) -> bytes:
        return bytes(self.buffer[offset : offset + size])

    def is_locked(self) -> bool:
        return self.alive

    def close(self) -> None:
        pass


@dataclass
class MemoryPages:
    """What lies in the world's link directories."""

    engines: list[MemoryPage] = field(default_factory=list)
    valve_pages: list[MemoryPage] = field(default_factory=list)
    rank_pages: list[MemoryPage] = field(default_factory=list)

    def telemetry(self) -> MemoryPage | None:
        return next((page for page in reversed(self.engines) if page.alive), None)

    def valves(self) -> list[MemoryPage]:
        return [page for page in self.valve_pages if page.alive]

    def other_ranks(self) -> list[MemoryPage]:
        return [page for page in self.rank_pages if page.alive]


class World:
    """See the module docstring."""

    def __init__(
        self,
        *policies: str,
        arm: Arm | None = None,
        adopted: list[Adopted] | None = None,
        slo: Mapping[str, float] | None = None,
        flies_valves: bool = True,
    ) -> None:
        self.clock = VirtualClock(start_ns=1000 * NS)
        self.pages = MemoryPages()
        self.engine_controls = bytearray(CONTROLS_BYTES)
        self.valve_controls = bytearray(CONTROLS_BYTES)
        self.rows: list[Record] = []
        self.notices: list[Notice] = []
        self.alarms: list[tuple[str, bool]] = []
        """Each that fired (True) or was over, in order."""
        self.values: dict[str, float] = {}
        self.hook: StepHook | None = None
        self.engine_clock_offset_ns = 777 * NS
        controls = Controls(
            ControlsWriter(self.engine_controls, IDENTITY),
            ControlsWriter(self.valve_controls, IDENTITY) if flies_valves else None,
        )
        self.pilot = Pilot(
            clock=self.clock,
            engine=EngineAdapter(self.pages, "memory"),
            actuator=Actuator(controls, renewal=7),
            orders=Orders(self.clock, self.rows.append),
            ledger=Ledger(self.rows.append),
            board=Board(CLASSES),
            slo=slo or {"itl": 0.05, "ttft": 1.0},
            arm=arm or Arm(after=0.0, finished=0),
            notify=lambda notice, wall_ns: self.notices.append(notice),
            take_over=lambda sight: list(adopted or []),
            alarm=lambda change, wall_ns: self.alarms.append((change.alarm.name, change.firing)),
        )
        self.use(*policies)

    def use(self, *policies: str) -> None:
        self.pilot.use(PolicySet(tuple(load_text(text) for text in policies)))

    def start_engine(self, described: Manifest | None = None) -> None:
        """A new start of the engine; an earlier one is dead from here on."""
        if self.pages.engines:
            self.pages.engines[-1].alive = False
        described = described or manifest()
        whole = with_hook_fields(described)
        page = MemoryPage(bytearray(plan_page(whole, 64).page_bytes), "telemetry")
        started = Identity("host", "", self.clock.wall_ns(), self.engine_now_ns)
        nonce = 1 + len(self.pages.engines)
        writer = TelemetryWriter(page.buffer, whole, nonce=nonce, identity=started, record_count=64)
        self.hook = StepHook(described, writer, lambda now_ns: memoryview(self.engine_controls))
        self.fields = [column.name for column in described.fields]
        self.values = dict.fromkeys(self.fields, 0.0)
        if "kv_blocks_free" in self.values:
            self.values["kv_blocks_free"] = described.blocks
        self.pages.engines.append(page)

    @property
    def engine_now_ns(self) -> int:
        """The engine's own monotonic clock: another than the pilot's."""
        return self.clock.monotonic_ns() + self.engine_clock_offset_ns

    def step(self, **fields: float) -> Mapping[str, float]:
        """One engine step that reports `fields`; others stay. Returns the knob values in force."""
        assert self.hook is not None
        in_force = self.hook.begin_step(self.engine_now_ns)
        self.values |= fields
        self.values["steps_total"] += 1
        self.values["time_ns"] = self.engine_now_ns
        types = {name: STEP_FIELDS[name].type for name in self.fields}
        ordered = (
            self.values[name] if types[name] == "f64" else int(self.values[name]) for name in self.fields
        )
        self.hook.end_step(tuple(ordered))
        return dict(in_force)

    def tick(self, **fields: float) -> Tick:
        """One engine step (with an engine), one pilot tick, then a tick's time."""
        if self.hook is not None and self.pages.engines[-1].alive:
            self.step(**fields)
        return self.only_tick()

    def only_tick(self) -> Tick:
        """A pilot tick while the engine says nothing."""
        tick = self.pilot.tick()
        self.clock.advance(TICK_NS / NS)
        return tick

    def ticks(self, seconds: float, **fields: float) -> Tick:
        """Ticks for `seconds`."""
        for _ in range(round(seconds * NS / TICK_NS) - 1):
            self.tick(**fields)
        return self.tick(**fields)

    def knob(self, name: str) -> float:
        """The value that the engine's next step has in force."""
        return self.step()[name]

    def sight(self) -> Sight:
        assert self.pilot.board.tick is not None
        return self.pilot.board.tick.sight

    def of(self, kind: type) -> list[Record]:
        """Journal rows of one kind."""
        return [row for row in self.rows if isinstance(row, kind)]


class MemoryValve:
    """A valve whose page is in the world; it obeys the world's valve controls when it looks."""

    def __init__(self, world: World, nonce: int = 1) -> None:
        self.page = MemoryPage(bytearray(VALVE_PAGE_BYTES), "valve")
        self.writer = ValvePageWriter(self.page.buffer, CLASSES, nonce=nonce, identity=IDENTITY)
        self._world = world
        self.law = ValveLaw(random.Random(nonce), world.clock.monotonic_ns())
        world.pages.valve_pages.append(self.page)
        self.look()

    def look(self) -> None:
        """Read the controls and echo what is obeyed."""
        now_ns, law, levels = self._world.clock.monotonic_ns(), self.law, range(len(CLASSES))
        law.observe(bytes(self._world.valve_controls), now_ns)
        self.writer.beat(
            now_ns,
            [law.fraction(level, "", now_ns) for level in levels],
            law.controls_sequence,
            [law.credits_left(level, "", now_ns) for level in levels],
            law.echoes(now_ns),
            law.bytes_per_token(now_ns),
        )


def policy(
    name: str = "guard",
    signal: str = "requests_waiting",
    agg: str = "last",
    when: str = "x > 10.0",
    do: str = "{knob: prefill_chunk_tokens, set: 64}",
    spec: str = "",
    rule: str = "",
    window: str = "",
) -> str:
    """A policy of one rule over one input, `x`."""
    return f"""
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {{name: {name}}}
spec:
  inputs:
    x: {{signal: {signal}, agg: {agg}, {window} maxAge: 2s}}
  {spec}
  rules:
    - name: act
      when: {when}
      {rule}
      do: [{do}]
"""
