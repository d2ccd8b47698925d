"""One pilot and everything around it, as one value for those who show or operate it."""

from dataclasses import dataclass
from pathlib import Path

from kvpilot.adapters.other_ranks import OtherRanks
from kvpilot.alerts.outbox import Outbox
from kvpilot.journal.writer import JournalWriter
from kvpilot.link.place import LinkPlace
from kvpilot.pilot import Pilot
from kvpilot.policy_directory import PolicyDirectory


@dataclass(frozen=True, slots=True)
class Flight:
    """`engine_name` labels whatever leaves this process, and `rank` where it is not 0."""

    engine_name: str
    pilot: Pilot
    directory: PolicyDirectory
    outbox: Outbox
    journal: JournalWriter
    rank: int = 0
    others: OtherRanks | None = None
    """Ranks that no pilot flies, where this pilot shows them too."""
    place: LinkPlace | None = None
    """Where the engine's pages lie; None in virtual time."""
    config_path: Path | None = None
    """The configuration that was named, which whoever operates this pilot has to name too."""
