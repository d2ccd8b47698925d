"""The door: `kvpilot` with its extras opens `commands`; without them it says so in one line."""

import errno
import io
import sys

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def main() -> None:
    """Entry point of the `kvpilot` script."""
    try:
        from kvpilot.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kvpilot"):
            raise
        sys.exit(f"kvpilot: {error.name} is not installed: pip install 'kvpilot[sidecar]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character shows a question mark, not a traceback.
            stream.reconfigure(errors="replace")
    try:
        app(prog_name="kvpilot")
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        sys.exit(f"kvpilot: the output cannot be written: {error.strerror}")
