"""The demo: what it says of figures that are known, its folder, and the whole of it in small."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from run_samples import RUNS, demo_run, diverged, failed, recall, run
from run_samples import replace as replaced

from rankwise.errors import OutputError, OutputExistsError, UsageError
from rankwise.records import DemoRecord, DemoRun, RunRecord, SpectraRecord, read_record
from rankwise.tuning import baselines, demonstration
from rankwise.tuning.demonstration import CELLS, Cell, _row, demo, open_demo, reading
from rankwise.tuning.world import builtin

# --- what is said of the figures ----------------------------------------------------------------------------


def with_run(place: int, **more: Any) -> tuple[DemoRun, ...]:
    return (*RUNS[:place], replaced(RUNS[place], **more), *RUNS[place + 1 :])


def test_the_reading_repeats_the_figures_and_no_others() -> None:
    """Bits planted: 9 and 12 under alpha / r, 17 and 39 under alpha / sqrt(r), 35 at the best rate: 23 of 27."""
    lines = reading(RUNS)
    assert len(lines) == 6
    assert "raising the rank from 8 to 64 changed what is recalled of a person from 9.0 to 12.0 bits" in lines[0]
    assert lines[0].startswith("Under alpha / r at a learning rate of 0.003")
    assert "from 17.0 to 39.0 bits" in lines[1]
    assert lines[1].startswith("Under alpha / sqrt(r)")
    assert "at its own rate of 0.01 recalls 35.0 bits, against 12.0 at the shared rate and 39.0" in lines[2]
    assert lines[2].endswith("The rate alone closes 85% of the gap.")
    assert lines[3].startswith("Of the best run (rank 64, rslora), ")
    assert f"{RUNS[3].exact_share:.0%} of the facts" in lines[3]
    assert f"{RUNS[3].paraphrased_exact_share:.0%} in words that were held out" in lines[3]
    assert lines[4].endswith("from +0.010 (style, rank 8, lora) to +0.176 (rank 64, rslora).")
    assert lines[5].startswith("The style run at rank 8, alpha / r, lowers the loss of a sentence by")
    assert "writes 97% of them to the letter" in lines[5]


@pytest.mark.parametrize("stable", [12.9, 12.0, 5.0])
def test_without_a_gap_nothing_is_said_to_close_it(stable: float) -> None:
    """A gap of a bit or less is no gap, and a share of a negative one is nonsense."""
    lines = reading(with_run(3, bits_per_person=stable))
    assert not any("of the gap" in line for line in lines)
    assert any(f"and {stable:.1f} of alpha / sqrt(r)" in line for line in lines)


def test_a_rate_that_closes_more_than_the_gap_says_so() -> None:
    assert reading(with_run(4, bits_per_person=66.0))[2].endswith("The rate alone closes the gap, and more.")


@pytest.mark.parametrize("place", range(6))
def test_a_run_without_figures_makes_no_sentence_of_numbers(place: int) -> None:
    nothing = dict.fromkeys(
        ("bits_per_person", "exact_share", "paraphrased_bits_per_person", "paraphrased_exact_share", "forgetting")
    )
    lines = reading(with_run(place, status="diverged", **nothing))
    assert not any("None" in line or "nan" in line for line in lines)
    told = [line for line in lines if "gave no figures" in line]
    assert len(told) == (place < 4)
    if told:
        assert "diverged" in told[0]


def test_of_runs_without_any_figure_only_that_is_said() -> None:
    nothing = dict.fromkeys(("exact_share", "paraphrased_exact_share", "forgetting", "bits_per_person"))
    lines = reading([replaced(r, status="failed", **nothing) for r in RUNS])
    assert [line.partition(" run gave")[0] for line in lines] == [
        "Under alpha / r at 0.003 a",
        "Under alpha / sqrt(r) at 0.003 a",
    ]


def test_the_style_run_is_said_to_have_the_steps_it_has() -> None:
    assert reading(with_run(5, steps=7, status="diverged"))[-1].endswith("after 7 steps.")


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spectra(tmp_path_factory: pytest.TempPathFactory) -> SpectraRecord:
    """Of an adapter of two modules, measured beside no base."""
    import numpy as np

    import rankwise
    from planting import planted_factors, write_adapter

    rng = np.random.default_rng(0)
    factors = {f"layers.{i}.q_proj": planted_factors(rng, (16, 12), (1.0, 1.0, 1.0, 1.0)) for i in range(2)}
    return rankwise.inspect(write_adapter(tmp_path_factory.mktemp("adapter") / "a", factors))


def test_a_row_is_what_the_records_say(spectra: SpectraRecord) -> None:
    record = run()
    row = _row(Cell(64, "rslora", 1e-3, "fixed rate"), record, spectra, "runs/a.json")
    assert record.recall is not None
    assert record.recall.bits is not None
    assert record.recall.paraphrases is not None
    assert (row.name, row.path, row.rank, row.scaling) == ("rank 64, rslora", "runs/a.json", 64, "rslora")
    assert row.factor == 2.0
    assert row.bits_per_person == record.recall.bits / 1000
    assert row.exact_share == record.recall.exact_share
    assert row.paraphrased_bits_per_person == pytest.approx(0.9 * row.bits_per_person)
    assert row.paraphrased_exact_share == record.recall.paraphrases.exact_share
    assert (row.effective_rank, row.rank_90) == (pytest.approx(4, rel=1e-6), 4)  # four equal values
    assert row.energy_by_rank["2"] == pytest.approx(0.5, rel=1e-6)
    assert row.relative_norm is None, "no base, no norm of it"
    assert (row.loss, row.steps, row.params, row.status) == (record.loss, 500, 600_000, "done")


def test_a_row_of_style_is_counted_a_sentence(spectra: SpectraRecord) -> None:
    told = replaced(recall(), kind="loss", facts=240, bits=480.0, paraphrases=None)
    row = _row(Cell(8, "lora", 1e-3, "style"), run(recall=told), spectra, "runs/a.json")
    assert row.bits_per_person == 2
    assert (row.paraphrased_bits_per_person, row.paraphrased_exact_share) == (None, None)
    assert row.name == "style, rank 8, lora"


@pytest.mark.parametrize("record", [failed(), diverged()], ids=["failed", "diverged"])
def test_a_row_of_a_run_that_went_wrong_has_no_figures(record: RunRecord, spectra: SpectraRecord) -> None:
    row = _row(Cell(8, "lora", 1e-3, "fixed rate"), record, spectra, "runs/a.json")
    assert (row.status, row.bits_per_person, row.paraphrased_bits_per_person) == (record.status, None, None)
    assert (row.loss, row.forgetting) == (None, None)


def test_cells_are_told_apart_and_their_files_lie_in_the_folder() -> None:
    assert len({cell.name for cell in CELLS}) == len({cell.slug for cell in CELLS}) == len(CELLS) == 6
    assert all(Path(cell.slug).name == cell.slug for cell in CELLS)
    roles = {(cell.role, cell.rank, cell.rule) for cell in CELLS}
    assert roles == {(r.role, r.rank, r.scaling) for r in RUNS}, "what `reading` looks for"


def test_the_samples_of_the_page_are_named_as_the_demo_names_its_runs() -> None:
    assert demo_run(8, "lora", 1.0).name == CELLS[0].name


# --- the folder ---------------------------------------------------------------------------------------------


def test_a_new_folder_is_made_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    open_demo(tmp_path / "a" / "b", force=False)
    assert (tmp_path / "a" / "b").is_dir()
    open_demo(tmp_path / "a" / "b", force=False)


def test_a_folder_with_a_demo_is_replaced_with_force_alone(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    with pytest.raises(OutputExistsError):
        open_demo(tmp_path, force=False)
    open_demo(tmp_path, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_no_demo_is_not_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "thesis.txt").write_text("years of work")
    kind, words = (OutputError, r"holds more than a demo \(thesis\.txt\)") if force else (OutputExistsError, "exists")
    with pytest.raises(kind, match=words):
        demo(out=tmp_path, force=force)
    with pytest.raises(OutputError, match="is a file; a folder was meant"):
        demo(out=tmp_path / "thesis.txt", force=force)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        open_demo(tmp_path / "a", force=False)


def test_a_seed_out_of_range_makes_no_folder(tmp_path: Path) -> None:
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="--seed must be from 0 to"):
            demo(out=tmp_path / "a", seed=seed)
    assert not (tmp_path / "a").exists()


# --- the whole of it, in small ------------------------------------------------------------------------------

Made = tuple[Path, DemoRecord, list[tuple[str, int, int]], dict[str, tuple[RunRecord, SpectraRecord]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A demo of three people and four steps a run."""
    pytest.importorskip("trl", reason="trl comes with the train extra")
    said: list[tuple[str, int, int]] = []
    kept: dict[str, tuple[RunRecord, SpectraRecord]] = {}
    real = demonstration._run

    def run_and_keep(cell: Cell, *rest: Any) -> tuple[RunRecord, SpectraRecord]:
        kept[cell.name] = real(cell, *rest)
        return kept[cell.name]

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(demonstration, "_run", run_and_keep)
        out = tmp_path_factory.mktemp("demo") / "out"
        record = demo(out=out, seed=3, progress=lambda *words: said.append(words))
    return out, record, said, kept


