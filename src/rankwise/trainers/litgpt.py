"""LitGPT: the arguments of `litgpt finetune_lora`, as YAML for its --config.

In: a job of one rank and one alpha, for whole blocks. Out: YAML. Its scale is alpha / r with a whole alpha; it has no
rsLoRA. Query, key and value are one layer in its models, of which each part gets its own factors of rank r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.trainers.alphas import whole_alphas
from rankwise.trainers.blocks import HEAD, MLP, blocks_note, kind_of, kinds_of
from rankwise.trainers.model import FlatReading, Given, Job, Reading, Trainer, Written
from rankwise.trainers.text import NO_RATE, read_yaml, to_yaml

FILE: Final = "litgpt.yaml"

_SWITCHES: Final[dict[str, frozenset[str]]] = {
    "lora_query": frozenset({"self_attn.q_proj"}),
    "lora_key": frozenset({"self_attn.k_proj"}),
    "lora_value": frozenset({"self_attn.v_proj"}),
    "lora_projection": frozenset({"self_attn.o_proj"}),
    "lora_mlp": MLP,
    "lora_head": frozenset({HEAD}),
}


def write(job: Job) -> Written:
    """Return the arguments to merge into a config for `litgpt finetune_lora --config`."""
    kinds = kinds_of(job, "LitGPT")
    alphas, error = whole_alphas(job, "lora", "LitGPT")
    values: dict[str, Any] = {
        "lora_r": job.modules[0].r,
        "lora_alpha": alphas[job.modules[0].module],
        "lora_dropout": 0.0,
        **{switch: kinds >= meant for switch, meant in _SWITCHES.items()},
    }
    head = [*job.head, f"A whole alpha: the error of the scale is {error:.2%}."]
    if job.rule == "rslora":
        head.append("LitGPT has no rsLoRA: lora_alpha is that of alpha / r, with the same scale at this rank.")
    if job.learning_rate is not None:
        values["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": job.learning_rate}}
    else:
        head.append(NO_RATE)
    notes = (blocks_note(job, "LitGPT"), f"alpha is a whole number; the error of the scale is {error:.2%}.")
    return Written({FILE: to_yaml(head, values)}, notes)


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the YAML again: alpha / r, for the kinds that it switches on."""
    values = read_yaml(FILE, files[FILE])
    kinds = frozenset[str]().union(*(meant for switch, meant in _SWITCHES.items() if values[switch]))
    given = Given(values["lora_r"], values["lora_alpha"], values["lora_alpha"] / values["lora_r"])
    return (FlatReading(FILE, given, lambda module: kind_of(module) in kinds),)


TRAINER: Final = Trainer(
    title="LitGPT",
    read_at="26857050 (0.5.13)",
    per_module=False,
    rslora=False,
    whole_alpha=True,
    from_adapter=False,
    write=write,
    read=read,
)
