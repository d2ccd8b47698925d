"""The demo's real processes: one engine, and a pilot for as long as its leg lasts."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from kvpilot.clock import NS, Clock


class DemoError(Exception):
    """The demo cannot go on; the message is one line for the person who ran it."""


class Process:
    """A child process with its output in a file, told to stop politely and then not."""

    def __init__(
        self, name: str, arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environ or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def alive(self) -> bool:
        return self._child.poll() is None

    def last_line(self) -> str:
        """The last thing it said, for an error message."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    async def wait_until_answers(self, url: str, clock: Clock, within_s: float) -> None:
        """Return once a GET of `url` gives 200. Raises DemoError if the process ends or time runs out."""
        deadline_ns = clock.monotonic_ns() + round(within_s * NS)
        async with httpx.AsyncClient(timeout=2.0) as client:
            while clock.monotonic_ns() < deadline_ns:
                if not self.alive():
                    raise DemoError(f"the {self.name} did not start: {self.last_line()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(url)).status_code == 200:
                        return
                await clock.sleep_until(clock.monotonic_ns() + NS // 10)
        raise DemoError(f"the {self.name} did not answer {url} within {within_s:g} s: {self.last_line()}")

    async def stop(self, within_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL to its whole group after `within_s`."""
        if self.alive():
            self._child.terminate()
            try:
                await asyncio.to_thread(self._child.wait, within_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._child.pid, signal.SIGKILL)
                await asyncio.to_thread(self._child.wait)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
