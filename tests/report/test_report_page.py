"""The page: whole, the same every time, deaf to hostile names, and small enough."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import conversion_samples
import extraction_samples
import lint_samples
import msgspec
import page_samples as samples
import pytest
import run_samples
import stability_samples

from rankwise.errors import RecordError
from rankwise.records import Finding, Record, Skipped
from rankwise.report import page as page_module
from rankwise.report import render_page, words
from rankwise.report.table import COLUMNS, module_table
from rankwise.simulation import simulate

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=hacked()>\"'`&amp;{{7*7}}"
BUNDLE_SHA256 = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "!doctype"}


class Reader(HTMLParser):
    """Collects elements, checks that they close in order, and keeps the text of each tag."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


PAGES: dict[str, Any] = {
    "adapter": samples.adapter(2),
    "delta": samples.delta(2, 128),
    "one": samples.record([samples.module("w", [1.0, 0.5])]),
    "empty": samples.record([], skipped=(Skipped(module="norm", reason="1-D"),)),
    "nulls": samples.record([samples.unknown("a.0.b"), samples.unknown("c")]),
    "nulls in a delta": samples.record([samples.unknown("a.0.b")], kind="delta", seed=None),
    "zero": samples.record([samples.module("w", [0.0], energy=0.0)]),
    "simulation": simulate(command=("rankwise", "simulate")),
    "own spectrum": simulate(command=("rankwise", "simulate"), spectrum="power:1:3"),
    **run_samples.RECORDS,
    **stability_samples.RECORDS,
    **lint_samples.RECORDS,
    **conversion_samples.RECORDS,
    **extraction_samples.RECORDS,
}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_whole_and_self_contained(name: str) -> None:
    html = render_page(PAGES[name])
    reader = Reader(html)
    assert html.startswith("<!doctype html>")
    assert reader.open == []
    assert reader.of("html") == [{"lang": "en"}]
    assert reader.words["title"][0].endswith("· rankwise")
    assert len(reader.of("h1")) == 1
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in reader.elements:
        assert "src" not in attrs, f"<{tag}> loads something"
        assert tag not in {"link", "iframe", "object", "img", "base"}
        assert (attrs.get("href") or "#").startswith("#")
        for reference in ("for", "aria-labelledby"):
            assert attrs.get(reference) is None or attrs[reference] in ids
    style = "".join(reader.words["style"])
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("name", PAGES)
def test_the_policy_allows_these_scripts_and_no_network(name: str) -> None:
    html = render_page(PAGES[name])
    (policy,) = [a["content"] for a in Reader(html).of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 3
    assert policy.count("'sha256-") == 3


def test_hostile_names_stay_words() -> None:
    bad = [samples.module(HOSTILE, [1.0, 0.5]), samples.module(f"layers.0.{HOSTILE}", [1.0])]
    record = samples.record(
        bad,
        source=HOSTILE,
        base=HOSTILE,
        device=HOSTILE,
        command=("rankwise", HOSTILE),
        skipped=(Skipped(module=HOSTILE, reason=HOSTILE),),
        others=(Finding(code="<b>", level="warning", text=HOSTILE),),
    )
    html, calm = (
        render_page(record),
        render_page(samples.record([samples.module("w", [1.0]), samples.module("v", [1.0])])),
    )
    reader = Reader(html)
    assert reader.open == []
    assert len(reader.of("script")) == len(Reader(calm).of("script"))
    assert not reader.of("img")
    assert not any(name.startswith("on") for _, attrs in reader.elements for name in attrs)
    assert "<script>window.hacked" not in html
    assert "".join(reader.words["option"]).count(HOSTILE) == 2
    assert "49" not in "".join(reader.words["h1"]), "a name is no template"


def test_data_cannot_end_its_script_element() -> None:
    text = str(page_module._json({"</script>": "<!--&\u2028"}))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script>": "<!--&\u2028"}


def test_hostile_simulation_stays_words() -> None:
    calm = simulate(command=("x",))
    updates = {HOSTILE: msgspec.structs.replace(calm.updates["style"], planted=HOSTILE)}
    html = render_page(msgspec.structs.replace(calm, updates=updates, notes=(HOSTILE,)))
    reader = Reader(html)
    assert reader.open == []
    assert not reader.of("img")
    assert "<script>window.hacked" not in html


def test_a_path_that_is_no_utf8_does_not_break_the_page() -> None:
    html = render_page(samples.record([samples.module("w\udcff", [1.0])], source="/runs/\udcff"))
    html.encode("utf-8")


@pytest.mark.parametrize("name", ["adapter", "delta", "simulation", "run", "recall", "demo", "hostile demo"])
def test_the_same_record_gives_the_same_bytes(name: str) -> None:
    assert render_page(PAGES[name]) == render_page(PAGES[name])


def test_the_bytes_do_not_depend_on_the_process() -> None:
    code = (
        "import hashlib, page_samples as s; from rankwise.report import render_page;"
        "print(hashlib.sha256(render_page(s.delta(2, 64)).encode()).hexdigest())"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(page_module.__file__).parents[2])])
    digests = set()
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths, "TZ": f"UTC+{seed}"}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def test_300_modules_stay_small() -> None:
    """The bundle is 1.5 MB; 300 modules of 1,024 values may add 1.5 MB at most."""
    record = samples.delta(43, 1024)
    assert len(record.modules) > 300
    assert len(render_page(record).encode()) < 3_000_000


