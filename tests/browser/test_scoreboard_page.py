"""The report of a comparison in a real browser: nothing sticks out or is fetched, and both themes differ."""

from pathlib import Path

import pytest

from kvpilot.compare_command import asked_for, command
from kvpilot.policy_directory import shipped
from kvpilot.simulate.report.page import About, page
from kvpilot.simulate.scoreboard import fly

pytestmark = pytest.mark.needs_program("chromium")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
LONG = "tenant-" + "x" * 90 + ".csv"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds against one static setting, of a trace with a name that goes on and on."""
    folder = tmp_path_factory.mktemp("report")
    lines = [f"2023-11-16 18:17:{at // 4:02},{300 + 50 * (at % 9)},{5 + at % 17}" for at in range(40)]
    trace = folder / LONG
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    asks, settings = asked_for(
        *([trace], None, "h100", "llama-3-8b", shipped(), None, 10.0, 1.0, 1, 0, None, None)
    )
    settings = settings.model_copy(update={"grid": settings.grid[7:8]})
    board, asked = fly(asks, settings, shipped(), 1, workers=1), asks.stage()
    about = About(
        *("h100", "llama-3-8b", 1, len(asked.arrivals), 0, asked.scene.promises.slos),
        *(command(asks, shipped(), 1), "0"),
    )
    path = folder / "report.html"
    path.write_text(page(board, about))
    return path


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_fits_and_asks_nobody(report: Path, browser, size: dict) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        opened, said, asked = context.new_page(), [], []
        opened.on("console", lambda message, said=said: said.append(message.text))
        opened.on("pageerror", lambda error, said=said: said.append(str(error)))
        opened.on("request", lambda request, asked=asked: asked.append(request.url))
        opened.goto(report.as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= size["width"]
        small = opened.evaluate(
            """() => Math.min(...[...document.querySelectorAll("svg")].filter((e) => e.clientWidth > 0)
            .map((e) => e.clientWidth / e.viewBox.baseVal.width))"""
        )
        assert small > 0.85, "text in charts is about as large as it was drawn"
        grounds.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert said == []
        assert asked == [report.as_uri()]
        context.close()
    assert len(grounds) == 2
