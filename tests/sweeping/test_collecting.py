"""Listing and reading many cells: how much is opened, and what is refused."""

from __future__ import annotations

import builtins
import csv
import io
import os
from pathlib import Path
from typing import Any

import pytest
from stand_ins import files_of, row, run_record

from rankwise.errors import OutputExistsError, RankwiseError, RecordError, UsageError
from rankwise.records import SweepRun
from rankwise.sweeping import collecting, folder
from rankwise.sweeping.grid import Cell, make_grid
from rankwise.sweeping.settings import make_request

REQUEST = make_request("m", "d", {"steps": 2})


def fill(out: Path, cells: Any) -> None:
    (out / folder.HIDDEN / folder.WORK).mkdir(parents=True, exist_ok=True)
    for cell in cells:
        folder.put_cell(out, cell, files_of(run_record(cell, bits=float(cell.rank))), REQUEST)


def test_a_thousand_cells_take_one_listing_and_one_small_read_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = make_grid(tuple(range(1, 51)), ("lora", "rslora"), (1e-3, 3e-3), tuple(range(5))).cells
    assert len(cells) == 1000
    for cell in cells:
        place = tmp_path / cell.name
        place.mkdir()
        (place / "run.json").write_bytes(files_of(run_record(cell, bits=float(cell.rank)))["run.json"])
        (place / "health.jsonl").write_text("never read")
    reads: list[str] = []
    listings: list[str] = []
    read, scan = Path.read_bytes, os.scandir
    monkeypatch.setattr(Path, "read_bytes", lambda self: reads.append(self.name) or read(self))
    monkeypatch.setattr(os, "scandir", lambda path: listings.append(str(path)) or scan(path))
    monkeypatch.setattr(builtins, "open", lambda *_, **__: pytest.fail("another way to open a file"))
    rows = collecting.collect(tmp_path)
    assert len(rows) == 1000
    assert reads == ["run.json"] * 1000
    assert listings == [str(tmp_path)]
    assert [r.bits for r in rows] == [float(r.rank) for r in rows]
    assert rows[0].path == "rank=1,scaling=lora,lr=0.001,seed=0/run.json"


def test_every_field_of_a_row_is_what_the_record_says(tmp_path: Path) -> None:
    cell = Cell(3, 16, "rslora", 1e-3)
    fill(tmp_path, [cell])
    (found,) = collecting.collect(tmp_path)
    record = run_record(cell, bits=16.0)
    assert (found.rank, found.scaling, found.learning_rate, found.seed) == (16, "rslora", 1e-3, 3)
    for name in ("status", "params", "steps", "tokens", "loss", "forgetting", "seconds", "peak_memory_bytes", "error"):
        assert getattr(found, name) == getattr(record, name)
    assert record.recall is not None
    for name in ("bits", "bits_possible", "bits_per_param", "exact_share"):
        assert getattr(found, name) == getattr(record.recall, name)
    assert found.paraphrased_exact_share == 0.5


def test_metrics_are_the_loss_curve_and_the_results(tmp_path: Path) -> None:
    import json

    cell = Cell(0, 4, "lora", 1e-3)
    fill(tmp_path, [cell])
    rows = [json.loads(line) for line in (tmp_path / cell.name / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows] == [3.0, 2.5, 2.5]
    assert (rows[-1]["status"], rows[-1]["bits"]) == ("done", 4.0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no whole run/1 record"),
        (b"{}", "no whole run/1 record"),
        (files_of(run_record(Cell(0, 4, "lora", 1e-3)))["run.json"].replace(b"run/1", b"run/9"), "rankwise/run/9"),
        (files_of(run_record(Cell(0, 8, "lora", 1e-3)))["run.json"], "not what its folder's name says"),
    ],
)
def test_records_that_are_none(content: bytes, words: str, tmp_path: Path) -> None:
    cell = Cell(0, 4, "lora", 1e-3)
    (tmp_path / cell.name).mkdir()
    (tmp_path / cell.name / "run.json").write_bytes(content)
    with pytest.raises(RecordError, match=words):
        collecting.collect(tmp_path)


def test_a_cell_without_a_record_is_named(tmp_path: Path) -> None:
    (tmp_path / Cell(0, 4, "lora", 1e-3).name).mkdir()
    with pytest.raises(RecordError, match="take its folder away to run it anew"):
        collecting.collect(tmp_path)


