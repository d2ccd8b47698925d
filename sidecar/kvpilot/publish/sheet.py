"""What one collection gathers: families in the table's order, samples by label values."""

from kvpilot.publish.collected import Collected, Distribution
from kvpilot.publish.durations import BOUNDS_S, Durations
from kvpilot.publish.families import FAMILIES

_PLACE = {name: place for place, name in enumerate(FAMILIES)}


class Sheet:
    """Collects samples of one engine. A family that is in no table cannot be added to."""

    def __init__(self, engine: str, rank: int) -> None:
        self.engine = engine
        self.rank = str(rank)
        self._collected: dict[str, Collected] = {}

    def add(self, name: str, value: float, *labels: str, rank: int | None = None) -> None:
        """One sample of `kvpilot_<name>`; `labels` are the values after engine and rank, in order."""
        own = self.rank if rank is None else str(rank)
        collected = self._collected.get(name) or self._of(name)
        collected.samples.append(((self.engine, own, *labels), value))

    def add_distribution(self, name: str, found: Distribution, *labels: str, rank: int | None = None) -> None:
        """One histogram of `kvpilot_<name>`."""
        own = self.rank if rank is None else str(rank)
        self._of(name).distributions.append(((self.engine, own, *labels), found))

    def add_durations(self, name: str, durations: Durations) -> None:
        """One of the pilot's own histograms."""
        found = Distribution(BOUNDS_S, [count for _, count in durations.buckets()], durations.sum_s)
        self.add_distribution(name, found)

    def collected(self) -> list[Collected]:
        """In the table's order."""
        return sorted(self._collected.values(), key=lambda each: _PLACE[each.family.name])

    def _of(self, name: str) -> Collected:
        found = self._collected.get(name)
        if found is None:
            found = self._collected[name] = Collected(FAMILIES[f"kvpilot_{name}"])
        return found
