"""What the measuring batch puts through each frozen module, before any cell is looked at.

In: a subject. Out: for each module its size and the RMS of its output, and the names of those that no branch can be put
on, with the reason.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.records import Skipped

if TYPE_CHECKING:
    from torch import Tensor

    from rankwise.tuning.stability.subject import Subject


@dataclass(frozen=True, slots=True)
class Site:
    """A module that gets a branch.

    Attributes:
        name: dotted path.
        place: its number among the modules asked for.
        layer: the frozen layer.
        out_features: of its output.
        in_features: of its input.
        calls: how often one forward pass calls it.
        rows: rows of the measuring batch that reach it, padding left out.
        frozen_rms: RMS of its output over them.
        whole: whether a call gets one row for each token: only then can copies be told apart.
        wide: whether it computes in float64.
    """

    name: str
    place: int
    layer: Any
    out_features: int
    in_features: int
    calls: int
    rows: int
    frozen_rms: float
    whole: bool
    wide: bool


@contextlib.contextmanager
def hooked(layers: Mapping[str, Any], hook: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    """Put a forward hook on every layer for a while; `hook` makes it from the name."""
    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(hook(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the first input of a layer, however it was given."""
    return args[0] if args else next(iter(kwargs.values()), None)


def counted_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows that count of an activation (..., features), as (rows, features) of float32 or float64."""
    import torch

    flat = values.detach().reshape(-1, values.shape[-1])
    if rows is not None and len(rows) == len(flat):  # else it sees tokens in an order of its own: experts
        flat = flat[rows.to(flat.device)]
    return flat if flat.dtype == torch.float64 else flat.float()


def listen(subject: Subject) -> tuple[tuple[Site, ...], tuple[Skipped, ...]]:
    """Run the measuring batch once; return the modules, and those that are left out."""
    import torch

    found: dict[str, list[Any]] = {}
    reasons: dict[str, str] = {}
    counted = subject.probe_rows()
    tokens = None if counted is None else len(counted)

    def hook(name: str) -> Callable[..., None]:
        def hear(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            x = input_of(args, kwargs)
            tensors = isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor)
            if not tensors or not x.is_floating_point() or x.ndim < 2 or x.shape[:-1] != output.shape[:-1]:
                reasons[name] = "its output is no row of features for each row of its input"
                return
            y = counted_rows(output, counted)
            whole = tokens is None or tokens == x.numel() // x.shape[-1]
            square = torch.linalg.vector_norm(y).double().square()
            entry = found.setdefault(
                name, [output.shape[-1], x.shape[-1], 0, 0, 0.0, whole, output.dtype == torch.float64]
            )
            entry[2] += 1
            entry[3] += len(y)
            entry[4] = entry[4] + square
            entry[5] = entry[5] and whole

        return hear

    with hooked(subject.modules, hook):
        subject.probe()
    sites = []
    for place, (name, layer) in enumerate(subject.modules.items()):
        if name in reasons or name not in found or not found[name][3]:
            reasons.setdefault(name, "no token of the measuring batch reaches it")
            continue
        out_features, in_features, calls, rows, square, whole, wide = found[name]
        rms = math.sqrt(float(square) / (rows * out_features))
        sites.append(Site(name, place, layer, out_features, in_features, calls, rows, rms, whole, wide))
    return tuple(sites), tuple(Skipped(module=name, reason=reason) for name, reason in reasons.items())
