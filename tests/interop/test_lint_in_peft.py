"""The scales that lint shows for a config and a model, held to what PEFT attaches with the same config."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

# 12 layers, so that `layers.1` and `layers.11` are told apart
SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12}

CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "regex": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.(1|11)\..*(q|k)_proj"},
    "all-linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "layers": {"target_modules": ["o_proj"], "layers_to_transform": [0, 11]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.3.self_attn.q_proj"]},
    "whole": {"target_modules": ["up_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "plan": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 16, r"layers\.(0|2)\..*v_proj": 2, "gate_proj": 4},
        "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 22.5, "layers.0.self_attn.v_proj": 5},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_scales_are_those_that_peft_attaches(base: Path, tmp_path: Path, name: str) -> None:
    config = LoraConfig(**CONFIGS[name], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    wanted = Counter((m.r["default"], round(m.scaling["default"], 9)) for m in layers)
    assert layers
    record = rankwise.lint(tmp_path, model=base)
    made: Counter[tuple[int, float]] = Counter()
    for row in record.scales:
        made[row.r, round(row.scaling or 0.0, 9)] += row.modules or 0
    assert made == wanted


def test_a_saved_adapter_gives_the_same_scales(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**CONFIGS["plan"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    record = rankwise.lint(tmp_path)
    scales = {round(row.scaling or 0.0, 9): row.modules for row in record.scales}
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert scales == dict(Counter(round(m.scaling["default"], 9) for m in layers))
    assert [f.code for f in record.findings] == [
        "rank-pattern-alone",
        "alpha-2r-with-rslora",
        "untrained",
        "scale-differs-by-runtime",
    ]
