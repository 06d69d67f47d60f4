"""Unsloth: the arguments of `get_peft_model`.

In: a job. Out: a Python file. `rank_pattern` and `alpha_pattern` reach PEFT's LoraConfig through the function's further
keyword arguments. Targets are a list: one string would be taken letter by letter in `FastLanguageModel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.errors import CannotCarryError
from rankwise.trainers.model import AdapterReading, Job, PeftReading, Reading, Trainer, Written
from rankwise.trainers.peft_fields import peft_fields
from rankwise.trainers.text import NO_RATE, comment, read_call, read_constant, to_call

FILE: Final = "unsloth_lora.py"

_ADD = '''

def add_lora(model):
    """Add the planned adapter to a model of FastLanguageModel.from_pretrained.

    A model that Unsloth loads through FastModel takes the same arguments in FastModel.get_peft_model; there
    FastLanguageModel's own would filter the list of modules by kind.
    """
    from unsloth import FastLanguageModel

    return FastLanguageModel.get_peft_model(model, **LORA)
'''

_LOAD = '''

def load(**settings):
    """Return Unsloth's (model, tokenizer) with the untrained adapter on it, ready to train.

    The base is the one that the folder's adapter_config.json names.
    """
    from unsloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(model_name=ADAPTER, **settings)
'''


_TABLE: Final = "embed_tokens"
"""As a target, Unsloth takes this for a table to train whole; under its full name it gets LoRA."""


def write(job: Job) -> Written:
    """Return a Python file with the arguments, and a function that applies them.

    Raises:
        CannotCarryError: the full name of a module is the one that Unsloth takes for something else.
    """
    if any(m.module == _TABLE for m in job.modules) and job.adapter is None:
        raise CannotCarryError(f"Unsloth takes a target {_TABLE} for a table to train whole; leave it out of the plan.")
    rate = [NO_RATE] if job.learning_rate is None else ["Pass LEARNING_RATE to the trainer's config."]
    text = comment([*job.head, *rate])
    if job.learning_rate is not None:
        text += f"LEARNING_RATE = {job.learning_rate!r}\n"
    if job.adapter is not None:
        return Written({FILE: text + f"ADAPTER = {job.adapter!r}\n" + _LOAD})
    values: dict[str, Any] = peft_fields(job) | {"lora_dropout": 0.0, "bias": "none"}
    if _TABLE in job.targets:
        values["target_modules"] = [m.module for m in job.layers]
    if not values["rank_pattern"]:
        del values["rank_pattern"], values["alpha_pattern"]
    if job.conv1d:
        values["fan_in_fan_out"] = True
    return Written({FILE: text + to_call("LORA", "dict", values) + _ADD})


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the arguments again, without running the file."""
    if "\nADAPTER = " in f"\n{files[FILE]}":
        return (AdapterReading(FILE, read_constant(FILE, files[FILE], "ADAPTER")),)
    return (PeftReading(FILE, read_call(FILE, files[FILE], "LORA")),)


TRAINER: Final = Trainer(
    title="Unsloth",
    read_at="015bdef0 (0.1.801-beta and 29 commits)",
    per_module=True,
    rslora=True,
    whole_alpha=False,
    from_adapter=True,
    write=write,
    read=read,
    stacks=True,
)
