"""What a source looks like once opened, whatever its format: a checkpoint of tensors, or a LoRA adapter.

In: nothing. Out: the abstract `Checkpoint` and `Adapter` that every reader of this room returns, and the
frozen facts about their tensors. Nothing here reads a byte.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rankwise.records import Finding, Skipped

Array = NDArray[Any]

ModuleKind = Literal["linear", "embedding", "conv", "expert"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its header states it.

    Attributes:
        name: as stored.
        shape: as stored.
        dtype: in the spelling of safetensors: "BF16", "F16", "F32", "F64", "I64", ...
        file: name of the file that holds it, for messages.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str


class Checkpoint(abc.ABC):
    """A full checkpoint: named tensors, read one at a time. Use as a context manager.

    Attributes:
        source: as the user gave it.
        config: the model's config.json, or None where there is none.
        findings: what the reader noticed.
    """

    source: str
    config: Mapping[str, Any] | None
    findings: Sequence[Finding]

    @abc.abstractmethod
    def names(self) -> Sequence[str]:
        """Return the names of all tensors: of a sharded checkpoint from its index, opening no shard."""

    @abc.abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Return what the header says of one tensor; of a sharded checkpoint one shard's header is read.

        Raises:
            TensorError: there is no tensor of that name.
            MalformedFileError: the shard is not there, or lacks the tensor that the index promises.
        """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> facts, in the order of the files; each header is read when first needed."""
        return _Infos(self)

    @abc.abstractmethod
    def read(self, name: str) -> Array:
        """Read one tensor in its storage dtype (bf16 as `ml_dtypes.bfloat16`), opening one file.

        Raises:
            MalformedFileError: the bytes are not there.
            AccessError: they cannot be read.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close any open file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Infos(Mapping[str, TensorInfo]):
    """The mapping view of a checkpoint's `names` and `info`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = dict.fromkeys(checkpoint.names())

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self._names:
            raise KeyError(name)
        return self._checkpoint.info(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module of an adapter, from headers and config alone.

    Attributes:
        module: dotted path without PEFT's prefixes and without `.weight`; experts end in `[i]`. Formats that
            store no dotted path keep what they store: `lora_unet_mid_block_0` (kohya), `unet:3` (cloneofsimo).
        shape: (out_features, in_features) of the delta.
        kind: what the delta is added to; a conv kernel is taken as (out, in * kh * kw).
        r: rank of the factors, from the tensors.
        lora_alpha: alpha that the format or its config gives, or None.
        scaling: factor on B @ A that the trainer and the reference loader apply, or None.
        rule: the scaling rule that gives it, or None.
        dtype: storage dtype of the factors.
        warnings: codes of findings about this module.
    """

    module: str
    shape: tuple[int, int]
    kind: ModuleKind
    r: int
    lora_alpha: float | None
    scaling: float | None
    rule: str | None
    dtype: str
    warnings: tuple[str, ...] = ()


class Adapter(abc.ABC):
    """A LoRA adapter: pairs of factors, read one module at a time. Use as a context manager.

    Attributes:
        source: as the user gave it.
        format: "peft", "kohya", "diffusers", "cloneofsimo" or "mlx".
        config: adapter_config.json, or None.
        modules: in the order of the file.
        skipped: what is in the file but is no pair of factors, and why.
        findings: what the reader noticed.
    """

    source: str
    format: str
    config: Mapping[str, Any] | None
    modules: Sequence[LoraModule]
    skipped: Sequence[Skipped]
    findings: Sequence[Finding]

    @abc.abstractmethod
    def read_factors(self, module: LoraModule) -> tuple[Array, Array]:
        """Read (A, B) of one module, A of shape (r, in_features), B of shape (out_features, r).

        Both come as float32 (or float64 where stored so), so that delta = scaling * B @ A.
        """

    @abc.abstractmethod
    def stored(self, module: LoraModule) -> tuple[TensorInfo, TensorInfo]:
        """Return what the headers say of the tensors that hold A and B; experts of a stack share one pair."""

    @abc.abstractmethod
    def others(self) -> Sequence[TensorInfo]:
        """Return the tensors that belong to no pair of factors: whole weights, magnitudes, alphas."""

    @abc.abstractmethod
    def read_other(self, name: str) -> Array:
        """Read one tensor of `others` in its storage dtype."""

    @property
    @abc.abstractmethod
    def metadata(self) -> Mapping[str, str]:
        """The metadata in the header of a safetensors file, else nothing."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close any open file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_float32(array: Array) -> Array:
    """Return float64 arrays unchanged and every other float as float32, contiguous."""
    if array.dtype == np.float64:
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(array, dtype=np.float32)
