"""`report`: one page, or the figures alone, out of any records.

In: records, their files, folders of them. Out: a page and a report/1 record; or figures by name.

This module is light: `rankwise` imports it at once, so that `rankwise.report` is the function and not the package of
pages, which Python would else put there when that is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

import rankwise.report  # noqa: F401 - before the function of this name is

if TYPE_CHECKING:
    from rankwise.records import Record, ReportRecord
    from rankwise.report.drawing import Figure


def report(
    *files: str | PathLike[str] | Record,
    out: str | PathLike[str],
    figures: str | PathLike[str] | None = None,
    figure_formats: Sequence[str] = ("png", "svg", "csv"),
    browser: str | PathLike[str] | None = None,
    force: bool = False,
    command: Sequence[str] | None = None,
) -> ReportRecord:
    """Write one self-contained page out of any records.

    A sweep, or runs that differ in rank, rule, rate and seed alone, comes first with its answer; several records of
    another kind are compared; then each has what its own page shows.

    Args:
        files: records, files of them, folders of a sweep, of a run, or of record files.
        out: path of the page.
        figures: folder for the figures as files, named as `rankwise.figures` names them; made if it is not there.
        figure_formats: of "png", "svg" and "csv".
        browser: path or name of the Chromium, Chrome or Edge that draws PNG and SVG; the first on the path if None.
        force: whether files there are replaced.
        command: argv to write into the record.

    Returns:
        A report/1 record: what stands in the page.

    Raises:
        RecordError: a file is no record of rankwise, or a folder holds none.
        UsageError: a record was given twice.
        OutputExistsError: `out` or a figure's file is taken and `force` is not set.
        BrowserError: PNG or SVG are wanted, and there is no browser to draw them.
    """
    from rankwise.reporting.making import make_report
    from rankwise.reporting.saving import Saving

    saving = None if figures is None else Saving.of(figures, figure_formats, browser)
    return make_report(files, out=out, saving=saving, force=force, command=command)


def figures(*sources: str | PathLike[str] | Record) -> dict[str, Figure]:
    """Return the figures of a page by name, for notebooks and scripts.

    A figure shows itself in a notebook; `to_html()` is a page of it, `to_image()` a PNG or SVG, `to_csv()` its numbers,
    `to_plotly()` what plotly.py takes.

    Args:
        sources: records, files of them, folders, as `report` takes them.

    Returns:
        Name -> figure, in reading order. Where two parts have a figure of one name, the second is "NAME-2".

    Raises:
        RecordError: as `report`.
    """
    from rankwise.reporting.making import figures_by_name

    return figures_by_name(sources)
