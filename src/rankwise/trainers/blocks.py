"""Plans as switches: which kinds of layers get LoRA, for trainers that adapt a kind in every block or nowhere.

In: the names of the planned modules. Out: the kinds, or an error that says why the plan is no such choice. Known are
the layers of Llama and the models that name theirs alike (Mistral, Qwen, Gemma, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from rankwise.errors import CannotCarryError
from rankwise.trainers.model import Job

_LAYER: Final = re.compile(
    r"(?P<stem>(?:.*\.)?layers)\.(?P<block>\d+)\.(?P<kind>self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
)
_HEAD: Final = re.compile(r"(?:.*\.)?lm_head")

HEAD: Final = "lm_head"
MLP: Final = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})


def kind_of(module: str) -> str | None:
    """Return the kind of a layer: `self_attn.q_proj`, ..., `lm_head`; None for any other.

    >>> kind_of("model.layers.11.mlp.up_proj"), kind_of("transformer.h.0.attn.c_attn")
    ('mlp.up_proj', None)
    """
    if _HEAD.fullmatch(module):
        return HEAD
    found = _LAYER.fullmatch(module)
    return None if found is None else found["kind"]


def kinds_of(job: Job, title: str) -> frozenset[str]:
    """Return the kinds that the plan adapts in every block.

    Raises:
        CannotCarryError: a module is of no known kind, a kind is planned for some blocks only, or a part of the MLP
            is left out.
    """
    blocks: dict[str, set[int]] = {}
    stems: dict[str, str] = {}
    for asked in job.modules:
        kind = kind_of(asked.module)
        if kind is None:
            raise CannotCarryError(
                f"{title} adapts attention, MLP and output layers by switches, and {asked.module} is none that its "
                "switches mean (known are the names of Llama-like models). Take another trainer."
            )
        found = _LAYER.fullmatch(asked.module)
        if found is not None:
            blocks.setdefault(kind, set()).add(int(found["block"]))
            stems[found["stem"]] = asked.module
    if len(stems) > 1:
        first, second = list(stems.values())[:2]
        raise CannotCarryError(f"{title} knows one stack of blocks; the plan has {first} and {second}.")
    every = set().union(*blocks.values())
    for kind, found_in in blocks.items():
        missing = sorted(every - found_in) or sorted(set(range(max(every))) - found_in)
        if missing:
            raise CannotCarryError(
                f"{title} adapts a kind of layer in every block or in none; the plan leaves {kind} out of block "
                f"{missing[0]} ({len(missing)} of {max(every) + 1} in all). Plan all blocks alike, or take another "
                "trainer."
            )
    kinds = set(blocks) | ({HEAD} if any(kind_of(m.module) == HEAD for m in job.modules) else set())
    if kinds & MLP and not kinds >= MLP:
        left = ", ".join(sorted(MLP - kinds))
        raise CannotCarryError(
            f"{title} adapts the whole MLP or nothing of it; the plan leaves {left} out. Plan all three, or none."
        )
    return frozenset(kinds)


def blocks_note(job: Job, title: str) -> str:
    """Say how far the plan reaches, which the file itself cannot."""
    found = [int(m["block"]) for asked in job.modules if (m := _LAYER.fullmatch(asked.module)) is not None]
    if not found:
        return f"{title} adapts the output layer alone."
    return f"{title} adapts these layers in every block of the model; blocks in the plan: {max(found) + 1}."


def chosen_by(switches: Mapping[str, bool]) -> frozenset[str]:
    """Return the kinds whose switches are on."""
    return frozenset(kind for kind, on in switches.items() if on)
