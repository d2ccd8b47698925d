"""bench/settings.yaml: what the project is judged on, fixed before anything was tuned to it.

Workloads in groups with shares, part of them held out; a static grid; the defaults of a real engine; promises
relative to the machine; a budget of compute. All mistakes of the file are said at once, each in one line with
its place.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvpilot.config_mistakes import problems_of
from kvpilot.policy.source import Source
from kvpilot.score import Slo
from kvpilot.simulate.plants.acceptance import Acceptance, ByDomain, Deepening, Drifting
from kvpilot.simulate.plants.named import Machine
from kvpilot.simulate.plants.pace import Pace
from kvpilot.workload.client import Patience
from kvpilot.workload.spec import Part, Workload

Group = Literal["easy", "stationary", "nonstationary", "kv_bound"]
GROUPS: tuple[Group, ...] = get_args(Group)
CLASSES = ("batch", "interactive")
"""Lowest first."""
MOST_POINTS = 24
MOST_REFINED = 8
Share = Annotated[float, Field(ge=0, le=1)]
Cap = Annotated[int, Field(ge=1)] | None


class SettingsError(ValueError):
    """The file is no settings; a line for each mistake."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MachineSpec(_Plain):
    """As `kvpilot.simulate.plants.named.Machine`; KV memory is what the largest step of any point leaves."""

    device: str
    model: str
    draft: str | None = None
    tp: int = Field(default=1, ge=1)
    chunk_tokens: int = Field(ge=1)
    max_running: int = Field(ge=1)
    noise: float = Field(ge=0, le=1)
    """Spread of the lognormal noise on every step."""

    @property
    def machine(self) -> Machine:
        return Machine(
            self.device,
            self.model,
            self.draft,
            self.tp,
            chunk_tokens=self.chunk_tokens,
            max_running=self.max_running,
        )


class RelativeSlo(_Plain):
    """In steps of a full batch (`Pace.step_s`), and in prompt tokens' time for each token of the prompt."""

    itl_steps: float = Field(gt=0)
    ttft_steps: float = Field(gt=0)
    ttft_prompts: float = Field(ge=0)

    def on(self, pace: Pace) -> Slo:
        """In seconds, on a machine of that pace."""
        return Slo(
            self.ttft_steps * pace.step_s,
            self.itl_steps * pace.step_s,
            self.ttft_prompts * pace.prompt_token_s,
        )


class Client(_Plain):
    """How clients of a class behave: seconds until they hang up, and how often they come back when shed."""

    answer_s: float = Field(gt=0)
    retries: Literal[0, 2] = 0

    @property
    def patience(self) -> Patience:
        return Patience(self.answer_s, self.retries)


