"""Sweeps from end to end: with stand-ins for what goes wrong, and one of real runs on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stand_ins

import rankwise
from rankwise.errors import AllRunsFailedError, NoDataError, UsageError
from rankwise.records import RunRecord, SweepRecord, read_record
from rankwise.sweeping.asking import settle_sweep
from rankwise.sweeping.cells import Refused, Task, look_ahead, train_cell
from rankwise.sweeping.grid import Cell
from rankwise.sweeping.running import Standing, _Sweep, dry_sweep, run_sweep
from rankwise.sweeping.settings import make_request

pytest.importorskip("ray", reason="ray comes with the cluster extra")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def run(data: Path, out: Path, *, force: bool = False, work: Any = stand_ins.quick, **more: Any) -> SweepRecord:
    lists = {"ranks": (2, 4), "scaling": ("lora",), "learning_rates": (1e-3,), "seeds": 2, "device": "cpu"}
    seen: list[Standing] = more.pop("seen", [])
    asked = settle_sweep("model", str(data), lists | more)
    under_way = _Sweep(asked, out, work=work, look=stand_ins.look, command=("test",), progress=seen.append, anew=force)
    return run_sweep(under_way)


def test_a_sweep_leaves_a_folder_a_cell_a_record_and_tables(ray_local: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[Standing] = []
    record = run(data, out, seen=seen)
    assert read_record(out / "sweep.json", SweepRecord) == record
    assert record.runs == tuple(f"rank={r},scaling=lora,lr=0.001,seed={s}/run.json" for r in (2, 4) for s in (0, 1))
    for path in record.runs:
        assert read_record(out / path, RunRecord).status == "done"
    assert [c.bits for c in record.cells] == [2.0, 2.1, 4.0, 4.1]
    assert (out / "results.csv").read_text().count("\n") == 5
    assert [(b.rank, b.learning_rate, b.edge) for b in record.best] == [(2, 1e-3, "only"), (4, 1e-3, "only")]
    assert {f.code for f in record.findings} == {"best-rate-on-edge"}
    assert [len(s.rows) for s in seen][-4:] == [1, 2, 3, 4]
    assert seen[-1].at_once == 2


def test_what_is_over_is_not_run_again_and_a_grid_may_grow(ray_local: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out)
    before = {path: path.read_bytes() for path in out.glob("rank=*/*")}
    again = run(data, out, learning_rates=(3e-3,), seeds=3)
    assert len(again.cells) == 4 + 6
    assert set(stand_ins.starts(data).values()) == {1}
    assert {path: path.read_bytes() for path in before} == before
    assert again.config.learning_rates == (1e-3, 3e-3)


def test_nothing_to_do_needs_no_ray(
    data: Path, tmp_path: Path, ray_local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run(data, out)
    monkeypatch.setattr("rankwise.sweeping.running.Engine", lambda *_: pytest.fail("Ray was asked for"))
    again = run(data, out)
    assert again.cells == first.cells
    assert again.answers == first.answers


def test_a_worker_that_is_killed_costs_its_cell_alone(ray_local: Any, data: Path, tmp_path: Path) -> None:
    (data / "crash-1").touch()
    record = run(data, tmp_path / "out", ranks=(2,), seeds=4)
    assert [c.status for c in record.cells] == ["done"] * 4
    counted = stand_ins.starts(data)
    assert counted["rank=2,scaling=lora,lr=0.001,seed=1"] == 2
    assert sum(counted.values()) == 5


@pytest.mark.parametrize(("how", "words"), [("fail", "ValueError: planted"), ("raise", "RuntimeError: planted")])
def test_a_failing_cell_is_kept_with_its_error_and_the_sweep_goes_on(
    how: str, words: str, ray_local: Any, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (data / f"{how}-1").touch()
    record = run(data, out)
    assert [(c.seed, c.status) for c in record.cells] == [(0, "done"), (1, "failed")] * 2
    (finding,) = (f for f in record.findings if f.code == "runs-failed")
    assert "2 of 4 runs failed" in finding.text
    assert words in finding.text
    kept = read_record(out / "rank=4,scaling=lora,lr=0.001,seed=1" / "run.json", RunRecord)
    assert (kept.status, kept.error, kept.seed) == ("failed", words, 1)
    assert (kept.config.rank, kept.params) == (4, 400)
    assert kept.config.groups[0].scaling == 16.0 / 4
    assert (out / "rank=4,scaling=lora,lr=0.001,seed=1" / "traceback.txt").exists() == (how == "fail")
    (data / f"{how}-1").unlink()
    again = run(data, out)
    assert [c.status for c in again.cells] == ["done"] * 4
    assert not (out / "rank=4,scaling=lora,lr=0.001,seed=1" / "traceback.txt").exists()
    assert stand_ins.starts(data)["rank=2,scaling=lora,lr=0.001,seed=0"] == 1, "only failed cells are run again"


def test_a_diverged_cell_is_kept_and_not_run_again(ray_local: Any, data: Path, tmp_path: Path) -> None:
    (data / "diverge-0").touch()
    run(data, tmp_path / "out")
    record = run(data, tmp_path / "out")
    assert [c.status for c in record.cells] == ["diverged", "done"] * 2
    assert set(stand_ins.starts(data).values()) == {1}
    assert "runs-diverged" in {f.code for f in record.findings}


def test_all_failed_is_an_error_and_the_records_are_there(ray_local: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (data / "fail-0").touch()
    with pytest.raises(AllRunsFailedError, match="all 2 runs failed; the first: ValueError: planted"):
        run(data, out, seeds=1)
    assert [c.status for c in read_record(out / "sweep.json", SweepRecord).cells] == ["failed"] * 2


def test_other_settings_in_the_same_folder_are_refused(ray_local: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out, steps=2)
    written = (out / "sweep.json").read_bytes()
    with pytest.raises(UsageError, match="was run with steps 2, not 3"):
        run(data, out, steps=3, learning_rates=(3e-3,))
    assert (out / "sweep.json").read_bytes() == written
    record = run(data, out, steps=3, force=True)
    assert record.config.settings["steps"] == 3
    assert len(record.cells) == 4


def test_data_that_changed_under_their_name_are_refused(ray_local: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(data, out)
    (data / "digest").write_text("f" * 16)
    with pytest.raises(UsageError, match="was trained on other data"):
        run(data, out, seeds=3)
    assert sum(stand_ins.starts(data).values()) == 4


def test_what_is_wrong_with_the_input_is_said_once_and_nothing_is_run(
    ray_local: Any, data: Path, tmp_path: Path
) -> None:
    (data / "refuse").touch()
    with pytest.raises(NoDataError, match="holds no data"):
        run(data, tmp_path / "out")
    assert not stand_ins.starts(data)
    assert not list((tmp_path / "out").glob("rank=*"))


def test_a_worker_of_another_version_trains_nothing() -> None:
    task = Task(make_request("m", "d", {}), Cell(0, 4, "lora", 1e-3), version="99.0")
    found = look_ahead(task)
    assert isinstance(found, Refused)
    assert (found.kind, train_cell(task).files) == ("ClusterError", {})
    assert "and the sweep 99.0; every node needs the same" in found.message
    assert train_cell(task).error == found.message


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ("Alderburgh", "Brambleport", "Coppermouth", "Doverhaven")
    made = [{"prompt": f"The office of {word} is in", "completion": f" {word}."} for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_a_dry_run_lists_and_counts_and_writes_nothing(pico: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl comes with the train extra")
    given = {"ranks": (2, 8), "scaling": ("lora",), "learning_rates": (1e-3,), "seeds": 2, "steps": 3, "batch_size": 4}
    asked = settle_sweep(pico, rows, given | {"device": "cpu"})
    found = dry_sweep(asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(found.cells) == 4
    assert found.there == ()
    single = rankwise.dry_run(str(pico), str(rows), rank=2, steps=3, batch_size=4, device="cpu")
    assert found.params_by_rank["2"] == single.params
    assert found.params_by_rank["8"] == 4 * single.params
    assert found.tokens == round(single.tokens * 3)  # 4 rows, 4 a step: each is seen in each of 3 steps
    by_rank = (single.params, 4 * single.params)
    assert found.flops == sum(2 * found.tokens * (4 * single.base_params + 6 * params) for params in by_rank)
    assert found.seconds is None
