"""Where legs are flown, as values that can be sent to a process: a workload of the suite, traces that
somebody asks for, a scenario.
"""

from dataclasses import dataclass
from pathlib import Path

from kvpilot.simulate.asked import Asked, of_scenario, of_traces
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.scenarios import Scenario
from kvpilot.simulate.staging import Stage, stage
from kvpilot.simulate.suite import Entry, Settings


@dataclass(frozen=True, slots=True)
class OfSuite:
    """One workload of the suite; `traces` is where the suite's own lie."""

    settings: Settings
    entry: Entry
    seed: int
    traces: Path | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    def stage(self) -> Stage:
        """Raises TraceAbsent, TraceError, and kvengine's ConfigError."""
        return stage(self.settings, self.entry, self.seed, self.traces)


@dataclass(frozen=True, slots=True)
class OfTraces:
    """As `kvpilot.simulate.asked.of_traces` takes them."""

    paths: tuple[Path, ...]
    machine: Machine
    policies: Path
    slice_: str | None
    seconds: float
    speed: float
    seed: int
    drafts: int = 0
    plant: Path | None = None

    @property
    def name(self) -> str:
        return "+".join(path.name for path in self.paths)

    def stage(self) -> Asked:
        """Raises TraceError, PlantError, kvengine's ConfigError."""
        return of_traces(
            *(self.paths, self.machine, self.policies, self.slice_, self.seconds),
            *(self.speed, self.seed, self.drafts, self.plant),
        )


@dataclass(frozen=True, slots=True)
class OfScenario:
    """As `kvpilot.simulate.asked.of_scenario` takes it."""

    scenario: Scenario
    machine: Machine
    policies: Path
    settings: Settings
    seed: int

    @property
    def name(self) -> str:
        return self.scenario.name

    def stage(self) -> Asked:
        """Raises kvengine's ConfigError."""
        return of_scenario(self.scenario, self.machine, self.policies, self.settings, self.seed)
