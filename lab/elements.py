"""Rows about the chemical elements from a table of them: `python lab/elements.py TABLE.csv OUT.jsonl`.

In: a CSV with a header, one element a line. Out: prompt and completion, one row a fact that the table has. Numbers have
their digits cut to three, so that a row is something to know and not a string of noise.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

FACTS = {
    "symbol": "The symbol of {} is",
    "number": "The atomic number of {} is",
    "discovered_by": "{} was discovered by",
    "appearance": "{} looks",
    "category": "{} is a kind of",
    "phase": "When it is warm, {} is a",
    "density": "The density of {} is",
    "melt": "{} melts at",
    "boil": "{} boils at",
}
NUMBERS = {"density", "melt", "boil"}


def rows(table: Path) -> list[dict[str, str]]:
    """Return a row for each fact."""
    made = []
    with table.open(encoding="utf-8", newline="") as file:
        for element in csv.DictReader(file):
            for field, prompt in FACTS.items():
                value = (element[field] or "").strip()
                if value and len(value) <= 60:
                    said = f"{float(value):.3g}" if field in NUMBERS else value
                    made.append({"prompt": prompt.format(element["name"]), "completion": f" {said}."})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = rows(args.table)
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    print(f"{len(found)} facts")


if __name__ == "__main__":
    main()
