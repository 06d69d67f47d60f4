"""Cells and their names, flags and config files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import ConfigError, RankwiseError, UsageError
from rankwise.scaling import SCALINGS
from rankwise.sweeping.asking import settle_sweep
from rankwise.sweeping.grid import Cell, cell_of, make_grid, seeds_of
from rankwise.sweeping.settings import OF_THE_CELL, TRAINING, default_rates, make_request, read_config
from rankwise.tuning.training import train


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4096),
    st.sampled_from(sorted(SCALINGS)),
    st.floats(min_value=1e-12, max_value=1e3),
)
def test_every_name_is_read_back(seed: int, rank: int, rule: str, rate: float) -> None:
    cell = Cell(seed, rank, rule, rate)
    assert cell_of(cell.name) == cell
    assert "/" not in cell.name


def test_the_name_is_as_people_write_it() -> None:
    assert Cell(0, 64, "rslora", 1e-3).name == "rank=64,scaling=rslora,lr=0.001,seed=0"
    assert Cell(0, 64, "lora", 1e-3 + 1e-17).name != Cell(0, 64, "lora", 1e-3 + 1e-10).name


@pytest.mark.parametrize(
    "name", ["rank=64", "rank=64,scaling=rslora,lr=1e-3,seed=0", "rank=64,scaling=rslora,lr=nan,seed=0",
             "rank=64,scaling=rslora,lr=0.001,seed=00", "sweep.json", ""]
)  # fmt: skip
def test_other_names_are_no_cells(name: str) -> None:
    assert cell_of(name) is None


def test_all_settings_get_one_seed_before_any_gets_two() -> None:
    cells = make_grid((16, 4), ("lora", "rslora"), (1e-2, 1e-3), (0, 1)).cells
    assert len(cells) == len(set(cells)) == 16
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8
    assert cells[0] == Cell(0, 4, "lora", 1e-3)


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (((), ("lora",), (1e-3,), (0,)), "--ranks is empty"),
        (((4, 4), ("lora",), (1e-3,), (0,)), "--ranks has 4 more than once"),
        (((0,), ("lora",), (1e-3,), (0,)), "--ranks must be 1 or more"),
        (((4,), ("rs",), (1e-3,), (0,)), "there is no 'rs'"),
        (((4,), ("lora",), (float("nan"),), (0,)), "--learning-rates must be finite"),
        (((4,), ("lora",), (-1e-3,), (0,)), "--learning-rates must be finite"),
        (((4,), ("lora",), (1e-3,), (-1,)), "--seeds must be from 0"),
        ((tuple(range(1, 500)), ("lora",), (1e-3,), tuple(range(500))), "more than 100,000"),
    ],
)
def test_grids_that_cannot_be(lists: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_grid(*lists)


def test_seeds_are_a_number_or_a_list() -> None:
    assert seeds_of(3, 0) == (0, 1, 2)
    assert seeds_of((5,), 0) == (5,)
    with pytest.raises(UsageError, match="--seeds must be 1 or more"):
        seeds_of(0, 0)


def test_train_takes_every_setting_and_every_setting_of_train_is_here_or_the_grids() -> None:
    """A flag that `train` gains must be decided on here too."""
    takes = set(inspect.signature(train).parameters)
    driver = {"model", "data", "out", "resume", "force", "tokenizer", "device", "command", "progress", "announce"}
    assert takes - driver == set(TRAINING) | set(OF_THE_CELL)
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items() if name in TRAINING}
    assert {name: value for name, value in defaults.items() if TRAINING[name] != value} == {"save_every": None}


def test_the_digest_is_of_what_changes_the_outcome() -> None:
    one = make_request("m", "d", {"steps": 10})
    assert one.digest == make_request("m", "d", {"steps": 10, "monitor_every": 5, "report_to": ("wandb",)}).digest
    for other in ({"steps": 11}, {"steps": 10, "lora_alpha": 32.0}, {"steps": 10, "recall": False}):
        assert make_request("m", "d", other).digest != one.digest
    assert make_request("m2", "d", {"steps": 10}).digest != one.digest


def test_local_paths_are_written_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    request = make_request("org/name", "rows.jsonl", {})
    assert (request.model, request.data) == ("org/name", str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stepps": 3}, "did you mean 'steps'"),
        ({"rank": 3}, "the grid sets it"),
        ({"plan": "plan.json"}, "a plan fixes the rank"),
        ({"steps": 0}, "--steps must be 1 or more"),
        ({"steps": 3, "epochs": 1.0}, "--steps and --epochs both say"),
        ({"optimizer": "adamw", "batch_size": 7, "gradient_accumulation": 2}, "must be a multiple"),
        ({"stop_when_unstable": 0}, "--stop-when-unstable must be 1 or more"),
        ({"steps": "many"}, "--steps must be a whole number, got 'many'"),
        ({"jobs": 0}, "--jobs must be 1 or more"),
        ({"cpus_per_run": float("nan")}, "--cpus-per-run must be"),
        ({"gpus_per_run": 1.5}, "a share of one GPU"),
        ({"gpus_per_run": 1.0, "device": "cpu"}, "contradict"),
        ({"device": "cuda:1"}, "--device cuda:1: in a sweep it is cpu or cuda"),
        ({"seeds": 0}, "--seeds must be 1 or more"),
    ],
)
def test_settings_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settle_sweep("rankwise:tiny", "rankwise:facts", given)


def test_live_objects_are_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"the data of a sweep is loaded in other processes: .* not a list"):
        settle_sweep("rankwise:tiny", [{"text": "a"}], {})


def test_the_default_grid() -> None:
    asked = settle_sweep("rankwise:tiny", "rankwise:facts", {})
    assert len(asked.grid.cells) == 3 * 2 * 3 * 3
    assert asked.grid.learning_rates == (1e-3, 3e-3, 1e-2)
    assert default_rates("org/name") == (7e-5, 2e-4, 7e-4)


def test_one_rule_may_be_a_word() -> None:
    assert settle_sweep("m", "d", {"scaling": "lora"}).grid.scaling == ("lora",)


def test_a_config_file_says_what_flags_say_and_flags_override(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "ranks: 4,16\nscaling: [lora]\nlearning-rates: [1e-3, 3.0e-3]\nseeds: [5, 7]\nepochs: 2\nbatch_size: 8\n"
        "warmup: 1e-1\njobs: 2\n"
    )
    asked = settle_sweep("m", "d", {"ranks": (8,), "batch_size": 16}, config=path)
    assert asked.grid.ranks == (8,)
    assert asked.grid.learning_rates == (1e-3, 3e-3), "YAML takes 1e-3 for a word"
    assert asked.grid.seeds == (5, 7)
    assert (asked.request.settings["epochs"], asked.request.settings["batch_size"]) == (2, 16)
    assert asked.request.settings["warmup"] == 0.1
    assert asked.machines.jobs == 2


def test_a_config_file_may_name_model_and_data(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("model: m\ndata: d\nseeds: 2\n")
    asked = settle_sweep(None, None, {}, config=path)
    assert (asked.request.model, asked.request.data, asked.grid.seeds) == ("m", "d", (0, 1))
    with pytest.raises(UsageError, match="needs a MODEL and DATA"):
        settle_sweep(None, None, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ranks: [a]", "ranks must be a list of whole numbers"),
        ("ranks: [4.5]", "ranks must be a list of whole numbers"),
        ("ranks: true", "ranks must be a list of whole numbers"),
        ("learning_rates: {a: 1}", "learning_rates must be a list of numbers"),
        ("- 4", "it holds list"),
        ("ranks: [4", "is not YAML"),
        ("bach_size: 3", "did you mean 'batch_size'"),
        ("batch-size: 3\nbatch_size: 4", "has batch_size twice"),
        ("rank: 3", "the grid sets it"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_config_files_that_cannot_be(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config(path)


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RankwiseError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")
