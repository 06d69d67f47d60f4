"""What all writers share.

In: nothing. Out: the frozen facts that go into a writer and come out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.adapters.baking import Written
from rankwise.adapters.parts import Array
from rankwise.adapters.stored_units import Unit
from rankwise.checkpoints.model import Adapter, TensorInfo

Pairs = Sequence[tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is converted.

    Attributes:
        adapter: the first adapter: names, config and header are taken from it.
        units: all that are written, in order.
        paths: unit -> the path of its tensors in the format to write.
        others: tensors that travel as they are.
        changed: whether the set of modules is another than in the first adapter.
    """

    adapter: Adapter
    units: tuple[Unit, ...]
    paths: Mapping[str, str]
    others: tuple[TensorInfo, ...]
    changed: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One unit as written."""

    unit: Unit
    path: str
    written: Written


@dataclass(frozen=True, slots=True)
class Result:
    """What stands beside the tensors.

    Attributes:
        metadata: of the header.
        texts: file name -> contents, of the folder.
        notes: what the user should know.
    """

    metadata: Mapping[str, str]
    texts: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Writer:
    """One format.

    Attributes:
        file: name of the weights in a folder; OUT itself is the file where OUT ends in .safetensors.
        folder: whether OUT is always a folder.
        rules: scaling rules that it can say; the first is taken where the user names none.
        uniform: whether all modules have to have one rank and one factor.
        paths: from (first adapter, units) to unit -> path; raises UsageError for names that it cannot form.
        tensors: from (unit, path, pairs of factors, what is written) to named arrays.
        finish: from (setup, entries) to what stands beside them.
        readers: runtimes that read such files, and whether they find each module's alpha in the weights.
    """

    file: str
    folder: bool
    rules: tuple[str, ...]
    uniform: bool
    paths: Callable[[Adapter, Sequence[Unit]], dict[str, str]]
    tensors: Callable[[Unit, str, Pairs, Written], dict[str, Array]]
    finish: Callable[[Setup, Sequence[Entry]], Result]
    readers: Mapping[str, bool]
