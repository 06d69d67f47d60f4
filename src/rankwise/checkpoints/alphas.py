"""Alphas that a file itself carries: as `.alpha` tensors (kohya, diffusers), or in its header.

In: a weight set. Out: module -> alpha. An alpha that is no positive finite number is noted, and its
scaling stays unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from rankwise.checkpoints.factors import Draft, Scale
from rankwise.checkpoints.model import TensorInfo
from rankwise.errors import TensorError

_HEADER_KEYS: Final = ("lora_alpha", "network_alpha", "alpha")


def read_alphas(draft: Draft, tensors: Mapping[str, TensorInfo]) -> dict[str, float | None]:
    """Return module -> alpha for `.alpha` tensors; None where it is no positive finite number.

    Args:
        draft: gets a note for each alpha that cannot be used.
        tensors: module -> its alpha tensor.

    Raises:
        TensorError: an alpha is no single number.
    """
    for module, info in tensors.items():
        if math.prod(info.shape) != 1 or info.dtype in ("C64", "BOOL"):
            raise TensorError(
                f"{module}: {info.name} in {info.file} is {info.dtype} of shape {info.shape}; alpha is a single number."
            )
    values = draft.weights.read_many([info.name for info in tensors.values()])
    alphas: dict[str, float | None] = {}
    for module, array in zip(tensors, values, strict=True):
        number = float(np.asarray(array).reshape(-1)[0])
        usable = math.isfinite(number) and number > 0
        if not usable:
            text = f"{{modules}}: alpha is {number:g}, no positive finite number, so the scaling is unknown."
            draft.note("bad-alpha", "error", text, module)
        alphas[module] = number if usable else None
    return alphas


def scale_from(alphas: Mapping[str, float | None], module: str, r: int) -> Scale:
    """Return alpha / r, or the scale 1 that loaders take where a module has no alpha."""
    if module not in alphas:
        return Scale(scaling=1.0)
    alpha = alphas[module]
    return Scale() if alpha is None else Scale.by_rule("lora", alpha, r)


def alphas_in_header(draft: Draft, metadata: Mapping[str, str]) -> list[float]:
    """Return the distinct alphas that the header states for all modules; notes what it found.

    One is to be used; with several, the scaling is unknown.
    """
    stated = {key: metadata[key] for key in _HEADER_KEYS if key in metadata}
    numbers = sorted({number for text in stated.values() if (number := _positive(text)) is not None})
    if len(numbers) > 1:
        words = ", ".join(f"{key} = {value}" for key, value in stated.items())
        draft.note("alpha-conflict", "error", f"The header states several alphas ({words}): none was used.")
    elif numbers:
        text = (
            "Alpha stands in the file's header alone. It is used here; loaders that read tensors only take the "
            "scale 1 instead."
        )
        draft.note("alpha-in-header", "warning", text)
    return numbers


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def configs_in_header(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return component -> LoRA config out of diffusers' `lora_adapter_metadata`, which flattens them."""
    try:
        flat = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        component, dot, field = key.partition(".")
        if dot:
            found.setdefault(component, {})[field] = value
    return found
