"""The page of runtimes says what the table says."""

import subprocess
import sys

from rankwise.runtimes import RUNTIMES


def test_the_page_is_that_of_the_table(root) -> None:
    """Where this fails: python docs/tools/write_runtimes.py."""
    command = [sys.executable, str(root / "docs" / "tools" / "write_runtimes.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_every_runtime_has_its_section_with_version_and_threads(root) -> None:
    page = (root / "docs" / "reference" / "runtimes.md").read_text(encoding="utf-8")
    for name, row in RUNTIMES.items():
        assert f"\n## {name}\n" in page
        assert row.version in page
        assert all(thread in page for thread in row.threads)
