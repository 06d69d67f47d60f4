"""LoRA on real models: every rank and scale read back from PEFT, and the traps that are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_options import plan

from rankwise.errors import UsageError
from rankwise.records import to_json
from rankwise.scaling import SCALINGS, scaling
from rankwise.tuning import attach
from rankwise.tuning.options import Options, settle

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.0.self_attn.v_proj": (16, 32),
    "model.layers.0.self_attn.o_proj": (32, 32),
    "model.layers.1.mlp.up_proj": (64, 32),
    "model.layers.1.mlp.down_proj": (32, 64),
}


def attached(settings: Any, laid: dict[str, attach.Lora]) -> Any:
    from peft import get_peft_model
    from small_models import pico_config
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(pico_config()), attach.lora_config(settings, laid))
    attach.check_attached(model, laid)
    return model


@pytest.mark.parametrize("rule", SCALINGS)
@pytest.mark.parametrize("alpha", [16.0, 7.5])
def test_peft_gives_every_module_the_scale_of_the_rule(rule: str, alpha: float) -> None:
    settings = settle(Options(rank=8, lora_alpha=alpha, scaling=rule), "m")
    laid = attach.lay_out(settings, SHAPES)
    model = attached(settings, laid)
    for name in SHAPES:
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == 8
        assert layer.scaling["default"] == pytest.approx(scaling(rule, alpha, 8), rel=1e-12)


@pytest.mark.parametrize("rule", SCALINGS)
def test_a_plan_of_mixed_ranks_reaches_every_module(rule: str, tmp_path: Path) -> None:
    ranks = [2, 4, 4, 0, 16, 3]
    made = plan(*((m, s, r, 4.0 + r) for (m, s), r in zip(SHAPES.items(), ranks, strict=True)), rule=rule)
    path = tmp_path / "plan.json"
    path.write_text(to_json(made))
    settings = settle(Options(plan=str(path)), "m")
    laid = attach.lay_out(settings, SHAPES)
    assert {m: lora.r for m, lora in laid.items()} == {m: r for m, r in zip(SHAPES, ranks, strict=True) if r}
    model = attached(settings, laid)
    assert "lora_A" not in dict(
        model.base_model.model.get_submodule("model.layers.0.self_attn.o_proj").named_children()
    )


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan(("model.layers.9.mlp.up_proj", (64, 32), 2, 2.0))))
    with pytest.raises(UsageError, match=r"no linear layer model\.layers\.9\.mlp\.up_proj"):
        attach.lay_out(settle(Options(plan=str(path)), "m"), SHAPES)
    path.write_text(to_json(plan(("model.layers.1.mlp.up_proj", (64, 31), 2, 2.0))))
    with pytest.raises(UsageError, match=r"has shape \(64, 31\) in the plan"):
        attach.lay_out(settle(Options(plan=str(path)), "m"), SHAPES)


def test_a_model_that_peft_made_otherwise_is_refused() -> None:
    settings = settle(Options(rank=8, lora_alpha=16, scaling="lora"), "m")
    laid = attach.lay_out(settings, SHAPES)
    model = attached(settings, laid)
    model.base_model.model.get_submodule("model.layers.1.mlp.up_proj").scaling["default"] = 3.0
    with pytest.raises(UsageError, match=r"in 1 modules; first model\.layers\.1\.mlp\.up_proj"):
        attach.check_attached(model, laid)


def found(**flags: Any) -> dict[str, str]:
    settings = settle(Options(**flags), "m")
    return {f.code: f.text for f in attach.traps(settings, attach.lay_out(settings, SHAPES))}


def test_alpha_left_at_its_default_while_r_rises_is_named_with_the_scale() -> None:
    text = found(rank=32, scaling="lora")["alpha-left-at-default"]
    assert "the scale is 0.5" in text
    assert "alpha-left-at-default" not in found(rank=8, scaling="lora")
    assert "alpha-left-at-default" not in found(rank=32, scaling="lora", lora_alpha=16)
    assert "alpha-left-at-default" not in found(rank=32, scaling="rslora")


def test_alpha_2r_with_rslora_is_named_with_the_scale() -> None:
    assert "gives 8 at r = 16" in found(rank=16, lora_alpha=32, scaling="rslora")["alpha-2r-with-rslora"]
    assert "alpha-2r-with-rslora" not in found(rank=16, lora_alpha=32, scaling="lora")
    assert "alpha-2r-with-rslora" not in found(rank=8, scaling="rslora")  # the default of 16 is nobody's habit


def test_gaussian_init_and_ranks_above_the_shape_are_named() -> None:
    assert "gaussian-init" in found(rank=4, init="gaussian")
    assert "in 2 of 6 modules, first model.layers.0.self_attn.k_proj" in found(rank=20)["rank-above-shape"]
    assert found(rank=16, lora_alpha=16, scaling="lora") == {}


def test_groups_add_up_and_say_mixed_where_they_differ(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(plan(*((m, s, i + 1, 4.0) for i, (m, s) in enumerate(SHAPES.items())))))
    settings = settle(Options(plan=str(path)), "m")
    laid = attach.lay_out(settings, SHAPES)
    rows = attach.group_scales(laid)
    assert sum(row.modules for row in rows) == 6
    assert sum(row.params for row in rows) == sum(r.r * sum(r.shape) for r in laid.values())
    assert all(row.r is None and row.scaling is None and row.lora_alpha == 4.0 for row in rows if row.modules > 1)
