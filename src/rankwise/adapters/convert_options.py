"""What `convert` is asked for, checked before any file is touched.

In: the arguments of the command. Out: `Options`, or a refusal that says which two do not go together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from rankwise.adapters.formats import WRITERS
from rankwise.adapters.kept_ranks import RankChoice
from rankwise.errors import UsageError
from rankwise.runtimes import Runtime
from rankwise.runtimes import runtime as runtime_row
from rankwise.scaling import SCALINGS

FORMAT_OF: Final = {"comfyui": "kohya", "diffusers": "diffusers"}
"""Runtime -> the format that it reads; every other reads PEFT's."""

DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
"""As --dtype spells it -> as a header does."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to make of an adapter, checked.

    Attributes:
        choice: of ranks.
        scaling: rule to write, or None for the source's.
        lora_alpha: the one alpha to write, or None.
        alpha_equals_r: whether lora_alpha = r is written.
        bake: whether the scale is folded into B and all ranks are made one.
        runtime: what it is made for, or None.
        form: format to write, or None for the source's.
        dtype: as a header spells it, or None for the source's.
        drop_others: whether what the target cannot hold is left out.
        weight: of the first adapter.
    """

    choice: RankChoice
    scaling: str | None
    lora_alpha: float | None
    alpha_equals_r: bool
    bake: bool
    runtime: Runtime | None
    form: str | None
    dtype: str | None
    drop_others: bool
    weight: float

    @property
    def one_alpha(self) -> bool:
        """Whether the user gave the alpha, so that the rest goes into B."""
        return self.lora_alpha is not None or self.alpha_equals_r


def checked_options(
    choice: RankChoice,
    scaling: str | None,
    lora_alpha: float | None,
    dtype: str | None,
    *,
    runtime: str | None,
    form: str | None,
    alpha_equals_r: bool,
    bake: bool,
    drop_others: bool,
    weight: float,
) -> Options:
    """Check each option by itself and against the others.

    Raises:
        UsageError: one is out of its range, or two do not go together.
    """
    row = None if runtime is None else runtime_row(runtime)
    ways = {
        "--lora-alpha": lora_alpha is not None,
        "--alpha-equals-r": alpha_equals_r,
        "--bake": bake,
    }
    named = [name for name, given in ways.items() if given]
    if row is not None and not bake:
        named.append("--for")
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} each decide how the scale is written; give one of them")
    if scaling is not None:
        if scaling not in SCALINGS:
            raise UsageError(f"unknown scaling rule {scaling!r}; the rules are: {', '.join(SCALINGS)}")
        if bake or row is not None:
            raise UsageError(
                f"--scaling {scaling} goes against {named[0]}, which decides the rule itself; leave it out"
            )
    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise UsageError(f"--lora-alpha must be a finite number above 0, got {lora_alpha:g}")
    if form is not None and form not in WRITERS:
        raise UsageError(f"unknown format {form!r}; formats that are written: {', '.join(WRITERS)}")
    if row is not None:
        wanted = FORMAT_OF.get(row.name, "peft")
        if form is None:
            form = wanted
        elif form != wanted and row.name not in WRITERS[form].readers:
            raise UsageError(f"{row.name} does not read the {form} format; leave --format out, or give {wanted}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; the dtypes are: {', '.join(DTYPES)}")
    return Options(
        choice=choice,
        scaling=scaling,
        lora_alpha=lora_alpha,
        alpha_equals_r=alpha_equals_r,
        bake=bake,
        runtime=row,
        form=form,
        dtype=None if dtype is None else DTYPES[dtype],
        drop_others=drop_others,
        weight=weight,
    )
