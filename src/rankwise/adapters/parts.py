"""safetensors files written in parts, and joined without being read into memory.

In: named arrays. Out: one file a part, synced; and one file out of many parts, copied byte by byte. The writer is our
own because the library writes a file from memory alone; its reader is what the tests hold this to.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rankwise.errors import MalformedFileError, OutputError

Array = NDArray[Any]

DTYPES: Final[dict[np.dtype[Any], str]] = {
    np.dtype("<f8"): "F64",
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype("<i8"): "I64",
    np.dtype("<i4"): "I32",
    np.dtype("<i2"): "I16",
    np.dtype("i1"): "I8",
    np.dtype("<u8"): "U64",
    np.dtype("<u4"): "U32",
    np.dtype("<u2"): "U16",
    np.dtype("u1"): "U8",
    np.dtype("bool"): "BOOL",
}
"""numpy's dtype -> the name in a header."""

COPY: Final = 1 << 22  # bytes copied at a time


def write_part(path: Path, tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Write named arrays and some facts to one file, whole or not at all.

    Args:
        path: beside it the file is written, and then renamed.
        tensors: name -> array of a dtype in `DTYPES`.
        facts: kept as JSON in the header; read back by `read_facts`.

    Raises:
        OutputError: the disk is full, or may not be written to.
    """
    beside = path.with_name(path.name + ".new")
    entries = {name: (DTYPES[a.dtype], a.shape, a.nbytes) for name, a in tensors.items()}
    try:
        with beside.open("wb") as file:
            file.write(_header(entries, {"facts": json.dumps(facts)}))
            for array in tensors.values():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(f"{path.parent} cannot be written to: {error.strerror or error}.") from error


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts of a part.

    Raises:
        MalformedFileError: it is no part.
    """
    try:
        with path.open("rb") as file:
            header, _ = _read_header(file)
        facts: dict[str, Any] = json.loads(header["__metadata__"]["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise MalformedFileError(f"{path} is no part of an adapter: {error}.") from error
    return facts


def join_parts(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file that holds the tensors of all parts, in their order.

    The memory needed is that of the headers. The file is synced.

    Raises:
        OutputError: the disk is full, or may not be written to.
        MalformedFileError: a part is broken, or two hold a tensor of one name.
    """
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for part in parts:
        with part.open("rb") as file:
            header, _ = _read_header(file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in entries:
                raise MalformedFileError(f"two parts hold a tensor named {name}; delete {part.parent} and start again.")
            start, end = entry["data_offsets"]
            entries[name] = (entry["dtype"], tuple(entry["shape"]), end - start)
    try:
        with path.open("wb") as whole:
            whole.write(_header(entries, metadata))
            for part in parts:
                with part.open("rb") as file:
                    _read_header(file)
                    while block := file.read(COPY):
                        whole.write(block)
            whole.flush()
            os.fsync(whole.fileno())
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be written to: {error.strerror or error}.") from error


def _header(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """Return the length and the JSON of a header, padded so that the data start on 8 bytes."""
    held: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, (dtype, shape, size) in entries.items():
        held[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(held, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header and where the data start; the file stands there.

    Raises:
        ValueError: the file is not as long as its header says.
    """
    size = os.fstat(file.fileno()).st_size
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size:
        raise ValueError(f"its header is to take {length:,} bytes of {size:,}")
    header: dict[str, Any] = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"it has {size:,} bytes, not {8 + length + max(ends, default=0):,}")
    return header, 8 + length
