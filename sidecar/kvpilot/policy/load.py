"""The only door from files to policies: all errors of all files at once, or one right set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvpilot.policy.against import EngineHas, against
from kvpilot.policy.build import Builder
from kvpilot.policy.cases import Case, build_cases
from kvpilot.policy.clashes import clashes
from kvpilot.policy.files import File, Gathered, PolicyText, gather
from kvpilot.policy.reach import unreachable
from kvpilot.policy.rules import Policy, PolicySet
from kvpilot.policy.schema import PolicyFile, TestFile
from kvpilot.policy.shape import validate
from kvpilot.policy.source import Problem, Source


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
    return policy_set(load_gathered(gather(paths), classes))


def load_with_tests(paths: Iterable[str | Path], classes: Sequence[str] | None = None) -> list[Loaded]:
    """As `load_policies`, with each policy's tests. Ordered by policy name. Raises PolicyErrors."""
    return load_gathered(gather(paths), classes)


def load_gathered(
    gathered: Gathered, classes: Sequence[str] | None = None, engine: EngineHas | None = None
) -> list[Loaded]:
    """As `load_with_tests`, from what has been read already; `engine`: checked against what it has too."""
    problems = list(gathered.problems)
    loaded: list[tuple[Loaded, Source]] = []
    for text in gathered.files:
        source = Source(str(text.policy.path), text.policy.raw)
        found = _load_one(source, text, classes)
        if found is not None:
            loaded.append((found, source))
            if engine is not None:
                source.problems += against(found.policy, source, engine)
        problems += source.problems
    problems += clashes([(one.policy, source) for one, source in loaded])
    if problems:
        raise PolicyErrors(problems)
    return sorted((one for one, _ in loaded), key=lambda one: one.policy.name)


def load_text(text: str | bytes, path: str = "policy.yaml", classes: Sequence[str] | None = None) -> Policy:
    """The policy that this text is. Raises PolicyErrors."""
    raw = text.encode() if isinstance(text, str) else text
    source = Source(path, raw)
    loaded = _load_one(source, PolicyText(File(Path(path), raw)), classes)
    if source.problems or loaded is None:
        raise PolicyErrors(source.problems)
    return loaded.policy


def policy_set(loaded: Iterable[Loaded]) -> PolicySet:
    """The policies alone."""
    return PolicySet(tuple(one.policy for one in loaded))


def _load_one(source: Source, text: PolicyText, classes: Sequence[str] | None) -> Loaded | None:
    """None, or a policy that is only to be used if `source.problems` is empty."""
    data = source.data()
    inputs, rules = _declared(data)
    file = validate(source, PolicyFile)
    cases = []
    if text.tests is not None:
        beside = Source(str(text.tests.path), text.tests.raw)
        tests = validate(beside, TestFile)
        if isinstance(tests, TestFile) and data is not None:
            cases += build_cases(beside, tests.tests, inputs, rules)
        source.problems += beside.problems
    if not isinstance(file, PolicyFile):
        return None
    builder = Builder(source, inputs, classes)
    policy = builder.build(file)
    source.problems += builder.problems
    source.problems += unreachable(policy, source)
    cases = build_cases(source, file.tests, inputs, rules) + cases
    return Loaded(policy, tuple(cases))


def _declared(data: object) -> tuple[list[str], set[str]]:
    """The names of all inputs and rules in the file, also of those that are wrong in themselves."""
    spec = data.get("spec") if isinstance(data, dict) else None
    inputs, rules = (spec.get("inputs"), spec.get("rules")) if isinstance(spec, dict) else (None, None)
    names = [rule.get("name") for rule in rules if isinstance(rule, dict)] if isinstance(rules, list) else []
    return list(inputs) if isinstance(inputs, dict) else [], {name for name in names if isinstance(name, str)}
