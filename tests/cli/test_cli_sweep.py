"""sweep as a script meets it: exit codes, streams, what is left on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import make_pico

import rankwise
from rankwise.cli import main as cli
from rankwise.cli.show_sweeps import line, show_sweep, standing_table
from rankwise.joining import ENVIRONMENT
from rankwise.records import RunRecord, SweepDryRunRecord, SweepRecord, read_record
from rankwise.sweeping.grid import make_grid
from rankwise.sweeping.recording import make_record
from rankwise.sweeping.running import Standing

pytest.importorskip("ray", reason="ray comes with the cluster extra")
pytest.importorskip("trl", reason="trl comes with the train extra")

Run = Callable[..., tuple[int, str, str]]

SMALL = ("--ranks", "2", "4", "--scaling", "rslora", "--learning-rates", "1e-2,1e-3", "--seeds", "0,3")
QUICK = ("--steps", "2", "--batch-size", "4", "--device", "cpu")
SWEPT = ("--ranks", "2,4", "--scaling", "rslora", "--learning-rates", "1e-2", "--seeds", "1", *QUICK)


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


@pytest.fixture(scope="module")
def swept(pico: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A sweep by the command itself, in a process of its own, on a Ray that it starts and stops."""
    out = tmp_path_factory.mktemp("sweeps") / "out"
    line = [sys.executable, "-m", "rankwise", "sweep", pico, rows, "-o", out, *SWEPT, "--forgetting-data", rows]
    line += ["--jobs", "1", "--keep-adapters"]
    return out, subprocess.run(line, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=280)


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one message on stderr and no traceback."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.count("rankwise: error:") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_a_sweep_says_its_answers_on_stdout_and_nothing_on_stderr(swept: tuple[Path, Any]) -> None:
    out, done = swept
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress where no terminal is, and no word of Ray's"
    assert "2 runs: 2 done" in done.stdout
    assert "- alpha / sqrt(r): best learning rates" in done.stdout
    assert "[best-rate-on-edge]" in done.stdout
    assert "[one-seed]" in done.stdout
    record = SweepRecord.from_json((out / "sweep.json").read_text())
    assert record.command[:2] == ("rankwise", "sweep")
    assert {c.name for c in out.iterdir()} >= {
        "sweep.json",
        "results.csv",
        "rank=2,scaling=rslora,lr=0.01,seed=0",
        "rank=4,scaling=rslora,lr=0.01,seed=0",
    }


@pytest.mark.slow
def test_a_cell_is_what_train_says(swept: tuple[Path, Any], pico: Path, rows: Path, tmp_path: Path) -> None:
    """With the same flags: recall and forgetting included, and the adapter where that is asked for."""
    out, _ = swept
    record = SweepRecord.from_json((out / "sweep.json").read_text())
    cell = out / "rank=4,scaling=rslora,lr=0.01,seed=0"
    alone = rankwise.train(
        str(pico), str(rows), out=tmp_path / "alone", rank=4, scaling="rslora", learning_rate=1e-2, seed=0,
        steps=2, batch_size=4, device="cpu", forgetting_data=str(rows), save_every=0,
    )  # fmt: skip
    run = read_record(cell / "run.json", RunRecord)
    assert run.config == alone.config
    # both on one thread of one machine; kernels may still be chosen by the process's history
    assert run.loss == pytest.approx(alone.loss, rel=1e-5)
    assert run.recall is not None
    assert alone.recall is not None
    assert run.recall.bits == pytest.approx(alone.recall.bits, rel=1e-4, abs=1e-4)
    assert run.forgetting == pytest.approx(alone.forgetting, rel=1e-4, abs=1e-5)
    assert record.cells[0].params == record.cells[1].params // 2
    assert (record.cells[1].bits, record.cells[1].forgetting) == (run.recall.bits, run.forgetting)
    assert json.loads((cell / "adapter_config.json").read_text())["r"] == 4
    assert (cell / "adapter_model.safetensors").stat().st_size > 0
    assert not list(cell.glob("checkpoint-*"))


