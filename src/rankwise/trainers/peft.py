"""PEFT itself: adapter_config.json, as `LoraConfig.from_pretrained(FOLDER)` reads it.

In: a job. Out: the JSON, and its fields read again. JSON has no comments; what the other files say in their head is
said in the notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rankwise.trainers.model import AdapterReading, Job, PeftReading, Reading, Trainer, Written
from rankwise.trainers.peft_fields import peft_fields
from rankwise.trainers.text import NO_RATE, comment, read_constant, read_json

FILE: Final = "adapter_config.json"
START: Final = "start_from_adapter.py"

_CAUSAL: Final = ("ForCausalLM", "LMHeadModel")
"""Ends of the names that transformers gives to causal language models."""

_START = '''
from peft import PeftModel


def start(model):
    """Put the untrained adapter on a loaded base model, ready to train."""
    return PeftModel.from_pretrained(model, ADAPTER, is_trainable=True)
'''


def config_of(job: Job) -> dict[str, Any]:
    """Return adapter_config.json: the plan, and PEFT's own defaults where it is silent."""
    return {
        "peft_type": "LORA",
        "task_type": task_of(job.model),
        "base_model_name_or_path": job.model,
        **peft_fields(job),
        "fan_in_fan_out": job.conv1d,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": None,
        "inference_mode": False,
    }


def task_of(model: str | None) -> str | None:
    """Return PEFT's task type: CAUSAL_LM, and None where the model's config.json names another kind of model.

    PEFT takes hold of what a causal language model generates with, and stops at models that have no such thing.

    >>> task_of(None)
    'CAUSAL_LM'
    """
    try:
        held = json.loads((Path(model or "") / "config.json").read_bytes()) if model else {}
    except (OSError, ValueError):
        held = {}
    names = held.get("architectures") if isinstance(held, dict) else None
    name = names[0] if isinstance(names, list) and names else None
    return None if isinstance(name, str) and not name.endswith(_CAUSAL) else "CAUSAL_LM"


def write(job: Job) -> Written:
    """Return the config, or a script that starts from an adapter folder."""
    if job.adapter is not None:
        return Written({START: comment(job.head) + f"ADAPTER = {job.adapter!r}\n" + _START})
    text = json.dumps(config_of(job), indent=2, ensure_ascii=False) + "\n"
    rate = NO_RATE if job.learning_rate is None else f"Train with the plan's learning rate: {job.learning_rate:g}."
    how = f"Put {FILE} into a folder; peft.LoraConfig.from_pretrained(FOLDER) is the config for get_peft_model."
    return Written({FILE: text}, (how, rate))


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the JSON again."""
    if START in files:
        return (AdapterReading(START, read_constant(START, files[START], "ADAPTER")),)
    return (PeftReading(FILE, read_json(FILE, files[FILE])),)


TRAINER: Final = Trainer(
    title="PEFT",
    read_at="0.21.2",
    per_module=True,
    rslora=True,
    whole_alpha=False,
    from_adapter=True,
    write=write,
    read=read,
    stacks=True,
)
