"""kvpilot.yaml: which engine, whose promises, which policies, whom to tell, where to listen.

Every mistake in the file is reported at once, one line each with file, line and column. Relative paths are
relative to the file. Durations are seconds as a number, or `40ms`, `5s`, `2m`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvpilot.clock import NS
from kvpilot.config_mistakes import problems_of
from kvpilot.inside.callers import Callers, CallersError
from kvpilot.policy.context import Slo
from kvpilot.policy.quantity import parse_duration
from kvpilot.policy.source import Problem, Source

MOST_RANKS = 1_024

RESERVED_CLASS_NAMES = ("itl", "ttft", "lowest", "highest")
"""`slo.itl` and `slo.ttft` are the tightest over classes, `slo.lowest` is the lowest class: no class may take
these names."""


class ConfigError(Exception):
    """The configuration cannot be used; `str()` is one line for each mistake."""


def _seconds(value: object) -> float:
    if isinstance(value, tuple | dict):
        raise ValueError("should be a duration: write 250ms, 5s or 2m")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return parse_duration(value) / NS
    return float(value)


def _http(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url[:40]!r} is not an http:// or https:// address")
    return url


def _gpu_uuid(uuid: str) -> str:
    if not uuid.startswith(("GPU-", "MIG-")):
        raise ValueError(f"{uuid[:40]!r} is not a GPU's UUID: `nvidia-smi -L` lists them, GPU-... or MIG-...")
    return uuid


Seconds = Annotated[float, BeforeValidator(_seconds), Field(ge=0, le=86_400)]
Positive = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=86_400)]
File = Annotated[Path, BeforeValidator(lambda value: Path(value) if isinstance(value, str) else value)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class EngineLink(_Model):
    """Where the engine's pages are; KVPILOT_ENGINE, _TELEMETRY and _CONTROLS say what is not written here."""

    name: Name | None = None
    telemetry: File | None = None
    controls: File | None = None


class ClassSlo(_Model):
    """One class of requests and what it is promised. TTFT is a base plus a share for each prompt token."""

    name: Name
    ttft: Positive
    itl: Positive
    ttft_per_prompt_token: Seconds = 0.0


class Arm(_Model):
    """When rules may act on an engine that has just started: both must hold."""

    after: Seconds = 60.0
    finished: int = Field(default=20, ge=0)


class Receiver(_Model):
    """Whom `notify` reaches: a webhook that takes Alertmanager's version 4 body."""

    name: str = Field(min_length=1)
    url: Annotated[str, AfterValidator(_http)]


class Api(_Model):
    """Where the read-only HTTP answers. Port 0 takes any free one."""

    host: str = "127.0.0.1"
    port: int = Field(default=9477, ge=0, le=65_535)


class Gpu(_Model):
    """Which GPUs are the engine's, by UUID, where it does not say so itself and more than one is visible."""

    devices: tuple[Annotated[str, AfterValidator(_gpu_uuid)], ...] = Field(default=(), max_length=16)


class RecordingLimits(_Model):
    """The rolling recording for `kvpilot replay`: lengths, times and decisions, never text."""

    directory: File | None = None
    """Left out: beside the journal, under its name with `.recording`."""
    size_mb: float = Field(default=64.0, ge=0, le=65_536)
    """At most so much on disk; 0: nothing is recorded."""
    age: Positive = 86_400.0
    """What is older goes."""


class Otlp(_Model):
    """Where metrics and traces are sent to, over OTLP/HTTP. Without `endpoint` nothing is set up for it."""

    endpoint: Annotated[str, AfterValidator(_http)] | None = None
    """As in `http://collector:4318`; `/v1/metrics` and `/v1/traces` are added."""
    headers: dict[str, str] = {}
    """Without any, those of OTEL_EXPORTER_OTLP_HEADERS: secrets belong there."""
    interval: Positive = 15.0
    """Between two batches of metrics; spans go every second of it at most."""
    timeout: Positive = 10.0
    resource: dict[str, str] = {}
    """Further resource attributes, such as k8s.pod.name."""
    genai: bool = False
    """Also the GenAI semantic conventions' server metrics, whose names may still change."""


