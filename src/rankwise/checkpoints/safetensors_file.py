"""A safetensors file, read in ranges: its header once, then one tensor at a time.

In: a store and a file name. Out: names, shapes, dtypes, and arrays. The parser is our own because the
library reads local files alone, and because its messages name no file; whatever it refuses is refused here.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeGuard

import ml_dtypes
import numpy as np

from rankwise.checkpoints.model import Array, TensorInfo
from rankwise.checkpoints.stores import Store
from rankwise.checkpoints.strict_json import parse_strict
from rankwise.errors import AccessError, MalformedFileError, SourceNotFoundError, TensorError, without_secrets

HEADER_LIMIT: Final = 100_000_000
"""Largest header in bytes, as in the safetensors library."""

_U64: Final = 2**64

BITS: Final[dict[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""dtype -> bits of one entry."""

NUMPY: Final[dict[str, np.dtype[Any]]] = {
    **{name: np.dtype(f"<{name[0].lower()}{bits // 8}") for name, bits in BITS.items()
       if name[0] in "UIF" and name[1:].isdigit() and bits >= 8},
    "BOOL": np.dtype(np.bool_),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}  # fmt: skip
"""dtype -> numpy's; the 4 and 6 bit floats have none that is stored packed."""

_FOREIGN: Final = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it; rename it to end in .bin"),
    (b"\x80\x02", "a pickle, as torch.save writes it; rename it to end in .bin"),
    (b"GGUF", "a GGUF file, which rankwise does not read; give the checkpoint that it was made from"),
    (b"version ", "a Git LFS pointer, not the weights; run: git lfs pull"),
    (b"<!DOCTY", "a web page, not the weights; download the file itself"),
    (b"<html", "a web page, not the weights; download the file itself"),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One safetensors file of a store. The header is read when first needed."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name

    @cached_property
    def _parsed(self) -> tuple[int, dict[str, str], dict[str, _Entry]]:
        return _read_header(self._store, self.name)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header holds under `__metadata__`."""
        return self._parsed[1]

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name -> facts, in the order of the data."""
        entries = self._parsed[2]
        shown = without_secrets(self.name)  # a signed link ends in a query
        return {n: TensorInfo(n, e.shape, e.dtype, shown) for n, e in entries.items()}

    def read(self, name: str) -> Array:
        """Read the bytes of one tensor, and no others."""
        return self.read_many([name])[0]

    def read_many(self, names: Sequence[str]) -> list[Array]:
        """Read several tensors, in one request where the store can."""
        data_start, _, entries = self._parsed
        for name in names:
            if entries[name].dtype not in NUMPY:
                raise TensorError(
                    f"{name} in {self._store.label(self.name)} is stored as {entries[name].dtype}, packed below one "
                    "byte an entry, which rankwise does not read; give the checkpoint before quantisation."
                )
        ranges = [(data_start + entries[n].start, entries[n].end - entries[n].start) for n in names]
        try:
            raw = self._store.read_many(self.name, ranges)
        except (AccessError, MalformedFileError, SourceNotFoundError) as error:  # they name the file
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise type(error)(f"{names[0]}{more}: {error}") from error
        return [self._shaped(n, entries[n], data) for n, data in zip(names, raw, strict=True)]

    def _shaped(self, name: str, entry: _Entry, raw: Array) -> Array:
        try:
            return raw.view(NUMPY[entry.dtype]).reshape(entry.shape)
        except ValueError as error:  # more dimensions, or larger ones beside a zero, than numpy has room for
            where = self._store.label(self.name)
            raise TensorError(f"{name} in {where} has the shape {entry.shape!s:.200}: {error}.") from error

    def close(self) -> None:
        """Nothing stays open."""


def _read_header(store: Store, file: str) -> tuple[int, dict[str, str], dict[str, _Entry]]:
    """Return where the data starts, the metadata, and the entries in the order of the data."""
    label, size = store.label(file), store.size(file)
    if size < 8:
        raise MalformedFileError(
            f"{label} is {size} bytes; a safetensors file begins with 8 bytes that give the length of its header. "
            "Copy or download it again."
        )
    first = store.read(file, 0, 8).tobytes()
    length = int.from_bytes(first, "little")
    if length > HEADER_LIMIT or 8 + length > size:
        for magic, what in _FOREIGN:
            if first.startswith(magic):
                raise MalformedFileError(f"{label} is no safetensors file but {what}.")
        raise MalformedFileError(
            f"{label} is no whole safetensors file: its first 8 bytes claim a header of {length:,} bytes, and the file "
            f"has {size:,} (a header has at most {HEADER_LIMIT:,}). Copy or download it again."
        )
    text = store.read(file, 8, length).tobytes()
    header = parse_strict(text, f"the header of {label}")
    metadata = _metadata(header.pop("__metadata__", None), label)
    entries = {name: _entry(name, value, label) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(ordered, size - 8 - length, label)
    return 8 + length, metadata, ordered


def _metadata(found: Any, label: str) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise MalformedFileError(f"{label}: `__metadata__` of the header must map words to words.")
    return found


def _entry(name: str, found: Any, label: str) -> _Entry:
    where = f"{label}: tensor {name!r}"
    if not isinstance(found, dict):
        raise MalformedFileError(f"{where} is described by a JSON {type(found).__name__}; wanted an object.")
    dtype, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise MalformedFileError(f"{where} has the dtype {dtype!r}; safetensors has: {', '.join(BITS)}.")
    if not _naturals(shape):
        raise MalformedFileError(f"{where} has the shape {shape!r:.200}; wanted a list of integers of 0 or more.")
    if not _naturals(offsets) or len(offsets) != 2:
        raise MalformedFileError(f"{where} has data_offsets {offsets!r:.200}; wanted [start, end].")
    start, end = offsets
    bits = BITS[dtype]
    for step in shape:  # step by step, as the library does: a product of 0 may hide an overflow
        bits = bits * step
        if bits >= _U64:
            raise MalformedFileError(f"{where} has the shape {shape!r:.200}: more bits than a file can have.")
    if end < start or bits != 8 * (end - start):
        raise MalformedFileError(
            f"{where} of {dtype} and shape {tuple(shape)} takes {bits / 8:,.10g} bytes, and its data_offsets "
            f"{start:,} to {end:,} hold {end - start:,}."
        )
    return _Entry(dtype, tuple(shape), start, end)


def _naturals(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < _U64 for n in found)


def _check_cover(entries: Mapping[str, _Entry], size: int, label: str) -> None:
    """The tensors must follow each other without a hole or an overlap and end where the file ends."""
    at = 0
    for name, entry in entries.items():
        if entry.start != at:
            what = "overlaps the one before it" if entry.start < at else "leaves a hole before it"
            raise MalformedFileError(
                f"{label}: the data of {name!r} {what}: it begins at byte {entry.start:,} of the data, expected {at:,}."
            )
        at = entry.end
    if at != size:
        raise MalformedFileError(
            f"{label} should hold {at:,} bytes of data after its header, and holds {size:,}: it is cut short or was "
            "written twice. Copy or download it again."
        )
