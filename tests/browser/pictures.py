"""The pictures of docs/console.md: `python tests/browser/pictures.py`, with Chromium installed."""

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from stage import Stage

IMAGES = Path(__file__).parents[2] / "docs/img"
FLOWN_S = 24.0
SHOTS = (
    ("console-light", 1280, 1500, "light", 1.0, True),
    ("console-dark", 1280, 860, "dark", 1.0, False),
    ("console-phone", 390, 844, "light", 2.0, False),
)


def main() -> None:
    """Overwrite them."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        stage = Stage(Path(folder))
        stage.start()
        stage.record_death()
        stage.fly(FLOWN_S)
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        for name, width, height, scheme, scale, whole in SHOTS:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=scale
            )
            page = context.new_page()
            page.goto(stage.url)
            page.wait_for_selector("#tests:has-text('tests pass')")
            page.wait_for_selector("#starts table")
            if whole:
                page.locator("#feed summary").first.click()
                page.wait_for_selector(".why dl")
                page.locator("#starts button").first.click()
                page.wait_for_selector("#scrub")
                page.locator("#scrub").fill("300")
                page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            stage.beat()
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / f"{name}.png", full_page=whole)
            context.close()
        browser.close()
        stage.stop()


if __name__ == "__main__":
    main()
