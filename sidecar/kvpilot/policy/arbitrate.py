"""From claims to leases: one winner per knob and scope. Pure, total, and independent of the claims' order.

Per (knob, scope): higher priority, then the more protective value, then the name. Two things stand outside:

- A claim of a `protective: always` rule is a *limit*. It can only tighten what would hold without it (the
  ordinary winner's value, or baseline); it never loosens it. Otherwise a memory guard of the highest
  priority, content with a large value, would overrule every latency rule below it.
- A person's order outranks all. It also displaces claims on narrower scopes that it covers, because among
  leases that match one request the most protective holds, and only a person may be less protective.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvpilot.link.controls import Scope
from kvpilot.link.manifest import ManifestKnob
from kvpilot.policy.context import Override
from kvpilot.policy.grid import protective_first
from kvpilot.policy.lease import OVERRIDE, LeaseWish, Target
from kvpilot.policy.rules import DEFAULT_LEASE_NS


class Bid(NamedTuple):
    """One claim with what arbitration needs to know of its rule."""

    policy: str
    rule: str
    priority: int
    limit: bool
    knob: str
    scope: Scope
    value: float
    ttl_ns: int


class Ruling(NamedTuple):
    """The leases, and for each bid whose value does not hold, who holds the knob instead."""

    leases: dict[Target, LeaseWish]
    overruled: dict[Bid, str]


def arbitrate(
    bids: Iterable[Bid], knobs: Mapping[str, ManifestKnob], orders: Iterable[Override] = (), now_ns: int = 0
) -> Ruling:
    """See the module docstring. Bids and orders on knobs that the engine lacks are left out."""
    ruling = Ruling({}, {})
    for order in orders:
        if order.knob in knobs:
            ruling.leases[order.knob, order.scope] = _ordered(order, knobs[order.knob], now_ns)
    commanded = list(ruling.leases)
    contests: dict[Target, list[Bid]] = defaultdict(list)
    for bid in bids:
        if bid.knob not in knobs:
            continue
        over = next((t for t in commanded if t[0] == bid.knob and covers(t[1], bid.scope)), None)
        if over is None:
            contests[bid.knob, bid.scope].append(bid)
        else:
            ruling.overruled[bid] = _holder(ruling.leases[over])
    for target, rivals in contests.items():
        lease = _settle(rivals, knobs[target[0]])
        ruling.leases[target] = lease
        for bid in rivals:
            if not bid.limit and bid.value != lease.value:
                ruling.overruled[bid] = _holder(lease)
    return ruling


def covers(outer: Scope, inner: Scope) -> bool:
    """Whether every request that `inner` matches is matched by `outer`."""
    if outer.kind == "all" or outer == inner:
        return True
    if outer.kind == inner.kind == "class_at_most":
        return int(inner.argument or 0) <= int(outer.argument or 0)
    return False


def _settle(rivals: list[Bid], knob: ManifestKnob) -> LeaseWish:
    ordinary = min((bid for bid in rivals if not bid.limit), key=_by_rank, default=None)
    limit = min((bid for bid in rivals if bid.limit), key=_by_value, default=None)
    value = knob.baseline if ordinary is None else ordinary.value
    holder = ordinary
    if limit is not None and protective_first(knob.name, limit.value) <= protective_first(knob.name, value):
        holder, value = limit, limit.value
    holder = holder or limit
    assert holder is not None, "a contest has a rival"
    return LeaseWish(knob.name, holder.scope, value, holder.ttl_ns, holder.policy, holder.rule)


def _by_rank(bid: Bid) -> tuple[int, float, str, str]:
    return (-bid.priority, protective_first(bid.knob, bid.value), bid.policy, bid.rule)


def _by_value(bid: Bid) -> tuple[float, int, str, str]:
    return (protective_first(bid.knob, bid.value), -bid.priority, bid.policy, bid.rule)


def _ordered(order: Override, knob: ManifestKnob, now_ns: int) -> LeaseWish:
    ttl_ns = min(DEFAULT_LEASE_NS, order.until_ns - now_ns)
    return LeaseWish(order.knob, order.scope, knob.snap(order.value), ttl_ns, OVERRIDE, order.who)


def _holder(lease: LeaseWish) -> str:
    return f"{lease.policy}/{lease.rule}"
