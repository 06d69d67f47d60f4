"""diffusers: pytorch_lora_weights.safetensors, with each component's LoraConfig in the header.

In: modules of the components of a pipeline. Out: `unet.PATH.lora_A.weight` and `lora_B.weight`, and the header's
`lora_adapter_metadata`, which diffusers writes and reads since 0.34: with it every module gets its own rank and alpha.
What reads tensors alone takes the factor 1; `--bake` makes that right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from rankwise.adapters.baking import Written
from rankwise.adapters.formats.names import component_of, dotted, inside
from rankwise.adapters.formats.writer import Entry, Pairs, Result, Setup, Writer
from rankwise.adapters.parts import Array
from rankwise.adapters.peft_folder import Placed, peft_config
from rankwise.adapters.stored_units import Unit, ungrouped
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError


def _paths(adapter: Adapter, units: Sequence[Unit]) -> dict[str, str]:
    made = dotted(adapter, units, "diffusers")
    for unit in units:
        component = component_of(made[unit.name])
        if unit.kind == "expert" or component is None:
            raise UsageError(
                f"{adapter.source}: {unit.name} is no layer of an image or video model that diffusers has a component "
                "for (unet, text_encoder, transformer, ...), so it cannot be written as diffusers."
            )
        if adapter.format != "diffusers":  # older files may have no component before the path, and keep it so
            made[unit.name] = f"{component}.{inside(made[unit.name])}"
    return made


def _tensors(unit: Unit, path: str, pairs: Pairs, written: Written) -> dict[str, Array]:  # noqa: ARG001 - as all writers
    ((a, b),) = pairs
    if unit.groups > 1:
        b = ungrouped(b, unit.groups)
    if unit.kernel:
        a = a.reshape(a.shape[0], -1, *unit.kernel)
        b = b.reshape(*b.shape, *(1 for _ in unit.kernel))
    return {f"{path}.lora_A.weight": np.ascontiguousarray(a), f"{path}.lora_B.weight": np.ascontiguousarray(b)}


def _finish(setup: Setup, entries: Sequence[Entry]) -> Result:
    flat: dict[str, Any] = {}
    by_component: dict[str, list[Entry]] = {}
    for entry in entries:
        head = entry.path.partition(".")[0]
        by_component.setdefault(head if component_of(entry.path) == head else "", []).append(entry)
    if "" in by_component:  # a header speaks of components: what has none before its path cannot be scaled by it
        if any(e.written.scaling != 1.0 for e in by_component[""]):
            raise UsageError(
                f"{setup.adapter.source}: {by_component[''][0].unit.name} has no component (unet, text_encoder, ...) "
                "before its path, so the header cannot give it a scale. --bake folds the scale into the factors."
            )
        del by_component[""]
    for component, members in by_component.items():
        placed = [Placed(inside(e.path), e.unit.kind, e.written.r, e.written.lora_alpha) for e in members]
        config = peft_config(placed, members[0].written.rule, base=None)
        flat |= {f"{component}.{key}": value for key, value in config.items() if value is not None}
    kept = {k: v for k, v in setup.adapter.metadata.items() if k not in _REPLACED} if _same(setup) else {}
    metadata = kept | {"format": "pt"}
    if flat:
        metadata["lora_adapter_metadata"] = json.dumps(flat, sort_keys=True)
    notes: tuple[str, ...] = ()
    if any(e.written.scaling != 1.0 for e in entries):
        notes = (
            "The scale stands in the file's header, which diffusers reads since 0.34. Older versions, and programs "
            "that read tensors alone, take the factor 1: --bake is right in all of them.",
        )
    return Result(metadata, {}, notes)


_REPLACED: Final = ("lora_adapter_metadata", "lora_alpha", "network_alpha", "alpha")


def _same(setup: Setup) -> bool:
    return setup.adapter.format == "diffusers"


WRITER: Final = Writer(
    file="pytorch_lora_weights.safetensors",
    folder=False,
    rules=("lora", "rslora"),
    uniform=False,
    paths=_paths,
    tensors=_tensors,
    finish=_finish,
    readers={"diffusers": True, "comfyui": False},
)
