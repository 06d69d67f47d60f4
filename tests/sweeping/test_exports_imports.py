"""The grid in other tools' words, and PEFT's results as rows."""

from __future__ import annotations

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise.errors import NothingToMeasureError, OutputExistsError, RecordError, UsageError
from rankwise.records import SweepRecord, read_record
from rankwise.scaling import scaling
from rankwise.sweeping.exports import EXPORTS, export
from rankwise.sweeping.folder import check_sweep_folder
from rankwise.sweeping.grid import Cell, make_grid
from rankwise.sweeping.imports import import_method_comparison, read_method_comparison
from rankwise.sweeping.settings import make_request

GRID = make_grid((4, 16), ("lora", "rslora", "unscaled"), (1e-3, 3e-3), (0, 1))


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_every_export_is_yaml_that_holds_every_value_of_the_grid(name: str) -> None:
    text = export(name, make_request("org/m", "org/d", {"steps": 5}), GRID)
    whole = str(yaml.safe_load(text))
    for value in (*GRID.ranks, *GRID.learning_rates, *GRID.seeds):
        assert str(value) in whole
    assert text.startswith("#")


def test_axolotl_crosses_its_lists_into_our_cells() -> None:
    """Crossed as axolotl crosses: every list with every other, and `_` as one list of joint values."""
    found = yaml.safe_load(export("axolotl", make_request("org/m", "org/d", {"lora_alpha": 32.0}), GRID))
    joint = found.pop("_")
    runs = [
        dict(zip(found, values, strict=True)) | pair for values in itertools.product(*found.values()) for pair in joint
    ]
    assert len(runs) == len(GRID.cells)

    def factor(run: dict[str, Any]) -> float:
        return scaling("rslora" if run["peft_use_rslora"] else "lora", run["lora_alpha"], run["lora_r"])

    made = sorted((r["lora_r"], factor(r), r["learning_rate"], r["seed"]) for r in runs)
    wanted = sorted((c.rank, scaling(c.scaling, 32.0, c.rank), c.learning_rate, c.seed) for c in GRID.cells)
    for one, other in zip(made, wanted, strict=True):
        assert one == pytest.approx(other)


