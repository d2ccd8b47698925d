"""A pilot process beside an engine that only steps: the real hook on real pages, stepped by a thread of the
test as fast as engines step.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pilot_process import PATIENCE_S, PilotProcess

from kvpilot.clock import SystemClock
from kvpilot.inside.hook import StepHook
from kvpilot.link.ending import Ending
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest, ManifestKnob

STEP_S = 0.005
FIELDS = (
    *("time_ns", "duration_ns", "steps_total", "running", "waiting", "finished_total"),
    *("kv_blocks_free", "kv_blocks_cached"),
)
POLICY = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: guard}
spec:
  inputs:
    waiting: {signal: requests_waiting}
  rules:
    - name: act
      when: waiting > 10.0
      until: waiting < 2.0
      lease: 5s
      do: [{knob: prefill_chunk_tokens, set: 64}]
      notify: {receiver: oncall, severity: warning, summary: too many wait}
"""


class Engine:
    """Steps in a thread; `fields` is what its steps report, `seen` each chunk that a step had in force."""

    def __init__(self, environ: Mapping[str, str], rank: int = 0, ranks: int = 1) -> None:
        self.frozen = threading.Event()
        """While it is set the engine lives and makes no step."""
        self.fields = dict.fromkeys(FIELDS, 0) | {"running": 1, "kv_blocks_free": 100}
        self.seen: list[float] = []
        manifest = Manifest(
            engine="test",
            engine_version="1",
            model="tiny",
            block_size=16,
            blocks=100,
            bytes_per_block=1,
            max_model_len=2048,
            device="cpu",
            knobs=(ManifestKnob("prefill_chunk_tokens", "tokens", 16, 2048, 512, 16, "per step"),),
            fields=tuple(STEP_FIELDS[name] for name in FIELDS),
            classes=("default",),
            rank=rank,
            world={"dp": ranks, "tp": 1, "pp": 1},
        )
        self._ending: Ending | None = None
        self._clock = SystemClock()
        self._stopping = threading.Event()
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(manifest, environ), daemon=True)
        self._thread.start()
        assert self._opened.wait(PATIENCE_S)

    def _run(self, manifest: Manifest, environ: Mapping[str, str]) -> None:
        hook = StepHook.open(manifest, environ)
        assert hook.enabled
        self._opened.set()
        while not self._stopping.wait(STEP_S):
            if self.frozen.is_set():
                continue
            now_ns = self._clock.monotonic_ns()
            self.seen.append(hook.begin_step(now_ns)["prefill_chunk_tokens"])
            self.fields["steps_total"] += 1
            self.fields["time_ns"] = now_ns
            hook.end_step(tuple(self.fields[name] for name in FIELDS))
        hook.close(self._ending)

    @property
    def chunk(self) -> float:
        return self.seen[-1] if self.seen else 512

    def stop(self, ending: Ending | None = None) -> None:
        self._ending = ending
        self._stopping.set()
        self._thread.join()


class Lab(PilotProcess):
    """Link directories, a policy, engines, and pilots beside them."""

    def __init__(self, folder: Path) -> None:
        environ = {
            "KVPILOT_TELEMETRY": str(folder / "t"),
            "KVPILOT_CONTROLS": str(folder / "c"),
            "KVPILOT_ENGINE": "lab",
        }
        for name in ("t", "c"):
            (folder / name).mkdir(mode=0o750)
        super().__init__(folder, environ)
        (self.policies / "guard.yaml").write_text(POLICY)
        self._engines: list[Engine] = []
        self._beside: list[PilotProcess] = []

    def engine(self, rank: int = 0, ranks: int = 1) -> Engine:
        self._engines.append(Engine(self.environ, rank, ranks))
        return self._engines[-1]

    def beside(self, **changes: Any) -> PilotProcess:
        """Another configuration for the same engine and policies; its pilots end with this lab."""
        folder = self.folder / f"beside-{len(self._beside)}"
        folder.mkdir()
        other = PilotProcess(folder, self.environ, self.policies)
        other.configure(**changes)
        self._beside.append(other)
        return other

    def close(self) -> None:
        for engine in self._engines:
            engine.stop()
        for other in self._beside:
            other.close()
        super().close()
