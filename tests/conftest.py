"""Shared by all tests: what a skip may mean, and nothing else."""

import shutil
from pathlib import Path

import pytest

ALLOWED_SKIPS = {"gpu", "root", "traces"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-missing-system",
        action="store_true",
        help="fail instead of skipping when a system package is missing (CI)",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest tests` leaves out what needs vLLM's own environment, unless it is asked for by name."""
    if collection_path != Path(__file__).parent / "vllm":
        return None
    return None if any("vllm" in Path(argument).parts for argument in config.args) else True


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_program(name): skip unless the program is installed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs_program"):
        program = marker.args[0]
        if shutil.which(program) is None:
            message = f"{program} is not installed"
            if item.config.getoption("--fail-on-missing-system"):
                pytest.fail(message, pytrace=False)
            pytest.skip(message)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """In CI, a skip for any reason but those the project allows is a failure: green must mean run."""
    outcome = yield
    report = outcome.get_result()
    if not (report.skipped and item.config.getoption("--fail-on-missing-system")):
        return
    if hasattr(report, "wasxfail") or ALLOWED_SKIPS & {mark.name for mark in item.iter_markers()}:
        return
    report.outcome = "failed"
    why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.longrepr = f"skipped in CI: {why}"
