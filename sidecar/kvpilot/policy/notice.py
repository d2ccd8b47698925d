"""What people are told of a rule: that it became active, that its effect did not come, that this is over."""

from dataclasses import dataclass
from typing import Literal

About = Literal["state", "effect"]


@dataclass(frozen=True, slots=True)
class Notice:
    """A rule became active, or a change of it had not the effect that `verify` expects; or that is over."""

    policy: str
    rule: str
    receiver: str
    """Empty: every receiver."""
    severity: str
    summary: str
    firing: bool
    about: About = "state"
