"""One weight file, or many with an index, as one set of named tensors.

In: a store and the name of a weight file or index. Out: `WeightSet`, which knows every name from the index
alone and reads a shard's header when a tensor of that shard is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.checkpoints.model import Array, Checkpoint, TensorInfo
from rankwise.checkpoints.safetensors_file import SafetensorsFile
from rankwise.checkpoints.stores import Store
from rankwise.checkpoints.strict_json import parse_config, parse_strict
from rankwise.checkpoints.torch_file import TorchFile
from rankwise.errors import MalformedFileError, SourceNotFoundError, TensorError
from rankwise.records import Finding

INDEX: Final = ".index.json"
TORCH: Final = (".bin", ".pt", ".pth", ".ckpt")

_PLAIN_NAME: Final = re.compile(r"[^/\\\x00:]+")


def open_file(store: Store, name: str) -> SafetensorsFile | TorchFile:
    """Return a weight file; nothing is read yet."""
    return TorchFile(store, name) if name.lower().endswith(TORCH) else SafetensorsFile(store, name)


class WeightSet:
    """The tensors of one weight file or of the shards of an index; at most one shard is open.

    Attributes:
        store: where the files lie.
        file: the weight file or index.
    """

    def __init__(self, store: Store, file: str) -> None:
        self.store = store
        self.file = file
        self._shard_of = _read_index(store, file) if file.endswith(INDEX) else None
        self._files: dict[str, SafetensorsFile | TorchFile] = {}
        self._torch: TorchFile | None = None

    @property
    def label(self) -> str:
        """How messages name the set."""
        return self.store.label(self.file)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of a single safetensors file, else nothing."""
        return self._file(self.file).metadata if self._shard_of is None else {}

    def names(self) -> Sequence[str]:
        """Return all names, from the index or the one header."""
        return tuple(self._shard_of if self._shard_of is not None else self._file(self.file).infos)

    def files(self) -> Sequence[str]:
        """Return the files that hold tensors."""
        return tuple(dict.fromkeys([self.file] if self._shard_of is None else self._shard_of.values()))

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of one tensor."""
        return self._holder(name).infos[name]

    def infos(self) -> dict[str, TensorInfo]:
        """Return what the headers say of all tensors; reads the header of every shard."""
        return {name: self.info(name) for name in self.names()}

    def read(self, name: str) -> Array:
        """Read one tensor."""
        return self._holder(name).read(name)

    def read_many(self, names: Sequence[str]) -> list[Array]:
        """Read several tensors of a single file at once."""
        if self._shard_of is not None:
            return [self.read(name) for name in names]
        return self._file(self.file).read_many(names)

    def close(self) -> None:
        """Close any open shard."""
        for file in self._files.values():
            file.close()

    def _file(self, shard: str) -> SafetensorsFile | TorchFile:
        file = self._files.get(shard)
        new = file is None
        if file is None:
            file = open_file(self.store, shard)
        if isinstance(file, TorchFile) and file is not self._torch:
            if self._torch is not None:
                self._torch.close()
            self._torch = file
        if new:
            self._check_promise(shard, file)
            self._files[shard] = file
        return file

    def _check_promise(self, shard: str, file: SafetensorsFile | TorchFile) -> None:
        """Every tensor that the index places in this shard must be there."""
        if self._shard_of is None:
            return
        try:
            there = file.infos
        except SourceNotFoundError as error:
            raise _missing_shard(self.label, shard) from error
        lacking = [n for n, s in self._shard_of.items() if s == shard and n not in there]
        if lacking:
            raise MalformedFileError(
                f"{self.label} places {lacking[0]!r} in {shard}, which does not hold it ({len(lacking)} such tensors): "
                "index and shards are of different checkpoints. Copy or download both again."
            )

    def _holder(self, name: str) -> SafetensorsFile | TorchFile:
        shard = self.file if self._shard_of is None else self._shard_of.get(name)
        file = None if shard is None else self._file(shard)
        if file is None or name not in file.infos:
            raise TensorError(f"{self.label} holds no tensor {name!r}.")
        return file


def _missing_shard(label: str, shard: str) -> MalformedFileError:
    return MalformedFileError(
        f"{label} names the shard {shard}, which is not beside it: the copy or download is incomplete. Fetch {shard}."
    )


def _read_index(store: Store, file: str) -> dict[str, str]:
    """Return name -> shard, in the order of the index. No shard is opened.

    Raises:
        MalformedFileError: the index is no index, a shard is missing or lies outside the folder.
    """
    label = store.label(file)
    weight_map = parse_strict(store.text(file), label).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFileError(f"{label} has no `weight_map` from tensor names to shards: it is no index of weights.")
    shards = dict.fromkeys(s for s in weight_map.values() if isinstance(s, str))
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard) or shard in (".", ".."):
            raise MalformedFileError(
                f"{label} places {name!r} in {shard!r:.200}; wanted the plain name of a file beside the index. "
                "It was not opened."
            )
    listed = store.names()
    for shard in shards:
        if shard.endswith(INDEX):
            raise MalformedFileError(f"{label} names the shard {shard}, which is an index itself.")
        if listed is not None and shard not in listed:
            raise _missing_shard(label, shard)
    return weight_map


class WeightCheckpoint(Checkpoint):
    """A full checkpoint made of a weight set."""

    def __init__(self, source: str, weights: WeightSet, config: Mapping[str, Any] | None) -> None:
        self.source = source
        self.config = config
        self.findings: Sequence[Finding] = ()
        self._weights = weights

    def names(self) -> Sequence[str]:
        """Return all names, from the index or the one header."""
        return self._weights.names()

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of one tensor."""
        return self._weights.info(name)

    def read(self, name: str) -> Array:
        """Read one tensor in its storage dtype."""
        return self._weights.read(name)

    def close(self) -> None:
        """Close any open shard."""
        self._weights.close()


def config_beside(store: Store, name: str) -> dict[str, Any] | None:
    """Return the JSON object of a config in the same folder, or None where there is none."""
    if not store.has(name):
        return None
    return parse_config(store.text(name), store.label(name))
