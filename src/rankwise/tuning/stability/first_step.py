"""The first step of every cell from one forward and backward pass of the frozen model.

In: a subject and cells. Out: their rows at step 1, without a step being made.

With B = 0 no branch speaks yet, so that every cell sees the same activations X (tokens, in) and the same gradients G
(tokens, out) of the module's output. dL/dB = s G' X A' and dL/dA = 0. One draw U of A serves all ranks, since they
share its first rows: P = G' (X U') holds the gradient of every rank in its first columns, and K = U X_m' X_m U' of the
measuring batch turns any B into the size of its branch, ||s B A x||^2 summed = s^2 tr(B K B'). So a module costs two
thin products a draw; only K, rank by rank, is held between the two passes. Where all K together are too large, some
modules go after the others, with two passes more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rankwise.records import StabilityRow
from rankwise.tuning.stability.listening import Site, counted_rows, hooked, input_of
from rankwise.tuning.stability.starts import unit_draw

if TYPE_CHECKING:
    from torch import Tensor

    from rankwise.tuning.stability.settings import Cell
    from rankwise.tuning.stability.subject import Subject

MOST_SPREAD: Final = 2**30
"""Bytes of K that are held at once; one module is the least."""

Draw = tuple[str, int]
"""Init and seed: what a unit draw of A is made from."""


class FirstStep:
    """The two passes, and the rows that come out of them."""

    def __init__(self, subject: Subject, sites: Sequence[Site], cells: Sequence[Cell], *, eps: float) -> None:
        self.subject, self.sites, self.eps = subject, {site.name: site for site in sites}, eps
        self.cells: dict[Draw, list[Cell]] = {}
        for cell in cells:
            self.cells.setdefault((cell.init, cell.seed), []).append(cell)
        self.most = max(cell.rank for cell in cells)
        self._counted = subject.probe_rows()
        self._spread: dict[tuple[str, Draw], Tensor] = {}
        self._pulls: dict[tuple[str, Draw], Tensor] = {}
        self._calls: dict[str, int] = {}
        self._found: dict[tuple[Cell, str], Tensor] = {}

    def run(self) -> tuple[StabilityRow, ...]:
        """Return a row a cell and module."""
        names = list(self.sites)
        at_once = max(1, MOST_SPREAD // (4 * len(self.cells) * self.most**2))
        parts = [names[start : start + at_once] for start in range(0, len(names), at_once)]
        return tuple(row for part in parts for row in self._of(part))

    def _of(self, names: Sequence[str]) -> tuple[StabilityRow, ...]:
        """Return the rows of some modules."""
        import torch

        layers = {name: self.sites[name].layer for name in names}
        with hooked(layers, self._measure):
            self.subject.probe()
        with hooked(layers, self._listen):
            loss = self.subject.losses(1, 1)[0]
            if loss.requires_grad:  # else no module is on the way to the loss
                loss.backward()
        for name in names:
            if any(name == module for module, _ in self._pulls):
                self._settle(name)
        found, self._found = self._found, {}
        self._spread.clear()  # that of modules that the gradient did not reach
        keys = list(found)
        numbers = torch.stack([found[key].cpu() for key in keys]).tolist() if keys else []
        first = float(loss.detach())
        return tuple(
            self._row(cell, self.sites[name], size, gradient, first)
            for (cell, name), (size, gradient) in zip(keys, numbers, strict=True)
        )

    def _unit(self, site: Site, draw: Draw, like: Tensor) -> Tensor:
        import torch

        init, seed = draw
        unit = unit_draw(init, self.most, site.in_features, seed=seed, place=site.place)
        return torch.from_numpy(unit).to(like.device, like.dtype)  # (most, in)

    def _measure(self, name: str) -> Callable[..., None]:
        """Hook of the measuring batch: sum K."""

        def hear(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], __: Any) -> None:
            x = counted_rows(input_of(args, kwargs), self._counted)  # (rows, in)
            for draw in self.cells:
                h = x @ self._unit(self.sites[name], draw, x).T  # (rows, most)
                key = name, draw
                self._spread[key] = self._spread.get(key, 0) + h.T @ h

        return hear

    def _listen(self, name: str) -> Callable[..., Tensor]:
        """Hook of the batch of step 1: let the gradient of the output pass, and take P from it on the way."""
        import torch

        first_step = self

        class Ear(torch.autograd.Function):  # type: ignore[misc, unused-ignore]
            """Identity; x is saved as autograd saves, so that checkpointing recomputes it instead of keeping it."""

            @staticmethod
            def forward(ctx: Any, output: Tensor, x: Tensor, switch: Tensor) -> Tensor:  # noqa: ARG004
                ctx.save_for_backward(x)
                return output.clone()  # a view could not be changed in place, as some models do

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
                first_step._hear(name, ctx.saved_tensors[0], gradient)
                return gradient, None, None

        def pass_on(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
            x = input_of(args, kwargs).detach()
            # begins the graph at the first module, and keeps what lies below it out of the backward pass
            switch = torch.zeros((), device=output.device, requires_grad=True)
            made: Tensor = Ear.apply(output, x, switch)
            return made

        return pass_on

    def _hear(self, name: str, x: Tensor, gradient: Tensor) -> None:
        x, g = counted_rows(x, None), counted_rows(gradient, None)
        for draw in self.cells:
            key = name, draw
            self._pulls[key] = self._pulls.get(key, 0) + g.T @ (x @ self._unit(self.sites[name], draw, x).T)
        self._calls[name] = self._calls.get(name, 0) + 1
        if self._calls[name] == self.sites[name].calls:  # a module called twice has its gradients added up first
            self._settle(name)

    def _settle(self, name: str) -> None:
        """Turn P and K of a module into the figures of every cell, and forget them."""
        for draw, cells in self.cells.items():
            pull, spread = self._pulls.pop((name, draw)), self._spread.pop((name, draw))
            for cell in cells:
                self._found[cell, name] = _figures(pull, spread, cell, self.eps)

    def _row(self, cell: Cell, site: Site, size: float, gradient: float, loss: float) -> StabilityRow:
        rms = size / math.sqrt(site.rows * site.out_features) if math.isfinite(size) else None
        return StabilityRow(
            rule=cell.rule,
            optimizer=cell.optimizer,
            init=cell.init,
            rank=cell.rank,
            seed=cell.seed,
            step=1,
            module=site.name,
            branch_rms=rms,
            relative_rms=rms / site.frozen_rms if rms is not None and site.frozen_rms else None,
            update_rms=rms,  # before the step there was none
            grad_norm_A=0.0,
            grad_norm_B=gradient if math.isfinite(gradient) else None,
            loss=loss if math.isfinite(loss) else None,
        )


def _figures(pull: Tensor, spread: Tensor, cell: Cell, eps: float) -> Tensor:
    """Return (Frobenius norm of the branch over the measuring batch, norm of the gradient of B), float64.

    Args:
        pull: P, (out, most).
        spread: K, (most, most).
        cell: rank, scales and rates.
        eps: of Adam.
    """
    import torch

    r = cell.rank
    gradient = (cell.scale * cell.start) * pull[:, :r]  # (out, r)
    # Adam's first step: both means are corrected to the gradient itself and to its square
    step = gradient if cell.optimizer == "sgd" else gradient / (gradient.abs() + eps)
    # The branch is linear in B. Its size is taken of a B of largest entry 1 and stretched in float64: the square of a
    # small step at a small rate would be zero in float32, and that of a high rate infinite.
    peak = step.abs().amax()
    b = step / torch.where(peak > 0, peak, torch.ones_like(peak))
    square = ((b @ spread[:r, :r]) * b).sum().clamp(min=0)  # K is rounded: a sum near zero may come out below it
    size = square.double().sqrt() * peak.double() * (cell.rate_b * cell.scale * cell.start)
    return torch.stack([size, torch.linalg.vector_norm(gradient).double()])
