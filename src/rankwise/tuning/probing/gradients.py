"""Which directions the data pull at: the gradient of every module's weight at the base, from one streamed pass.

In: a model and rows of tokens. Out: for every module the spectrum of its gradient, summed over the rows, and how far
the rows pull the same way. What is held at once is bounded: large weights keep a random two-sided sketch in place of
the whole gradient.

The gradient is that of the summed loss in nats of the target tokens, so that rows are added and not averaged. With
x the input of the layer and g the gradient of its output, the weight's gradient of a row is the sum over its tokens of
g x', and its squared norm is the sum over pairs of tokens of (g_s . g_t)(x_s . x_t): no row's gradient is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rankwise.criteria import Spectrum, effective_rank, rank_for_energy, stable_rank
from rankwise.linalg import matrix_values
from rankwise.tuning.borrowing import borrowed
from rankwise.tuning.probing.passes import Said, TokenRow, batch_of, parts, summed_loss, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor

MOST_HELD: Final = 512 * 2**20
"""Bytes of whole gradients that are held; modules past it are sketched."""

SKETCH: Final = 256
"""Sides of a sketch: ranks above a half of it are not told apart from it."""


@dataclass(frozen=True, slots=True)
class Pull:
    """The gradient of one module.

    Attributes:
        module: dotted path.
        shape: (out_features, in_features).
        energy: squared Frobenius norm of the gradient summed over the rows; of a sketch its estimate. NaN where it
            overflowed.
        stable_rank: energy / sigma_1^2, or None for a gradient of zero.
        effective_rank: exp of the entropy of sigma^2 / energy, or None.
        rank_90: smallest rank that holds 90 % of the energy.
        rank_99: the same for 99 %.
        coherence: energy / (rows x sum of the energies of the rows' own gradients): 1 where all rows pull the same way,
            1 / rows where they have nothing in common. None for a gradient of zero.
        sketched: whether the spectrum is that of a sketch: ranks are then too low where they come near its side.
    """

    module: str
    shape: tuple[int, int]
    energy: float
    stable_rank: float | None
    effective_rank: float | None
    rank_90: int
    rank_99: int
    coherence: float | None
    sketched: bool


def pulls(
    model: Any,
    shapes: dict[str, tuple[int, int]],
    rows: Sequence[TokenRow],
    *,
    seed: int,
    most_held: int = MOST_HELD,
    said: Said | None = None,
) -> tuple[Pull, ...]:
    """Measure the gradient of every module.

    Args:
        model: a causal LM without an adapter; comes back as it was.
        shapes: module -> (out_features, in_features).
        rows: examples.
        seed: of the sketches.
        most_held: bytes of whole gradients that may be held.
        said: told the number of rows done.
    """
    import torch

    device = model.get_input_embeddings().weight.device
    sums = _Sums(shapes, _sketched(shapes, most_held), device, seed)
    with borrowed(model) as lent, torch.enable_grad():
        lent.eval()
        for p in lent.parameters():
            p.requires_grad_(False)
        handles = [lent.get_input_embeddings().register_forward_hook(_begin)]
        handles += [lent.get_submodule(name).register_forward_hook(sums.listen(name)) for name in shapes]
        try:
            done = 0
            order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
            for numbers in parts(rows, order, vocabulary_of(lent)):
                batch = batch_of(rows, numbers, device)
                summed_loss(lent, batch).backward()
                done += len(numbers)
                if said is not None:
                    said(done)
        finally:
            for handle in handles:
                handle.remove()
    return sums.results(len(rows))


def _sketched(shapes: dict[str, tuple[int, int]], most_held: int) -> set[str]:
    """Return the modules that are sketched: the largest, until the others fit."""
    held = 4 * sum(out * into for out, into in shapes.values())
    sketched = set()
    for name, (out, into) in sorted(shapes.items(), key=lambda item: -math.prod(item[1])):
        if held <= most_held or min(out, into) <= SKETCH:
            continue
        held -= 4 * (out * into - SKETCH * SKETCH)
        sketched.add(name)
    return sketched


def _begin(_: Any, __: Any, output: Tensor) -> Tensor:
    """Hook of the embeddings: the graph begins here, since no weight of the model asks for a gradient."""
    return output.detach().requires_grad_()


class _Sums:
    """What is added up while the batches go by."""

    def __init__(self, shapes: dict[str, tuple[int, int]], sketched: set[str], device: Any, seed: int) -> None:
        self.shapes, self.sketched, self.device, self.seed = shapes, sketched, device, seed
        self.whole: dict[str, Tensor] = {}
        self.own: dict[str, float] = {}
        self._sides: dict[tuple[int, bool], Tensor] = {}

    def listen(self, name: str) -> Callable[..., None]:
        """Return the hook of a module."""

        def hear(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = args[0].detach()
                output.register_hook(lambda g: self._add(name, x, g))

        return hear

    def _add(self, name: str, x: Tensor, g: Tensor) -> None:
        """Add what one batch pulls; x is (rows, tokens, in), g is (rows, tokens, out)."""
        x, g = x.float(), g.detach().float()
        # experts see tokens of all rows mixed: their rows cannot be told apart
        square = float(((g @ g.mT) * (x @ x.mT)).sum()) if x.ndim == 3 else math.nan
        self.own[name] = self.own.get(name, 0.0) + square
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        if name in self.sketched:
            x, g = x @ self._side(x.shape[-1], left=False), g @ self._side(g.shape[-1], left=True)
        self.whole[name] = self.whole.get(name, 0) + g.T @ x  # (out, in), or (SKETCH, SKETCH)

    def _side(self, size: int, *, left: bool) -> Tensor:
        """Return a random map (size, SKETCH) that keeps squared norms on average; one for all layers of that size.

        The two sides have to be drawn apart: with one S for both, S' G S adds the squared trace of a square G.
        """
        import torch

        if (size, left) not in self._sides:
            draw = torch.Generator().manual_seed(2 * (self.seed + size) + left)
            made = torch.randn(size, SKETCH, generator=draw) / math.sqrt(SKETCH)
            self._sides[size, left] = made.to(self.device)
        return self._sides[size, left]

    def results(self, rows: int) -> tuple[Pull, ...]:
        """Return the spectra."""
        found = []
        for name, shape in self.shapes.items():
            if name not in self.whole:  # no token reaches it
                found.append(Pull(name, shape, 0.0, None, None, 0, 0, None, name in self.sketched))
                continue
            whole = self.whole.pop(name).double().cpu()
            if not bool(whole.isfinite().all()):  # half precision overflows before the loss does
                found.append(Pull(name, shape, math.nan, None, None, 0, 0, None, name in self.sketched))
                continue
            values = matrix_values(whole.numpy())
            spectrum = Spectrum(name, shape, tuple(map(float, values.sigma)), values.energy)
            own = self.own[name]
            coherence = values.energy / (rows * own) if own > 0 and math.isfinite(own) else None
            found.append(
                Pull(
                    module=name,
                    shape=shape,
                    energy=values.energy,
                    stable_rank=stable_rank(spectrum),
                    effective_rank=effective_rank(spectrum),
                    rank_90=rank_for_energy(spectrum, 0.9),
                    rank_99=rank_for_energy(spectrum, 0.99),
                    coherence=coherence,
                    sketched=name in self.sketched,
                )
            )
        return tuple(found)
