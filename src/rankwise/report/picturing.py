"""Figures as PNG and SVG: drawn by a browser of this machine, without a window, a profile or a network.

In: figures. Out: the bytes of pictures. The browser opens one page of ours, which holds the plotting library and the
figures and nothing else, and hands back what that page has drawn; no driver, and no package of Python, is needed.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

from rankwise.errors import BrowserError
from rankwise.report import page
from rankwise.report.drawing import Figure

Format = Literal["png", "svg"]
FORMATS: Final[tuple[Format, ...]] = ("png", "svg")

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
"""Names that are looked for on the path."""

WIDTH: Final = 760
"""px: the width of a column of text, in which labels of 12 px can be read."""

SCALE: Final = 2
"""Pixels of a PNG for each px: what screens of today and print want."""

SECONDS: Final = 180
"""After which a browser is taken for stuck: forty figures took 10 on two cores."""

DRAWN: Final = re.compile(r'<pre id="drawn">(.*?)</pre>', re.DOTALL)

FLAGS: Final = (
    "--headless=new",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--virtual-time-budget=600000",  # waits until the page has drawn everything; none of it is waited for in real time
    "--dump-dom",
)


def find_browser(browser: str | os.PathLike[str] | None = None) -> str:
    """Return the browser that draws.

    Args:
        browser: its path or name; the first of `BROWSERS` on the path if None.

    Raises:
        BrowserError: there is none.
    """
    names = BROWSERS if browser is None else (os.fspath(browser),)
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        looked = f"none of {', '.join(names)} is on the path" if browser is None else f"{names[0]} is no program"
        raise BrowserError(
            f"PNG and SVG are drawn by Chromium, Chrome or Edge, and {looked}; install one (apt-get install chromium), "
            "name one with --browser, take CSV alone, or save the figures by the buttons in the page"
        )
    return found


def pictures(
    figures: Mapping[str, Figure],
    *,
    formats: Sequence[Format] = FORMATS,
    theme: Literal["light", "dark"] = "light",
    width: int = WIDTH,
    browser: str | os.PathLike[str] | None = None,
) -> dict[tuple[str, Format], bytes]:
    """Return the pictures of figures by name and format; one browser draws them all.

    Raises:
        BrowserError: there is none, or it did not draw.
    """
    program = find_browser(browser)
    jobs = [
        {"name": name, "format": kind, "figure": figure.to_plotly(theme), "height": figure.layout["height"]}
        for name, figure in figures.items()
        for kind in formats
    ]
    for job in jobs:
        job["width"], job["scale"] = width, SCALE if job["format"] == "png" else 1
    drawn = json.loads(html.unescape(_dumped(program, page.render_jobs(jobs))))
    if "error" in drawn:
        raise BrowserError(f"{program} could not draw a figure: {drawn['error']}")
    return {(one["name"], one["format"]): _content(one["url"]) for one in drawn["pictures"]}


def _content(url: str) -> bytes:
    """Return what a data: URL holds."""
    head, _, body = url.partition(",")
    return base64.b64decode(body) if head.endswith(";base64") else unquote_to_bytes(body)


def _dumped(program: str, text: str) -> str:
    """Return what the page wrote into itself."""
    with tempfile.TemporaryDirectory(prefix="rankwise-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "figures.html"
        path.write_text(text, encoding="utf-8")
        # as root Chromium does not start in its sandbox; the page is our own and asks nothing of a network
        bare = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        command = [program, *FLAGS, *bare, f"--user-data-dir={folder}/profile", path.as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise BrowserError(f"{program} did not draw within {SECONDS} s and was ended") from error
        except OSError as error:
            raise BrowserError(f"{program} cannot be started: {error.strerror or error}") from error
    found = DRAWN.search(done.stdout.decode("utf-8", "replace"))
    if found is None:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise BrowserError(
            f"{program} drew nothing (exit code {done.returncode}{f'; its last word: {last[0]}' if last else ''}); it "
            "has to be Chromium, Chrome or Edge, and able to read the folder of temporary files"
        )
    return found[1]
