"""Write the table of runtimes into the docs, or check that it is there word for word.

    python docs/tools/write_runtimes.py [--check]

What stands between the two marks of docs/reference/runtimes.md is made from `rankwise.runtimes.RUNTIMES`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rankwise.runtimes import RUNTIMES, Runtime

PAGE = Path(__file__).parents[1] / "reference" / "runtimes.md"
BEGIN, END = "<!-- runtimes: begin -->\n", "<!-- runtimes: end -->\n"


def _word(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known"}[value]


def _cap(row: Runtime) -> str:
    if row.cap_flag is None:
        return "none"
    return f"`{row.cap_flag}`" + ("" if row.default_cap is None else f", {row.default_cap} if not set")


def _factor(row: Runtime) -> str:
    if not row.reads_config:
        return "alpha in the weights / own rank; 1 where there is none"
    alpha = "own alpha" if row.reads_alpha_pattern else "the config's alpha"
    rank = "own rank" if row.reads_rank_pattern else "the config's r"
    return f"{alpha} / {rank}" + (", or its square root" if row.uses_rslora else "")


def rendered() -> str:
    """Return the tables of all runtimes."""
    lines = [
        "| runtime | factor that it applies | `use_rslora` | own rank | own alpha | cap on the rank |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in RUNTIMES.values():
        own = (row.uses_rslora, row.reads_rank_pattern, row.reads_alpha_pattern)
        lines.append(f"| {row.name} | {_factor(row)} | {' | '.join(_word(v) for v in own)} | {_cap(row)} |")
    lines += [
        "",
        "| runtime | whole weights | embedding tables | DoRA | whole alphas only |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in RUNTIMES.values():
        taken = (row.takes_modules_to_save, row.takes_embeddings, row.takes_dora, row.integer_alpha)
        lines.append(f"| {row.name} | {' | '.join(_word(v) for v in taken)} |")
    for row in RUNTIMES.values():
        how = "" if row.verified else " Not confirmed at a newer version."
        lines += ["", f"## {row.name}", "", f"Read in `{row.source}` at {row.version}, {row.read}.{how}", ""]
        if row.accepts is not None:
            lines += [f"- Ranks that the cap may be set to: {', '.join(str(r) for r in row.accepts)}."]
        lines += [f"- {fact}" for fact in row.facts]
        lines += [f"- Thread: <{thread}>" for thread in row.threads]
    return "\n".join(lines) + "\n"


def renewed(page: str) -> str:
    """Return the page with the tables as they are now."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + "\n" + rendered() + "\n" + END + rest.partition(END)[2]


def main() -> int:
    """Rewrite or check the page; 1 where a check found a difference."""
    parser = argparse.ArgumentParser(description="Write the table of runtimes into the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page differs")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = renewed(old)
    if old != new and not check:
        PAGE.write_text(new, encoding="utf-8")
        print(f"wrote {PAGE}")
    return 1 if check and old != new else 0


if __name__ == "__main__":
    sys.exit(main())
