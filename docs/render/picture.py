"""`python -m docs.render.picture URL`: take the pictures of the playground that README shows, light and dark.

URL is that of `expertsteer demo`. It needs Playwright and Chromium.
"""

import argparse
import shutil
import sys
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "images"
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_SIZE = {"width": 1180, "height": 840}


def take(url: str, scheme: str, file: Path) -> None:
    """Ask the lab's question on the page and write what it shows.

    Args:
        url: of the server.
        scheme: "light" or "dark".
        file: PNG to write.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=_FLAGS)
        page = browser.new_page(viewport=_SIZE, color_scheme=scheme)  # type: ignore[arg-type]
        page.set_default_timeout(120_000)
        page.goto(f"{url}/playground/")
        page.get_by_label("Prompt").first.fill("What is 7 plus 5?")
        page.get_by_role("button", name="Run").click()
        # Only when both answers are there the words that differ are counted.
        page.get_by_text("only in the steered one").wait_for()
        page.screenshot(path=file)
        browser.close()


def main() -> int:
    """Take both."""
    parser = argparse.ArgumentParser(prog="python -m docs.render.picture", description="Pictures of the playground.")
    parser.add_argument("url", metavar="URL", help="a running demo, such as http://localhost:8000")
    url = parser.parse_args().url.rstrip("/")
    IMAGES.mkdir(exist_ok=True)
    take(url, "light", IMAGES / "playground.png")
    take(url, "dark", IMAGES / "playground-dark.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
