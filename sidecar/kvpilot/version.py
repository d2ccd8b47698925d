"""Which kvpilot this is."""

from importlib import metadata


def version() -> str:
    """The installed distribution's version; `unknown` when run from a bare source tree."""
    try:
        return metadata.version("kvpilot")
    except metadata.PackageNotFoundError:
        return "unknown"
