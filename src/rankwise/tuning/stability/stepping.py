"""Real optimizer steps of many cells at once, on one frozen model.

In: a subject, and cells of one rank, optimizer and learning rate. Out: their rows at the steps asked for.

The cells are copies of the batch, one after the other in one forward pass; each copy has factors of its own, hooked
onto the frozen layers. The loss is the sum of the copies' losses, so that no cell sees another's gradient. The branch
is measured between two steps on the measuring batch, with the activations of the frozen model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rankwise.errors import DeviceError
from rankwise.records import StabilityRow
from rankwise.tuning.stability.listening import Site, counted_rows, hooked, input_of
from rankwise.tuning.stability.starts import unit_draw

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from rankwise.tuning.stability.settings import Cell
    from rankwise.tuning.stability.subject import Subject


def _adamw(groups: list[dict[str, Any]], eps: float) -> Optimizer:
    from torch.optim import AdamW

    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")  # one pass over factors and moments, not ten
    made: Optimizer = AdamW(groups, eps=eps, weight_decay=0.0, fused=fused)
    return made


def _sgd(groups: list[dict[str, Any]], eps: float) -> Optimizer:  # noqa: ARG001 - all have the same signature
    from torch.optim import SGD

    made: Optimizer = SGD(groups)
    return made


OPTIMIZERS: Final[dict[str, Callable[[list[dict[str, Any]], float], Optimizer]]] = {"adamw": _adamw, "sgd": _sgd}
"""Name -> optimizer over groups with rates of their own. No weight decay, no momentum in sgd, no schedule: the rule is
to be seen, not what is put on top of it."""

MARGIN: Final = 1.0
"""A loss that much above that of the frozen model on the same batch, in nats a token, says that a run has diverged."""

DROWNED: Final = 10.0
"""So does a branch that many times as loud as what the frozen layers put out. A model that normalises its activations
may hide it from the loss."""

MOST_FACTORS: Final = 2**30
"""Bytes of factors that are held at once, with their gradients, moments and last values; one cell is the least."""

Said = Callable[[int], None]


def run_cells(
    subject: Subject,
    sites: Sequence[Site],
    cells: Sequence[Cell],
    *,
    steps: Sequence[int],
    eps: float,
    said: Said,
    base: Sequence[float] | None = None,
) -> tuple[list[StabilityRow], dict[Cell, int]]:
    """Take the steps of every cell.

    Args:
        subject: the model and its batches.
        sites: modules that get a branch.
        cells: what to run.
        steps: after which to measure, ascending.
        eps: of Adam.
        said: told after every step how many cells have made it.
        base: losses of the frozen model on the batches, where they are known already.

    Returns:
        The rows, and of the cells that diverged the step at which it was seen.

    Raises:
        DeviceError: one cell alone does not fit into memory.
    """
    import torch

    base = base_losses(subject, steps[-1]) if base is None else base
    rows: list[StabilityRow] = []
    diverged: dict[Cell, int] = {}
    most = subject.most_copies() if all(site.whole for site in sites) else 1
    waiting = [list(alike) for alike in _alike(cells)]
    while waiting:
        group = waiting.pop(0)
        fit = max(1, MOST_FACTORS // _bytes_of(sites, group[0].rank))
        stack, rest = group[: min(most, fit)], group[min(most, fit) :]
        try:
            made = _Stack(subject, sites, stack, eps).run(steps, said, base)
        except torch.OutOfMemoryError as error:
            if most == 1:
                raise DeviceError(
                    f"one run of rank {stack[0].rank} does not fit into the memory of the device; try a smaller "
                    "--batch-size or --max-length, --gradient-checkpointing, or smaller --ranks"
                ) from error
            most = max(1, len(stack) // 2)
            waiting.insert(0, group)
            continue
        rows += made[0]
        diverged |= made[1]
        if rest:
            waiting.insert(0, rest)
    return rows, diverged


def _bytes_of(sites: Sequence[Site], rank: int) -> int:
    """Return what the factors of one cell take: weights, gradients, two moments and a copy, float32."""
    return 5 * 4 * rank * sum(site.in_features + site.out_features for site in sites)


def base_losses(subject: Subject, steps: int) -> tuple[float, ...]:
    """Return the loss of the frozen model on the batch of every step."""
    import torch

    with torch.no_grad():
        return tuple(float(subject.losses(step, 1)[0]) for step in range(1, steps + 1))


def _alike(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Yield the cells that can share a stack."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.optimizer, cell.rank, cell.rate_a, cell.rate_b), []).append(cell)
    yield from groups.values()


class _Stack:
    """Cells of one rank, optimizer and rate under way together."""

    def __init__(self, subject: Subject, sites: Sequence[Site], cells: Sequence[Cell], eps: float) -> None:
        import torch

        self.subject, self.cells = subject, tuple(cells)
        self.sites = {site.name: site for site in sites}
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        self.scale: dict[str, Tensor] = {}
        for site in sites:
            parameter = next(site.layer.parameters())
            # PEFT keeps adapters in float32 on half and quantised bases
            like = {"device": parameter.device, "dtype": torch.float64 if site.wide else torch.float32}
            self.a[site.name] = torch.stack([_start(cell, site) for cell in cells]).to(**like).requires_grad_()
            shape = (len(cells), site.out_features, cells[0].rank)
            self.b[site.name] = torch.zeros(shape, **like, requires_grad=True)  # (cells, out, r)
            self.scale[site.name] = torch.tensor([cell.scale for cell in cells], **like)[:, None, None]
        groups = [
            {"params": list(self.a.values()), "lr": cells[0].rate_a},
            {"params": list(self.b.values()), "lr": cells[0].rate_b},
        ]
        self.optimizer = OPTIMIZERS[cells[0].optimizer](groups, eps)
        self.layers = {name: site.layer for name, site in self.sites.items()}

    def run(
        self, steps: Sequence[int], said: Said, base: Sequence[float]
    ) -> tuple[list[StabilityRow], dict[Cell, int]]:
        """Step until the last of `steps`, measuring after each of them."""
        rows: list[StabilityRow] = []
        diverged: dict[Cell, int] = {}
        for step in range(1, steps[-1] + 1):
            with hooked(self.layers, self._adapt):
                losses = self.subject.losses(step, len(self.cells))
                losses.sum().backward()
            loss: list[float] = losses.tolist()
            for cell, value in zip(self.cells, loss, strict=True):
                if not value <= base[step - 1] + MARGIN:
                    diverged.setdefault(cell, step)
            measured = step in steps
            norms = self._gradients() if measured else {}
            before = self._copies() if measured else {}
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if measured:
                found = self._rows(step, loss, norms, self._branches(before))
                rows += found
                for cell in self.cells:
                    mine = [row for row in found if (row.rule, row.init, row.seed) == (cell.rule, cell.init, cell.seed)]
                    if _drowned(mine):
                        diverged.setdefault(cell, step)
            said(len(self.cells))
        return rows, diverged

    def _adapt(self, name: str) -> Callable[..., Tensor]:
        """Hook of a step: add the branch of each copy to its own rows."""
        import torch

        a, b, scale = self.a[name], self.b[name], self.scale[name]
        copies = len(self.cells)

        def add(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
            given = input_of(args, kwargs)
            x = given.reshape(copies, -1, given.shape[-1]).to(a.dtype)  # (cells, rows, in)
            y = output.reshape(copies, -1, output.shape[-1])  # (cells, rows, out)
            if _cheaper_whole(x.shape[1], a, b):
                left, right = x, ((scale * b) @ a).mT  # (cells, in, out)
            else:
                left, right = x @ a.mT, (scale * b).mT  # (cells, rows, r), (cells, r, out)
            made = torch.baddbmm(y, left, right) if y.dtype == left.dtype else (y + left @ right).to(output.dtype)
            return made.view(output.shape)

        return add

    def _gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the norms of the gradients of A and B, (cells,) each."""
        import torch

        return {
            name: (_norms(_gradient(self.a[name])), _norms(_gradient(self.b[name])))
            for name in self.sites
            if torch.is_tensor(self.b[name])
        }

    def _copies(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (self.a[name].detach().clone(), self.b[name].detach().clone()) for name in self.sites}

    def _branches(self, before: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the sums of squares of the branch and of its last change, (cells,) each, on the measuring batch."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        counted = self.subject.probe_rows()

        def hook(name: str) -> Callable[..., None]:
            a, b = self.a[name].detach(), self.b[name].detach()
            a_old, b_old = before[name]
            scale = self.scale[name]

            def hear(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], __: Any) -> None:
                x = counted_rows(input_of(args, kwargs), counted).to(a.dtype)
                h = x @ a.mT  # (cells, rows, r)
                branch = scale * (h @ b.mT)  # (cells, rows, out)
                # B A - B' A' = (B - B') A + B' (A - A'): no difference of two large numbers
                change = scale * (h @ (b - b_old).mT + (x @ (a - a_old).mT) @ b_old.mT)
                sums = _norms(branch).square(), _norms(change).square()
                old = found.get(name)
                found[name] = sums if old is None else (old[0] + sums[0], old[1] + sums[1])

            return hear

        with hooked(self.layers, hook):
            self.subject.probe()
        return found

    def _rows(
        self,
        step: int,
        loss: Sequence[float],
        norms: Mapping[str, tuple[Tensor, Tensor]],
        branches: Mapping[str, tuple[Tensor, Tensor]],
    ) -> list[StabilityRow]:
        import torch

        rows = []
        for name, site in self.sites.items():
            columns = torch.stack([t.cpu() for t in (*branches[name], *norms[name])], dim=1).tolist()
            entries = site.rows * site.out_features
            for cell, value, (branch, change, grad_a, grad_b) in zip(self.cells, loss, columns, strict=True):
                rms = _root(branch, entries)
                rows.append(
                    StabilityRow(
                        rule=cell.rule,
                        optimizer=cell.optimizer,
                        init=cell.init,
                        rank=cell.rank,
                        seed=cell.seed,
                        step=step,
                        module=name,
                        branch_rms=rms,
                        relative_rms=rms / site.frozen_rms if rms is not None and site.frozen_rms else None,
                        update_rms=_root(change, entries),
                        grad_norm_A=_finite(grad_a),
                        grad_norm_B=_finite(grad_b),
                        loss=_finite(value),
                    )
                )
        return rows