@pytest.mark.slow
def test_224_modules_of_4096_values_stay_below_6_mb() -> None:
    assert len(render_page(samples.delta(32, 4096)).encode()) < 6_000_000


def test_findings_come_in_the_order_of_the_record_and_say_their_level() -> None:
    others = (
        Finding(code="bad", level="error", text="Something `broke`."),
        Finding(code="meh", level="warning", text="w"),
        Finding(code="fyi", level="info", text="i"),
    )
    html = render_page(samples.record([samples.module("w", [1.0, 0.1])], others=others))
    places = [html.index(f'<li class="finding {level}">') for level in ("error", "warning", "info")]
    assert places == sorted(places)
    assert [html.count(f"<b>{word}</b>") for word in ("Error", "Warning", "Note")] == [1, 1, 1]
    assert "Something <code>broke</code>." in html
    assert "1 finding of level error (bad)" in html


def test_without_scripts_the_tables_and_findings_are_there() -> None:
    record = samples.delta(2, 128)
    html = render_page(record)
    body = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    for module in record.modules:
        assert f"{module.module.replace('.', '.<wbr>')}</bdi></th>" in body
    assert "rounding-limited" in body
    hidden = re.findall(r"<noscript>(.*?)</noscript>", body, flags=re.DOTALL)
    assert any("<table" in part and "Mean share of the energy by rank" in part for part in hidden)


def test_the_origin_is_on_the_page() -> None:
    html = render_page(PAGES["adapter"])
    for words_there in ("rankwise inspect &#39;runs/a b/adapter&#39;", "0.1.0", "cpu", "2026-01-02T03:04:05+00:00"):
        assert words_there in html


def test_table_cells_are_the_numbers_of_the_record() -> None:
    record = samples.delta(1, 128)
    table = module_table(record)
    heads = [c.head for c in table.columns]
    assert set(table.left_out) == {"r", "alpha", "scaling", "rule"}
    for module, row in zip(record.modules, table.rows, strict=True):
        cells = dict(zip(heads, row, strict=True))
        assert cells["module"].text == module.module
        assert float(cells["energy"].key) == module.energy
        assert float(cells["noise edge"].key) == module.noise_edge
        assert cells["shape"] == ("128 × 128", "16384")
        assert cells["stable rank"].key == ("" if module.stable_rank is None else str(module.stable_rank))


def test_table_of_nothing_known_keeps_names_and_dashes() -> None:
    table = module_table(samples.record([samples.unknown("x"), samples.module("w", [1.0])]))
    first = dict(zip([c.head for c in table.columns], table.rows[0], strict=True))
    assert first["energy"] == (words.UNKNOWN, "")
    assert [c.head for c in module_table(samples.record([])).columns] == [c.head for c in COLUMNS]


def test_verdicts_say_what_the_record_says() -> None:
    adapter = PAGES["adapter"]
    assert f"{adapter.summary.rank_90_mean:.3g} of 16 directions" in words.spectra_verdict(adapter)
    assert "Rounding hides part" in words.spectra_verdict(samples.delta(2, 128, limited=1.0))
    assert "Nothing was measured: 1 weight left out" in words.spectra_verdict(PAGES["empty"])
    cut = samples.module("cut", [2.0, 1.0], energy=10.0, complete=False, r=None, shape=(8, 8))
    assert "not known" in words.spectra_verdict(samples.record([cut], kind="delta"))


def test_a_simulation_puts_its_caveats_first() -> None:
    record = PAGES["simulation"]
    html = render_page(record)
    assert html.index("Scaling collapse is not a loss of capacity") < html.index("Key numbers")
    for update in record.updates.values():
        for row in update.rows:
            assert f"<td>{row.scaled_error.lora:.3f}</td><td>{row.closed_form.lora:.3f}</td>" in html


def test_a_record_without_a_page_is_refused_in_words() -> None:
    class Other(Record, frozen=True):
        FORMAT = "rankwise/other/1"

    other: Any = Other(format="rankwise/other/1", command=(), **samples.FIXED)
    with pytest.raises(RecordError, match=r"no page for a Other; pages show rankwise/spectra/1, rankwise/sim"):
        render_page(other)


def test_the_bundle_is_the_plotly_js_of_the_plotly_package() -> None:
    """A new plotly with another plotly.js asks for its own cartesian bundle: figures are checked against it."""
    head = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")[:300]
    found = re.search(r"plotly\.js v([0-9.]+)", head)
    assert found is not None
    assert f"plotly-cartesian-{found[1]}" == page_module.PLOTLY


def test_the_bundle_is_as_published_and_carries_its_licence() -> None:
    folder = resources.files("rankwise.report").joinpath("templates")
    bundle = folder.joinpath(f"{page_module.PLOTLY}.min.js").read_bytes()
    version = page_module.PLOTLY.rsplit("-", 1)[1]
    assert f"plotly.js (cartesian - minified) v{version}".encode() in bundle[:200]
    assert hashlib.sha256(bundle).hexdigest() == BUNDLE_SHA256, "npm: plotly.js-cartesian-dist-min"
    licence = folder.joinpath(f"{page_module.PLOTLY}.LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License")
    assert "Permission is hereby granted" in render_page(PAGES["one"])


def test_importing_the_report_pulls_in_no_torch_and_no_plotly() -> None:
    code = "import sys, rankwise.report; print(sorted({'torch', 'plotly', 'pandas'} & set(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(Path(page_module.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
