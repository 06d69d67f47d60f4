"""plan as a script meets it: exit codes, what goes to which stream, what is left on the disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rankwise
from planting import planted_factors, write_adapter, write_checkpoint
from rankwise.cli import main as cli
from rankwise.cli.plan import parsed_weights
from rankwise.errors import UsageError
from rankwise.records import PlanRecord, read_record

Run = Callable[..., tuple[int, str, str]]


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


def adapter_at(folder: Path, layers: int = 2) -> Path:
    """Write an adapter of two kinds of modules with six directions each, weaker from layer to layer."""
    rng = np.random.default_rng(5)
    factors = {}
    for layer in range(layers):
        for name, shape in (("self_attn.q_proj", (24, 16)), ("mlp.up_proj", (40, 16))):
            a, b = planted_factors(rng, shape, [8 * 0.5**i / (layer + 1) for i in range(6)])
            factors[f"model.layers.{layer}.{name}"] = (a.astype("f4"), b.astype("f4"))
    return write_adapter(folder, factors)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_at(tmp_path_factory.mktemp("plans") / "adapter")


@pytest.fixture(scope="module")
def spectra(adapter: Path) -> Path:
    path = adapter.parent / "spectra.json"
    path.write_text(rankwise.inspect(adapter).to_json())
    return path


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one message on stderr and no traceback."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.count("rankwise: error:") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_the_table_has_the_ranks_and_both_errors(run: Run, spectra: Path) -> None:
    code, out, err = run("plan", spectra, "--budget", "rank:2")
    assert (code, err) == (0, "")
    made = rankwise.plan(spectra, budget="rank:2")
    assert made.uniform is not None
    lines = out.splitlines()
    for m in made.modules:
        row = next(line for line in lines if line.startswith(m.module)).split()
        assert row[4:7] == [str(m.r), f"{m.lora_alpha:g}", "1"]
    compared = {line.split("  ")[0]: line for line in lines}
    assert f"{made.params:,}" in compared["this plan"]
    assert f"{made.relative_error:.4g}" in compared["this plan"]
    assert f"{made.uniform.relative_error:.4g}" in compared["uniform rank 2"]
    assert made.why in out


def test_many_modules_are_shown_by_group_and_all_on_request(run: Run, tmp_path: Path) -> None:
    folder = adapter_at(tmp_path / "adapter", layers=21)
    out = run("plan", folder, "--rank", 2)[1]
    assert "attention/early" in out
    assert "mlp/late" in out
    assert "model.layers.20.mlp.up_proj" not in out
    assert "--all prints every module" in out
    assert "model.layers.20.mlp.up_proj" in run("plan", folder, "--rank", 2, "--all")[1]


def test_json_is_the_record_and_nothing_else(run: Run, spectra: Path, tmp_path: Path) -> None:
    out_path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    code, out, _ = run("plan", spectra, "--energy", 0.9, "--json", "-o", out_path, "--report", page)
    assert code == 0
    assert out == out_path.read_text()
    record = read_record(out_path, PlanRecord)
    assert record.command[:4] == ("rankwise", "plan", str(spectra), "--energy")
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    assert_refused(run("plan", spectra, "--energy", 0.9, "-o", out_path), "--force")
    assert run("plan", spectra, "--energy", 0.5, "-o", out_path, "--force", "--quiet")[0] == 0
    assert read_record(out_path, PlanRecord).modules != record.modules


def test_a_pair_of_checkpoints_is_inspected(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    base = rng.standard_normal((32, 24)).astype("f4")
    tuned = base + (3 * np.outer(rng.standard_normal(32), rng.standard_normal(24))).astype("f4")
    before = write_checkpoint(tmp_path / "base", {name: base})
    after = write_checkpoint(tmp_path / "tuned", {name: tuned})
    code, out, _ = run("plan", after, "--base", before, "--signal", "--json", "--device", "cpu")
    assert code == 0
    made = PlanRecord.from_json(out)
    assert [(m.r, m.signal_rank) for m in made.modules] == [(1, 1)]
    assert_refused(run("plan", after, "--signal"), "--base")


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no choice": ((), "say in one way how ranks are chosen"),
    "two choices": (("--rank", "2", "--signal"), "got --signal and --rank"),
    "budget": (("--budget", "much"), "rank:16"),
    "share": (("--energy", "2"), "--energy is a share"),
    "weights": (("--energy", "0.9", "--weights", "mlp"), "wanted PATTERN=W"),
    "serve": (("--rank", "2", "--serve", "nowhere"), "no runtime is called"),
    "export": (("--rank", "2", "--export", "nothing"), "--export: there is no 'nothing'"),
    "stdout twice": (("--rank", "2", "--export", "peft", "--json"), "--export-out"),
    "place of nothing": (("--rank", "2", "--export-out", "x"), "name a trainer with --export"),
    "uniform of nothing": (("--rank", "2", "--uniform"), "name a trainer with --export"),
    "tolerance": (("--rank", "2", "--alpha-tolerance", "1"), "--alpha-tolerance"),
    "no folder": (("--rank", "2", "--export", "peft", "--export-out", "none/x.json"), "there is no folder none"),
    "one path": (("--rank", "2", "-o", "x", "--as-adapter", "x"), "--out and --as-adapter both name x"),
    "base": (("--rank", "2", "--base", "x"), "--base"),
    "model of nothing": (("--rank", "2", "--model", "x"), "--model is what exports are compared with"),
    "uniform adapter": (
        ("--rank", "2", "--export", "llamafactory", "--uniform", "--as-adapter", "x"),
        "give one of the two",
    ),
    "flag": (("--rang", "2"), "--rank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_usage_is_refused_in_one_message(
    run: Run, spectra: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, said = REFUSED[name]
    assert_refused(run("plan", spectra, *words), said)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_patterns_or_one_file() -> None:
    assert parsed_weights(["a=b=2", "mlp=0.5"]) == {"a=b": 2.0, "mlp": 0.5}
    assert parsed_weights([]) is None
    for wrong in ("=2", "mlp=", "mlp=many"):
        with pytest.raises(UsageError, match="PATTERN=W"):
            parsed_weights([wrong])


def test_an_export_takes_the_place_of_the_table_or_goes_to_its_own(run: Run, spectra: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft comes with the train extra")
    code, out, err = run("plan", spectra, "--budget", "rank:2", "--export", "peft")
    assert code == 0
    made = rankwise.plan(spectra, budget="rank:2")
    config = json.loads(out)
    assert set(config["target_modules"]) == {m.module for m in made.modules}
    assert config["use_rslora"] is False
    assert err, "notes go to stderr"
    path = tmp_path / "adapter_config.json"
    code, table, _ = run("plan", spectra, "--budget", "rank:2", "--export", "peft", "--export-out", path)
    assert code == 0
    assert path.read_text() == out
    assert "this plan" in table


def test_an_untrained_adapter_has_the_planned_ranks_and_scales(run: Run, spectra: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft comes with the train extra")
    folder = tmp_path / "untrained"
    words = ("--energy", "0.9", "--scaling", "rslora", "--as-adapter", folder)
    code, _, err = run("plan", spectra, *words)
    assert code == 0
    assert f"wrote {folder}" in err
    made = rankwise.plan(spectra, energy=0.9, scaling="rslora")
    read = rankwise.inspect(folder)
    assert {m.module: m.r for m in read.modules} == {m.module: m.r for m in made.modules}
    assert [m.scaling for m in read.modules] == pytest.approx([1.0] * len(read.modules))
    assert all(m.energy == 0 for m in read.modules)


def test_an_adapter_folder_of_another_plan_is_replaced_by_force_alone(run: Run, spectra: Path, tmp_path: Path) -> None:
    folder = tmp_path / "start"
    words = ("--as-adapter", folder, "--export", "llamafactory", "--quiet")
    assert run("plan", spectra, "--rank", 2, *words)[0] == 0
    before = (folder / "adapter_config.json").read_bytes()
    assert_refused(run("plan", spectra, "--rank", 3, *words), str(folder), "--force")
    assert (folder / "adapter_config.json").read_bytes() == before
    assert run("plan", spectra, "--rank", 3, *words, "--force")[0] == 0
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3


def test_a_folder_that_is_taken_is_refused_before_the_source_is_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "notes.txt").write_text("mine")
    assert_refused(run("plan", tmp_path / "none", "--rank", 2, "--as-adapter", tmp_path / "start"), "--force")


def test_a_uniform_file_says_its_own_ranks_and_its_exact_error(run: Run, spectra: Path) -> None:
    """A budget of the cheapest few directions leaves modules out: only the spectra know the uniform rank's error."""
    code, out, err = run("plan", spectra, "--budget", 200, "--export", "mlx", "--uniform")
    assert code == 0
    first = err.splitlines()[0]
    assert "Relative error over these modules: " in first
    assert "at most" not in first
    words = " ".join(line.removeprefix("# ") for line in out.splitlines() if line.startswith("#"))
    assert first in words
    assert "The plan in whose place it stands: Asked for" in words


def test_a_trainer_that_takes_no_ranks_by_module_is_refused_and_nothing_is_written(
    run: Run, spectra: Path, tmp_path: Path
) -> None:
    words = ("plan", spectra, "--budget", "rank:2", "--export", "litgpt", "--export-out", tmp_path / "lit.yaml")
    assert_refused(run(*words, "-o", tmp_path / "plan.json"), "--uniform")
    assert list(tmp_path.iterdir()) == []
