"""LoRA files of the image trainers that use their own names: kohya's sd-scripts, and cloneofsimo/lora.

In: a weight set. Out: an `Adapter`. Both store down (r, in) and up (out, r), the A and B of LoRA.
kohya: `NAME.lora_down.weight`, `NAME.lora_up.weight`, `NAME.alpha`; without alpha every loader takes the
scale 1 (sd-scripts networks/lora.py: alpha defaults to the rank). cloneofsimo: `unet:3:down`, `unet:3:up`,
the rank in the header; the scale at which it is merged is a choice of the user and 1 by default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.checkpoints.alphas import read_alphas, scale_from
from rankwise.checkpoints.factors import Draft, Scale, linear
from rankwise.checkpoints.model import Adapter, TensorInfo
from rankwise.checkpoints.sharded import WeightSet

_KEY: Final = re.compile(r"(?P<module>.+)\.(?P<part>lora_down|lora_up)\.weight")
_ALPHA: Final = re.compile(r"(?P<module>.+)\.alpha")
_DORA: Final = re.compile(r"(?P<module>.+)\.dora_scale")
_INDEXED: Final = re.compile(r"(?P<module>[^:]+:\d+):(?P<part>down|up)")


def recognises(names: Sequence[str]) -> bool:
    """Tell whether any tensor is named as kohya names factors."""
    return any(name.endswith((".lora_down.weight", ".lora_up.weight")) for name in names)


def read(source: str, weights: WeightSet, config: Mapping[str, Any] | None) -> Adapter:
    """Return a kohya adapter."""
    draft = Draft(weights)
    found: dict[str, dict[str, TensorInfo]] = {}
    alphas: dict[str, TensorInfo] = {}
    for name in weights.names():
        if match := _KEY.fullmatch(name):
            found.setdefault(match["module"], {})[match["part"]] = weights.info(name)
        elif match := _ALPHA.fullmatch(name):
            alphas[match["module"]] = weights.info(name)
        elif match := _DORA.fullmatch(name):
            text = "{modules}: DoRA. The figures are of scaling * B @ A; the learned magnitudes are left out."
            draft.note("dora", "info", text, match["module"])
        else:
            skip_whole(draft, name)
    values = read_alphas(draft, {module: info for module, info in alphas.items() if module in found})
    for pair in draft.pair_up(found, "lora_down", "lora_up"):
        factors = linear(pair)
        draft.add(pair, factors, scale_from(values, pair.module, factors.r))
    return draft.finish(source, "kohya", config)


def skip_whole(draft: Draft, name: str) -> None:
    """Leave a tensor out that is no factor."""
    module = name.removesuffix(".weight")
    draft.skip(module, "a whole tensor, not a product of factors")
    text = "{modules}: stored whole beside the adapter, not as factors; left out."
    draft.note("modules-to-save", "info", text, module)


def recognises_indexed(names: Sequence[str]) -> bool:
    """Tell whether any tensor is named as cloneofsimo/lora names factors."""
    return any(name.endswith((":down", ":up")) and _INDEXED.fullmatch(name) for name in names)


def read_indexed(source: str, weights: WeightSet, config: Mapping[str, Any] | None) -> Adapter:
    """Return a cloneofsimo adapter."""
    draft = Draft(weights)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name in weights.names():
        if match := _INDEXED.fullmatch(name):
            found.setdefault(match["module"], {})[match["part"]] = weights.info(name)
        elif weights.metadata.get(name) == "<embed>":
            draft.skip(name, "an embedding of textual inversion, not a product of factors")
        else:
            skip_whole(draft, name)
    for pair in draft.pair_up(found, "down", "up"):
        factors = linear(pair)
        stated = weights.metadata.get(f"{pair.module}:rank")
        if stated is not None and stated != str(factors.r):
            text = f"{{modules}}: the header states rank {stated!r:.20}, the tensors have {factors.r}."
            draft.note("rank-contradicts-config", "error", text, pair.module)
        draft.add(pair, factors, Scale(scaling=1.0))
    return draft.finish(source, "cloneofsimo", config)
