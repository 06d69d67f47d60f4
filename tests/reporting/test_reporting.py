"""One page out of any records: what is read, what is refused, which parts there are and in which order."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import page_samples
import plan_samples
import probe_samples
import pytest
import run_samples
import stability_samples
import sweep_samples

import rankwise
from rankwise.errors import OutputExistsError, RankwiseError, RecordError, UsageError
from rankwise.records import DryRunRecord, Record, ReportRecord, RunRecord, SweepRecord, read_record, to_json
from rankwise.report.page import PAGES
from rankwise.reporting.making import MOST_ALONE
from rankwise.reporting.reading import NO_PAGE
from rankwise.sweeping import collecting


def put(path: Path, record: Record) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(record), encoding="utf-8")
    return path


def run_like(row: Any, **config: Any) -> RunRecord:
    """Return the run/1 record of which a row of a sweep holds the figures."""
    one = run_samples.run()
    recall = None
    if row.bits is not None:
        assert one.recall is not None
        paraphrases = msgspec.structs.replace(one.recall.paraphrases, exact_share=row.paraphrased_exact_share)
        figures = {name: getattr(row, name) for name in ("bits", "bits_possible", "bits_per_param", "exact_share")}
        recall = msgspec.structs.replace(one.recall, **figures, paraphrases=paraphrases)
    figures = {
        name: getattr(row, name)
        for name in (
            "seed", "status", "params", "steps", "tokens", "loss", "forgetting", "seconds", "peak_memory_bytes",
            "tokens_per_second", "error",
        )
    }  # fmt: skip
    setting = {
        "rank": row.rank, "scaling": row.scaling, "learning_rate": row.learning_rate, "lora_alpha": row.lora_alpha,
        "plan": None,
    }  # fmt: skip
    asked = msgspec.structs.replace(one.config, **(setting | config))
    return msgspec.structs.replace(one, config=asked, recall=recall, losses=(), health=(), **figures)


def put_sweep(folder: Path, record: SweepRecord, *, told: bool = True) -> Path:
    """Write the folder that `sweep` leaves: a folder a cell, and sweep.json where `told`."""
    for row in record.cells:
        cell = folder / Path(row.path).parent
        put(cell / "run.json", run_like(row))
        shared = {"model": record.config.model, "data": record.config.data, "steps": 160}
        (cell / "cell.json").write_text(json.dumps({"digest": "d", "shared": shared}), encoding="utf-8")
    if told:
        put(folder / "sweep.json", record)
    return folder


def pages(folder: Path) -> Path:
    return folder / "page.html"


# --- what is read ---------------------------------------------------------------------------------------------


def test_the_folder_of_a_sweep_gives_the_answer_of_its_record(tmp_path: Path) -> None:
    planted = sweep_samples.sweep()
    made = rankwise.report(put_sweep(tmp_path / "facts", planted), out=pages(tmp_path))
    alone = rankwise.report(tmp_path / "facts" / "sweep.json", out=tmp_path / "other.html")
    assert made.verdict == alone.verdict
    assert "helps under alpha / r" in made.verdict
    assert made.parts[0].figures[0] == "sweep-answer"
    assert made.findings == ()
    html = pages(tmp_path).read_text(encoding="utf-8")
    assert made.verdict in html
    assert html == rankwise.render_page(planted)


def test_a_sweep_that_was_stopped_is_answered_from_its_runs_and_says_so(tmp_path: Path) -> None:
    planted = sweep_samples.sweep()
    folder = put_sweep(tmp_path / "facts", planted, told=False)
    made = rankwise.report(folder, out=pages(tmp_path))
    assert "there is no sweep.json" in made.findings[0].text
    assert "helps under alpha / r" in made.verdict
    assert "rankwise:facts?n=40" in made.title
    # and a record that is older than the runs is not believed
    few = msgspec.structs.replace(planted, cells=planted.cells[:4])
    put(folder / "sweep.json", few)
    again = rankwise.report(folder, out=pages(tmp_path), force=True)
    assert "108 runs and sweep.json holds 4" in again.findings[0].text
    assert again.verdict == made.verdict


def test_runs_that_differ_in_the_grid_alone_are_answered_as_the_sweep_is(tmp_path: Path) -> None:
    """The same rows through files of run/1: the points are those of the sweep."""
    planted = sweep_samples.sweep()
    folder = tmp_path / "runs"
    for row in planted.cells:
        put(folder / f"{Path(row.path).parent}.json", run_like(row))
    made = rankwise.report(folder, out=pages(tmp_path))
    assert len(made.parts) == 1
    assert len(made.parts[0].files) == 108
    assert made.verdict == rankwise.report(planted, out=tmp_path / "other.html").verdict
    mine, theirs = rankwise.figures(folder), rankwise.figures(planted)
    assert list(mine) == list(theirs)
    for name in mine:
        assert mine[name].to_csv() == theirs[name].to_csv()


def test_runs_on_other_data_or_of_other_steps_are_other_grids(tmp_path: Path) -> None:
    rows = [row for row in sweep_samples.sweep().cells if row.scaling == "lora" and row.seed == 0]
    for place, more in enumerate(({}, {"data_digest": "another"}, {"steps": 99})):
        for row in rows:
            put(tmp_path / "runs" / f"{place} {Path(row.path).parent}.json", run_like(row, **more))
    made = rankwise.report(tmp_path / "runs", out=pages(tmp_path))
    sweeps = [part for part in made.parts if part.figures]
    assert [len(part.files) for part in sweeps] == [len(rows)] * 3
    assert len({part.title for part in sweeps}) == 3


def test_alpha_that_varies_beside_the_rank_tells_grids_apart(tmp_path: Path) -> None:
    rows = [row for row in sweep_samples.sweep().cells if row.scaling == "lora" and row.status == "done"]
    for row in rows:
        put(tmp_path / "with" / f"{Path(row.path).parent}.json", run_like(row, lora_alpha=2.0 * row.rank))
    assert len(rankwise.report(tmp_path / "with", out=pages(tmp_path)).parts) == 1
    for row in rows:
        alpha = 16.0 if row.learning_rate < 1e-3 else 32.0
        put(tmp_path / "beside" / f"{Path(row.path).parent}.json", run_like(row, lora_alpha=alpha))
    made = rankwise.report(tmp_path / "beside", out=pages(tmp_path), force=True)
    assert sum(part.kind == "sweep" for part in made.parts) == 2


def test_a_run_made_again_does_not_count_as_a_second_seed(tmp_path: Path) -> None:
    rows = [row for row in sweep_samples.sweep().cells if row.scaling == "lora" and row.seed == 0]
    runs = [run_like(row) for row in rows]
    again = msgspec.structs.replace(runs[0], seconds=99.0)
    made = rankwise.report(*runs, again, out=pages(tmp_path))
    assert len(made.parts[0].files) == len(runs)
    assert [finding.code for finding in made.findings] == ["runs-repeated"]
    assert f"record {len(runs) + 1} (as record 1)" in made.findings[0].text


def test_two_runs_are_compared_and_each_has_its_part(tmp_path: Path) -> None:
    one = run_samples.run()
    two = msgspec.structs.replace(one, seed=1)
    put(tmp_path / "a" / "run.json", one)
    put(tmp_path / "b" / "run.json", two)
    made = rankwise.report(tmp_path / "a", tmp_path / "b", out=pages(tmp_path))
    assert [part.kind for part in made.parts] == ["comparison", "train", "train"]
    assert made.parts[0].files == (str(tmp_path / "a" / "run.json"), str(tmp_path / "b" / "run.json"))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    one = page_samples.adapter(1)
    for folder, seed in (("a", 0), ("b", 1)):
        put(tmp_path / folder / "x.json", msgspec.structs.replace(one, seed=seed))
    made = rankwise.report(tmp_path / "a" / "x.json", tmp_path / "b" / "x.json", out=pages(tmp_path))
    assert made.verdict.startswith("A is “a/x.json”, B is “b/x.json”. ")
    figure = rankwise.figures(tmp_path / "a" / "x.json", tmp_path / "b" / "x.json")["compare-energy"]
    assert [trace["name"] for trace in figure.data] == ["A: a/x.json", "B: b/x.json"]
    html = pages(tmp_path).read_text(encoding="utf-8")
    contents = html[html.index('<ol class="parts">') : html.index("</ol>")]
    assert re.findall(r"<small>([^<]*)<bdi>([^<]*)", contents) == [
        ("comparison, ", "2 records"), ("inspect, ", "a/x.json"), ("inspect, ", "b/x.json"),
    ]  # fmt: skip


def every_kind() -> list[Record]:
    """Return a record of every kind that has a page."""
    found: list[Record] = [page_samples.adapter(2), sweep_samples.sweep(), stability_samples.check()]
    found += [plan_samples.RECORDS["budget"], probe_samples.probe_record(), probe_samples.counter_record()]
    found += [run_samples.RECORDS[name] for name in ("run", "recall", "demo")]
    found.append(rankwise.simulate())
    import conversion_samples
    import extraction_samples
    import lint_samples

    for module in (conversion_samples, extraction_samples, lint_samples):
        found.append(
            next(value for value in vars(module).values() if isinstance(value, Record))
            if any(isinstance(value, Record) for value in vars(module).values())
            else next(iter(module.RECORDS.values()))
        )
    return found


def test_a_mix_of_all_kinds_is_one_page_with_ids_of_its_own(tmp_path: Path) -> None:
    records = every_kind()
    assert {type(record) for record in records} == set(PAGES)
    files = [put(tmp_path / f"{k}.json", record) for k, record in enumerate(records)]
    made = rankwise.report(*files, out=pages(tmp_path))
    assert len(made.parts) == len(records)
    assert made.parts[0].kind == "sweep"  # whatever the order of the files
    html = pages(tmp_path).read_text(encoding="utf-8")
    body = html[: html.index('<script type="application/json"')]
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for wanted in re.findall(r' (?:for|aria-labelledby|data-plot|data-save|data-filters)="([^"]+)"', body):
        assert wanted in ids or f"{wanted}-plot" in ids
    plots = re.findall(r'data-plot="([^"]+)"', body)
    assert len(plots) == sum(len(part.figures) for part in made.parts)
    assert all(f'id="{plot}-data"' in html for plot in plots)
    assert [int(n) for n in re.findall(r">Figure (\d+)<", body)] == list(range(1, len(plots) + 1))
    assert html.count("plotly.js v") <= 2  # the library is inside once


def test_one_record_alone_has_the_page_of_its_own_command(tmp_path: Path) -> None:
    record = page_samples.adapter(2)
    rankwise.report(record, out=pages(tmp_path))
    assert pages(tmp_path).read_text(encoding="utf-8") == rankwise.render_page(record)


def test_a_folder_passes_over_what_is_no_record_and_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    put(folder / "spectra.json", page_samples.adapter(1))
    (folder / "adapter_config.json").write_text('{"r": 8}', encoding="utf-8")
    (folder / "notes.txt").write_text("no record", encoding="utf-8")
    put(folder / "page.json", rankwise.report(page_samples.adapter(1), out=pages(tmp_path)))
    made = rankwise.report(folder, out=pages(tmp_path), force=True)
    assert len(made.files) == 1
    assert "adapter_config.json, page.json" in made.findings[0].text
    assert set(NO_PAGE) >= {DryRunRecord.FORMAT, ReportRecord.FORMAT}


def test_too_many_of_a_kind_are_named_and_not_drawn(tmp_path: Path) -> None:
    records = [msgspec.structs.replace(page_samples.adapter(1), seed=k) for k in range(MOST_ALONE + 2)]
    made = rankwise.report(*records, out=pages(tmp_path))
    assert len(made.parts) == MOST_ALONE
    assert [finding.code for finding in made.findings] == ["too-many-to-compare", "records-left-out"]
    assert f"record {MOST_ALONE + 1}" in made.findings[1].text


# --- what is refused ------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def bad_inputs(folder: Path) -> dict[str, tuple[list[Any], type[RankwiseError], str]]:
    good = put(folder / "good.json", page_samples.adapter(1))
    text = good.read_bytes()
    cell = put_sweep(folder / "cut", _small()) / "rank=4,scaling=lora,lr=0.001,seed=0" / "run.json"
    write(cell, cell.read_bytes()[:500])
    put_sweep(folder / "renamed", _small())
    (folder / "renamed" / "rank=4,scaling=lora,lr=0.001,seed=0").rename(
        folder / "renamed" / "rank=8,scaling=lora,lr=0.001,seed=0"
    )
    (folder / "empty").mkdir()
    write(folder / "strangers" / "config.json", b'{"a": 1}')
    put(folder / "dry.json", sweep_samples.dry_sweep())
    other = b'{"run_info": {}, "train_info": {}}'
    zero = msgspec.structs.replace(_small(), cells=(msgspec.structs.replace(_small().cells[0], learning_rate=0.0),))
    return {
        "nothing": ([], UsageError, "report needs records"),
        "no file": ([folder / "none.json"], RecordError, "none.json cannot be read: No such file"),
        "truncated": ([write(folder / "t.json", text[:300])], RecordError, "t.json is not a rankwise record"),
        "empty file": ([write(folder / "e.json", b"")], RecordError, "it is empty"),
        "weights": ([write(folder / "w.safetensors", b"\x08\0\0\0\0\0\0\0{}")], RecordError, "it is no JSON object"),
        "a mark before it": ([write(folder / "m.json", b"\xef\xbb\xbf" + text)], RecordError, "a byte order mark"),
        "no number": (
            [write(folder / "nan.json", text.replace(b'"seed": 7', b'"seed": NaN', 1))],
            RecordError,
            "nan.json is not JSON: it holds NaN, where a record has a finite number or null",
        ),
        "a list": ([write(folder / "l.json", b"[1]")], RecordError, "it is no JSON object"),
        "no format": ([write(folder / "f.json", b'{"a": 1}')], RecordError, "no field `format`"),
        "another tool": ([write(folder / "o.json", other)], RecordError, "rankwise sweep --import FOLDER -o DIR"),
        "newer": ([write(folder / "n.json", text.replace(b"spectra/1", b"spectra/9"))], RecordError, "newer than"),
        "unknown kind": ([write(folder / "k.json", text.replace(b"spectra/1", b"song/1"))], RecordError, "song/1"),
        "unknown field": (
            [write(folder / "u.json", text.replace(b'"source"', b'"spring"', 1))], RecordError, "not a whole",
        ),
        "bytes": ([write(folder / "b.json", b'{"format": "\xff\xfe"}')], RecordError, "not a rankwise record"),
        "no page": ([folder / "dry.json"], RecordError, "of which there is no page"),
        "twice": ([good, good], UsageError, "good.json is given twice"),
        "a copy": ([good, write(folder / "copy.json", text)], UsageError, "are equal"),
        "empty folder": ([folder / "empty"], RecordError, "holds no record of rankwise"),
        "strangers": ([folder / "strangers"], RecordError, "its .json files are no records: config.json"),
        "cut cell": ([folder / "cut"], RecordError, "is no whole run/1 record"),
        "renamed cell": ([folder / "renamed"], RecordError, "give the folder its name back"),
        "a rate of zero": ([zero], RecordError, "learning rate 0"),
    }  # fmt: skip


def _small() -> SweepRecord:
    from rankwise.sweeping.recording import make_record

    rows = tuple(r for r in sweep_samples.sweep().cells if r.learning_rate == 1e-3 and r.seed == 0)
    return make_record(
        rows, model="m", data="d", settings={}, digest="", command=("rankwise",), device="cpu", seconds=1.0
    )


NAMES = (
    "nothing", "no file", "truncated", "empty file", "weights", "a list", "no format", "another tool", "newer",
    "unknown kind", "unknown field", "bytes", "no page", "twice", "a mark before it", "no number", "a copy",
    "empty folder", "strangers", "cut cell", "renamed cell", "a rate of zero",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_message_and_no_page(tmp_path: Path, name: str) -> None:
    sources, kind, words = bad_inputs(tmp_path)[name]
    with pytest.raises(kind, match=re.escape(words)):
        rankwise.report(*sources, out=pages(tmp_path))
    assert not pages(tmp_path).exists()
    with pytest.raises(kind, match=re.escape(words)):
        rankwise.figures(*sources)


def test_every_bad_input_is_in_the_list(tmp_path: Path) -> None:
    assert set(bad_inputs(tmp_path)) == set(NAMES)


def test_a_page_that_exists_stays_without_force(tmp_path: Path) -> None:
    out = write(pages(tmp_path), b"mine")
    with pytest.raises(OutputExistsError):
        rankwise.report(page_samples.adapter(1), out=out)
    assert out.read_bytes() == b"mine"
    rankwise.report(page_samples.adapter(1), out=out, force=True)
    assert out.read_bytes() != b"mine"


# --- figures for notebooks ------------------------------------------------------------------------------------


def test_figures_come_by_name_and_a_second_one_has_a_number() -> None:
    one = page_samples.adapter(1)
    found = rankwise.figures(one)
    assert list(found) == ["energy", "singular-values", "heat-map"]
    both = rankwise.figures(one, msgspec.structs.replace(one, seed=1))
    assert {"compare-energy", "energy", "energy-2"} <= set(both)


def test_a_figure_in_a_notebook_is_a_frame_that_holds_all_it_needs() -> None:
    figure = rankwise.figures(page_samples.adapter(1))["energy"]
    page = figure.to_html()
    assert page.startswith("<!doctype html>")
    assert 'http-equiv="Content-Security-Policy"' in page
    assert not re.search(r"<(?:link|img|script src|a href)", page[: page.index("<script>")])
    frame = figure._repr_html_()
    assert frame.startswith('<iframe srcdoc="')
    assert frame.count('"') == 2 * len(re.findall(r' \w+="', re.sub(r'srcdoc="[^"]*"', 'srcdoc=""', frame)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plotly_gets_colours_and_no_tokens(theme: Any) -> None:
    for figure in rankwise.figures(sweep_samples.sweep()).values():
        given = figure.to_plotly(theme)
        text = json.dumps(given)
        assert not re.search(r'color": "@', text)
        assert ("#16181a" in text) == (theme == "dark")
        assert len(given["data"]) == len(figure.data)


def test_csv_is_what_programs_read() -> None:
    from rankwise.report.drawing import Figure, Table

    table = Table("t", ("a", "b"), (("=1+1", "1,234"), ("–", "−0.5"), ("50 %", "1e-05"), ("0.123 %", "100 %")))
    figure = Figure("f", "t", "a", (), {"height": 100}, (), fallback=table)
    assert figure.to_csv() == "a,b\r\n'=1+1,1234\r\n,-0.5\r\n0.5,1e-05\r\n0.00123,1\r\n"


def test_a_figure_without_a_table_gives_what_is_drawn() -> None:
    found = rankwise.figures(page_samples.adapter(1))
    assert found["heat-map"].to_csv().startswith("line,x,y,value\r\n")
    assert len(found["singular-values"].to_csv().splitlines()) > 8


# --- the record -----------------------------------------------------------------------------------------------


def test_the_record_reads_back_and_says_what_is_in_the_page(tmp_path: Path) -> None:
    made = rankwise.report(page_samples.adapter(1), stability_samples.check(), out=pages(tmp_path))
    assert read_record(put(tmp_path / "report.json", made), ReportRecord) == made
    assert made.out == str(pages(tmp_path))
    assert made.command == (f"rankwise.report({page_samples.adapter(1)!r}, {stability_samples.check()!r}, "
                            f"out={str(pages(tmp_path))!r})",)  # fmt: skip
    assert "2 parts out of 2 records" in repr(made)


def test_the_name_is_the_function_whatever_is_imported_before() -> None:
    import importlib

    importlib.import_module("rankwise.report.page")
    assert callable(rankwise.report)
    assert not isinstance(rankwise.report, type(json))


def test_the_rows_of_runs_are_those_that_a_sweep_reads(tmp_path: Path) -> None:
    """Two readers of run/1 give one row."""
    from rankwise.reporting.grids import row_of
    from rankwise.reporting.reading import load

    folder = put_sweep(tmp_path / "s", _small())
    for row in _small().cells:
        name = str(Path(row.path).parent)
        loaded, _ = load([folder / name / "run.json"])
        assert msgspec.structs.replace(row_of(loaded[0]), path=row.path) == collecting.read_cell(folder, name).row
