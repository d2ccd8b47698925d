"""A stage, a browser and a page for each file of tests; any error in the page fails the test."""

import shutil
from collections.abc import Iterator

import pytest
from opened import Opened
from stage import Stage

WIDTH, HEIGHT = 1280, 900
FLOWN_S = 15.0
"""Calm, and then nine seconds of a burst: rules act, requests wait and are shed."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    stage.start()
    stage.record_death()
    stage.fly(FLOWN_S)
    yield stage
    stage.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(stage: Stage, browser) -> Iterator[Opened]:
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
    context.set_default_timeout(15_000)
    yield Opened(context.new_page(), stage.url)
    context.close()


@pytest.fixture
def opened(shared: Opened, stage: Stage) -> Iterator[Opened]:
    """The one page that a file's tests share: each takes it as it is left."""
    opened = shared
    yield opened
    assert opened.errors == []
    assert all(url.startswith(stage.url) for url in opened.requests), "no request leaves the pilot"