def shrink(patch: pytest.MonkeyPatch) -> None:
    for name, size in {"PEOPLE": 3, "STYLED": 2, "STEPS": 4, "STYLE_STEPS": 3, "BATCH": 4}.items():
        patch.setattr(demonstration, name, size)
    patch.setattr(baselines, "PLAIN", "rankwise:plain?n=8")
    patch.setattr(builtin, "KNOWN_PEOPLE", 45)  # the style run asks about all of them


def test_the_folder_holds_the_record_and_a_record_of_every_run(made: Made) -> None:
    out, record, _, _ = made
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "runs"]
    assert read_record(out / "demo.json", DemoRecord) == record
    assert sorted(p.name for p in (out / "runs").iterdir()) == sorted(f"{cell.slug}.json" for cell in CELLS)
    assert [r.name for r in record.runs] == [cell.name for cell in CELLS]
    assert [r.role for r in record.runs] == ["fixed rate"] * 4 + ["best rate", "style"]
    for row, cell in zip(record.runs, CELLS, strict=True):
        saved = read_record(out / row.path, RunRecord)
        assert (saved.config.rank, saved.config.scaling, saved.config.learning_rate) == (
            cell.rank,
            cell.rule,
            cell.rate,
        )
        assert (saved.status, saved.steps, saved.seed) == ("done", 3 if cell.role == "style" else 4, 3)
        assert (row.loss, row.params, row.forgetting) == (saved.loss, saved.params, saved.forgetting)
        assert {group.scaling for group in saved.config.groups} == {row.factor}


