"""mlx-lm: a folder with adapters.safetensors and adapter_config.json.

In: modules of one rank and one factor. Out: `PATH.lora_a` (in, r) and `PATH.lora_b` (r, out), the transposes of PEFT's,
and a config whose `scale` is the factor on the product. Written after mlx_lm/tuner/utils.py at d78bf58e: its
`load_adapters` gives every module of `keys` one rank and one scale, and takes full paths as keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Final

import numpy as np

from rankwise.adapters.baking import Written
from rankwise.adapters.formats.names import component_of, dotted
from rankwise.adapters.formats.writer import Entry, Pairs, Result, Setup, Writer
from rankwise.adapters.parts import Array
from rankwise.adapters.stored_units import Unit
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError


def _paths(adapter: Adapter, units: Sequence[Unit]) -> dict[str, str]:
    if adapter.format == "mlx":
        return {u.name: u.path for u in units}
    made = dotted(adapter, units, "mlx")
    for unit in units:
        if unit.kind in ("expert", "conv") or component_of(made[unit.name]) is not None:
            what = "a stack of experts, which mlx-lm names in another way" if unit.kind == "expert" else "no such layer"
            raise UsageError(
                f"{adapter.source}: {unit.name} cannot be written as mlx: mlx-lm adapts the linear layers and "
                f"embedding tables of language models, and this is {what}."
            )
    return made


def _tensors(unit: Unit, path: str, pairs: Pairs, written: Written) -> dict[str, Array]:  # noqa: ARG001 - as all writers
    if unit.kind == "expert":
        return {
            f"{path}.lora_a": np.ascontiguousarray(np.stack([a for a, _ in pairs])),
            f"{path}.lora_b": np.ascontiguousarray(np.stack([b for _, b in pairs])),
        }
    ((a, b),) = pairs
    first, second = (b, a) if unit.kind == "embedding" else (a.T, b.T)
    return {f"{path}.lora_a": np.ascontiguousarray(first), f"{path}.lora_b": np.ascontiguousarray(second)}


def _finish(setup: Setup, entries: Sequence[Entry]) -> Result:
    written = entries[0].written
    source = dict(setup.adapter.config or {}) if setup.adapter.format == "mlx" else {}
    before = source.get("lora_parameters") or {}
    keys = sorted(e.path for e in entries)
    parameters = {**before, "rank": written.r, "scale": written.scaling, "dropout": before.get("dropout", 0.0)}
    parameters.pop("alpha", None)  # early versions multiplied by alpha / rank as well
    if not source or setup.changed:
        parameters["keys"] = keys
    layers = [int(found[1]) for key in keys if (found := re.search(r"\.(\d+)\.", key))]
    config = {
        "fine_tune_type": "lora",
        "num_layers": max(layers, default=-1) + 1,
        **source,
        "lora_parameters": parameters,
    }
    notes = []
    if not source:
        config["model"] = (setup.adapter.config or {}).get("base_model_name_or_path")
        notes.append(
            "mlx-lm finds modules by their paths in its own models, which are those of transformers for Llama, Qwen, "
            "Mistral and Gemma; where they are others (GPT-2) it refuses the adapter."
        )
    return Result({"format": "mlx"}, {"adapter_config.json": json.dumps(config, indent=4) + "\n"}, tuple(notes))


WRITER: Final = Writer(
    file="adapters.safetensors",
    folder=True,
    rules=("unscaled",),
    uniform=True,
    paths=_paths,
    tensors=_tensors,
    finish=_finish,
    readers={},
)
