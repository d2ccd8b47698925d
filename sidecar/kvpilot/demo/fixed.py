"""A static setting, held through the same leases that the pilot uses: constant values, renewed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping

from kvpilot.clock import NS, Clock
from kvpilot.link.controls import Lease, Scope
from kvpilot.link.files import open_controls
from kvpilot.link.place import LinkPlace

TTL_NS = 5 * NS
RENEW_NS = NS // 4


@contextlib.asynccontextmanager
async def held(knobs: Mapping[str, float], place: LinkPlace, nonce: int, clock: Clock) -> AsyncIterator[None]:
    """Hold `knobs` inside the block, for the engine start `nonce`; withdraw them at its end."""
    writer, page = open_controls(place, 0, clock)
    renewing = asyncio.create_task(_renew(knobs, writer, nonce, clock))
    try:
        yield
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        writer.write([], nonce)
        writer.close()
        page.close()


async def _renew(knobs: Mapping[str, float], writer, nonce: int, clock: Clock) -> None:  # type: ignore[no-untyped-def]
    renewal = 0
    while True:
        renewal += 1
        leases = [Lease(name, Scope(), value, TTL_NS, renewal) for name, value in knobs.items()]
        writer.write(leases, nonce)
        await clock.sleep_until(clock.monotonic_ns() + RENEW_NS)
