"""Open checkpoints and adapters, whatever their format and wherever they lie.

In: a path, hub id or URL. Out: a `Checkpoint` or an `Adapter` (see `model`), lazy: opening reads headers and
configs, reading one tensor reads its bytes alone. Nothing in a file is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rankwise.checkpoints import diffusers, kinds, kohya, mlx, peft
from rankwise.checkpoints.locate import locate
from rankwise.checkpoints.model import Adapter, Checkpoint, LoraModule, TensorInfo
from rankwise.checkpoints.refused import refuse_unsupported
from rankwise.checkpoints.sharded import INDEX, WeightCheckpoint, WeightSet, config_beside
from rankwise.errors import UnknownFormatError, WrongKindError

__all__ = ["READERS", "Adapter", "Checkpoint", "LoraModule", "Reader", "TensorInfo", "open_source"]

Config = Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Reader:
    """How one format is told and read.

    Attributes:
        recognises: from the tensor names and whether an adapter_config.json lies beside, to whether it is this.
        read: from the source as given, its tensors and its config (adapter_config.json, or config.json for
            checkpoints) to what it is.
    """

    recognises: Callable[[Sequence[str], bool], bool]
    read: Callable[[str, WeightSet, Config], Checkpoint | Adapter]


READERS: Final[dict[str, Reader]] = {
    "cloneofsimo": Reader(lambda names, _: kohya.recognises_indexed(names), kohya.read_indexed),
    "mlx": Reader(lambda names, _: mlx.recognises(names), mlx.read),
    "kohya": Reader(lambda names, _: kohya.recognises(names), kohya.read),
    "diffusers": Reader(lambda names, config: not config and diffusers.recognises(names), diffusers.read),
    "peft": Reader(lambda names, _: peft.recognises(names), peft.read),
    "checkpoint": Reader(lambda *_: True, WeightCheckpoint),
}
"""Format -> reader; the first that recognises the names of the tensors reads them."""


def open_source(
    source: str | os.PathLike[str], *, want: Literal["any", "checkpoint", "adapter"] = "any"
) -> Checkpoint | Adapter:
    """Open a checkpoint or an adapter. What it is, is told from its content.

    Args:
        source: local folder or file; hub id `org/name[@revision]`; or URL (s3://, gs://, https://, hf://, ...).
        want: refuse the other kind; in a folder that holds both, choose.

    Returns:
        A `Checkpoint` or an `Adapter`; close it, or use it in a `with` statement.

    Raises:
        RankwiseError: and nothing else, whatever lies there; see `rankwise.errors` for the kinds.
    """
    text = os.fsdecode(source)
    place = locate(text)
    file = place.file if place.file is not None else kinds.choose(place.store, want)
    if file.endswith(".json") and not file.endswith(INDEX):
        raise UnknownFormatError(f"{place.store.label(file)} is a config, not weights; give its folder.")
    weights = WeightSet(place.store, file)
    try:
        opened = _read(text, weights)
        if want != "any" and isinstance(opened, Adapter) != (want == "adapter"):
            is_one = "an adapter" if isinstance(opened, Adapter) else "a full checkpoint"
            wanted = "an adapter" if want == "adapter" else "a full checkpoint"
            raise WrongKindError(f"{weights.label} is {is_one}; wanted {wanted}.")
    except BaseException:
        weights.close()
        raise
    return opened


def _read(source: str, weights: WeightSet) -> Checkpoint | Adapter:
    names = weights.names()
    store = weights.store
    refuse_unsupported(names, None, weights.label)
    beside = store.has("adapter_config.json")
    form = next(name for name, reader in READERS.items() if reader.recognises(names, beside))
    named_adapter = weights.file in kinds.ADAPTERS
    if form == "checkpoint" and not named_adapter:
        return READERS[form].read(source, weights, config_beside(store, "config.json"))
    config = config_beside(store, "adapter_config.json")
    refuse_unsupported(names, config, weights.label)
    if form == "checkpoint":
        example = f"{len(names)} tensors such as {names[0]}" if names else "no tensors"
        raise UnknownFormatError(
            f"{weights.label} is named as an adapter, but holds {example}, of which none is a LoRA factor."
        )
    return READERS[form].read(source, weights, config)
