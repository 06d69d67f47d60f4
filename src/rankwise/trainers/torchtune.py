"""torchtune: the `model` section of a LoRA recipe's YAML.

In: a job of one rank and one alpha, for whole blocks. Out: YAML. Its scale is alpha / rank with a real alpha; it has no
rsLoRA, so alpha is that of alpha / r. Active development has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.trainers.alphas import plain, real_alphas
from rankwise.trainers.blocks import HEAD, MLP, blocks_note, kind_of, kinds_of
from rankwise.trainers.model import FlatReading, Given, Job, Reading, Trainer, Written
from rankwise.trainers.text import NO_RATE, read_yaml, to_yaml

FILE: Final = "torchtune.yaml"

_ATTENTION: Final = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "output_proj",
}


def write(job: Job) -> Written:
    """Return the keys to merge into the config of a LoRA recipe."""
    kinds = kinds_of(job, "torchtune")
    model: dict[str, Any] = {
        "lora_attn_modules": [ours for theirs, ours in _ATTENTION.items() if theirs in kinds],
        "apply_lora_to_mlp": kinds >= MLP,
        "apply_lora_to_output": HEAD in kinds,
        "lora_rank": job.modules[0].r,
        "lora_alpha": plain(real_alphas(job, "lora")[job.modules[0].module]),
        "lora_dropout": 0.0,
    }
    values: dict[str, Any] = {"model": model}
    head = [*job.head, "Merge into the config of a LoRA recipe; its model._component_ names the model."]
    notes = [blocks_note(job, "torchtune")]
    if job.rule == "rslora":
        head.append("torchtune has no rsLoRA: lora_alpha is that of alpha / r, with the same scale at this rank.")
    if not model["lora_attn_modules"]:
        notes.append("Some of torchtune's model builders refuse an empty lora_attn_modules.")
    if job.learning_rate is not None:
        values["optimizer"] = {"lr": job.learning_rate}
    else:
        head.append(NO_RATE)
    return Written({FILE: to_yaml(head, values)}, tuple(notes))


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the YAML again: alpha / rank, for the kinds that it switches on."""
    model = read_yaml(FILE, files[FILE])["model"]
    kinds = {theirs for theirs, ours in _ATTENTION.items() if ours in model["lora_attn_modules"]}
    kinds |= MLP if model["apply_lora_to_mlp"] else set()
    kinds |= {HEAD} if model["apply_lora_to_output"] else set()
    given = Given(model["lora_rank"], model["lora_alpha"], model["lora_alpha"] / model["lora_rank"])
    return (FlatReading(FILE, given, lambda module: kind_of(module) in kinds),)


TRAINER: Final = Trainer(
    title="torchtune",
    read_at="bd2a0fc7 (0.7.0)",
    per_module=False,
    rslora=False,
    whole_alpha=False,
    from_adapter=False,
    write=write,
    read=read,
)
