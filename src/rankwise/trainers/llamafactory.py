"""LLaMA-Factory: the LoRA keys of its YAML.

In: a job of one rank and one alpha, or an adapter to start from. Out: YAML. It has no pattern keys; `lora_alpha` is an
integer and, left out, twice the rank also under rsLoRA, so it is always written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.errors import UsageError
from rankwise.trainers.alphas import rule_of, whole_alphas
from rankwise.trainers.model import AdapterReading, Job, PeftReading, Reading, Trainer, Written
from rankwise.trainers.peft_fields import peft_fields
from rankwise.trainers.text import NO_RATE, read_yaml, to_yaml

FILE: Final = "llamafactory.yaml"


def write(job: Job) -> Written:
    """Return the keys to merge into a LLaMA-Factory config.

    Raises:
        UsageError: a name or a path holds a comma, which separates entries there.
    """
    values: dict[str, Any] = {} if job.model is None else {"model_name_or_path": job.model}
    values["finetuning_type"] = "lora"
    notes: tuple[str, ...] = ()
    if job.adapter is not None:
        _no_comma([job.adapter])
        values |= {"adapter_name_or_path": job.adapter, "create_new_adapter": False}
        head = (
            *job.head,
            "create_new_adapter has to stay false: true would merge the folder and make a new, uniform adapter.",
        )
    else:
        ways = ["--as-adapter FOLDER, which LLaMA-Factory starts from (adapter_name_or_path)"]
        alphas, error = whole_alphas(job, rule_of(job, rslora=True), "LLaMA-Factory", ways)
        fields = peft_fields(job, alphas)
        _no_comma(fields["target_modules"])
        values |= {
            "lora_rank": fields["r"],
            "lora_alpha": fields["lora_alpha"],
            "use_rslora": fields["use_rslora"],
            "lora_dropout": 0.0,
            "lora_target": ",".join(fields["target_modules"]),
        }
        notes = (f"alpha is a whole number; the error of the scale is {error:.2%}.",)
        head = (
            *job.head,
            f"A whole alpha: the error of the scale is {error:.2%}. Left out, it would be 2 * lora_rank.",
        )
    if job.learning_rate is not None:
        values["learning_rate"] = job.learning_rate
    else:
        head = (*head, NO_RATE)
    return Written({FILE: to_yaml(head, values)}, notes)


def _no_comma(entries: Sequence[str]) -> None:
    for entry in entries:
        if "," in entry:
            raise UsageError(f"{entry!r} holds a comma, at which LLaMA-Factory would cut it in two; rename it")


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the YAML again, as LLaMA-Factory makes a LoraConfig of it (hparams/finetuning_args.py, model/adapter.py)."""
    values = read_yaml(FILE, files[FILE])
    if values.get("adapter_name_or_path") is not None and not values.get("create_new_adapter"):
        return (AdapterReading(FILE, values["adapter_name_or_path"]),)
    rank = values.get("lora_rank", 8)
    config = {
        "r": rank,
        "lora_alpha": values.get("lora_alpha") or 2 * rank,
        "use_rslora": values.get("use_rslora", False),
        "lora_dropout": values.get("lora_dropout", 0.0),
        "target_modules": [entry.strip() for entry in values.get("lora_target", "all").split(",")],
    }
    return (PeftReading(FILE, config),)


TRAINER: Final = Trainer(
    title="LLaMA-Factory",
    read_at="ff6d4d12 (0.9.6.dev0)",
    per_module=False,
    rslora=True,
    whole_alpha=True,
    from_adapter=True,
    write=write,
    read=read,
)
