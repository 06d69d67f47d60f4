"""axolotl: the LoRA keys of its YAML.

In: a job. Out: YAML. Its patterns go to PEFT's `rank_pattern` and `alpha_pattern` as they are; all alphas are whole
numbers in its schema (`lora_alpha: int`, `lora_alpha_pattern: dict[str, PositiveInt]`). With `lora_model_dir` the
adapter's own config holds and the patterns of the YAML are ignored, so none are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.trainers.alphas import rule_of, whole_alphas
from rankwise.trainers.model import AdapterReading, Job, PeftReading, Reading, Trainer, Written
from rankwise.trainers.peft_fields import peft_fields
from rankwise.trainers.text import NO_RATE, read_yaml, to_yaml

FILE: Final = "axolotl.yaml"


def write(job: Job) -> Written:
    """Return the keys to merge into an axolotl config."""
    values: dict[str, Any] = {} if job.model is None else {"base_model": job.model}
    values["adapter"] = "lora"
    notes: list[str] = []
    if job.adapter is not None:
        values |= {"lora_model_dir": job.adapter, "lora_r": max(job.ranks)}
        head = (*job.head, "The adapter folder decides ranks, alphas and modules; lora_r is its largest rank.")
    else:
        ways = ["--as-adapter FOLDER, which axolotl starts from (lora_model_dir)"]
        alphas, error = whole_alphas(job, rule_of(job, rslora=True), "axolotl", ways)
        fields = peft_fields(job, alphas)
        values |= {
            "lora_r": fields["r"],
            "lora_alpha": fields["lora_alpha"],
            "peft_use_rslora": fields["use_rslora"],
            "lora_dropout": 0.0,
            "lora_target_modules": fields["target_modules"],
        }
        if job.stacks:
            values["lora_target_parameters"] = fields["target_parameters"]
        if job.conv1d:
            values["lora_fan_in_fan_out"] = True
        if fields["rank_pattern"]:
            values |= {"lora_rank_pattern": fields["rank_pattern"], "lora_alpha_pattern": fields["alpha_pattern"]}
            notes.append("lora_rank_pattern and lora_alpha_pattern need an axolotl that has them (0.18 does).")
        notes.append(f"Alphas are whole numbers; the largest error of a scale is {error:.2%}.")
        head = (*job.head, f"Whole alphas: the largest error of a scale is {error:.2%}.")
    if job.learning_rate is not None:
        values["learning_rate"] = job.learning_rate
    else:
        head = (*head, NO_RATE)
    return Written({FILE: to_yaml(head, values)}, tuple(notes))


_PEFT: Final = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "peft_use_rslora": "use_rslora",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
}
"""Key of axolotl -> field of the LoraConfig that it becomes (loaders/adapter.py)."""


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the YAML again, as axolotl turns it into a LoraConfig."""
    values = read_yaml(FILE, files[FILE])
    if values.get("lora_model_dir"):
        return (AdapterReading(FILE, values["lora_model_dir"]),)
    return (PeftReading(FILE, {field: values[key] for key, field in _PEFT.items() if key in values}),)


TRAINER: Final = Trainer(
    title="axolotl",
    read_at="067b021c (0.18.0 and 9 commits)",
    per_module=True,
    rslora=True,
    whole_alpha=True,
    from_adapter=True,
    write=write,
    read=read,
    stacks=True,
)
