"""A plan as the fields of a PEFT LoraConfig.

In: a job and its alphas. Out: r, lora_alpha, the patterns, the targets. Every key of a pattern is a full name, escaped
and anchored at its beginning, so that it can match one module only: PEFT takes the first key that matches, in the order
of the config, and sorts the keys when it saves it. A module that differs in rank or in alpha stands in both patterns,
since PEFT looks the two up independently and a rank alone would change the scale. Stacked parameters of experts stand
in `target_parameters`, never in `target_modules`, and their keys are made alike: PEFT gives the rank to each expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rankwise.trainers.alphas import common_pair, plain, real_alphas, rule_of
from rankwise.trainers.model import Job


def peft_fields(job: Job, alphas: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Return the fields of a LoraConfig that carry the plan.

    Args:
        job: the plan.
        alphas: module -> alpha, where the trainer has rounded them; default: the exact ones.

    >>> from rankwise.trainers.model import Asked
    >>> two = (Asked("a.q", (8, 8), 4, 8.0, 2.0), Asked("a.v", (8, 8), 2, 4.0, 2.0))
    >>> peft_fields(Job(two, (), "lora", None, 1e-3, ("q", "v"), False))["rank_pattern"]
    {'^a\\\\.v': 2}
    """
    rule = rule_of(job, rslora=True)
    alphas = real_alphas(job, rule) if alphas is None else alphas
    rank, alpha = common_pair({m.module: m.r for m in job.modules}, alphas)
    others = {m.module: m.r for m in job.modules if (m.r, alphas[m.module]) != (rank, alpha)}
    fields: dict[str, Any] = {
        "r": rank,
        "lora_alpha": plain(alpha),
        "use_rslora": rule == "rslora",
        "target_modules": list(job.targets),
        "rank_pattern": {key_of(name): r for name, r in others.items()},
        "alpha_pattern": {key_of(name): plain(alphas[name]) for name in others},
    }
    if job.stacks:  # PEFT 0.17 has the field; without stacks older versions take the config too
        fields["target_parameters"] = [m.module for m in job.stacks]
    return fields


def key_of(module: str) -> str:
    """Return the pattern key that matches one full name and nothing else.

    >>> key_of("model.layers.1.q_proj")
    '^model\\\\.layers\\\\.1\\\\.q_proj'
    """
    return "^" + re.escape(module)
