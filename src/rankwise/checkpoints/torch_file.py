"""A file written by torch.save: a dict of tensors, loaded without executing anything in it.

In: a store and a file name. Out: names, shapes, dtypes, and arrays, as from a safetensors file. torch is
imported here alone, and only when such a file is opened. `torch.load(weights_only=True)` refuses every
pickle that calls something other than what tensors need.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np

from rankwise.checkpoints.model import Array, TensorInfo
from rankwise.checkpoints.stores import Store, printable
from rankwise.errors import (
    MalformedFileError,
    MissingDependencyError,
    RankwiseError,
    TensorError,
    UnsafeFileError,
    without_secrets,
)

# torch's spelling -> safetensors'
_NAMES: Final[dict[str, str]] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip
# dtypes that numpy lacks -> (integer of the same width, ml_dtypes)
_VIEWS: Final[dict[str, tuple[str, Any]]] = {
    "BF16": ("int16", ml_dtypes.bfloat16),
    "F8_E5M2": ("uint8", ml_dtypes.float8_e5m2),
    "F8_E4M3": ("uint8", ml_dtypes.float8_e4m3fn),
}

# what the unpickler says of things that are no tensors, as against bytes that are no pickle
_CODE: Final = re.compile(r"GLOBAL|[Uu]nsupported class|[Tt]rying to (call|load|instantiate)|TorchScript|not.*allowed")


class TorchFile:
    """One file of torch.save. Its tensors are mapped, where that is possible, until it is closed."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name
        self._loaded: dict[str, Any] | None = None

    metadata: Mapping[str, str] = MappingProxyType({})

    def _tensors(self) -> dict[str, Any]:
        if self._loaded is None:
            self._loaded = _load(self._store, self.name)
        return self._loaded

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> facts, in the order of the file."""
        shown = without_secrets(self.name)  # a signed link ends in a query
        return {n: TensorInfo(n, tuple(t.shape), _dtype(t), shown) for n, t in self._tensors().items()}

    def read(self, name: str) -> Array:
        """Copy one tensor out of the file."""
        where = f"{name} in {self._store.label(self.name)}"
        tensor = self._tensors()[name]
        dtype = _dtype(tensor)
        if dtype not in _NAMES.values() or str(tensor.layout) != "torch.strided" or tensor.is_quantized:
            raise TensorError(f"{where} is stored as {dtype} ({tensor.layout}), which rankwise does not read.")
        import torch

        try:
            with torch.no_grad():
                tensor = tensor.detach().cpu().contiguous()
                if dtype in _VIEWS:
                    width, wanted = _VIEWS[dtype]
                    return np.array(tensor.view(getattr(torch, width)).numpy()).view(wanted)
                return np.array(tensor.numpy())
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise MalformedFileError(f"{where} cannot be read: {_first_line(error)}") from error

    def read_many(self, names: Sequence[str]) -> list[Array]:
        """Copy several tensors out of the file."""
        return [self.read(name) for name in names]

    def close(self) -> None:
        """Drop the mapping."""
        self._loaded = None


def _dtype(tensor: Any) -> str:
    word = str(tensor.dtype).removeprefix("torch.")
    return _NAMES.get(word, word)


def _load(store: Store, name: str) -> dict[str, Any]:
    """Return the tensors of the file by name.

    Raises:
        UnsafeFileError: the pickle holds more than tensors.
        MalformedFileError: it is damaged, or no dict of tensors.
    """
    label = store.label(name)
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("torch", "train", f"{label} was written by torch.save; reading it") from error
    path = store.path(name)
    size = store.size(name)  # refuses folders and what may not be read before torch words it
    if path is not None and size:
        store.read(name, 0, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path is None:
                whole = io.BytesIO(store.read(name, 0, size).tobytes())
                found = torch.load(whole, map_location="cpu", weights_only=True)
            else:
                zipped = store.read(name, 0, min(4, size)).tobytes() == b"PK\x03\x04"  # else nothing to map
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except RankwiseError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error.__context__ or error)
        if _CODE.search(reason):
            raise _unsafe(label, _first_line(reason)) from error
        raise _damaged(label, _first_line(reason)) from error
    except Exception as error:  # torch raises whatever the bytes lead it to
        if "TorchScript" in str(error):
            raise _unsafe(label, "it is a TorchScript archive, which is a program") from error
        raise _damaged(label, _first_line(error)) from error
    return _only_tensors(found, label)


def _unsafe(label: str, reason: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{label} holds more than tensors, and loading it would run what it holds: {reason}. It was refused, and "
        "nothing in it was executed. Ask for a .safetensors file, or save the state dict alone."
    )


def _damaged(label: str, reason: str) -> MalformedFileError:
    return MalformedFileError(
        f"{label} is damaged, or was not written by torch.save: {reason}. Copy or download it again."
    )


def _first_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")


def _only_tensors(found: Any, label: str) -> dict[str, Any]:
    import torch

    if isinstance(found, Mapping) and not any(isinstance(v, torch.Tensor) for v in found.values()):
        inner = [found[key] for key in ("state_dict", "model", "module") if isinstance(found.get(key), Mapping)]
        found = inner[0] if inner else found  # Lightning and other trainers wrap the state dict once
    if not isinstance(found, Mapping):
        raise MalformedFileError(f"{label} holds a {type(found).__name__}; wanted a dict of tensors by name.")
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    for name, tensor in tensors.items():
        claimed = tensor.numel() * tensor.element_size()
        if tensor.layout is torch.strided and claimed > tensor.untyped_storage().nbytes():
            raise MalformedFileError(
                f"{label}: {printable(name)} claims the shape {tuple(tensor.shape)}, {claimed:,} bytes, but stores "
                f"{tensor.untyped_storage().nbytes():,}: it is an expanded view. Save it with .contiguous()."
            )
    if not tensors:
        raise MalformedFileError(f"{label} holds a dict without tensors; wanted a dict of tensors by name.")
    return tensors
