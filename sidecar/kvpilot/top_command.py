"""`kvpilot top`: the console at a glance, in a terminal."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from kvpilot.clock import Clock

RETRY_S = 1.0
PLAIN_WIDTH = 140


def top(
    url: Annotated[str | None, typer.Option(help="The pilot's address, such as http://host:9477.")] = None,
    once: Annotated[bool, typer.Option("--once", help="One frame, and end.")] = False,
    config: Annotated[Path, typer.Option("--config", "-c", help="The configuration file.")] = Path(
        "kvpilot.yaml"
    ),
) -> None:
    """State, knobs, memory and decisions, twice a second, in this terminal."""
    from rich.console import Console

    from kvpilot.api.console.follow import NoPilot
    from kvpilot.clock import SystemClock
    from kvpilot.config import ConfigError

    console = Console()
    if not console.is_terminal:
        once = True
        console.width = PLAIN_WIDTH
    try:
        address = url or _address(config)
        if once:
            _one(console, address)
        else:
            _follow(console, address, SystemClock(), threading.Event().wait)
    except ConfigError as error:
        sys.exit(str(error))
    except NoPilot as error:
        sys.exit(f"kvpilot: {error}")
    except KeyboardInterrupt:
        return


def _address(config: Path) -> str:
    """Where the configuration's pilot listens. Raises ConfigError."""
    from kvpilot.config import ConfigError, load

    api = load(config).api
    if api.port == 0:
        raise ConfigError(f"{config}: api.port 0 takes any free port: give --url, as `kvpilot run` says it")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(api.host, api.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{api.port}"


def _one(console: "Console", url: str) -> None:
    from kvpilot.api.console.follow import frames
    from kvpilot.api.console.terminal import render

    console.print(render(next(frames(url))))


def _follow(console: "Console", url: str, clock: "Clock", wait: Callable[[float], Any]) -> None:
    """Until interrupted. Raises NoPilot where there was none to begin with; one that goes is waited for."""
    from rich.live import Live

    from kvpilot.api.console.follow import NoPilot, frames
    from kvpilot.api.console.terminal import render
    from kvpilot.clock import NS

    frame: dict[str, Any] | None = None
    heard_ns = clock.monotonic_ns()
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            try:
                for frame in frames(url):
                    heard_ns = clock.monotonic_ns()
                    live.update(render(frame), refresh=True)
            except NoPilot:
                if frame is None:
                    raise
                live.update(render(frame, (clock.monotonic_ns() - heard_ns) / NS), refresh=True)
            wait(RETRY_S)