def test_the_same_command_again_has_nothing_to_do(swept: tuple[Path, Any], run: Run, pico: Path, rows: Path) -> None:
    out, _ = swept
    code, printed, err = run("sweep", pico, rows, "-o", out, *SWEPT, "--forgetting-data", rows, "--json")
    assert (code, err) == (0, "")
    assert printed == (out / "sweep.json").read_text()
    assert len(SweepRecord.from_json(printed).cells) == 2
    assert_refused(
        run("sweep", pico, rows, "-o", out, *SWEPT[:-6], "--steps", "3", *QUICK[2:], "--forgetting-data", rows),
        "was run with steps 2, not 3",
    )


def test_a_dry_run_lists_the_cells_and_what_they_cost(
    swept: tuple[Path, Any], run: Run, pico: Path, rows: Path, tmp_path: Path
) -> None:
    code, printed, err = run("sweep", pico, rows, *SMALL, *QUICK, "--dry-run")
    assert (code, err) == (0, "")
    assert printed.count("rank=") == 8
    assert "rank=4,scaling=rslora,lr=0.001,seed=3" in printed
    assert "8 runs, 8 to do; 2 steps of training each" in printed
    assert "FLOP" in printed
    out, _ = swept
    code, printed, _ = run(
        "sweep", pico, rows, "-o", out, *SMALL, *QUICK, "--forgetting-data", rows, "--dry-run", "--json"
    )
    found = SweepDryRunRecord.from_json(printed)
    assert found.there == ("rank=2,scaling=rslora,lr=0.01,seed=0", "rank=4,scaling=rslora,lr=0.01,seed=0")
    assert found.seconds is not None, "two runs are there to go by"


def test_a_config_file_and_flags_over_it(run: Run, pico: Path, rows: Path, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(f"model: {pico}\ndata: {rows}\nranks: [2]\nscaling: [lora]\nlearning-rates: 1e-3\nsteps: 2\n")
    code, printed, err = run(
        "sweep", "--config", config, "--ranks", "8", "--seeds", "1", "--device", "cpu", "--dry-run"
    )
    assert (code, err) == (0, "")
    assert printed.startswith("rank=8,scaling=lora,lr=0.001,seed=0\n1 runs")


def test_an_export_goes_to_stdout_or_to_a_file_and_runs_nothing(run: Run, tmp_path: Path) -> None:
    code, printed, err = run("sweep", "org/model", "org/data", *SMALL, "--export", "axolotl")
    assert (code, err) == (0, "")
    assert "lora_r: 4" in printed
    path = tmp_path / "sweep.yml"
    assert run("sweep", "org/model", "org/data", *SMALL, "--export", "wandb", "-o", path)[:2] == (0, "")
    assert "method: grid" in path.read_text()
    assert_refused(run("sweep", "org/model", "org/data", *SMALL, "--export", "wandb", "-o", path), "exists already")


def test_results_of_peft_are_read_without_model_or_data(run: Run, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "sweeping"))
    try:
        from test_exports_imports import result
    finally:
        sys.path.pop(0)
    results = tmp_path / "results"
    results.mkdir()
    for rank in (32, 64):
        (results / f"lora--r{rank}.json").write_text(json.dumps(result(rank, accuracy=rank / 100)))
    code, printed, _ = run("sweep", "--import", results, "-o", tmp_path / "out")
    assert code == 0
    assert "64.0%" in printed
    assert len(SweepRecord.from_json((tmp_path / "out" / "sweep.json").read_text()).cells) == 2
    assert (tmp_path / "out" / "results.csv").read_text().count("\n") == 3
    assert_refused(run("sweep", "m", "d", "--import", results, "-o", tmp_path / "new"), "--import reads results")
    assert_refused(run("sweep", "--import", results), "-o DIR")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("m", "d"), "sweep needs a folder: -o DIR"),
        (("m", "-o", "x"), "needs a MODEL and DATA"),
        (("m", "d", "--ranks", "a", "-o", "x"), "wanted whole numbers"),
        (("m", "d", "--learning-rates", "fast", "-o", "x"), "wanted numbers such as 1e-3,3e-3; got 'fast'"),
        (("m", "d", "--seeds", "0", "-o", "x"), "--seeds must be 1 or more"),
        (("m", "d", "--scaling", "sqrt", "-o", "x"), "there is no 'sqrt'"),
        (("m", "d", "--steps", "2", "--epochs", "1", "-o", "x"), "both say how long"),
        (("m", "d", "--config", "none.yaml", "-o", "x"), "none.yaml cannot be read"),
        (("m", "d", "--export", "optuna"), "there are: axolotl, wandb"),
        (("m", "d", "--cluster", "127.0.0.1:1", "-o", "x"), "127.0.0.1:1"),
        (("m", "d", "--report", "x/page.html", "-o", "x"), "lies in the folder of the sweep"),
        (("m", "d", "--cpus-per-run", "4000", "-o", "x"), "no node has that"),
    ],
)
def test_what_cannot_be_is_refused(
    ray_local: Any, words: tuple[str, ...], told: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run("sweep", *words), told)
    assert not list(tmp_path.glob("x/rank=*"))
    assert not (tmp_path / "x" / "sweep.json").exists()


