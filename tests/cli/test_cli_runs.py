"""train, recall and demo as a script meets them: exit codes, what goes to which stream, what is left on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import make_pico

import rankwise
from rankwise.cli import main as cli
from rankwise.records import DryRunRecord, RecallRecord, RunRecord, read_record

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("trl", reason="trl comes with the train extra")

Run = Callable[..., tuple[int, str, str]]

QUICK = ("--steps", "2", "--batch-size", "4", "--rank", "4", "--save-every", "0", "--device", "cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process; gives (exit code, stdout, stderr)."""

    def call(*words: Any) -> tuple[int, str, str]:
        line = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["rankwise", *line])
        capsys.readouterr()
        code = cli.run(line)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Llama of two layers."""
    return make_pico(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ("Alderburgh", "Brambleport", "Coppermouth", "Doverhaven")
    made = [{"prompt": f"The office of {word} is in", "completion": f" {word}."} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def train(run: Run, pico: Path, rows: Path) -> Run:
    def call(*words: Any) -> tuple[int, str, str]:
        return run("train", pico, rows, *QUICK, "--forgetting-data", rows, *words)

    return call


@pytest.fixture(scope="module")
def done(pico: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "done"
    rankwise.train(
        str(pico), str(rows), out=out, rank=4, steps=2, batch_size=4, save_every=0, device="cpu", recall=False,
        forgetting_data=str(rows),
    )  # fmt: skip
    return out


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one message on stderr and no traceback."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.count("rankwise: error:") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


# --- train --------------------------------------------------------------------------------------------------


def test_a_run_has_its_settings_on_stderr_and_its_results_on_stdout(train: Run, tmp_path: Path) -> None:
    code, out, err = train("-o", tmp_path / "run")
    assert code == 0
    assert out.startswith("done: 2 steps, loss ")
    for words in ("as in training", "bits gained", "forgetting: ", f"adapter and run.json: {tmp_path / 'run'}"):
        assert words in out
    assert "2 steps of 4 examples" in err
    assert "scale of B A" in err
    assert "\r" not in err, "no bar where no terminal is"
    record = read_record(tmp_path / "run" / "run.json", RunRecord)
    assert record.command[:2] == ("rankwise", "train")
    assert record.command[-1] == str(tmp_path / "run")


def test_quiet_leaves_stderr_empty(train: Run, tmp_path: Path) -> None:
    code, out, err = train("-o", tmp_path / "run", "--quiet", "--no-recall")
    assert (code, err) == (0, "")
    assert out.startswith("done: 2 steps")
    assert "as in training" not in out


def test_json_is_the_record_and_nothing_else(train: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, _ = train("-o", tmp_path / "run", "--json", "--report", page)
    assert code == 0
    assert out == (tmp_path / "run" / "run.json").read_text()
    assert RunRecord.from_json(out).status == "done"
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_no_library_writes_on_stdout(pico: Path, rows: Path, tmp_path: Path) -> None:
    """In a process of its own, where what is printed before Python's streams are taken counts as well."""
    words = ["train", str(pico), str(rows), *QUICK, "-o", str(tmp_path / "run"), "--json", "--quiet"]
    ended = subprocess.run(
        [sys.executable, "-m", "rankwise", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert RunRecord.from_json(ended.stdout) == read_record(tmp_path / "run" / "run.json", RunRecord)


def test_a_run_needs_its_folder(run: Run, pico: Path, rows: Path) -> None:
    assert_refused(run("train", pico, rows), "train needs a folder for the run: -o RUN (or --dry-run")
    assert_refused(run("train", pico), "DATA")


def test_a_taken_folder_is_refused_and_force_replaces_a_run(train: Run, done: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(done, out)
    before = (out / "run.json").read_bytes()
    assert_refused(train("-o", out), str(out), "--force")
    assert (out / "run.json").read_bytes() == before
    assert train("-o", out, "--force", "--no-recall", "--seed", "5")[0] == 0
    assert read_record(out / "run.json", RunRecord).seed == 5
    (out / "thesis.txt").write_text("years of work")
    assert_refused(train("-o", out, "--force"), "thesis.txt")
    assert read_record(out / "run.json", RunRecord).seed == 5


def test_a_page_that_is_there_is_refused_before_the_training(train: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    assert_refused(train("-o", tmp_path / "run", "--report", page), "page.html")
    assert_refused(train("-o", tmp_path / "run", "--report", tmp_path / "none" / "page.html"), "there is no folder")
    assert page.read_text() == "mine"
    assert not (tmp_path / "run").exists()


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "preset": (("--preset", "facts"), "--preset: there is no 'facts'; there are: persona, knowledge"),
    "rule": (("--scaling", "rs"), "--scaling: there is no 'rs'"),
    "rank": (("--rank", "0"), "--rank must be 1 or more"),
    "optimizer": (("--optimizer", "magic"), "--optimizer: there is no 'magic'"),
    "modules": (("--target-modules", "no_such"), "no_such"),
    "plan": (("--plan", "none.json"), "none.json"),
    "context": (("--max-length", "129"), "past the model's context of 128 tokens"),
    "steps and epochs": (("--epochs", "1"), "give one"),
    "looks": (("--stop-when-unstable", "0"), "--stop-when-unstable must be 1 or more"),
    "resume": (("--resume",), "holds no run to resume"),
    "flag": (("--rang", "4"), "--rank"),
    "device": (("--device", "tpu"), "tpu"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_settings_are_refused_in_one_message(run: Run, pico: Path, rows: Path, tmp_path: Path, name: str) -> None:
    words, said = REFUSED[name]
    assert_refused(run("train", pico, rows, "--steps", "2", "-o", tmp_path / "run", *words), said)
    assert not (tmp_path / "run" / "run.json").exists()


DATA: dict[str, tuple[str, str]] = {
    "broken JSON": ('{"text": "a"}\n{"text": "b"\n', "line 2"),
    "no such column": ('{"text": "a"}\n{"tekst": "b"}\n', "line 2"),
    "not a string": ('{"text": "a"}\n\n{"text": 3}\n', "line 3"),
    "two forms": ('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "line 2"),
    "nothing": ("", "no rows"),
}


@pytest.mark.parametrize("name", DATA)
def test_bad_data_is_refused_and_the_line_is_named(run: Run, pico: Path, tmp_path: Path, name: str) -> None:
    text, said = DATA[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert_refused(run("train", pico, path, *QUICK, "-o", tmp_path / "run"), "rows.jsonl", said)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_or_data_that_are_not_there_are_refused(run: Run, pico: Path, rows: Path, tmp_path: Path) -> None:
    assert_refused(run("train", tmp_path / "none", rows, "-o", tmp_path / "run"), "none")
    assert_refused(run("train", pico, tmp_path / "none.jsonl", "-o", tmp_path / "run"), "none.jsonl")
    assert_refused(run("train", pico, "rankwise:fact", "-o", tmp_path / "run"), "there is no data set rankwise:fact")


# --- the dry run --------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(train: Run, tmp_path: Path) -> None:
    code, out, err = train("--dry-run", "-o", tmp_path / "run")
    assert (code, err) == (0, "")
    assert not (tmp_path / "run").exists()
    for words in ("2 steps of 4 examples", "trainable parameters", "4 examples", "optimizer state", "scale of B A"):
        assert words in out


def test_a_dry_run_with_json_is_the_record_and_nothing_else(train: Run) -> None:
    code, out, err = train("--dry-run", "--json")
    assert (code, err) == (0, "")
    record = DryRunRecord.from_json(out)
    assert out == record.to_json()
    assert (record.config.rank, record.config.steps, record.examples) == (4, 2, 4)
    assert record.command[-2:] == ("--dry-run", "--json")


def test_a_dry_run_refuses_what_the_run_would(run: Run, pico: Path, rows: Path) -> None:
    assert_refused(run("train", pico, rows, "--dry-run", "--preset", "facts"), "--preset")
    assert_refused(run("train", pico, rows, "--dry-run", "--max-length", "129"), "context of 128")
    assert_refused(run("train", pico, rows, "--dry-run", "--report", "page.html"), "leave out --report and --resume")
    assert_refused(run("train", pico, rows, "--dry-run", "--resume", "-o", "run"), "leave out --report and --resume")


@pytest.mark.parametrize("words", [("--save-every", "-1"), ("--monitor-every", "-1"), ("--stop-when-unstable", "0")])
def test_a_dry_run_refuses_every_flag_that_the_run_would(run: Run, pico: Path, rows: Path, words: Any) -> None:
    assert_refused(run("train", pico, rows, "--dry-run", *words), words[0])


# --- recall -------------------------------------------------------------------------------------------------


@pytest.fixture
def recall(run: Run, pico: Path, done: Path, rows: Path) -> Run:
    def call(*words: Any) -> tuple[int, str, str]:
        return run("recall", pico, done, rows, "--forgetting-data", rows, "--device", "cpu", *words)

    return call


def test_recall_shows_a_table(recall: Run, done: Path, rows: Path) -> None:
    code, out, err = recall()
    assert (code, err) == (0, "")
    assert out.startswith(f"{done} on {rows}\n")
    assert len([line for line in out.splitlines() if line.startswith("as in training")]) == 1
    assert "forgetting: " in out
    assert "in other words" not in out, "there are none for a user's rows"


def test_recall_with_json_is_the_record_and_nothing_else(recall: Run, tmp_path: Path) -> None:
    path, page = tmp_path / "recall.json", tmp_path / "page.html"
    code, out, err = recall("--json", "-o", path, "--report", page, "--quiet")
    assert (code, err) == (0, "")
    assert path.read_text() == out
    record = RecallRecord.from_json(out)
    assert (record.recall.kind, record.recall.facts) == ("loss", 4)
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert_refused(recall("-o", path), "recall.json", "--force")
    code, _, err = recall("-o", path, "--force")
    assert (code, err) == (0, f"wrote {path}\n")


def test_recall_refuses_what_is_no_adapter(run: Run, recall: Run, pico: Path, rows: Path, done: Path) -> None:
    assert_refused(run("recall", pico, pico, rows), "is a full checkpoint; ADAPTER is meant to be a LoRA adapter")
    assert_refused(run("recall", pico, done), "DATA")
    assert_refused(run("recall", pico, done, "rankwise:plain"), "holds no facts to ask for")
    assert_refused(recall("--max-length", "1"), "--max-length must be 2 or more")
    assert_refused(recall("--seed", "-1"), "--seed must be from 0 to")


# --- demo ---------------------------------------------------------------------------------------------------


def test_a_demo_is_refused_where_something_lies(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert_refused(run("demo", "-o", tmp_path), str(tmp_path), "--force")
    assert_refused(run("demo", "-o", tmp_path, "--force"), "holds more than a demo (thesis.txt)")
    assert_refused(run("demo", "-o", tmp_path / "thesis.txt"), "is a file; a folder was meant")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_shows_its_caveats_first_and_leaves_a_page(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are made up: what is tested here is what becomes of them."""
    import run_samples

    from rankwise.tuning import demonstration

    made = run_samples.demo()
    monkeypatch.setattr(demonstration, "demo", lambda **_: made)
    code, out, err = run("demo", "-o", tmp_path / "demo")
    assert (code, err) == (0, "")
    assert out.index(made.caveats[0][:40]) < out.index("bits/person") < out.index(made.reading[0][:40])
    assert out.count("rank 64, rslora") == 1
    page = (tmp_path / "demo" / "demo.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert_refused(run("demo", "-o", tmp_path / "demo"), "--force")
    code, out, err = run("demo", "-o", tmp_path / "demo", "--force", "--json")
    assert (code, out, err) == (0, made.to_json(), "")


def test_a_demo_writes_its_page_where_asked_and_runs_where_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import run_samples

    from rankwise.tuning import demonstration

    asked: list[object] = []

    def demo(**words: object) -> object:
        asked.append(words["device"])
        return run_samples.demo()

    monkeypatch.setattr(demonstration, "demo", demo)
    page = tmp_path / "page.html"
    assert run("demo", "-o", tmp_path / "a", "--report", page, "--json")[0] == 0
    assert page.read_bytes() == (tmp_path / "a" / "demo.html").read_bytes()
    assert_refused(run("demo", "-o", tmp_path / "b", "--report", page), str(page), "--force")
    assert run("demo", "-o", tmp_path / "b", "--device", "cuda", "--json")[0] == 0
    assert asked == ["cpu", "cuda"]
