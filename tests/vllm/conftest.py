"""Tests against a real vLLM: skipped where there is none, and one server at a time."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_lab.server import Settings, VllmServer

# What runs inside vLLM's interpreter cannot be imported by any other.
collect_ignore = [] if find_spec("vllm") else ["inprocess"]

TEST_WITHIN_S = 600
"""A server may have to start first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and "inprocess" not in item.path.parts:
            item.add_marker(pytest.mark.timeout(TEST_WITHIN_S), append=False)


class Hangar:
    """Holds one running server: a start costs half a minute, and two at once would measure each other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: VllmServer | None = None
        self._starts = 0

    def server(self, settings: "Settings") -> "VllmServer":
        """The running one, if it was started like this and lives; else a fresh one in its place."""
        from vllm_lab.load import Ask, prompt, run
        from vllm_lab.server import VllmServer

        if self._server is None or self._server.settings != settings or not self._server.alive():
            self.close()
            self._starts += 1
            folder = self._folder / f"server-{self._starts}"
            folder.mkdir()
            self._server = VllmServer(settings, folder).__enter__()
            # The first step of each kind takes seconds.
            assert all(answer.ok for answer in run(self._server.url, [Ask(prompt(500), 20)] * 2))
        return self._server

    def close(self) -> None:
        """Stop it."""
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture(scope="session")
def hangar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hangar]:
    from vllm_lab.environment import missing

    problem = missing()
    if problem:
        pytest.skip(problem)
    hangar = Hangar(tmp_path_factory.mktemp("vllm"))
    yield hangar
    hangar.close()
