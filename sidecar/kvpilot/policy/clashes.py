"""What is wrong between policies, each of which is right: one name twice, one knob pushed both ways."""

from collections.abc import Sequence
from typing import NamedTuple

from kvpilot.policy.build_action import direction
from kvpilot.policy.rules import Action, Policy, Rule
from kvpilot.policy.source import Problem, Source


class _Push(NamedTuple):
    policy: Policy
    rule: Rule
    action: Action


def clashes(policies: Sequence[tuple[Policy, Source]]) -> list[Problem]:
    """All of them, each at the later of the two places."""
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    pushes: list[_Push] = []
    for policy, source in policies:
        if policy.name in seen:
            message = f"a second policy named '{policy.name}' (the first is in {seen[policy.name]})"
            problems.append(source.at(("metadata", "name"), message))
        seen.setdefault(policy.name, policy.path)
        if policy.mode == "off":
            continue
        for rule in policy.rules:
            for action in rule.actions:
                push = _Push(policy, rule, action)
                against = next((other for other in pushes if _opposed(push, other)), None)
                if against is not None:
                    message = (
                        f"rule '{rule.name}' pushes {action.knob} against "
                        f"{against.policy.name}/{against.rule.name} at the same priority {policy.priority}: "
                        "give one policy the higher priority"
                    )
                    problems.append(source.at((*source.rule(rule.name), "name"), message))
                if direction(action):
                    pushes.append(push)
    return problems


def _opposed(one: _Push, other: _Push) -> bool:
    """Equal priority and opposite ways: which of the two holds would be an accident of the moment."""
    return (
        one.policy.priority == other.policy.priority
        and (one.action.knob, one.action.scope) == (other.action.knob, other.action.scope)
        and direction(one.action) * direction(other.action) < 0
    )
