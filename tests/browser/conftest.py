"""A Chromium without a network, and pages that fail the test on any error or outside request."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))  # page_samples.py

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESK = {"viewport": {"width": 1100, "height": 900}}
LOCAL = ("file:", "data:", "blob:")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A running Chromium; the test skips where playwright or the browser is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("no playwright: pip install 'rankwise[dev]'")
    path = os.environ.get("RANKWISE_CHROMIUM", "/usr/bin/chromium")
    if not Path(path).is_file():
        pytest.skip(f"no Chromium at {path}: apt-get install chromium, or name one in RANKWISE_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a record's page; at the end no error and no request may have been seen."""
    errors: list[str] = []
    requests: list[str] = []
    contexts: list[Any] = []

    def open_it(record: Any, **context: Any) -> Any:
        from rankwise.report import render_page

        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(render_page(record), encoding="utf-8")
        contexts.append(chromium.new_context(offline=True, **(DESK | context)))
        page = contexts[-1].new_page()
        page.on("console", lambda m: errors.append(m.text) if m.type in {"error", "warning"} else None)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(LOCAL) else requests.append(r.url))
        page.goto(path.as_uri())
        if context.get("java_script_enabled", True):
            plots = page.locator("[data-plot]").count()
            page.wait_for_function("n => document.querySelectorAll('.plot .main-svg').length >= n", arg=plots)
            page.wait_for_function("() => [...document.querySelectorAll('[data-plot]')].every(p => p._fullLayout)")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []
    assert requests == []