def _cheaper_whole(rows: int, a: Tensor, b: Tensor) -> bool:
    """Tell whether it takes fewer products to multiply B A out, and once more in its gradient, than to keep factors.

    That is so for few tokens and a rank near the width of the layer, as in small models; an adapter of a large model
    stays factored.
    """
    r, wide, high = int(a.shape[1]), int(a.shape[2]), int(b.shape[1])
    return rows * r * (wide + high) > wide * high * (rows + r)


def _drowned(rows: Sequence[StabilityRow]) -> bool:
    """Tell whether the branches of one run are no numbers, or too loud, as a geometric mean over the modules."""
    if any(row.branch_rms is None for row in rows):
        return True
    loud = [math.log(row.relative_rms) for row in rows if row.relative_rms]
    return bool(loud) and sum(loud) / len(loud) > math.log(DROWNED)


def _start(cell: Cell, site: Site) -> Tensor:
    """Return A of one cell, (r, in)."""
    import torch

    unit = unit_draw(cell.init, cell.rank, site.in_features, seed=cell.seed, place=site.place)
    return torch.from_numpy(unit) * cell.start


def _gradient(parameter: Tensor) -> Tensor:
    """Return the gradient; zeros where the loss does not depend on the factor."""
    import torch

    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _norms(tensor: Tensor) -> Tensor:
    """Return the norm of each cell's part, (cells,), float64."""
    import torch

    rows = torch.linalg.vector_norm(tensor.detach(), dim=-1)  # rows first: one float32 sum over all loses digits
    return torch.linalg.vector_norm(rows, dim=-1).double()


def _root(square: float, entries: int) -> float | None:
    return math.sqrt(square / entries) if math.isfinite(square) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
