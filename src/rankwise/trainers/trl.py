"""TRL: a LoraConfig for `SFTTrainer`, and the YAML of `trl sft` where it can carry the plan.

In: a job. Out: a Python file, which takes ranks and alphas for each module; and for a plan of one rank and a whole
alpha the YAML too. A list of one target in the YAML becomes a string in TRL, which PEFT takes for a regular expression
over the full name: it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.errors import CannotCarryError
from rankwise.trainers.alphas import rule_of, whole_alphas
from rankwise.trainers.model import AdapterReading, Job, PeftReading, Reading, Trainer, Written
from rankwise.trainers.peft_fields import peft_fields
from rankwise.trainers.text import NO_RATE, comment, read_call, read_constant, read_yaml, to_call, to_yaml

PYTHON: Final = "trl_lora.py"
YAML: Final = "trl_sft.yaml"

_RATE: Final = "    settings.setdefault('learning_rate', LEARNING_RATE)\n"

_TRAINER: Final = '''

def trainer(model, dataset, **settings):
    """Return an SFTTrainer for a model (its name or itself); the settings are those of SFTConfig."""
    from trl import SFTConfig, SFTTrainer

{rate}    return SFTTrainer(model=model, train_dataset=dataset, args=SFTConfig(**settings), peft_config=PEFT_CONFIG)
'''

_FROM_ADAPTER: Final = '''

def trainer(model, dataset, **settings):
    """Return an SFTTrainer for a loaded base model, which goes on from the adapter; the settings are of SFTConfig."""
    from peft import PeftModel
    from trl import SFTConfig, SFTTrainer

{rate}    started = PeftModel.from_pretrained(model, ADAPTER, is_trainable=True)
    return SFTTrainer(model=started, train_dataset=dataset, args=SFTConfig(**settings))
'''


def write(job: Job) -> Written:
    """Return the Python file, and the YAML or a note on why there is none."""
    rate = [NO_RATE] if job.learning_rate is None else []
    constant = "" if job.learning_rate is None else f"LEARNING_RATE = {job.learning_rate!r}\n"
    given = "" if job.learning_rate is None else _RATE
    head = comment([*job.head, *rate])
    if job.adapter is not None:
        text = head + constant + f"ADAPTER = {job.adapter!r}\n" + _FROM_ADAPTER.format(rate=given)
        return Written({PYTHON: text})
    values: dict[str, Any] = {"task_type": "CAUSAL_LM", **peft_fields(job), "lora_dropout": 0.0, "bias": "none"}
    if job.conv1d:
        values["fan_in_fan_out"] = True
    call = to_call("PEFT_CONFIG", "LoraConfig", values)
    files = {PYTHON: head + "from peft import LoraConfig\n\n" + constant + call + _TRAINER.format(rate=given)}
    yaml, note = _command_line(job, values)
    return Written(files | yaml, (note,))


def _command_line(job: Job, values: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return the YAML of `trl sft` and a note; no YAML where it would not be the plan."""
    if values["rank_pattern"]:
        return {}, f"`trl sft` takes no rank or alpha for single modules: only {PYTHON} carries the plan."
    if job.conv1d:
        return {}, f"`trl sft` has no key for fan_in_fan_out: only {PYTHON} is written."
    if job.stacks and len(job.targets) == 1:  # PEFT resolves a string to last parts in models whose experts it converts
        return {}, f"`trl sft` makes a regular expression of one target, unsafe with experts: only {PYTHON} is written."
    try:
        alphas, error = whole_alphas(job, rule_of(job, rslora=True), "trl sft")
    except CannotCarryError as refusal:
        return {}, f"Only {PYTHON} is written, without the YAML of `trl sft`: {refusal}"
    keys: dict[str, Any] = {} if job.model is None else {"model_name_or_path": job.model}
    keys |= {
        "use_peft": True,
        "lora_r": values["r"],
        "lora_alpha": alphas[job.modules[0].module],
        "use_rslora": values["use_rslora"],
        "lora_dropout": 0.0,
        "lora_target_modules": list(job.targets),
    }
    if len(job.targets) == 1:  # a suffix could not be a whole name
        keys["lora_target_modules"] = ["|".join(re.escape(m.module) for m in job.layers)]
    if job.stacks:
        keys["lora_target_parameters"] = values["target_parameters"]
    head = [*job.head, f"For `trl sft --config {YAML}`. A whole alpha: the error of the scale is {error:.2%}."]
    if job.learning_rate is not None:
        keys["learning_rate"] = job.learning_rate
    else:
        head.append(NO_RATE)
    note = f"{PYTHON} is for SFTTrainer, {YAML} for `trl sft`: its alpha is whole, the error of the scale {error:.2%}."
    return {YAML: to_yaml(head, keys)}, note


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read both files again, the YAML as TRL turns it into a LoraConfig (trainer/model_config.py, trainer/utils.py)."""
    if "\nADAPTER = " in f"\n{files[PYTHON]}":
        return (AdapterReading(PYTHON, read_constant(PYTHON, files[PYTHON], "ADAPTER")),)
    readings = [PeftReading(PYTHON, read_call(PYTHON, files[PYTHON], "PEFT_CONFIG"))]
    if YAML in files:
        values = read_yaml(YAML, files[YAML])
        targets = values["lora_target_modules"]
        config = {
            "r": values["lora_r"],
            "lora_alpha": values["lora_alpha"],
            "use_rslora": values["use_rslora"],
            "lora_dropout": values["lora_dropout"],
            "target_modules": targets[0] if len(targets) == 1 else targets,
        }
        if values.get("lora_target_parameters"):
            config["target_parameters"] = values["lora_target_parameters"]
        readings.append(PeftReading(YAML, config))
    return readings


TRAINER: Final = Trainer(
    title="TRL",
    read_at="f2cd5771 (1.10.0.dev0), run with 1.16",
    per_module=True,
    rslora=True,
    whole_alpha=False,
    from_adapter=True,
    write=write,
    read=read,
    stacks=True,
)