class AcceptanceSpec(_Plain):
    """Probability that a draft stands: by domain, `deepening` for every place deeper, drifting over time."""

    by_domain: dict[str, Share] = {}
    otherwise: Share
    deepening: Share = 1.0
    drift: tuple[tuple[float, float], ...] = ()
    """(second, factor), straight lines between."""

    @field_validator("drift")
    @classmethod
    def _ascending(cls, drift: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        times = [at_s for at_s, _ in drift]
        if times != sorted(set(times)) or any(factor < 0 for _, factor in drift):
            raise ValueError("seconds must ascend and factors not be below 0")
        return drift

    @property
    def process(self) -> Acceptance:
        process: Acceptance = ByDomain(self.by_domain, self.otherwise)
        if self.deepening < 1:
            process = Deepening(process, self.deepening)
        return Drifting(process, self.drift) if self.drift else process


class Setting(_Plain):
    """Baselines of an engine: one point of the grid, the defaults, or what the pilot starts from.

    The step budget is never what limits, unless it is given: chunk, and room for every sequence with its
    drafts.
    """

    chunk: int = Field(ge=1)
    drafts: int = Field(ge=0, le=16)
    max_running: int = Field(ge=1)
    watermark: float = Field(ge=0.05, le=1)
    caps: dict[str, Cap] = {}
    """Most waiting, by class; whoever comes then is turned away. None, or left out: no cap."""
    step_tokens: int | None = Field(default=None, ge=1)
    in_order: bool = True
    """Whether the higher class is served first; if not, all as they come."""

    @field_validator("caps")
    @classmethod
    def _known(cls, caps: dict[str, Cap]) -> dict[str, Cap]:
        if unknown := sorted(caps.keys() - set(CLASSES)):
            raise ValueError(f"no class is called {', '.join(unknown)}; known are {', '.join(CLASSES)}")
        return caps

    @property
    def name(self) -> str:
        caps = "/".join(str(self.caps.get(each) or "-") for each in reversed(CLASSES))
        return f"c{self.chunk} k{self.drafts} r{self.max_running} w{self.watermark:g} q{caps}"

    @property
    def engine(self) -> dict[str, Any]:
        """By the names of `Deployment`."""
        budget = self.step_tokens or self.chunk + self.max_running * (1 + self.drafts)
        return {
            "step_token_budget": budget,
            "prefill_chunk_tokens": min(self.chunk, budget),
            "speculative_tokens": self.drafts,
            "max_running": self.max_running,
            "admission_watermark": self.watermark,
            "queue_caps": {name: cap for name, cap in self.caps.items() if cap is not None},
            "in_order": self.in_order,
        }


class Entry(_Plain):
    """One workload of the suite."""

    name: str = Field(pattern=r"^[\w.+-]+$")
    group: Group
    parts: tuple[Part, ...] = Field(min_length=1)
    held_out: bool = False
    kv_tokens: int | None = Field(default=None, ge=1024)
    """A pool of this many tokens in place of what the device holds."""
    acceptance: AcceptanceSpec | None = None
    clients: dict[str, Client] = {}
    """Of classes whose clients behave otherwise here."""

    @field_validator("clients")
    @classmethod
    def _known(cls, clients: dict[str, Client]) -> dict[str, Client]:
        if unknown := sorted(clients.keys() - set(CLASSES)):
            raise ValueError(f"no class is called {', '.join(unknown)}; known are {', '.join(CLASSES)}")
        return clients

    @property
    def workload(self) -> Workload:
        return Workload(name=self.name, parts=self.parts)


class Budget(_Plain):
    """What a full run may cost."""

    slice_s: float = Field(gt=0, le=600)
    hours_on_two_cores: float = Field(gt=0)
    seeds: int = Field(ge=1)
    """For every point of the grid."""
    seeds_of_best: int = Field(ge=1)
    best: int = Field(ge=1)
    """Points that are flown again with `seeds_of_best`, as the pilot is."""
    refined: tuple[str, ...] = Field(max_length=MOST_REFINED)
    """Workloads whose best point is refined by coordinate descent."""
    drain_s: float = Field(gt=0)


class Settings(_Plain):
    """The whole file."""

    version: Literal[1]
    machine: MachineSpec
    slos: dict[str, RelativeSlo]
    clients: dict[str, Client]
    acceptance: AcceptanceSpec
    """Where a workload has none of its own."""
    shares: dict[Group, Share]
    """Weight of each group in means over the suite."""
    defaults: Setting
    pilot: Setting
    grid: tuple[Setting, ...] = Field(min_length=1, max_length=MOST_POINTS)
    best_known: str | None = None
    """The point that is known as the best over many workloads, where one is: for reports, not for judging."""
    budget: Budget
    suite: tuple[Entry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for what, given in (("slos", self.slos), ("clients", self.clients)):
            if given.keys() != set(CLASSES):
                raise ValueError(f"{what}: needs {' and '.join(CLASSES)}, no others")
        if self.shares.keys() != set(GROUPS) or abs(sum(self.shares.values()) - 1) > 1e-9:
            raise ValueError(f"shares: of {', '.join(GROUPS)}, 1 together")
        names = [entry.name for entry in self.suite]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"suite: {', '.join(twice)} more than once")
        if unknown := set(self.budget.refined) - set(names):
            raise ValueError(f"budget.refined: no workload is called {', '.join(sorted(unknown))}")
        if len({point.name for point in self.grid}) < len(self.grid):
            raise ValueError("grid: a point more than once")
        if self.best_known is not None and self.best_known not in {point.name for point in self.grid}:
            raise ValueError(f"best_known: no point of the grid is called {self.best_known}")
        largest = max(self.grid, key=lambda point: point.chunk)
        if largest.chunk > self.machine.chunk_tokens:
            raise ValueError(f"grid: chunk {largest.chunk} is above machine.chunk_tokens")
        for entry in self.suite:
            if entry.workload.seconds > self.budget.slice_s:
                raise ValueError(f"suite: {entry.name} lasts longer than budget.slice_s")
        return self

    @cached_property
    def by_name(self) -> Mapping[str, Entry]:
        return {entry.name: entry for entry in self.suite}

    def present(self, traces: Path | None) -> tuple[list[Entry], dict[str, list[str]]]:
        """What can be flown with this directory of traces; and, by absent file, what cannot."""
        flown: list[Entry] = []
        absent: dict[str, list[str]] = {}
        for entry in self.suite:
            missing = [
                name for name in entry.workload.traces if traces is None or not (traces / name).exists()
            ]
            for name in missing:
                absent.setdefault(name, []).append(entry.name)
            if not missing:
                flown.append(entry)
        return flown, absent


def shipped() -> Path:
    """The settings that come with kvpilot: inside the installed package, or in the source tree."""
    packaged = Path(__file__).parent / "settings.yaml"
    return packaged if packaged.exists() else Path(__file__).parents[3] / "bench/settings.yaml"


def load(path: Path) -> Settings:
    """Raises SettingsError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; give settings such as bench/settings.yaml") from error
    source = Source(str(path), raw)
    if source.problems:
        raise SettingsError("\n".join(map(str, source.problems)))
    data = source.data()
    if not isinstance(data, dict):
        raise SettingsError(f"{path}:1:1: must be a mapping: version, machine, slos and so on")
    try:
        return Settings.model_validate(_tuples(data))
    except ValidationError as error:
        errors = error.errors()
        # What our own checks say names its place itself.
        ours = [source.at(each["loc"], str(each["ctx"]["error"])) for each in errors if _ours(each)]
        paths = [each["loc"] for each in errors]
        # A list counts an item that is wrong as none: that is not one more mistake.
        others = [
            each
            for each in errors
            if not _ours(each)
            and not (
                each["type"] == "too_short" and any(p[:-1][: len(each["loc"])] == each["loc"] for p in paths)
            )
        ]
        problems = problems_of(source, others, _known_keys)
        raise SettingsError("\n".join(map(str, [*ours, *problems]))) from None


def _ours(error: Mapping[str, Any]) -> bool:
    return bool(error["type"] == "value_error")


def _tuples(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _tuples(value) for key, value in data.items()}
    return tuple(map(_tuples, data)) if isinstance(data, list) else data


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    """The keys of the mapping at a path: a walk along the models' fields."""
    models: dict[str, type[BaseModel]] = {
        "machine": MachineSpec,
        "slos": RelativeSlo,
        "clients": Client,
        "acceptance": AcceptanceSpec,
        "defaults": Setting,
        "pilot": Setting,
        "grid": Setting,
        "budget": Budget,
        "suite": Entry,
        "parts": Part,
    }
    named = [part for part in path if isinstance(part, str)]
    model = next((models[name] for name in reversed(named) if name in models), Settings)
    return list(model.model_fields)
