"""`limits`: how many steps a policy's rules may take in any window of time."""

from kvpilot.policy.rules import Limits


class Budget:
    """One policy's recent steps during one tick; `steps_ns` is what to remember of them."""

    def __init__(self, limits: Limits | None, steps_ns: tuple[int, ...], now_ns: int) -> None:
        self._limits = limits
        self._now_ns = now_ns
        self.steps_ns = steps_ns
        if limits is None:
            self.steps_ns = ()
        elif steps_ns and now_ns - steps_ns[0] >= limits.per_ns:
            self.steps_ns = tuple(at_ns for at_ns in steps_ns if now_ns - at_ns < limits.per_ns)

    def allows(self, count: int) -> bool:
        """Whether `count` more steps fit the window that ends now."""
        return self._limits is None or len(self.steps_ns) + count <= self._limits.max_changes

    def spend(self, count: int) -> None:
        """Remember `count` steps taken now."""
        if self._limits is not None:
            self.steps_ns += (self._now_ns,) * count
