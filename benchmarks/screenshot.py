"""Page one of a report as a picture, for the README: `python benchmarks/screenshot.py runs/demo/report.html docs/report.png`.

Page one holds no image of the data, so the picture may be shown where the data may not.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def screenshot(html: str | Path, png: str | Path, *, width: int = 1200) -> Path:
    """Photographs page one of a report with Chromium, at twice the width in pixels so that it stays sharp.

    Args:
        html: `report.html`.
        png: where the picture is written.
        width: of the window in CSS pixels; the page itself is at most 1,120 wide.
    """
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium on this machine: apt-get install chromium fonts-noto-cjk")
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000}, device_scale_factor=2)
        page.goto(Path(html).resolve().as_uri())
        page.locator("#front").screenshot(path=str(png))
        browser.close()
    return png


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/screenshot.py REPORT.html PICTURE.png")
    print(screenshot(sys.argv[1], sys.argv[2]))
