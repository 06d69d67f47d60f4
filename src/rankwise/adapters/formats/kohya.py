"""kohya's sd-scripts, and what ComfyUI reads: one .safetensors with down, up and an alpha for every module.

In: modules. Out: `NAME.lora_down.weight`, `NAME.lora_up.weight` and `NAME.alpha` (float32, so that it is not rounded),
where NAME is the path with underscores for dots and `lora_unet_`, `lora_te_`, ... before it. The dotted paths stay in
the header, as the names alone do not lead back to them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import numpy as np

from rankwise.adapters.baking import Written
from rankwise.adapters.formats.names import HEADER, component_of, dotted, underscored
from rankwise.adapters.formats.writer import Entry, Pairs, Result, Setup, Writer
from rankwise.adapters.parts import Array
from rankwise.adapters.peft_folder import plain
from rankwise.adapters.stored_units import Unit, ungrouped
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError


def _paths(adapter: Adapter, units: Sequence[Unit]) -> dict[str, str]:
    if adapter.format == "kohya":
        return {u.name: u.name for u in units}
    for unit in units:
        if unit.kind == "expert":
            raise UsageError(
                f"{adapter.source}: {unit.name} adapts a stack of experts, for which the kohya format has no name. "
                f"Write it as {adapter.format}."
            )
    return underscored(dotted(adapter, units, "kohya"))


def _tensors(unit: Unit, path: str, pairs: Pairs, written: Written) -> dict[str, Array]:
    ((a, b),) = pairs
    if unit.groups > 1:
        b = ungrouped(b, unit.groups)
    if unit.kernel:
        a = a.reshape(a.shape[0], -1, *unit.kernel)
        b = b.reshape(*b.shape, *(1 for _ in unit.kernel))
    return {
        f"{path}.alpha": np.array(written.lora_alpha, np.float32),
        f"{path}.lora_down.weight": np.ascontiguousarray(a),
        f"{path}.lora_up.weight": np.ascontiguousarray(b),
    }


def _finish(setup: Setup, entries: Sequence[Entry]) -> Result:
    metadata = {"format": "pt"}
    notes: list[str] = []
    if setup.adapter.format == "kohya":
        metadata |= setup.adapter.metadata
        for key, values in (
            ("ss_network_dim", {e.written.r for e in entries}),
            ("ss_network_alpha", {plain(e.written.lora_alpha) for e in entries}),
        ):
            if key in metadata:  # the trainer's own note; several values have no place in it
                metadata[key] = str(next(iter(values))) if len(values) == 1 else "Dynamic"
    else:
        paths = dotted(setup.adapter, [e.unit for e in entries], "kohya")
        metadata[HEADER] = json.dumps({e.path: paths[e.unit.name] for e in entries})
        if not any(component_of(p) for p in paths.values()):
            notes.append(
                "kohya's format has no names for the modules of language models; these are `lora_` and the path with "
                "underscores for dots. No trainer is known to read them; rankwise does, by the header."
            )
    return Result(metadata, {}, tuple(notes))


WRITER: Final = Writer(
    file="adapter.safetensors",
    folder=False,
    rules=("lora",),
    uniform=False,
    paths=_paths,
    tensors=_tensors,
    finish=_finish,
    readers={"comfyui": True, "diffusers": True},
)
