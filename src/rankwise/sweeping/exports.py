"""The grid in the words of others: axolotl's sweep file and a W&B sweep.

In: a sweep that was asked for. Out: YAML text.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any, Final

from rankwise.errors import UsageError
from rankwise.sweeping.grid import Grid
from rankwise.sweeping.settings import TRAINING, Request
from rankwise.tuning.options import DEFAULT_ALPHA


def axolotl(request: Request, grid: Grid) -> str:
    """Return a file for `axolotl train config.yml --sweep FILE`.

    Lists are crossed; the list under `_` holds values that move together: a rank, its alpha and the rule. axolotl has
    no rule `unscaled`; alpha times r under alpha / r is the same factor.

    Raises:
        UsageError: alpha is no whole number, and axolotl's is.
    """
    alpha = request.settings["lora_alpha"] or DEFAULT_ALPHA
    if alpha != int(alpha):
        raise UsageError(f"axolotl's lora_alpha is a whole number; --lora-alpha {alpha:g} cannot be written")
    together = [
        {
            "lora_r": rank,
            "lora_alpha": int(alpha * rank if rule == "unscaled" else alpha),
            "peft_use_rslora": rule == "rslora",
        }
        for rule in grid.scaling
        for rank in grid.ranks
    ]
    lists = {"learning_rate": list(grid.learning_rates), "seed": list(grid.seeds), "_": together}
    head = (
        f"# rank x rule x learning rate x seed: {len(grid.cells)} runs.\n"
        "# axolotl train CONFIG.yml --sweep THIS_FILE\n"
        "# Model, data and everything else stand in CONFIG.yml.\n"
    )
    others = flags_of(request.public, "lora_alpha", "save_every")
    if others:
        head += f"# Flags of train that are not in this file: {shlex.join(others)}\n"
    return head + _yaml(lists)


def wandb(request: Request, grid: Grid) -> str:
    """Return a file for `wandb sweep FILE`: every agent calls `rankwise train`, into a folder of its run's id.

    Raises:
        UsageError: the command would hold the secrets of a URL.
    """
    public = request.public
    texts = [found["forgetting_data"] for found in (request.settings, public.settings)]
    for what, given, shown in (
        ("MODEL", request.model, public.model),
        ("DATA", request.data, public.data),
        ("--forgetting-data", *texts),
    ):
        if given != shown:
            raise UsageError(
                f"--export wandb: {what} {shown} has a password or a signature, which the file would show and W&B "
                "keep. Give a path, or a URL whose credentials the machines have in their environment"
            )
    words = ["rankwise", "train", request.model, request.data, *flags_of(request, "report_to")]
    line = f'{shlex.join(words)} --report-to wandb -o "runs/$WANDB_RUN_ID" "$@"'
    sweep = {
        "program": "rankwise",  # W&B's agent reads it, whatever the command is
        "method": "grid",
        "metric": {"name": "train/loss", "goal": "minimize"},
        "parameters": {
            "rank": {"values": list(grid.ranks)},
            "scaling": {"values": list(grid.scaling)},
            "learning-rate": {"values": list(grid.learning_rates)},
            "seed": {"values": list(grid.seeds)},
        },
        # a shell, because no macro of W&B's gives the id of the run; ${args} is --rank=4 --scaling=lora ...
        "command": ["bash", "-c", line, "rankwise", "${args}"],
    }
    return f"# rank x rule x learning rate x seed: {len(grid.cells)} runs.\n# wandb sweep THIS_FILE\n" + _yaml(sweep)


def flags_of(request: Request, *but: str) -> list[str]:
    """Return the flags of `train` for the settings that are not at its default, but for some."""
    words = []
    for name, value in request.settings.items():
        if name in but or (value == TRAINING[name] and name != "save_every"):  # train's own is another
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else _short(value)]
    return words


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, default_flow_style=False, width=1000))


EXPORTS: Final[dict[str, Callable[[Request, Grid], str]]] = {"axolotl": axolotl, "wandb": wandb}
"""Name -> the function that writes the grid."""


def export(to: str, request: Request, grid: Grid) -> str:
    """Return the grid in another tool's words.

    Raises:
        UsageError: there is no such export.
    """
    if to not in EXPORTS:
        raise UsageError(f"--export: there is no {to!r}; there are: {', '.join(_names(EXPORTS))}")
    return EXPORTS[to](request, grid)


def _names(table: dict[str, Any]) -> Sequence[str]:
    return tuple(table)
