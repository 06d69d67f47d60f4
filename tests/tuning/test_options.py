"""Flags, presets and defaults: what is settled, and what is refused before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RankwiseError, RecordError, UsageError
from rankwise.records import PlannedModule, PlanRecord, now, to_json, version
from rankwise.tuning.options import DEFAULT_ALPHA, DEFAULT_RATE, PRESETS, TINY_RATE, Options, settle


def plan(
    *modules: tuple[str, tuple[int, int], int, float], rule: str = "lora", rate: float | None = None
) -> PlanRecord:
    from rankwise.scaling import scaling

    return PlanRecord(
        format=PlanRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=("test",),
        device="cpu",
        seed=None,
        rule=rule,
        modules=tuple(
            PlannedModule(
                module=name,
                shape=shape,
                r=r,
                lora_alpha=alpha,
                scaling=scaling(rule, alpha, r) if r else 1.0,
                kept_energy_share=None,
            )
            for name, shape, r, alpha in modules
        ),
        params=0,
        budget=None,
        relative_error=None,
        learning_rate=rate,
        why="planted",
    )


def test_without_flags_the_preset_is_knowledge() -> None:
    got = settle(Options(), "some/model")
    assert (got.rank, got.scaling, got.target_modules) == (64, "rslora", "all-linear")
    assert (got.lora_alpha, got.learning_rate) == (DEFAULT_ALPHA, DEFAULT_RATE)
    assert not got.alpha_given


def test_persona_is_standard_lora_of_rank_8() -> None:
    got = settle(Options(preset="persona"), "some/model")
    assert (got.rank, got.scaling) == (8, "lora")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_value_of_a_preset_can_be_overridden(preset: str) -> None:
    got = settle(
        Options(preset=preset, rank=5, scaling="unscaled", target_modules=("q_proj",), epochs=1.5, lora_alpha=3), "m"
    )
    assert (got.rank, got.scaling, got.target_modules, got.epochs, got.lora_alpha) == (
        5,
        "unscaled",
        ("q_proj",),
        1.5,
        3,
    )


def test_the_shipped_model_has_a_learning_rate_of_its_own() -> None:
    assert settle(Options(), "rankwise:tiny").learning_rate == TINY_RATE
    assert settle(Options(learning_rate=1e-5), "rankwise:tiny").learning_rate == 1e-5


def test_a_plan_gives_rank_alpha_rule_and_rate(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan(("a.q_proj", (8, 4), 3, 6.0), rule="rslora", rate=7e-4)))
    got = settle(Options(plan=str(path)), "m")
    assert (got.rank, got.lora_alpha, got.scaling, got.learning_rate) == (3, 6.0, "rslora", 7e-4)
    assert settle(Options(plan=str(path), learning_rate=1e-3), "m").learning_rate == 1e-3


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "--rank must be 1 or more"),
    ({"rank": -4}, "--rank must be 1 or more"),
    ({"steps": 0}, "--steps must be 1 or more"),
    ({"batch_size": 0}, "--batch-size must be 1 or more"),
    ({"batch_size": 10, "gradient_accumulation": 4}, "must be a multiple of"),
    ({"max_length": 1}, "--max-length must be 2 or more"),
    ({"lora_alpha": 0.0}, "--lora-alpha must be a finite number above 0"),
    ({"lora_alpha": math.nan}, "--lora-alpha must be a finite number above 0"),
    ({"learning_rate": -1e-3}, "--learning-rate must be a finite number above 0"),
    ({"learning_rate": math.inf}, "--learning-rate must be a finite number above 0"),
    ({"epochs": 0.0}, "--epochs must be a finite number above 0"),
    ({"steps": 3, "epochs": 1.0}, "give one"),
    ({"weight_decay": -1.0}, "--weight-decay must be 0 or more"),
    ({"max_grad_norm": math.nan}, "--max-grad-norm must be 0 or more"),
    ({"lora_dropout": 1.0}, "--lora-dropout is a share"),
    ({"warmup": -0.1}, "--warmup is a share"),
    ({"seed": -1}, "--seed must be from 0"),
    ({"scaling": "rs"}, "--scaling: there is no 'rs'; there are: lora, rslora, unscaled"),
    ({"preset": "facts"}, "--preset: there is no 'facts'; there are: persona, knowledge"),
    ({"init": "pissa"}, "changes the base weights"),
    ({"init": "xavier"}, "--init: there is no 'xavier'"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[str(flags) for flags, _ in BAD])
def test_a_value_out_of_range_is_refused_with_its_flag(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        settle(Options(**flags), "m")
    assert words in str(caught.value)


def test_a_plan_that_contradicts_the_flags_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan(("a", (4, 4), 2, 2.0))))
    with pytest.raises(UsageError, match="--plan fixes rank"):
        settle(Options(plan=str(path), rank=4), "m")
    with pytest.raises(UsageError, match="made for the rule lora; --scaling rslora contradicts"):
        settle(Options(plan=str(path), scaling="rslora"), "m")
    path.write_text(to_json(plan(("a", (4, 4), 0, 2.0))))
    with pytest.raises(UsageError, match="no module of this plan has a rank above 0"):
        settle(Options(plan=str(path)), "m")
    path.write_text("{}")
    with pytest.raises(RecordError):
        settle(Options(plan=str(path)), "m")
    with pytest.raises(RankwiseError):
        settle(Options(plan=str(tmp_path / "none.json")), "m")
