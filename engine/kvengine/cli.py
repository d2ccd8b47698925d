"""The door: `kvengine` with its extras opens `commands`; without them it says so in one line."""

import sys


def main() -> None:
    """Entry point of the `kvengine` script."""
    try:
        from kvengine.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("kvengine", "kvkernels", "kvpilot")):
            raise
        sys.exit(f"kvengine: {error.name} is not installed: pip install 'kvpilot[engine]'")
    app(prog_name="kvengine")
