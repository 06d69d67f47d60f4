"""Photograph the top of a page that rankwise wrote.

    python docs/tools/picture.py story/inspect.html docs/_static/inspect.png

Needs playwright (extra dev) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> int:
    """Open the page without a network and save what it shows."""
    parser = argparse.ArgumentParser(description="Photograph the top of a page that rankwise wrote.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1320)
    arguments = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"no browser: none of {', '.join(BROWSERS)} is on the path", file=sys.stderr)
        return 2
    with sync_playwright() as tools:
        started = tools.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = started.new_page(viewport={"width": arguments.width, "height": arguments.height})
        page.goto(arguments.page.resolve().as_uri())
        page.wait_for_timeout(1500)  # the charts draw themselves
        page.screenshot(path=arguments.picture)
        started.close()
    print(f"wrote {arguments.picture} ({arguments.picture.stat().st_size // 1024} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
