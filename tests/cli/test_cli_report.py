"""report as a script meets it: exit codes, streams, what is left on the disk; without torch and ray."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "report"))

import page_samples
import sweep_samples

from rankwise.cli import main as cli
from rankwise.records import ReportRecord, to_json

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process; gives (exit code, stdout, stderr)."""

    def call(*words: Any) -> tuple[int, str, str]:
        typed = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["rankwise", *typed])
        capsys.readouterr()
        code = cli.run(typed)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def records(tmp_path: Path) -> list[Path]:
    """A sweep and a spectra record."""
    made = {"sweep.json": sweep_samples.sweep(), "adapter.json": page_samples.adapter(1)}
    for name, record in made.items():
        (tmp_path / name).write_text(to_json(record), encoding="utf-8")
    return [tmp_path / name for name in made]


def test_the_answer_and_the_parts_are_on_stdout(run: Run, records: list[Path], tmp_path: Path) -> None:
    code, out, err = run("report", *reversed(records), "-o", tmp_path / "page.html")
    assert code == 0
    assert "Raising the rank" in out.splitlines()[0]
    assert "What the adapter" in out
    assert err == f"wrote {tmp_path / 'page.html'}\n"
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "rankwise report" in html  # the command, at its end
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "page.html", "sweep.json"]


def test_json_is_a_record_and_nothing_else(run: Run, records: list[Path], tmp_path: Path) -> None:
    code, out, err = run("report", *records, "-o", tmp_path / "page.html", "--json", "--quiet")
    assert (code, err) == (0, "")
    made = ReportRecord.from_json(out)
    assert [part.kind for part in made.parts] == ["sweep", "inspect"]
    assert made.command[:2] == ("rankwise", "report")
    assert made.out == str(tmp_path / "page.html")


def refused(result: tuple[int, str, str], told: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert told in err
    assert err.count("rankwise: error:") == 1
    assert "Traceback" not in err


def test_what_cannot_be_is_one_message_and_no_file(run: Run, records: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    cut = tmp_path / "cut.json"
    cut.write_bytes(records[0].read_bytes()[:1000])
    refused(run("report", "-o", page), "report needs records")
    refused(run("report", *records), "report needs a page to write: -o FILE.html")
    refused(run("report", cut, "-o", page), "cut.json is not a rankwise record")
    refused(run("report", records[0], cut, "-o", page), "cut.json")
    refused(run("report", records[0], records[0], "-o", page), "is given twice")
    refused(run("report", tmp_path / "none", "-o", page), "none cannot be read")
    refused(run("report", *records, "-o", tmp_path), "is a folder")
    refused(run("report", *records, "-o", tmp_path / "no" / "page.html"), "there is no folder")
    refused(run("report", *records, "-o", page, "--device", "cuda"), "on the cpu only")
    refused(run("report", *records, "-o", page, "--depth", "3"), "--depth")
    assert not page.exists()
    page.write_text("mine", encoding="utf-8")
    refused(run("report", *records, "-o", page), "exists already")
    assert page.read_text(encoding="utf-8") == "mine"
    assert run("report", *records, "-o", page, "--force")[0] == 0
    assert not list(tmp_path.glob(".*"))  # no part of a page is left


def test_a_page_needs_neither_torch_nor_ray(records: list[Path], tmp_path: Path) -> None:
    """In an interpreter in which neither can be imported."""
    code = (
        "import sys, json\n"
        "for name in ('torch', 'ray', 'transformers', 'peft', 'pandas', 'plotly'): sys.modules[name] = None\n"
        "from rankwise.cli.main import run\n"
        f"code = run(['report', *{[str(r) for r in records]!r}, '-o', {str(tmp_path / 'page.html')!r}, '--json'])\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["parts"]) == 2