def test_the_csv_is_read_back() -> None:
    rows = [row(4, "lora", 1e-3, 0, 12.5), row(4, "lora", 1e-3, 1, None, status="failed", error='a, "b"\nc')]
    found = list(csv.DictReader(io.StringIO(collecting.as_csv(rows))))
    assert tuple(found[0]) == SweepRun.__struct_fields__
    assert (float(found[0]["learning_rate"]), float(found[0]["bits"])) == (1e-3, 12.5)
    assert (found[1]["bits"], found[1]["error"]) == ("", 'a, "b"\nc')


def test_the_parquet_has_the_same_rows_and_types() -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with datasets")
    rows = [row(4, "lora", 1e-3, 0, None), row(8, "lora", 1e-3, 1, 2.0)]
    content = collecting.as_parquet(rows)
    assert content is not None
    table = parquet.read_table(io.BytesIO(content))
    assert table.column_names == list(SweepRun.__struct_fields__)
    assert table.to_pylist() == [{name: getattr(r, name) for name in SweepRun.__struct_fields__} for r in rows]
    assert str(table.schema.field("bits").type) == "double"
    assert str(table.schema.field("rank").type) == "int64"
    empty = collecting.as_parquet([])
    assert empty is not None
    assert str(parquet.read_table(io.BytesIO(empty)).schema.field("error").type) == "string"


def test_a_cell_of_other_settings_is_refused_and_the_first_difference_named(tmp_path: Path) -> None:
    cell = Cell(0, 4, "lora", 1e-3)
    fill(tmp_path, [cell])
    folder.check_same(tmp_path, cell.name, REQUEST)
    with pytest.raises(UsageError, match=r"was run with steps 2, not 3; .*--force"):
        folder.check_same(tmp_path, cell.name, make_request("m", "d", {"steps": 3}))
    with pytest.raises(UsageError, match='was run with data "d", not "e"'):
        folder.check_same(tmp_path, cell.name, make_request("m", "e", {"steps": 2}))
    (tmp_path / cell.name / "cell.json").write_text("{}")
    with pytest.raises(RecordError, match="is no record of a cell"):
        folder.check_same(tmp_path, cell.name, REQUEST)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError):
        folder.check_sweep_folder(tmp_path, force=False)
    with pytest.raises(RankwiseError):
        folder.check_sweep_folder(tmp_path, force=True)
    with pytest.raises(RankwiseError, match="is a file"):
        folder.check_sweep_folder(tmp_path / "thesis.tex", force=False)
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_sweep_with_notes_beside_its_cells_goes_on_and_is_not_deleted(tmp_path: Path) -> None:
    fill(tmp_path, [Cell(0, 4, "lora", 1e-3)])
    (tmp_path / "notes.txt").write_text("mine")
    folder.check_sweep_folder(tmp_path, force=False)
    with pytest.raises(RankwiseError, match=r"holds more than a sweep \(notes.txt\)"):
        folder.check_sweep_folder(tmp_path, force=True)


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        folder.opened(tmp_path),
        pytest.raises(UsageError, match="another sweep is at work"),
        folder.opened(tmp_path),
    ):
        pass
    with folder.opened(tmp_path) as work:
        assert list(work.iterdir()) == []


def test_what_a_killed_sweep_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / folder.HIDDEN / folder.WORK / "rankwise-cell.x"
    left.mkdir(parents=True)
    with folder.opened(tmp_path) as work:
        assert not left.exists()
        assert work.is_dir()


def test_a_failed_cell_is_replaced_whole(tmp_path: Path) -> None:
    cell = Cell(0, 4, "lora", 1e-3)
    with folder.opened(tmp_path):
        folder.put_cell(tmp_path, cell, {"run.json": b"1", "traceback.txt": b"old"}, REQUEST)
        folder.put_cell(tmp_path, cell, {"run.json": b"2", "logs/a": b"new"}, REQUEST)
    assert sorted(p.name for p in (tmp_path / cell.name).iterdir()) == ["cell.json", "logs", "run.json"]
    assert (tmp_path / cell.name / "run.json").read_bytes() == b"2"