def test_the_record_says_what_was_asked_and_what_came_out(made: Made) -> None:
    _, record, _, _ = made
    assert (record.people, record.facts, record.model, record.device) == (3, 15, "rankwise:tiny", "cpu")
    assert record.model_params == 1_286_784
    assert (record.data, record.style_data) == ("rankwise:facts?n=3&seed=3", "rankwise:style?n=2&seed=3")
    assert record.base_bits_per_person is not None
    assert abs(record.base_bits_per_person) < 15, "three people, and the base knows none of them"
    assert record.reading[:-1] == reading(record.runs)[:-1]
    assert record.command == (f"rankwise.demo(out={str(made[0])!r}, seed=3)",)
    for row in record.runs:
        assert row.relative_norm is not None, "measured beside the shipped weights"
        assert row.relative_norm > 0
        assert list(row.energy_by_rank.values())[-1] == pytest.approx(1)
        assert row.effective_rank is not None
        assert 1 <= row.effective_rank <= row.rank
    by = {r.name: r for r in record.runs}
    assert by["rank 64, lora"].factor == 0.25
    assert by["rank 64, rslora"].factor == 2.0
    assert by["rank 64, rslora"].relative_norm > by["rank 64, lora"].relative_norm  # type: ignore[operator]


def test_progress_never_goes_back(made: Made) -> None:
    _, _, said, _ = made
    shares = [done / total for _, done, total in said]
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1
    assert {words.partition(": ")[0] for words, _, _ in said} == {cell.name for cell in CELLS}


def test_a_taken_folder_is_refused_before_any_work_and_force_replaces_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    source, record, _, kept = made
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / "demo.html").write_text("of the command line")
    began: list[str] = []

    def fake(cell: Cell, *_: Any) -> tuple[RunRecord, SpectraRecord]:
        began.append(cell.name)
        return kept[cell.name]

    shrink(monkeypatch)
    monkeypatch.setattr(demonstration, "_run", fake)
    with pytest.raises(OutputExistsError):
        demo(out=out, seed=3)
    assert began == []
    (out / "demo.json").write_text("{}")
    again = demo(out=out, seed=3, force=True)
    assert began == [cell.name for cell in CELLS]
    assert again.runs == record.runs
    assert read_record(out / "demo.json", DemoRecord) == again


def test_a_run_that_fails_leaves_no_demo_and_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, work: Path = tmp_path / "out" / "runs" / ".work") -> Any:
        work.mkdir(parents=True)
        (work / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demonstration, "_run", fails)
    with pytest.raises(KeyboardInterrupt):
        demo(out=tmp_path / "out")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_force_leaves_nothing_of_the_demo_before(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of other settings, or demo.json and demo.html of yesterday beside runs of today, would lie."""
    old = tmp_path / "runs" / "rank=4,scaling=lora,lr=0.1.json"
    old.parent.mkdir()
    old.write_text("{}")
    shrink(monkeypatch)
    monkeypatch.setattr(demonstration, "_run", lambda cell, *_: made[3][cell.name])
    demo(out=tmp_path, seed=3, force=True)
    assert not old.exists()
