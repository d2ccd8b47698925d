"""Engine starts that were recorded: pages as a hook leaves them, in virtual time."""

from pathlib import Path

from link_pages import IDENTITY, KNOBS, NONCE

from kvpilot.clock import NS
from kvpilot.incident.recording import Recording, recording
from kvpilot.inside.hook import with_hook_fields
from kvpilot.link.ending import Ending
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest
from kvpilot.link.telemetry import TelemetryWriter, plan_page

BLOCKS = 100
FIELDS = (
    "time_ns",
    "duration_ns",
    "steps_total",
    "prefill_tokens_total",
    "decode_tokens_total",
    "running",
    "waiting",
    "kv_blocks_free",
    "kv_blocks_cached",
    "preemptions_total",
    "failed_total",
    "oom_total",
    "device_free_bytes",
)
GIB = 1 << 30
MS = NS // 1000


def manifest(*without: str) -> Manifest:
    fields = tuple(STEP_FIELDS[name] for name in FIELDS if name not in without)
    return Manifest("test", "1", "tiny", 16, BLOCKS, 1024, 2048, "cpu", KNOBS, fields)


class Flown:
    """One start. `step` writes a record `ms` after the one before; what is not named stays as it was."""

    def __init__(self, *without: str, records: int = 16_384, nonce: int = NONCE) -> None:
        self.manifest = with_hook_fields(manifest(*without), host=True)
        self.buffer = bytearray(plan_page(self.manifest, records).page_bytes)
        self.writer = TelemetryWriter(
            self.buffer, self.manifest, nonce=nonce, identity=IDENTITY, record_count=records
        )
        self.now_ns = IDENTITY.start_monotonic_ns
        self.values: dict[str, float] = dict.fromkeys((f.name for f in self.manifest.fields), 0)
        self.values |= {"kv_blocks_free": 60, "kv_blocks_cached": 10, "device_free_bytes": 2 * GIB}
        self.values |= {"host_available_bytes": 8 * GIB, "running": 4, "knob.max_running": 32}
        self.values |= {"knob.prefill_chunk_tokens": 512, "knob.admission_watermark": 0.95}

    def step(self, ms: float = 10, count: int = 1, **changes: float) -> "Flown":
        """`count` steps; a change that is a counter (`..._total`) is added in every one of them."""
        for _ in range(count):
            self.now_ns += round(ms * MS)
            self.values |= {"time_ns": self.now_ns, "duration_ns": round(ms * MS)}
            self.values["steps_total"] += 1
            for name, value in changes.items():
                name = name.replace("knob_", "knob.")
                self.values[name] = self.values[name] + value if name.endswith("_total") else value
            self.writer.mark_boundary(self.now_ns - round(ms * MS))
            self.writer.write_step([self.values[field.name] for field in self.manifest.fields])
        return self

    def begin(self, ms: float = 1) -> "Flown":
        """A step boundary, and nothing after."""
        self.now_ns += round(ms * MS)
        self.writer.mark_boundary(self.now_ns)
        return self

    def end(self, kind: str = "closed", what: str = "") -> "Flown":
        self.writer.write_ending(Ending(kind, self.now_ns, self.wall_ns(), what))  # type: ignore[arg-type]
        return self

    def wall_ns(self) -> int:
        return IDENTITY.start_wall_ns + self.now_ns - IDENTITY.start_monotonic_ns

    def recording(self, alive: bool = False, copied: bool = False) -> Recording:
        return recording(bytes(self.buffer), Path("page.kvp"), alive=alive, copied=copied)

    def save(self, telemetry: Path, engine: str = "tiny", rank: int = 0) -> Path:
        """As a file that its engine left behind."""
        directory = telemetry / f"{engine}-{rank}"
        directory.mkdir(mode=0o750, exist_ok=True)
        path = directory / f"telemetry-{self.writer.nonce:016x}.kvp"
        path.write_bytes(self.buffer)
        path.chmod(0o640)
        return path