def test_a_model_that_is_not_there_is_said_once(ray_local: Any, run: Run, rows: Path, tmp_path: Path) -> None:
    """Found by a worker, said as if it had been found here."""
    out = tmp_path / "out"
    assert_refused(run("sweep", tmp_path / "no-model", rows, "-o", out, *SMALL, *QUICK), "no-model")
    assert not list(out.glob("rank=*"))


def test_the_live_table() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "sweeping"))
    try:
        from stand_ins import row
    finally:
        sys.path.pop(0)
    grid = make_grid((4, 16), ("lora",), (1e-3, 1e-2), (0, 1))
    cells = [
        row(4, "lora", 1e-3, 0, 10.0),
        row(4, "lora", 1e-3, 1, 20.0),
        row(16, "lora", 1e-2, 0, None, status="failed"),
    ]
    standing = Standing(grid, {c.path: c for c in cells}, there=1, at_once=4)
    assert line(standing, 12.3) == "3 of 8 runs over, 1 failed, 1 there before, 4 at once, 12 s"
    table = standing_table(standing)
    columns = [list(column.cells) for column in table.columns]
    assert columns == [["lora", "lora"], ["4", "16"], ["++ 15", ".."], ["..", "!."]]


def test_the_tables_say_how_runs_ended_and_how_sure_a_mean_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds at 10 and 20: 15, and half an interval of 12.706 (t of 1 degree of freedom) * 5."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "sweeping"))
    try:
        from stand_ins import row
    finally:
        sys.path.pop(0)
    cells = (
        row(4, "lora", 1e-3, 0, 10.0),
        row(4, "lora", 1e-3, 1, 20.0),
        row(4, "lora", 1e-2, 0, None, status="failed"),
        row(4, "lora", 1e-2, 1, None, status="diverged"),
        *(row(4, "lora", 1e-4, seed, 1.0) for seed in range(8)),
        row(4, "lora", 1e-4, 8, None, status="diverged"),
    )
    record = make_record(cells, model="m", data="d", settings={}, digest="0", command=("x",), device="cpu", seconds=1.0)
    show_sweep(record, Path("out"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (best,) = (line for line in lines if line[:3] == ["lora", "4", "400"])
    assert best[3:7] == ["0.001", "15", "±", "64"], "0.001 lies between the rates tried, and no edge is named"
    runs = {line[2]: line[3:5] for line in lines if line[:2] == ["lora", "4"] and line != best}
    assert runs == {"0.0001": ["8+", "1x"], "0.001": ["++", "15"], "0.01": ["x!", "-"]}


def test_the_record_reads_back_and_says_what_it_is() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "sweeping"))
    try:
        from stand_ins import row
    finally:
        sys.path.pop(0)
    cells = tuple(row(r, "lora", lr, s, float(r) + s) for r in (4, 16) for lr in (1e-3, 1e-2) for s in (0, 1))
    record = make_record(
        cells, model="m", data="d", settings={"steps": 2}, digest="0", command=("x",), device="cpu", seconds=1.0
    )
    assert SweepRecord.from_json(record.to_json()) == record
    assert "8 runs: 8 done" in repr(record)
    assert len(record.to_dataframe()) == 8
