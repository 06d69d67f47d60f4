"""Write the `--help` texts into the docs, or check that they are there word for word.

    python docs/tools/write_help.py [--check]

A help text stands in a fenced block after a line `<!-- help: rankwise inspect -->`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGES = (Path(__file__).parents[1] / "reference" / "cli.md",)
BLOCK = re.compile(r"(<!-- help: rankwise(?P<words>[^>]*?) -->\n+```text\n)(?P<text>.*?)(^```$)", re.S | re.M)


def help_text(words: str) -> str:
    """Return what `rankwise WORDS --help` prints on a terminal of 100 columns without colours."""
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    coloured = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
    environment = {k: v for k, v in os.environ.items() if k not in coloured} | plain
    command = [sys.executable, "-m", "rankwise", *shlex.split(words), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=True)
    return "".join(line.rstrip() + "\n" for line in done.stdout.strip("\n").splitlines())


def renewed(page: str) -> str:
    """Return the page with every help text as it is now."""
    return BLOCK.sub(lambda found: found[1] + help_text(found["words"]) + found[4], page)


def main() -> int:
    """Rewrite or check every page; 1 where a check found a difference."""
    parser = argparse.ArgumentParser(description="Write the --help texts into the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a text differs")
    check = parser.parse_args().check
    stale = 0
    for path in PAGES:
        old = path.read_text(encoding="utf-8")
        new = renewed(old)
        if old == new:
            continue
        stale += 1
        if check:
            difference = difflib.unified_diff(old.splitlines(), new.splitlines(), path.name, "--help", lineterm="")
            print("\n".join(difference))
        else:
            path.write_text(new, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
