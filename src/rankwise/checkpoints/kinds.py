"""Which file of a folder holds the weights.

In: a store. Out: the name of the weight file or index to open. Only names are looked at: what the file
holds is told later, from its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from rankwise.checkpoints.sharded import INDEX, WeightSet
from rankwise.checkpoints.stores import Store, printable
from rankwise.errors import RankwiseError, UnknownFormatError

Want = Literal["any", "checkpoint", "adapter"]

ADAPTERS: Final = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
"""Names that adapters are saved under, the one to take first first."""

CHECKPOINTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names that checkpoints are saved under, in the order in which transformers looks for them."""

CONFIGS: Final = ("adapter_config.json", "config.json")
"""Names of what says how the weights are meant."""


class _AmbiguousError(UnknownFormatError):
    """A folder holds several weight files: all that it needs is there, and the user has to choose."""


def choose(store: Store, want: Want) -> str:
    """Return the weight file or index of a folder.

    Raises:
        UnknownFormatError: there is none, or several of which none is the obvious one.
    """
    listed = store.names()
    known = ADAPTERS + CHECKPOINTS
    there = [n for n in known if (store.has(n) if listed is None else n in listed)]
    adapter = next((n for n in there if n in ADAPTERS), None)
    checkpoint = next((n for n in there if n in CHECKPOINTS), None)
    if adapter is not None and checkpoint is not None and want == "any":
        raise _AmbiguousError(
            f"{_folder(store)} holds an adapter ({adapter}) and a checkpoint ({checkpoint}); give the path of the file "
            "that is meant."
        )
    chosen = adapter if checkpoint is None or (want == "adapter" and adapter is not None) else checkpoint
    if chosen is not None:
        return chosen
    return _loose(store, listed)


def _loose(store: Store, known: Sequence[str] | None) -> str:
    """Return the only index or .safetensors file of any other name."""
    listed = known or ()
    indexes = [n for n in listed if n.endswith(f".safetensors{INDEX}")]
    files = [n for n in listed if n.endswith(".safetensors")]
    found = indexes or files
    if len(found) == 1 and not (files == found and "-00001-of-" in found[0]):
        return found[0]
    if found:
        sharded = all("-of-0" in n for n in found)
        raise (UnknownFormatError if sharded else _AmbiguousError)(
            f"{_folder(store)} holds {len(found)} weight files ({_some(found)}) "
            + (
                "and no index that says which tensor is in which; fetch model.safetensors.index.json."
                if sharded
                else "and none is the obvious one; give the path of the file that is meant."
            )
        )
    what = f"it holds {_some(listed)}" if listed else "it holds no files"
    if known is None:
        what = "its server lists no files, and gives none of the usual names there"
        what += f" (it answers {store.refused})" if store.refused else ""
    hint = ""
    if "adapter_config.json" in listed:
        hint = " The adapter_config.json is there, but its weights (adapter_model.safetensors) are not."
    elif "model_index.json" in listed:
        hint = " It is a diffusers pipeline: give the folder of one model in it, such as unet/."
    elif any(n.endswith(".gguf") for n in listed):
        hint = " GGUF files are not read; give the checkpoint that it was made from."
    raise UnknownFormatError(
        f"{_folder(store)} is neither a checkpoint nor an adapter: {what}; wanted "
        f"{', '.join(ADAPTERS + CHECKPOINTS)}, or one .safetensors file.{hint}"
    )


def complete(store: Store) -> bool:
    """Tell whether a folder of the hub's cache holds whole weights: caches often hold a config alone."""
    try:
        file = choose(store, "any")
        if file.endswith(INDEX):
            WeightSet(store, file)  # refuses where a shard is missing
    except _AmbiguousError:
        return True
    except RankwiseError:
        return False
    return True


def _folder(store: Store) -> str:
    return printable(store.where or ".")


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(printable(n) for n in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