def test_wandb_calls_train_with_what_its_flags_take(tmp_path: Path) -> None:
    """The line is run by a real shell, with a stand-in for rankwise that prints its words."""
    data = tmp_path / "my rows.jsonl"
    data.write_text("{}")
    request = make_request(
        "org/m", data, {"steps": 5, "recall": False, "target_modules": ["q_proj", "v_proj"], "warmup": 0.1}
    )
    found = yaml.safe_load(export("wandb", request, GRID))
    assert found["method"] == "grid"
    assert set(found["parameters"]) == {"rank", "scaling", "learning-rate", "seed"}
    stand_in = tmp_path / "rankwise"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    words = found["command"]
    assert words[-1] == "${args}"
    line = [*words[:-1], "--rank=4", "--scaling=lora", "--learning-rate=0.001", "--seed=0"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WANDB_RUN_ID": "abc"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert done[:3] == ["train", "org/m", str(data)]
    assert done[-4:] == ["--rank=4", "--scaling=lora", "--learning-rate=0.001", "--seed=0"]
    assert done[done.index("-o") + 1] == "runs/abc"
    assert "--no-recall" in done
    for flag, value in (("--steps", "5"), ("--target-modules", "q_proj,v_proj"), ("--warmup", "0.1")):
        assert done[done.index(flag) + 1] == value

    from rankwise.cli.main import build_app

    command, bound, _ = build_app().parse_args([*done[:3], *done[3:]], exit_on_error=False, print_error=False)
    assert command.__name__ == "train"
    assert bound.arguments["lora"].rank == 4
    assert bound.arguments["loop"].steps == 5


def test_an_export_that_is_none() -> None:
    with pytest.raises(UsageError, match="--export: there is no 'optuna'; there are: axolotl, wandb"):
        export("optuna", make_request("m", "d", {}), GRID)


def result(
    rank: int, *, rslora: bool = False, rate: float = 1e-4, seed: int = 0, accuracy: float = 0.5, **more: Any
) -> dict[str, Any]:
    """A result in the shape of method_comparison/MetaMathQA/results: the fields of late 2025, made-up figures."""
    peft = {
        "task_type": "CAUSAL_LM",
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["v_proj", "q_proj"],
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "bias": "none",
    }
    train = {
        "model_id": "meta-llama/Llama-3.2-3B",
        "query_template": "Question: {query}",
        "max_steps": 5000,
        "seed": seed,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": rate, "weight_decay": 0.1},
        "use_amp": False,
    }
    last = {
        "step": 5000, "test accuracy": accuracy, "train loss": 0.6, "train samples": 20000,
        "train total tokens": 4198051, "forgetting": 0.05,
    }  # fmt: skip
    whole: dict[str, Any] = {
        "run_info": {
            "created_at": "2025-12-01T00:00:00+00:00", "total_time": 2000.0, "experiment_name": f"lora/rank{rank}",
            "peft_branch": "main", "train_config": train, "peft_config": peft, "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_max": 22_000_000_000, "train_time": 1800.0, "num_trainable_params": 286720 * rank,
            "status": "success", "metrics": [{"step": 250, "valid accuracy": 0.3, "train loss": 0.9}, last],
        },
        "meta_info": {"system_info": {"accelerator": "NVIDIA L40S"}},
    }  # fmt: skip
    for path, value in more.items():
        place, *keys, name = path.split("__")
        target = whole[place]
        for key in keys:
            target = target[key]
        target[name] = value
    return whole


def write(folder: Path, **results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_results_of_peft_are_rows_with_the_same_answers(tmp_path: Path) -> None:
    results = {
        f"r{rank}_s{seed}": result(rank, seed=seed, rslora=True, accuracy=0.4 + rank / 1000 + seed / 10000)
        for rank in (32, 64) for seed in (0, 1, 2)
    }  # fmt: skip
    record = read_method_comparison(write(tmp_path / "results", **results))
    assert [(c.rank, c.scaling, c.seed) for c in record.cells] == [
        (r, "rslora", s) for r in (32, 64) for s in (0, 1, 2)
    ]
    first = record.cells[0]
    assert (first.exact_share, first.forgetting, first.loss, first.tokens) == (0.4 + 32 / 1000, 0.05, 0.6, 4198051)
    assert (first.params, first.seconds, first.peak_memory_bytes) == (286720 * 32, 1800.0, 22_000_000_000)
    assert record.config.score == "exact_share"
    assert record.device == "NVIDIA L40S"
    assert record.rank_effects[0].verdict == "helps"
    assert "raising the rank helps: share of exact answers +3.2 points" in record.answers[0]


def test_what_is_no_lora_run_or_has_other_settings_is_named(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "results",
        a=result(32),
        b=result(64, rslora=True),
        later=result(64, rslora=True, accuracy=0.6),
        dora=result(32, run_info__peft_config__use_dora=True),
        kasa=result(32, run_info__peft_config__use_kasa=True),
        loha=result(32, run_info__peft_config__peft_type="LOHA"),
        full=result(32, run_info__peft_config=None),
        mlp=result(10, run_info__peft_config__target_modules=["up_proj"]),
        patterns=result(32, run_info__peft_config__rank_pattern={"q": 8}),
        newer=result(16, run_info__train_config__a_new_field=False),
    )
    record = read_method_comparison(folder)
    assert [c.path for c in record.cells] == ["newer.json", "a.json", "b.json"], "the first of one setting and seed"
    (finding,) = (f for f in record.findings if f.code == "results-left-out")
    assert finding.text.startswith("7 of 10 files are not in this record")
    for words in ("dora (use_dora)", "kasa (use_kasa)", "loha (LOHA)", "full (full fine-tuning)"):
        assert words in finding.text


def test_failed_and_cancelled_results_keep_their_status(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "results",
        a=result(4),
        b=result(8, train_info__status="failed", train_info__metrics=[], run_info__error_msg="out of memory"),
        c=result(16, train_info__status="canceled"),
    )
    record = read_method_comparison(folder)
    assert [c.status for c in record.cells] == ["done", "failed", "interrupted"]
    assert record.cells[1].error == "out of memory"
    assert record.cells[1].exact_share is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_info": {}}', '{"run_info": [], "train_info": {}}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError, match="is no result of PEFT's method_comparison"):
        read_method_comparison(tmp_path)


@pytest.mark.parametrize(
    ("where", "value"),
    [("run_info__peft_config__r", "many"), ("run_info__train_config__optimizer_kwargs", {}), ("train_info__metrics", 3),
     ("run_info__train_config__seed", None), ("train_info__train_time", [])],
)  # fmt: skip
def test_fields_of_a_wrong_type_are_refused(where: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"a\.json"):
        read_method_comparison(write(tmp_path / "results", a=result(4, **{where: value})))


def test_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(NothingToMeasureError, match=r"holds no \.json file"):
        read_method_comparison(tmp_path)
    with pytest.raises(NothingToMeasureError, match="no LoRA run"):
        read_method_comparison(write(tmp_path / "results", a=result(4, run_info__peft_config__peft_type="LOHA")))


def test_what_is_imported_replaces_no_runs_and_no_runs_replace_it(tmp_path: Path) -> None:
    results, out = write(tmp_path / "results", a=result(32), b=result(64)), tmp_path / "out"
    name = Cell(0, 4, "lora", 1e-3).name
    (tmp_path / "swept" / name).mkdir(parents=True)
    (tmp_path / "swept" / "sweep.json").write_text("of runs")
    for force in (False, True):
        with pytest.raises(UsageError, match="is the folder of a sweep that was run here"):
            import_method_comparison(results, tmp_path / "swept", force=force)
    assert (tmp_path / "swept" / "sweep.json").read_text() == "of runs"
    (tmp_path / "begun" / ".sweep").mkdir(parents=True)
    with pytest.raises(UsageError, match="is the folder of a sweep that was run here"):
        import_method_comparison(results, tmp_path / "begun")
    with pytest.raises(OutputExistsError):
        import_method_comparison(results, results)

    record = import_method_comparison(results, out)
    assert read_record(out / "sweep.json", SweepRecord) == record
    with pytest.raises(UsageError, match=r"sweep\.json was imported .* pass --force"):
        check_sweep_folder(out, force=False)
    check_sweep_folder(out, force=True)
    with pytest.raises(OutputExistsError):
        import_method_comparison(results, out)
    (results / "b.json").unlink()
    (out / "results.parquet").write_bytes(b"stale")
    assert len(import_method_comparison(results, out, force=True).cells) == 1
    parquet = out / "results.parquet"
    assert not parquet.exists() or parquet.read_bytes()[:4] == b"PAR1"
    assert (out / "results.csv").read_text().count("\n") == 2
