"""The door: `kvpilot` with its extras opens `commands`; without them it says so in one line."""

import sys


def main() -> None:
    """Entry point of the `kvpilot` script."""
    try:
        from kvpilot.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvpilot"):
            raise
        sys.exit(f"kvpilot: {error.name} is not installed: pip install 'kvpilot[sidecar]'")
    app(prog_name="kvpilot")
