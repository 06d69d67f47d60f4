"""The files hold only keys that the trainers have, of the types that they declare.

The tables are facts out of the trainers' own schemas at the commits named in docs/reference/trainers.md: names and
types alone. A key that a trainer does not know would be ignored by some and refused by others.
"""

from __future__ import annotations

import ast

import pytest
import yaml
from trainer_plans import mixed, uniform

from rankwise.trainers import TRAINERS, export

WHOLE = int
TABLE = dict
NAMES = list

KEYS = {
    # src/axolotl/utils/schemas/peft.py and training.py at 067b021c
    "axolotl.yaml": {
        "base_model": str,
        "adapter": str,
        "lora_model_dir": str,
        "lora_r": WHOLE,
        "lora_alpha": WHOLE,
        "peft_use_rslora": bool,
        "lora_dropout": float,
        "lora_target_modules": NAMES,
        "lora_fan_in_fan_out": bool,
        "lora_rank_pattern": TABLE,
        "lora_alpha_pattern": TABLE,
        "learning_rate": float,
    },
    # src/llamafactory/hparams/finetuning_args.py and model_args.py at ff6d4d12
    "llamafactory.yaml": {
        "model_name_or_path": str,
        "adapter_name_or_path": str,
        "create_new_adapter": bool,
        "finetuning_type": str,
        "lora_rank": WHOLE,
        "lora_alpha": WHOLE,
        "use_rslora": bool,
        "lora_dropout": float,
        "lora_target": str,
        "learning_rate": float,
    },
    # trl/trainer/model_config.py at f2cd5771, and TrainingArguments
    "trl_sft.yaml": {
        "model_name_or_path": str,
        "use_peft": bool,
        "lora_r": WHOLE,
        "lora_alpha": WHOLE,
        "use_rslora": bool,
        "lora_dropout": float,
        "lora_target_modules": NAMES,
        "learning_rate": float,
    },
    # torchtune/models/llama3_1/_model_builders.py and recipes/configs at bd2a0fc7
    "torchtune.yaml": {"model": TABLE, "optimizer": TABLE},
    "torchtune.yaml:model": {
        "lora_attn_modules": NAMES,
        "apply_lora_to_mlp": bool,
        "apply_lora_to_output": bool,
        "lora_rank": WHOLE,
        "lora_alpha": (int, float),
        "lora_dropout": float,
    },
    "torchtune.yaml:optimizer": {"lr": float},
    # litgpt/finetune/lora.py at 26857050
    "litgpt.yaml": {
        "lora_r": WHOLE,
        "lora_alpha": WHOLE,
        "lora_dropout": float,
        "lora_query": bool,
        "lora_key": bool,
        "lora_value": bool,
        "lora_projection": bool,
        "lora_mlp": bool,
        "lora_head": bool,
        "optimizer": TABLE,
    },
    "litgpt.yaml:optimizer": {"class_path": str, "init_args": TABLE},
    # mlx_lm/lora.py and examples/lora_config.yaml at d78bf58e
    "mlx_lora.yaml": {
        "model": str,
        "fine_tune_type": str,
        "num_layers": WHOLE,
        "lora_parameters": TABLE,
        "learning_rate": float,
    },
    "mlx_lora.yaml:lora_parameters": {"rank": WHOLE, "scale": float, "dropout": float, "keys": NAMES},
}
CALLS = {
    # unsloth/models/llama.py at 015bdef0; the patterns go through its **kwargs to LoraConfig
    ("unsloth_lora.py", "LORA"): {
        "r": WHOLE,
        "lora_alpha": (int, float),
        "use_rslora": bool,
        "target_modules": NAMES,
        "lora_dropout": float,
        "bias": str,
        "rank_pattern": TABLE,
        "alpha_pattern": TABLE,
        "fan_in_fan_out": bool,
    },
}


def check(where, values, table):
    for key, value in values.items():
        assert key in table, f"{where}: {key} is no key of the trainer"
        kind = table[key]
        assert isinstance(value, kind), f"{where}: {key} is {value!r}"
        assert isinstance(value, bool) is (kind is bool), f"{where}: {key} is {value!r}"


def plans():
    yield uniform(16, 8.0, "rslora", learning_rate=1e-4), {}
    yield uniform(), {"model": "org/base"}
    yield mixed("rslora"), {}
    yield mixed(), {"adapter": "some/folder"}
    yield mixed("unscaled"), {"uniform": True}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_key_is_one_of_the_trainers_and_of_its_type(trainer):
    from rankwise.errors import CannotCarryError

    checked = 0
    for plan, more in plans():
        try:
            made = export(plan, trainer, ask_peft=False, **more)
        except CannotCarryError:
            continue
        for name, text in made.files.items():
            checked += 1
            if name.endswith(".yaml"):
                values = yaml.safe_load(text)
                check(name, values, KEYS[name])
                for key, value in values.items():
                    if isinstance(value, dict) and f"{name}:{key}" in KEYS:
                        check(f"{name}:{key}", value, KEYS[f"{name}:{key}"])
            for (file, target), table in CALLS.items():
                if file == name and f"{target} = dict" in text:
                    (call,) = [
                        n.value
                        for n in ast.parse(text).body
                        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == target
                    ]
                    check(name, {k.arg: ast.literal_eval(k.value) for k in call.keywords}, table)
    assert checked >= 3


def test_the_table_in_the_docs_says_what_the_trainers_carry(root):
    text = (root / "docs" / "reference" / "trainers.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `") and "--export" not in line
    ]
    assert sorted(row[0].strip("`") for row in rows) == sorted(TRAINERS)
    for row in rows:
        trainer = TRAINERS[row[0].strip("`")]
        said = [cell.split(",")[0].split(" ")[0] for cell in row[2:]]
        per_module = "in" if row[0] == "`trl`" else "yes" if trainer.per_module else "no"
        assert said[0] == per_module
        assert said[1] == ("yes" if trainer.rslora else "no")
        assert said[2].rstrip(";") == ("no" if row[0] == "`mlx`" else "whole" if trainer.whole_alpha else "real")
        assert said[3] == ("yes" if trainer.from_adapter else "no")
        version = trainer.read_at.split(" ")[0].strip("(),")
        assert version in text, f"{row[0]} was read at {trainer.read_at}"


@pytest.mark.parametrize("plan", [mixed("rslora"), mixed(), mixed("unscaled")])
def test_axolotls_patterns_hold_whole_numbers_above_zero(plan):
    """`dict[str, PositiveInt]`: a float or a zero is refused by its schema."""
    y = yaml.safe_load(export(plan, "axolotl", ask_peft=False).files["axolotl.yaml"])
    for field in ("lora_rank_pattern", "lora_alpha_pattern"):
        assert y[field]
        assert all(type(value) is int and value > 0 for value in y[field].values())


def test_llamafactory_always_gets_its_alpha():
    """Left out, it would be twice the rank, also under rsLoRA."""
    for plan in (uniform(8, 16.0), uniform(16, 8.0, "rslora")):
        y = yaml.safe_load(export(plan, "llamafactory", ask_peft=False).files["llamafactory.yaml"])
        assert type(y["lora_alpha"]) is int
