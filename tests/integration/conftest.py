"""Shared by tests that fly a pilot process."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pilot_lab import Lab
from pilot_process import Webhook


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    hook = Webhook()
    thread = threading.Thread(target=hook.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hook
    hook.shutdown()
    thread.join()
    hook.server_close()
