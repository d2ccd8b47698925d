"""Pages over bytearrays, for tests: the link without files."""

from dataclasses import replace

from kvpilot.link.controls import CONTROLS_BYTES, ControlsWriter
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob
from kvpilot.link.page import Identity
from kvpilot.link.telemetry import TelemetryReader, TelemetryWriter, plan_page

NONCE = 0xFEED_0000_0000_0001
IDENTITY = Identity("engine-host", "0123456789ab", 1_700_000_000_000_000_000, 5)

KNOBS = (
    ManifestKnob("max_running", "requests", 1, 64, 32, 1, "step boundary"),
    ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 512, 16, "step boundary"),
    ManifestKnob("admission_watermark", "ratio", 0.5, 1.0, 0.95, 0.01, "step boundary"),
)


def manifest(*names: str, classes: tuple[str, ...] = ("batch", "interactive"), rank: int = 0) -> Manifest:
    """A small engine that provides the named step fields."""
    provided = names or ("time_ns", "duration_ns", "steps_total", "running")
    fields = tuple(STEP_FIELDS[name] for name in provided)
    return Manifest("test", "1", "tiny", 16, 64, 1024, 2048, "cpu", KNOBS, fields, classes=classes, rank=rank)


def read_at(buffer: bytearray):
    """`pread` over a buffer."""
    return lambda offset, size: bytes(buffer[offset : offset + size])


class Telemetry:
    """A page with its writer and its reader."""

    def __init__(self, *names: str, record_count: int = 16, tenant_columns: tuple[str, ...] = ()):
        self.manifest = replace(manifest(*names), tenant_columns=tenant_columns)
        self.sequence = 0
        self.plan = plan_page(self.manifest, record_count)
        self.buffer = bytearray(self.plan.page_bytes)
        self.writer = TelemetryWriter(
            self.buffer, self.manifest, nonce=NONCE, identity=IDENTITY, record_count=record_count
        )
        self.reader = self.new_reader()

    def new_reader(self) -> TelemetryReader:
        return TelemetryReader(read_at(self.buffer))

    def record_offset(self, sequence: int) -> int:
        slot = (sequence - 1) % self.plan.record_count
        return self.plan.ring + 64 + slot * self.plan.layout.size

    def write(self, count: int) -> None:
        """`count` records whose every field is the record's own sequence."""
        for _ in range(count):
            self.sequence += 1
            self.writer.write_step((self.sequence,) * len(self.manifest.fields))


class Controls:
    """A controls page with its writer."""

    def __init__(self) -> None:
        self.page = bytearray(CONTROLS_BYTES)
        self.writer = ControlsWriter(self.page, IDENTITY)
