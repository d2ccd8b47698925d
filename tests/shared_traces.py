"""The published traces, which lie beside the source tree and are no part of it: a test that reads them skips
where they are not.
"""

from pathlib import Path

import pytest

TRACES = Path(__file__).parents[2] / "shared/traces"


def needs_traces(test):
    """Marks a test and skips it without the traces."""
    absent = pytest.mark.skipif(not TRACES.is_dir(), reason="the shared traces are not here")
    return pytest.mark.traces(absent(test))
