"""mlx-lm: the LoRA part of the YAML of `mlx_lm.lora --config`.

In: a job of one rank and one scale. Out: YAML. `scale` is the factor on B @ A itself, whatever the rank. `keys` may be
full paths, which are looked up in the whole model; `num_layers` then only has to be no more than the model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.trainers.model import FlatReading, Given, Job, Reading, Trainer, Written
from rankwise.trainers.text import NO_RATE, read_yaml, to_yaml

FILE: Final = "mlx_lora.yaml"


def write(job: Job) -> Written:
    """Return the keys to merge into a config of mlx_lm.lora."""
    first = job.modules[0]
    values: dict[str, Any] = {} if job.model is None else {"model": job.model}
    values |= {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": first.r,
            "scale": float(first.scaling),
            "dropout": 0.0,
            "keys": [m.module for m in job.modules],
        },
    }
    head = [
        *job.head,
        "scale is the factor on B @ A itself, not alpha. keys are full paths, so that num_layers (-1: all) leaves none "
        "out.",
    ]
    if job.learning_rate is not None:
        values["learning_rate"] = job.learning_rate
    else:
        head.append(NO_RATE)
    note = (
        "The paths have to be those of the MLX model: Llama-like models keep theirs, others are renamed on conversion."
    )
    return Written({FILE: to_yaml(head, values)}, (note,))


def read(files: Mapping[str, str]) -> Sequence[Reading]:
    """Read the YAML again: its scale, for the paths that it lists."""
    lora = read_yaml(FILE, files[FILE])["lora_parameters"]
    keys = frozenset(lora["keys"])
    given = Given(lora["rank"], lora["scale"] * lora["rank"], lora["scale"])
    return (FlatReading(FILE, given, lambda module: module in keys),)


TRAINER: Final = Trainer(
    title="mlx-lm",
    read_at="d78bf58e (0.32.0)",
    per_module=False,
    rslora=False,
    whole_alpha=False,
    from_adapter=False,
    write=write,
    read=read,
)
