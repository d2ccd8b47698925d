"""What the valves of a server say: one reading of each live API-server process."""

from kvpilot.link.following import open_pages
from kvpilot.link.place import LinkPlace
from kvpilot.link.valve_page import ValvePageReader, ValveSnapshot


def snapshots(place: LinkPlace) -> list[ValveSnapshot]:
    """Of every valve that lives, newest start first."""
    pages = open_pages(place.telemetry_directory(None), "valve", place.uids, locked=True)
    try:
        found = [ValvePageReader(page.read_at).read() for page in pages]
    finally:
        for page in pages:
            page.close()
    return [snapshot for snapshot in found if snapshot is not None]


def shedding(place: LinkPlace) -> float:
    """The largest share of any class that any valve sheds now."""
    return max((share for one in snapshots(place) for share in one.fractions.values()), default=0.0)


def rows(place: LinkPlace) -> dict[tuple[str, str], dict[str, int]]:
    """Offered, admitted and shed by (class, tenant), summed over processes."""
    sums: dict[tuple[str, str], dict[str, int]] = {}
    for snapshot in snapshots(place):
        for row in snapshot.rows:
            counts = sums.setdefault((row.class_name, row.tenant), {"offered": 0, "admitted": 0, "shed": 0})
            for name in counts:
                counts[name] += getattr(row, name)
    return sums
