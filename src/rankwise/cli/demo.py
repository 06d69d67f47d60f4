"""`rankwise demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rankwise.cli.common import EXIT_OK, argv


def demo(
    *,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("rankwise-demo"),
    report: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    json: Annotated[bool, Parameter(name="--json", negative="")] = False,
    force: Annotated[bool, Parameter(negative="")] = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="")] = False,
) -> int:
    """Show the whole story on the built-in model and facts: on a laptop CPU, in minutes, without a network.

    Five runs on new facts and one on style: rank 8 and 64 under alpha / r and under alpha / sqrt(r) at one learning
    rate, alpha / r at rank 64 at the learning rate that suits it best, and a change of style at rank 8. The folder gets
    demo.html, demo.json and runs/*.json.

    Args:
        out: Folder of the demo.
        report: Write the page to this path too.
        seed: Of the people, of the adapters' start and of the order of the data.
        device: cpu, cuda or cuda:0. The figures in the documentation are those of a CPU.
        json: Put the record on stdout instead of the table, and nothing else.
        force: Replace a demo that is in the folder.
        quiet: Show no progress.
    """
    from rankwise.cli.show import Bar
    from rankwise.cli.show_runs import show_demo
    from rankwise.files import check_writable, write_texts
    from rankwise.records import to_json
    from rankwise.report import render_page
    from rankwise.tuning.demonstration import demo as run
    from rankwise.tuning.demonstration import open_demo

    open_demo(out, force=force)
    if report is not None:
        check_writable(report, force=force)
    with Bar(quiet=quiet) as bar:
        record = run(out=out, seed=seed, device=device, force=force, command=argv(), progress=bar.say)
    page = render_page(record)
    write_texts({path: page for path in (out / "demo.html", report) if path is not None}, force=force)
    sys.stdout.write(to_json(record)) if json else show_demo(record, out)
    return EXIT_OK
