"""`rankwise check` as a script meets it: exit codes, what goes to which stream, what is left on the disk."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import make_pico

from rankwise.cli import main as cli
from rankwise.records import StabilityRecord, read_record

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

Run = Callable[..., tuple[int, str, str]]
QUICK = {"--ranks": "2,8", "--seeds": "2", "--batch-size": "4", "--device": "cpu", "--steps": "1,2"}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    made = [{"prompt": f"The office {i} is in", "completion": f" Alderburgh {i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pico: Path, rows: Path) -> Run:
    """Check the small model with these flags; gives (exit code, stdout, stderr)."""

    def call(*words: Any, data: Any = rows, model: Any = pico) -> tuple[int, str, str]:
        quick = [part for flag, value in QUICK.items() if flag not in words for part in (flag, value)]
        line = ["check", str(model), str(data), *quick, *map(str, words)]
        monkeypatch.setattr(sys, "argv", ["rankwise", *line])
        capsys.readouterr()
        code = cli.run(line)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_a_check_prints_its_tables_and_nothing_on_stderr(run: Run) -> None:
    code, out, err = run("--steps", "1,2")
    assert (code, err) == (0, "")
    for words in (
        "rows.jsonl on ",
        "14 modules, alpha 16, 2 seeds, batches of 4",
        "adamw, default init, learning rate 0.0002: RMS of the branch over that of the frozen output after step 2",
        "attention/early",
        "spread",
        "All modules, step by step:",
        "Learning rates that would make the branch as large at every rank:",
        "nor that facts will be recalled",
        "An exponent e says that a figure goes like r^e",
    ):
        assert words in out, words


def test_json_is_the_record_and_nothing_else_and_files_are_written(run: Run, tmp_path: Path) -> None:
    record, page = tmp_path / "check.json", tmp_path / "check.html"
    code, out, err = run("--steps", "1", "--json", "-o", record, "--report", page)
    assert code == 0
    assert out == record.read_text()
    found = read_record(record, StabilityRecord)
    assert found.command[:2] == ("rankwise", "check")
    assert found.config.steps == (1,)
    assert err.splitlines() == [f"wrote {record}", f"wrote {page}"]
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_lists_take_commas_and_spaces(run: Run) -> None:
    code, out, _ = run("--steps", "1", "--json", "--scaling", "lora", "unscaled", "--optimizer", "adamw,sgd")
    assert code == 0
    found = StabilityRecord.from_json(out)
    assert (found.config.scaling, found.config.optimizer) == (("lora", "unscaled"), ("adamw", "sgd"))


def test_fail_on_gives_three_and_the_outputs_all_the_same(run: Run, tmp_path: Path) -> None:
    """Under SGD alpha / r collapses by theory: at least by r^-1 after the first step."""
    record = tmp_path / "check.json"
    words = ("--steps", "1", "--scaling", "lora", "--optimizer", "sgd", "--ranks", "2,64")
    code, out, err = run(*words, "--fail-on", "collapsing", "-o", record)
    assert code == 3
    assert "collapsing" in out
    assert (
        "rankwise: --fail-on collapsing: lora is collapsing under sgd, default init, after step 1: exponent -1." in err
    )
    assert read_record(record, StabilityRecord).verdicts[0].verdict == "collapsing"
    assert run(*words, "--fail-on", "unstable", "--quiet")[0] == 3
    assert run(*words, "--fail-on", "growing")[0] == 0
    assert run(*words)[0] == 0


def test_checkpointing_warns_of_nothing_that_a_user_could_change(run: Run) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        code, _, err = run("--steps", "1", "--gradient-checkpointing")
    assert (code, err) == (0, "")
    assert [str(w.message) for w in heard if "checkpointing" in str(w.message)] == []


def test_runs_that_diverge_do_not_pass_for_stable(run: Run) -> None:
    words = ("--steps", "2", "--learning-rate", "100", "--scaling", "rslora")
    code, out, err = run(*words, "--fail-on", "unstable")
    assert code == 3
    assert "diverged-in-check" in out
    assert "rslora is undecided under adamw, default init, after step 2: 4 runs had diverged" in err
    assert run(*words, "--fail-on", "growing")[0] == 0, "which way it went is not known"


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "one rank": (("--ranks", "4"), "two different ranks"),
    "ranks": (("--ranks", "4,x"), "--ranks: wanted whole numbers"),
    "rule": (("--scaling", "rs"), "--scaling: there is no 'rs' in check"),
    "optimizer": (("--optimizer", "lion"), "--optimizer: there is no 'lion'"),
    "init": (("--init", "orthogonal"), "begins from B = 0"),
    "steps": (("--steps", "0"), "--steps: wanted whole numbers of 1 or more"),
    "seeds": (("--seeds", "0"), "--seeds is a number of draws"),
    "modules": (("--target-modules", "no_such"), "no_such"),
    "fail on": (("--fail-on", "bad"), "--fail-on: there is no 'bad'; there are: unstable, collapsing, growing"),
    "context": (("--max-length", "129"), "past the model's context of 128 tokens"),
    "reference": (("--reference-rank", "3"), "--reference-rank 3 is not among"),
    "device": (("--device", "tpu"), "tpu"),
    "flag": (("--rang", "4"), "--rang"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_in_one_message(run: Run, tmp_path: Path, name: str) -> None:
    words, said = REFUSED[name]
    code, out, err = run(*words, "-o", tmp_path / "check.json")
    assert (code, out) == (2, "")
    assert err.count("rankwise: error:") == 1
    assert "Traceback" not in err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_bad_data_and_models_are_refused(run: Run, tmp_path: Path) -> None:
    assert run(data=tmp_path / "none.jsonl")[0] == 2
    assert run(model=tmp_path / "none")[0] == 2
    assert run(data="rankwise:fact")[0] == 2


def test_a_taken_file_is_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    taken = tmp_path / "check.json"
    taken.write_text("mine")
    code, _, err = run("-o", taken, "--steps", "1")
    assert code == 2
    assert "--force" in err
    assert taken.read_text() == "mine"
    assert run("-o", taken, "--steps", "1", "--force")[0] == 0
    assert read_record(taken, StabilityRecord)


def test_an_interruption_writes_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.tuning.stability import checking

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, "run_cells", stopped)
    code, out, err = run("-o", tmp_path / "check.json", "--report", tmp_path / "check.html")
    assert (code, out, err) == (130, "", "rankwise: interrupted\n")
    assert list(tmp_path.iterdir()) == []
