"""`rankwise report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rankwise.cli.common import EXIT_OK, OUTPUT, Words, argv


def report(
    *files: Path,
    out: Annotated[Path | None, Parameter(name=["--out", "-o", "--report"], group=OUTPUT)] = None,
    figures: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    figure_formats: Annotated[Words, Parameter(group=OUTPUT)] = ("png", "svg", "csv"),
    browser: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    device: str = "cpu",
    seed: int | None = None,  # noqa: ARG001 - every command takes it
    json: Annotated[bool, Parameter(name="--json", negative="", group=OUTPUT)] = False,
    force: Annotated[bool, Parameter(negative="", group=OUTPUT)] = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", group=OUTPUT)] = False,
) -> int:
    """Write one self-contained page out of any records.

    A sweep comes first with its answer: its folder, sweep.json, or runs that differ in rank, rule, rate and seed alone.
    Several records of one other kind are compared. Then each record has what its own page shows. Every figure can be
    saved as PNG, SVG or CSV by the buttons in the page, or all of them at once by --figures.

    Args:
        files: Records as -o and --json write them, folders of a sweep or a run, folders of such files.
        out: The page, such as report.html; --report is the same here.
        figures: Also write every figure into this folder.
        figure_formats: As png, svg, csv; png and svg are drawn by Chromium, Chrome or Edge, csv needs none.
        browser: Path or name of that browser; the first on the path by default.
        device: Always cpu, as nothing is computed.
        seed: Taken as every command takes it; nothing here is random.
        json: Put a record of what is in the page on stdout instead of the table, and nothing else.
        force: Overwrite a file that exists.
        quiet: Do not say on stderr what was written.
    """
    from rankwise.cli.show_report import show_report
    from rankwise.errors import DeviceError, UsageError
    from rankwise.records import to_json
    from rankwise.reporting import report as run

    if device != "cpu":
        raise DeviceError(f"report computes on the cpu only, got --device {device}")
    if out is None:
        raise UsageError("report needs a page to write: -o FILE.html")
    record = run(
        *files,
        out=out,
        figures=figures,
        figure_formats=figure_formats,
        browser=browser,
        force=force,
        command=argv(),
    )
    if json:
        sys.stdout.write(to_json(record))
    else:
        show_report(record)
    if not quiet:
        print(f"wrote {out}" + (f" and the figures in {figures}" if figures else ""), file=sys.stderr)
    return EXIT_OK
