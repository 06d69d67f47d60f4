"""Page assembly: figures, words and tables into one HTML document.

In: a record. Out: one document that holds its own styles, scripts and data, and forbids itself any
network by a content security policy. The same record gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rankwise.errors import RecordError
from rankwise.records import (
    ConversionRecord,
    CounterTestRecord,
    DemoRecord,
    ExtractionRecord,
    LintRecord,
    PlanRecord,
    ProbeRecord,
    RecallRecord,
    Record,
    RunRecord,
    SimulationRecord,
    SpectraRecord,
    StabilityRecord,
    SweepRecord,
)
from rankwise.report import words
from rankwise.report.conversion_contents import conversion_contents
from rankwise.report.demo_contents import demo_contents
from rankwise.report.drawing import Figure, Table
from rankwise.report.extraction_contents import extraction_contents
from rankwise.report.figures import FIGURES
from rankwise.report.lint_contents import lint_contents
from rankwise.report.plan_contents import plan_contents
from rankwise.report.probe_contents import counter_contents, probe_contents
from rankwise.report.run_contents import recall_contents, run_contents
from rankwise.report.stability_contents import stability_contents
from rankwise.report.sweep_contents import sweep_contents
from rankwise.report.table import module_table

PLOTLY: Final = "plotly-cartesian-4.1.1"
"""The bundle of plotly.js with scatter, bars and heat map: file name without its ending, version last."""


@cache
def _asset(name: str) -> str:
    return resources.files("rankwise.report").joinpath("templates", name).read_text(encoding="utf-8")


PAGE_SCRIPTS: Final = ("figures.js", "tables.js")
"""What a page runs beside the plotting library."""


@cache
def _scripts(own: tuple[str, ...] = PAGE_SCRIPTS) -> tuple[str, ...]:
    """Return the scripts of a page; the first carries its licence, as the licence asks."""
    licence = _asset(f"{PLOTLY}.LICENSE").replace("*/", "* /").strip()
    return (f"/*\n{licence}\n*/\n{_asset(f'{PLOTLY}.min.js')}", *map(_asset, own))


@cache
def _policy(own: tuple[str, ...] = PAGE_SCRIPTS) -> str:
    """Return a content security policy: these scripts, by their hashes, and nothing from elsewhere."""
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in _scripts(own)]
    hashes = " ".join(f"'sha256-{d}'" for d in digests)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {hashes}; {rest}"


def _json(value: Any) -> Markup:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _coded(text: str) -> Markup:
    """Return escaped text in which `words between backticks` are set as code."""
    parts = str(escape(text)).split("`")
    if len(parts) % 2 == 0:  # an odd backtick: no pairs to trust
        return Markup("`".join(parts))
    return Markup("".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts)))


def _breaking(path: str) -> Markup:
    """Return an escaped dotted path that may break after each dot."""
    return Markup(str(escape(path)).replace(".", ".<wbr>"))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("rankwise.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"json": _json, "coded": _coded, "breaking": _breaking}
    return environment


def figures_of(record: Record) -> list[Figure]:
    """Return the figures of a record, in reading order; those with nothing to draw are left out."""
    drawn = [row.draw(record) for row in FIGURES.values() if isinstance(record, row.record)]
    return [figure for figure in drawn if figure is not None]


def _spectra(record: SpectraRecord) -> dict[str, Any]:
    return {
        "verdict": words.spectra_verdict(record),
        "facts": words.spectra_facts(record),
        "findings": record.summary.findings,
        "counted": words.counted(record.summary.findings),
        "table": module_table(record),
        "skipped": record.skipped,
    }


def _scale_table(record: SimulationRecord) -> Table:
    rows = tuple((str(s.rank), words.number(s.lora, 4), words.number(s.rslora, 4)) for s in record.scales)
    caption = f"Factor on B A at alpha = {record.lora_alpha:g}"
    return Table(caption, ("rank", "lora: alpha / r", "rslora: alpha / √r"), rows)


def _error_tables(record: SimulationRecord) -> list[Table]:
    head = ("rank", "energy", "truncated SVD", "× alpha / r", "closed form", "× alpha / √r", "closed form")
    tables = []
    for name, update in record.updates.items():
        rows = []
        for r in update.rows:
            scaled, closed = r.scaled_error, r.closed_form
            errors = (r.truncation_error, scaled.lora, closed.lora, scaled.rslora, closed.rslora)
            rows.append((str(r.rank), words.share(r.energy_share), *(f"{e:.3f}" for e in errors)))
        tables.append(Table(f"{name} ({update.planted}): relative error by rank", head, tuple(rows)))
    return tables


def _simulation(record: SimulationRecord) -> dict[str, Any]:
    return {
        "verdict": words.simulation_verdict(record),
        "facts": words.simulation_facts(record),
        "notes": record.notes,
        "scale_table": _scale_table(record),
        "error_tables": _error_tables(record),
    }


PAGES: Final[dict[type[Record], tuple[str, Callable[[Any], dict[str, Any]]]]] = {
    SpectraRecord: ("spectra.html", _spectra),
    SimulationRecord: ("simulation.html", _simulation),
    PlanRecord: ("plan.html", plan_contents),
    ConversionRecord: ("conversion.html", conversion_contents),
    ExtractionRecord: ("extraction.html", extraction_contents),
    RunRecord: ("run.html", run_contents),
    RecallRecord: ("recall.html", recall_contents),
    LintRecord: ("lint.html", lint_contents),
    DemoRecord: ("demo.html", demo_contents),
    ProbeRecord: ("probe.html", probe_contents),
    CounterTestRecord: ("counter_test.html", counter_contents),
    StabilityRecord: ("stability.html", stability_contents),
    SweepRecord: ("sweep.html", sweep_contents),
}
"""Record class -> template and the function that fills it."""


def render_page(
    record: SpectraRecord
    | SimulationRecord
    | PlanRecord
    | ConversionRecord
    | ExtractionRecord
    | RunRecord
    | RecallRecord
    | DemoRecord
    | LintRecord
    | StabilityRecord
    | ProbeRecord
    | CounterTestRecord
    | SweepRecord,
) -> str:
    """Return one self-contained HTML document: it opens without a network, in light and dark.

    Args:
        record: what a command returned.

    Raises:
        RecordError: there is no page for this kind of record.
    """
    template, fill = page_of(record)
    figures = figures_of(record)
    return render(
        template,
        layout="page.html",
        title=words.title(record),
        figures={f.name: f for f in figures},
        numbers={f.name: index for index, f in enumerate(figures, start=1)},
        specs=[(f.name, f.spec()) for f in figures],
        provenance=words.provenance(record),
        **fill(record),
    )


def page_of(record: Record) -> tuple[str, Callable[[Any], dict[str, Any]]]:
    """Return the template of a record and the function that fills it.

    Raises:
        RecordError: there is no page for this kind of record.
    """
    if type(record) not in PAGES:
        made = ", ".join(kind.FORMAT for kind in PAGES)
        raise RecordError(f"there is no page for a {type(record).__name__}; pages show {made}")
    return PAGES[type(record)]


def render_figure(figure: Figure) -> str:
    """Return one figure as a page of its own."""
    specs = [(figure.name, figure.spec())]
    return render("figure.html", title=figure.title, verdict=figure.alt, figure=figure, number=1, specs=specs)


def render_jobs(jobs: Sequence[dict[str, Any]]) -> str:
    """Return the page that draws pictures for `picturing`, and has nothing for people to read."""
    return render("picture.html", own=("picture.js",), jobs=jobs)


def render(template: str, *, own: tuple[str, ...] = PAGE_SCRIPTS, **values: Any) -> str:
    """Return a template filled with values, and with the style and the scripts that every page has."""
    scripts = [Markup(s) for s in _scripts(own)]
    assets = {"style": Markup(_asset("style.css")), "scripts": scripts, "policy": _policy(own)}
    html = _environment().get_template(template).render(assets | values)
    # a path that is no UTF-8 reaches us as lone surrogates, which no file can hold
    return html.encode("utf-8", "replace").decode("utf-8")
