"""The only door from files to policies: all errors of all files at once, or one right set."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from kvpilot.policy.build import Builder, direction
from kvpilot.policy.cases import Case, build_cases
from kvpilot.policy.rules import Action, Policy, PolicySet, Rule
from kvpilot.policy.schema import NOT_YET, PolicyFile, TestFile, key_owners
from kvpilot.policy.source import Path as DataPath
from kvpilot.policy.source import Problem, Source

SUFFIXES = (".yaml", ".yml")
_TEST_SUFFIXES = tuple(f".test{suffix}" for suffix in SUFFIXES)


class PolicyErrors(Exception):
    """At least one file is wrong; each problem prints as `path:line:col: message`."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(set(problems)))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True, slots=True)
class Loaded:
    """One policy with the tests that its file, or the test file beside it, gives it."""

    policy: Policy
    cases: tuple[Case, ...]


def load_policies(paths: Iterable[str | Path], classes: Sequence[str] | None = None) -> PolicySet:
    """The policies of these files and directories. `classes`: the configured class names, lowest first.

    Raises PolicyErrors.
    """
    return PolicySet(tuple(loaded.policy for loaded in load_with_tests(paths, classes)))


def load_with_tests(paths: Iterable[str | Path], classes: Sequence[str] | None = None) -> list[Loaded]:
    """As `load_policies`, with each policy's tests. Ordered by policy name. Raises PolicyErrors."""
    problems: list[Problem] = []
    loaded: list[tuple[Loaded, Source]] = []
    for path in _files(paths, problems):
        raw = _read(path, problems)
        if raw is None:
            continue
        source = Source(str(path), raw)
        found = _load_one(source, path, classes)
        problems += source.problems
        if found is not None:
            loaded.append((found, source))
    problems += _clashes(loaded)
    if problems:
        raise PolicyErrors(problems)
    return sorted((one for one, _ in loaded), key=lambda one: one.policy.name)


def load_text(text: str | bytes, path: str = "policy.yaml", classes: Sequence[str] | None = None) -> Policy:
    """The policy that this text is. Raises PolicyErrors."""
    source = Source(path, text.encode() if isinstance(text, str) else text)
    loaded = _load_one(source, None, classes)
    if source.problems or loaded is None:
        raise PolicyErrors(source.problems)
    return loaded.policy


def policy_files(paths: Iterable[str | Path]) -> list[Path]:
    """The policy files that these files and directories are."""
    return _files(paths, [])


def _files(paths: Iterable[str | Path], problems: list[Problem]) -> list[Path]:
    files: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            try:
                names = sorted(given.iterdir())
            except OSError as error:
                problems.append(Problem(str(given), 1, 1, f"cannot be read: {error.strerror or error}"))
                continue
            inside = [p for p in names if p.name.endswith(SUFFIXES) and not p.name.startswith(".")]
            policies = [p for p in inside if not p.name.endswith(_TEST_SUFFIXES) and p.is_file()]
            if not policies:
                problems.append(Problem(str(given), 1, 1, "no policy file (*.yaml) in this directory"))
            files += policies
        else:
            files.append(given)
    return list(dict.fromkeys(files))