class Config(_Model):
    """The whole file."""

    engine: EngineLink = EngineLink()
    rank: int = Field(default=0, ge=0, lt=MOST_RANKS)
    """Which data-parallel rank of the engine this pilot flies: one pilot for each."""
    valve: bool | None = None
    """Whether this pilot flies the valves, which all ranks share. Left out: rank 0's does."""
    classes: tuple[ClassSlo, ...] = Field(min_length=1, max_length=8)
    policies: File | None = None
    shadow: bool = False
    """Rules only say what they would do: the pilot touches nothing, whatever `mode` policies have."""
    callers: File | None = None
    arm: Arm = Arm()
    receivers: tuple[Receiver, ...] = ()
    api: Api = Api()
    gpu: Gpu = Gpu()
    otlp: Otlp = Otlp()
    recording: RecordingLimits = RecordingLimits()
    journal: File | None = None
    socket: File | None = None

    @property
    def engine_name(self) -> str:
        return self.engine.name or ""

    @property
    def flies_valves(self) -> bool:
        return self.rank == 0 if self.valve is None else self.valve

    @property
    def slo(self) -> Slo:
        """What policies see as `slo`: seconds; tightest over classes, by class, and of the lowest class."""
        by_class = {each.name: {"itl": each.itl, "ttft": each.ttft} for each in self.classes}
        tightest = {key: min(each[key] for each in by_class.values()) for key in ("itl", "ttft")}
        return {**tightest, **by_class, "lowest": by_class[self.classes[0].name]}


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and check the file, and fill in what it leaves to the environment. Raises ConfigError."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}: name the configuration with --config, or write kvpilot.yaml here"
        ) from error
    if not raw.strip():
        raise ConfigError(f"{path}:1:1: empty: at least `classes` is needed")
    source = Source(str(path), raw)
    if source.problems:
        raise _errors(source.problems)
    data = source.data()
    if not isinstance(data, dict):
        raise _errors([source.at((), "must be a mapping that begins with `engine:`, `classes:` and so on")])
    try:
        config = Config.model_validate(_tuples(data))
    except ValidationError as error:
        raise _errors(problems_of(source, error.errors(), _known_keys)) from None
    config = _completed(config, path.parent, environ)
    problems = _check(config, source)
    if problems:
        raise _errors(problems)
    return config


def _completed(config: Config, base: Path, environ: Mapping[str, str]) -> Config:
    """Relative paths resolved, and defaults that depend on the environment."""
    engine = config.engine
    name = engine.name or environ.get("KVPILOT_ENGINE") or "engine"
    own = f"{name}-{config.rank}" if config.rank else name
    telemetry = engine.telemetry or _from_environment(environ, "KVPILOT_TELEMETRY")
    controls = engine.controls or _from_environment(environ, "KVPILOT_CONTROLS")
    runtime = Path(environ.get("XDG_RUNTIME_DIR") or f"/tmp/kvpilot-{os.getuid()}") / "kvpilot"
    journal = base / config.journal if config.journal else default_journal(name, config.rank, environ)
    recording = config.recording.directory
    directory = base / recording if recording else journal.with_suffix(".recording")
    return config.model_copy(
        update={
            "engine": EngineLink(
                name=name,
                telemetry=base / telemetry if telemetry else None,
                controls=base / controls if controls else None,
            ),
            "policies": base / config.policies if config.policies else None,
            "callers": base / config.callers if config.callers else None,
            "journal": journal,
            "recording": config.recording.model_copy(update={"directory": directory}),
            "socket": base / config.socket if config.socket else runtime / f"{own}.sock",
        }
    )


def default_journal(engine: str, rank: int, environ: Mapping[str, str]) -> Path:
    """Where the journal of a pilot lies that was told nothing else."""
    state = Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "kvpilot"
    return state / (f"{engine}-{rank}.sqlite" if rank else f"{engine}.sqlite")


def _from_environment(environ: Mapping[str, str], name: str) -> Path | None:
    return Path(environ[name]).absolute() if environ.get(name) else None


def _check(config: Config, source: Source) -> list[Problem]:
    """What no single field can know."""
    problems = []
    for key in ("telemetry", "controls"):
        if getattr(config.engine, key) is None:
            variable = f"KVPILOT_{key.upper()}"
            problems.append(
                source.at(
                    ("engine",), f"no `{key}` directory: write `engine: {{{key}: DIR}}` or set {variable}"
                )
            )
    problems += _duplicates(source, "classes", [each.name for each in config.classes])
    problems += _duplicates(source, "receivers", [each.name for each in config.receivers])
    for index, each in enumerate(config.classes):
        if each.name in RESERVED_CLASS_NAMES:
            problems.append(source.at(("classes", index, "name"), f"a class cannot be called '{each.name}'"))
    if config.policies is not None and not config.policies.is_dir():
        problems.append(source.at(("policies",), f"{config.policies} is not a directory"))
    problems += _check_callers(config, source)
    return problems


def _duplicates(source: Source, key: str, names: list[str]) -> list[Problem]:
    return [
        source.at((key, index, "name"), f"two {key} are called '{name}'")
        for index, name in enumerate(names)
        if name in names[:index]
    ]


def _check_callers(config: Config, source: Source) -> list[Problem]:
    """The valve classifies by the callers file: class names, lowest first, must be the same in both."""
    if config.callers is None:
        return []
    try:
        known = list(Callers.load(config.callers).classes)
    except CallersError as error:
        return [source.at(("callers",), str(error))]
    here = [each.name for each in config.classes]
    if here == known:
        return []
    return [
        source.at(
            ("classes",),
            f"classes, lowest first, are {', '.join(here)} here and {', '.join(known)} in {config.callers}",
        )
    ]


def _tuples(value: Any) -> Any:
    """Strict pydantic takes a tuple where the model says tuple; YAML has lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    models: dict[object, type[BaseModel]] = {
        "engine": EngineLink,
        "classes": ClassSlo,
        "arm": Arm,
        "receivers": Receiver,
        "api": Api,
        "gpu": Gpu,
        "otlp": Otlp,
        "recording": RecordingLimits,
    }
    model = models.get(path[0], Config) if path else Config
    return list(model.model_fields)


def _errors(problems: list[Problem]) -> ConfigError:
    ordered = sorted(problems, key=lambda problem: (problem.line, problem.column))
    return ConfigError("\n".join(str(problem) for problem in ordered))
