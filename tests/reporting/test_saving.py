"""Figures as files: what is refused before anything is written, and what a browser that fails leaves behind."""

from __future__ import annotations

import base64
import html
import json
import stat
import sys
from pathlib import Path
from typing import Any

import page_samples
import pytest
import sweep_samples

import rankwise
from rankwise.errors import BrowserError, OutputError, OutputExistsError, RankwiseError, UsageError
from rankwise.report.picturing import BROWSERS, find_browser

SPECTRA = page_samples.adapter(1)
NAMES = ["energy", "heat-map", "singular-values"]


def stand_in(folder: Path, dom: str, code: int = 0) -> Path:
    """Return a program that prints a document, whatever it is asked for, and keeps its arguments and their page."""
    script = folder / "browser"
    script.write_text(
        f"#!{sys.executable}\nimport sys, pathlib, urllib.parse\n"
        f"here = pathlib.Path({str(folder)!r})\n"
        "page = urllib.parse.unquote(urllib.parse.urlparse(sys.argv[-1]).path)\n"
        "(here / 'page.html').write_bytes(pathlib.Path(page).read_bytes())\n"
        "(here / 'arguments').write_text('\\n'.join(sys.argv[1:]))\n"
        f"print({dom!r})\nprint('the bus is not there', file=sys.stderr)\nsys.exit({code})\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def drawn(told: dict[str, Any]) -> str:
    return f'<html><body><pre id="drawn">{html.escape(json.dumps(told))}</pre></body></html>'


def test_csv_needs_no_browser_and_is_what_figures_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "figures"
    rankwise.report(SPECTRA, out=tmp_path / "page.html", figures=folder, figure_formats=("csv",))
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.csv" for name in NAMES]
    for name, figure in rankwise.figures(SPECTRA).items():
        assert (folder / f"{name}.csv").read_bytes().decode() == figure.to_csv()


def test_without_a_browser_nothing_is_written_and_it_is_said_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BrowserError, match=r"none of chromium, .* is on the path; install one .* CSV alone") as caught:
        rankwise.report(SPECTRA, out=tmp_path / "page.html", figures=tmp_path / "figures")
    assert all(name in str(caught.value) for name in BROWSERS)
    with pytest.raises(BrowserError, match="is on the path"):
        rankwise.figures(SPECTRA)["energy"].to_image()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BrowserError, match="nowhere is no program"):
        find_browser("nowhere")


def test_pictures_are_what_the_browser_hands_back(tmp_path: Path) -> None:
    """A PNG comes in base64, an SVG with escapes; both as the bytes that they stand for."""
    png, svg = b"\x89PNG\r\n\x1a\n", '<svg>é < & "</svg>'
    urls = {
        "png": f"data:image/png;base64,{base64.b64encode(png).decode()}",
        "svg": "data:image/svg+xml,%3Csvg%3E%C3%A9",
    }
    urls["svg"] += "%20%3C%20%26%20%22%3C%2Fsvg%3E"
    told = {"pictures": [{"name": n, "format": kind, "url": urls[kind]} for n in NAMES for kind in urls]}
    folder = tmp_path / "figures"
    browser = stand_in(tmp_path, drawn(told))
    rankwise.report(SPECTRA, out=tmp_path / "p.html", figures=folder, figure_formats=("svg", "png"), browser=browser)
    for name in NAMES:
        assert (folder / f"{name}.png").read_bytes() == png
        assert (folder / f"{name}.svg").read_bytes().decode() == svg
    assert len(list(folder.iterdir())) == 2 * len(NAMES)  # no CSV, which was not asked for


def test_the_browser_has_no_window_no_profile_and_no_network(tmp_path: Path) -> None:
    browser = stand_in(tmp_path, drawn({"pictures": [{"name": "energy", "format": "svg", "url": "data:,x"}]}))
    assert rankwise.figures(SPECTRA)["energy"].to_image("svg", theme="dark", width=500, browser=browser) == b"x"
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert "--headless=new" in arguments
    profile = next(word for word in arguments if word.startswith("--user-data-dir="))
    assert not Path(profile.partition("=")[2]).exists()  # nor is anything of it left
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html.unescape(page)
    jobs = json.loads(page.split('id="jobs">')[1].split("</script>")[0])
    assert [(job["name"], job["format"], job["width"], job["scale"]) for job in jobs] == [("energy", "svg", 500, 1)]
    assert jobs[0]["figure"] == json.loads(json.dumps(rankwise.figures(SPECTRA)["energy"].to_plotly("dark")))


@pytest.mark.parametrize(
    ("dom", "code", "told"),
    [
        (drawn({"error": "RangeError: too large"}), 0, "could not draw a figure: RangeError: too large"),
        ("<html></html>", 0, "drew nothing .exit code 0; its last word: the bus is not there"),
        ("", 1, "drew nothing .exit code 1"),
    ],
)
def test_a_browser_that_fails_leaves_no_file(tmp_path: Path, dom: str, code: int, told: str) -> None:
    browser = stand_in(tmp_path, dom, code)
    with pytest.raises(BrowserError, match=told):
        rankwise.report(SPECTRA, out=tmp_path / "page.html", figures=tmp_path / "figures", browser=browser)
    assert {path.name for path in tmp_path.iterdir()} == {"browser", "arguments", "page.html"}
    assert "jobs" in (tmp_path / "page.html").read_text(encoding="utf-8")  # the stand-in's copy, and not the report


def test_what_is_no_browser_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no program")
    text.chmod(0o755)
    with pytest.raises(BrowserError, match="cannot be started"):
        rankwise.figures(SPECTRA)["energy"].to_image(browser=text)


def test_folders_and_formats_that_cannot_be(tmp_path: Path) -> None:
    page, taken = tmp_path / "page.html", tmp_path / "file"
    taken.write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "energy.csv").write_text("mine")
    refused: dict[str, tuple[type[RankwiseError], dict[str, Any]]] = {
        "got 'svgg'": (UsageError, {"figures": tmp_path / "f", "figure_formats": ("svgg", "csv")}),
        "got none": (UsageError, {"figures": tmp_path / "f", "figure_formats": ()}),
        "file is a file; a folder": (OutputError, {"figures": taken, "figure_formats": ("csv",)}),
        "there is no folder": (OutputError, {"figures": tmp_path / "no" / "f", "figure_formats": ("csv",)}),
        "energy.csv exists already": (
            OutputExistsError,
            {"figures": tmp_path / "full", "figure_formats": ("csv",)},
        ),
    }
    for told, (kind, asked) in refused.items():
        with pytest.raises(kind, match=told):
            rankwise.report(SPECTRA, out=page, **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["energy.csv"]
    rankwise.report(SPECTRA, out=page, figures=tmp_path / "full", figure_formats=("csv",), force=True)
    assert (tmp_path / "full" / "energy.csv").read_text() != "mine"


def test_a_page_is_not_put_in_the_place_of_its_record(tmp_path: Path) -> None:
    """A slip of the hand with --force would cost the record."""
    record = tmp_path / "sweep"  # without a suffix, so that the name alone does not give it away
    record.write_text(sweep_samples.sweep().to_json(), encoding="utf-8")
    before = record.read_bytes()
    (tmp_path / "link.html").symlink_to(record)
    for out in (record, tmp_path / "link.html"):
        with pytest.raises(UsageError, match="is a record that the page is made from"):
            rankwise.report(record, out=out, force=True)
    for name in ("page.json", "page.PNG"):
        with pytest.raises(UsageError, match=r"is no place for a page: give a name such as .*page\.html"):
            rankwise.report(record, out=tmp_path / name, force=True)
    assert record.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", "link.html"}