def _read(path: Path, problems: list[Problem]) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        problems.append(Problem(str(path), 1, 1, "no such file"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problems.append(Problem(str(path), 1, 1, f"cannot be read: {reason}"))
    return None


def _load_one(source: Source, path: Path | None, classes: Sequence[str] | None) -> Loaded | None:
    """None, or a policy that is only to be used if `source.problems` is empty."""
    inputs, rules = _declared(source.data())
    file = _validate(source, PolicyFile)
    if not isinstance(file, PolicyFile):
        return None
    builder = Builder(source, inputs, classes)
    policy = builder.build(file)
    source.problems += builder.problems
    cases = build_cases(source, file.tests, inputs, rules)
    beside = None if path is None else path.with_name(f"{path.stem}.test{path.suffix}")
    if beside is not None and beside.is_file():
        cases += _load_beside(beside, source, inputs, rules)
    return Loaded(policy, tuple(cases))


def _load_beside(path: Path, owner: Source, inputs: Sequence[str], rules: set[str]) -> list[Case]:
    raw = _read(path, owner.problems)
    if raw is None:
        return []
    source = Source(str(path), raw)
    file = _validate(source, TestFile)
    cases = build_cases(source, file.tests, inputs, rules) if isinstance(file, TestFile) else []
    owner.problems += source.problems
    return cases


def _declared(data: object) -> tuple[list[str], set[str]]:
    """The names of all inputs and rules in the file, also of those that are wrong in themselves."""
    spec = data.get("spec") if isinstance(data, dict) else None
    inputs, rules = (spec.get("inputs"), spec.get("rules")) if isinstance(spec, dict) else (None, None)
    names = [rule.get("name") for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []
    return list(inputs) if isinstance(inputs, dict) else [], {name for name in names if isinstance(name, str)}


def _validate(source: Source, model: type[BaseModel]) -> BaseModel | None:
    """The file's shape. What is wrong is reported and cut out, so that the rest is still checked."""
    for attempt in range(20):
        data = source.data()
        if data is None:
            return None
        try:
            return model.model_validate(data)
        except ValidationError as error:
            cuts: list[DataPath] = []
            details = error.errors(include_url=False, include_context=False, include_input=False)
            misspelt = {detail["loc"][:-1] for detail in details if detail["type"] == "extra_forbidden"}
            for detail in details:
                path = detail["loc"]
                absent = detail["type"] == "missing"
                # After a cut, or beside a misspelt key, what is missing is no second mistake.
                if not absent or (attempt == 0 and path[:-1] not in misspelt):
                    key = absent or detail["type"] == "extra_forbidden"
                    source.problems.append(
                        source.at(path, _message(detail["type"], detail["msg"], path), key)
                    )
                cuts.append(path[:-1] if absent else path)
        # Deepest and last first: cutting shifts what follows.
        pruned = [source.prune(path) for path in sorted(cuts, key=_cut_order, reverse=True)]
        if not any(pruned):
            return None
    return None


def _cut_order(path: DataPath) -> tuple[int, list[str]]:
    return len(path), [f"{step:09d}" if isinstance(step, int) else step for step in path]


def _message(kind: str, message: str, path: DataPath) -> str:
    name = str(path[-1]) if path else "file"
    if kind == "missing":
        return f"'{name}' is missing"
    if kind == "extra_forbidden":
        return f"unknown key '{name}'{_hint(name)}"
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    if kind == "string_pattern_mismatch":
        text = (
            "must be a name: letters, digits and dashes" if path[0] == "metadata" or name == "name" else text
        )
    return f"{'.'.join(str(step) for step in path) or 'file'}: {text}"


def _hint(key: str) -> str:
    if key in NOT_YET:
        return f": {NOT_YET[key]} is not supported yet"
    owners = key_owners()
    if key in owners:
        return f": it belongs to {' or '.join(owners[key])}"
    near = difflib.get_close_matches(key, owners, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _clashes(loaded: Sequence[tuple[Loaded, Source]]) -> list[Problem]:
    """What is wrong between files: one name twice, and equal priorities that push a knob both ways."""
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    pushes: list[tuple[Policy, Rule, Action]] = []
    for one, source in loaded:
        policy = one.policy
        if policy.name in seen:
            message = f"a second policy named '{policy.name}' (the first is in {seen[policy.name]})"
            problems.append(source.at(("metadata", "name"), message))
        seen.setdefault(policy.name, policy.path)
        for i, rule in enumerate(policy.rules if policy.mode != "off" else ()):
            for action in rule.actions:
                against = _opposed(policy, rule, action, pushes)
                if against is not None:
                    problems.append(source.at(("spec", "rules", i, "name"), against))
                pushes.append((policy, rule, action))
    return problems


def _opposed(
    policy: Policy, rule: Rule, action: Action, pushes: Sequence[tuple[Policy, Rule, Action]]
) -> str | None:
    for other_policy, other_rule, other in pushes:
        same = (other.knob, other.scope) == (action.knob, action.scope)
        if same and other_policy.priority == policy.priority and direction(other) * direction(action) < 0:
            return (
                f"rule '{rule.name}' pushes {action.knob} against {other_policy.name}/{other_rule.name} "
                f"at the same priority {policy.priority}: give one policy the higher priority"
            )
    return None
