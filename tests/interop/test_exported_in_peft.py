"""Exported plans in real PEFT, for every family of layers: the file as written is put on the base, and takes factors.

With B = 0 the model is the base bit by bit. With the factors that `extract --plan` makes for the same plan, it gives
the logits that the extracted adapter gives: ranks and scales of the file are those of the plan, at every module.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rankwise
from rankwise.trainers import export
from rankwise.trainers.as_adapter import write_untrained

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
peft = pytest.importorskip("peft", reason="peft comes with the train extra")
pytest.importorskip("transformers", reason="transformers comes with the train extra")

from safetensors.torch import load_file
from test_extracted_in_peft import CLOSE, FAMILIES, _logits, _pair

pytestmark = [
    pytest.mark.interop,
    # PEFT 0.21 compares pattern keys with modules alone, and obeys those of parameters all the same
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

STACKED = [name for name in sorted(FAMILIES) if not name.endswith("one-by-one")]  # PEFT renames the others
ROUTER = r"mlp\.(gate|shared_expert_gate)$"
"""A router is no linear layer in transformers 5: its parameter is bare."""


def _planned(family: str, folder: Path, scaling: str) -> tuple[Any, Path, Path, rankwise.PlanRecord]:
    build, saving, _ = FAMILIES[family]
    tuned, base, after = _pair(build, folder, **saving)
    plan = rankwise.plan(after, base=base, budget="rank:2", skip=ROUTER, scaling=scaling, scale=0.5, device="cpu")
    assert len({m.r for m in plan.modules}) > 1
    return tuned, base, after, plan


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("family", STACKED)
def test_an_exported_config_gives_the_logits_of_the_plan(family: str, scaling: str, tmp_path: Path) -> None:
    tuned, base, after, plan = _planned(family, tmp_path, scaling)
    rankwise.extract(base, after, tmp_path / "extracted", plan=plan, device="cpu")
    made = export(plan, "peft", model=str(base))
    config = json.loads(made.files["adapter_config.json"]) | {"base_model_name_or_path": None}
    fresh = type(tuned).from_pretrained(base).eval()
    before = _logits(fresh)
    model = peft.get_peft_model(fresh, peft.LoraConfig(**config)).eval()
    assert torch.equal(_logits(model), before)
    factors = load_file(tmp_path / "extracted" / "adapter_model.safetensors")
    loaded = peft.set_peft_model_state_dict(model, factors)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    fresh = type(tuned).from_pretrained(base).eval()
    wanted = _logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "extracted").eval())
    change = float((wanted - before).abs().max())
    assert change > 0.1
    assert float((_logits(model) - wanted).abs().max()) < CLOSE * change


@pytest.mark.parametrize("family", STACKED)
def test_an_untrained_adapter_is_the_base_and_takes_the_factors_of_the_plan(family: str, tmp_path: Path) -> None:
    tuned, base, after, plan = _planned(family, tmp_path, "rslora")
    rankwise.extract(base, after, tmp_path / "extracted", plan=plan, device="cpu")
    write_untrained(plan, tmp_path / "start", model=str(base))
    factors = load_file(tmp_path / "extracted" / "adapter_model.safetensors")
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert {n: t.shape for n, t in start.items()} == {n: t.shape for n, t in factors.items()}
    fresh = type(tuned).from_pretrained(base).eval()
    before = _logits(fresh)
    model = peft.PeftModel.from_pretrained(fresh, tmp_path / "start", is_trainable=True).eval()
    assert torch.equal(_logits(model), before)
    peft.set_peft_model_state_dict(model, factors)
    fresh = type(tuned).from_pretrained(base).eval()
    wanted = _logits(peft.PeftModel.from_pretrained(fresh, tmp_path / "extracted").eval())
    change = float((wanted - before).abs().max())
    assert float((_logits(model) - wanted).abs().max()) < CLOSE * change
