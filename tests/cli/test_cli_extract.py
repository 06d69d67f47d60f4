"""extract as a script meets it: exit codes, streams, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import rankwise
from planting import planted, write_checkpoint
from rankwise.cli import main as cli
from rankwise.cli.show_extraction import show_extraction
from rankwise.records import Calibration, ExtractionRecord, from_json, read_record

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: Any) -> tuple[int, str, str]:
        line = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["rankwise", *line])
        capsys.readouterr()
        code = cli.run(line)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    base = {f"layers.{i}.q_proj.weight": rng.standard_normal((24, 16)).astype(np.float32) for i in range(2)}
    base["norm.weight"] = np.ones(16, np.float32)
    tuned = {
        n: 1.5 * a if a.ndim == 1 else (a + planted(rng, (24, 16), [2, 1])).astype(a.dtype) for n, a in base.items()
    }
    return write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned)


def test_table_record_and_page(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, record, page = tmp_path / "adapter", tmp_path / "record.json", tmp_path / "page.html"
    code, text, errors = run("extract", *pair, out, "--rank", "2", "-o", record, "--report", page)
    assert code == 0, errors
    assert "layers.0.q_proj" in text
    assert "best possible" in text
    assert "it is no error of outputs" in text
    assert "[left-out]" in text
    assert "50.000%" not in text
    made = read_record(record, ExtractionRecord)
    assert made == read_record(out / "extraction.json", ExtractionRecord)
    assert made.command[:2] == ("rankwise", "extract")
    html = page.read_text()
    assert "is not the error of its outputs" in html
    assert "layers.0.q_proj" in html
    assert f"wrote {record}" in errors


def test_json_is_the_record_alone(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, text, _ = run("extract", *pair, tmp_path / "adapter", "--energy", "0.9", "--json")
    assert code == 0
    assert from_json(text, ExtractionRecord).choice == "energy"


def test_inspect_reads_it(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    run("extract", *pair, tmp_path / "adapter", "--rank", "2", "--scaling", "rslora")
    code, text, _ = run("inspect", tmp_path / "adapter", "--json")
    assert code == 0
    for module in json.loads(text)["modules"]:
        np.testing.assert_allclose(module["singular_values"], [2, 1], rtol=1e-5)
        assert module["rule"] == "rslora"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--rank N, --energy SHARE"),
        (("--rank", "2", "--signal"), "--rank and --signal"),
        (("--rank", "2", "--dtype", "int8"), "--dtype"),
        (("--rank", "x"), "rank"),
        (("--plan", "nowhere.json"), "nowhere.json"),
    ],
)
def test_refusals_are_one_message(
    words: tuple[str, ...], said: str, run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    code, text, errors = run("extract", *pair, tmp_path / "adapter", *words)
    assert code == 2
    assert text == ""
    assert said in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "adapter").exists()


def test_an_existing_adapter_is_replaced_only_by_force(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert run("extract", *pair, out, "--rank", "1")[0] == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    code, _, errors = run("extract", *pair, out, "--rank", "2")
    assert code == 2
    assert "--force" in errors
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert run("extract", *pair, out, "--rank", "2", "--force")[0] == 0
    assert (out / "adapter_model.safetensors").read_bytes() != before


def test_outputs_inside_the_adapter_are_refused(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, errors = run("extract", *pair, tmp_path / "adapter", "--rank", "1", "-o", tmp_path / "adapter" / "r.json")
    assert code == 2
    assert "put it beside" in errors


def test_a_folder_that_may_not_be_written_to_is_one_message(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, errors = run("extract", *pair, tmp_path / "no" / "adapter", "--rank", "1")
    assert code == 2
    assert "no folder" in errors


def test_a_share_is_no_rank(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The parser of the command line would round 0.99 to rank 1."""
    code, _, errors = run("extract", *pair, tmp_path / "out", "--rank", "0.99")
    assert code == 2
    assert "--rank: wanted a whole number; got '0.99'" in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("flag", ["--out", "--report"])
def test_no_input_is_overwritten(flag: str, side: int, run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    weights = pair[side] / "model.safetensors"
    before = weights.read_bytes()
    code, _, errors = run("extract", *pair, tmp_path / "out", "--rank", "2", flag, weights, "--force")
    assert code == 2
    assert "which is read" in errors
    assert weights.read_bytes() == before


@pytest.mark.parametrize(("ours", "said"), [(0.06, "25.0% lower"), (0.1, "25.0% higher"), (None, None)])
def test_what_calibration_brought_is_said(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], ours: float | None, said: str | None
) -> None:
    """At equal rank: the figures are of the held-out texts, and the difference of losses is said as a share."""
    calibration = Calibration(
        data="texts.jsonl",
        samples=64,
        tokens=4096,
        held_out=16,
        modules=2,
        output_error=0.06,
        output_error_plain=0.1,
        base_loss=3.2,
        tuned_loss=None if ours is None else 2.5,
        adapter_loss=2.6,
        plain_loss=2.7,
        loss_difference=ours,
        loss_difference_plain=None if ours is None else 0.08,
        inputs="base" if ours is None else "tuned",
    )
    record = rankwise.extract(*pair, tmp_path / "adapter", rank=2, device="cpu")
    show_extraction(msgspec.structs.replace(record, calibration=calibration), every=False)
    out = capsys.readouterr().out
    inputs = "base" if ours is None else "tuned"
    assert (
        "output error on 16 held-out texts of texts.jsonl: 6.000%, without calibration 10.000% "
        f"(fitted to the inputs of the {inputs} model on 64 others)"
    ) in out
    if said is None:
        assert "off the tuned" not in out
    else:
        assert (
            f"off the tuned model's loss by {ours:.4f} a token, without calibration by 0.0800 at the same ranks: {said}"
        ) in out
