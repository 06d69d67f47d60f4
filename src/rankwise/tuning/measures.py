"""What can be read off the LoRA layers of a model in training, without touching the training.

In: a model with PEFT's LoRA layers. Out: figures per module as Python floats: NaN or infinite where the training is so,
None where a figure cannot be known. torch is imported by the functions that need it; peft is not needed at all, its
layers are known by their attributes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rankwise.checkpoints.peft import PREFIX
from rankwise.records import Skipped

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

BATCH_ENTRIES: Final = 1 << 24
"""Entries of factors that are turned to float64 at a time: 128 MiB."""

SHARDED_MODULES: Final = frozenset({"FullyShardedDataParallel", "FSDPModule"})
"""Classes that mark a module as sharded by FSDP 1 and 2 (FSDP 2 mixes its class into the module's own)."""


@dataclass(frozen=True, slots=True)
class Site:
    """One LoRA module of one adapter. Tensors are looked up when asked for: loaders and wrappers replace them.

    Attributes:
        name: dotted path, without prefixes.
        layer: PEFT's layer.
        adapter: the key into its dicts.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def a(self) -> Tensor:
        """A, shape (r, in_features)."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def b(self) -> Tensor:
        """B, shape (out_features, r)."""
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """s, the factor on B A; read anew each time, since it may be scheduled."""
        return float(self.layer.scaling[self.adapter])

    @property
    def base(self) -> Module:
        """The frozen layer, called within PEFT's forward pass."""
        return self.layer.base_layer


def clean_name(path: str) -> str:
    """Return a module's path without the prefixes of PEFT, DDP and torch.compile.

    >>> clean_name("module.base_model.model.model.layers.0.self_attn.q_proj")
    'model.layers.0.self_attn.q_proj'
    """
    path = path.replace("_orig_mod.", "").removeprefix("module.")
    while path.startswith(PREFIX):
        path = path[len(PREFIX) :]
    return path.replace(".base_layer", "")


def find_sites(model: Module, adapter: str) -> tuple[tuple[Site, ...], tuple[Skipped, ...], frozenset[str]]:
    """Return the LoRA modules that can be measured, those that cannot and why, and the names of all adapters."""
    sites, skipped, adapters = [], [], set()
    for path, layer in model.named_modules():
        if not (hasattr(layer, "lora_A") and hasattr(layer, "scaling") and hasattr(layer, "base_layer")):
            continue
        adapters.update(layer.scaling)
        if adapter not in layer.scaling:
            continue
        name, reason = clean_name(path), _obstacle(layer, adapter)
        if reason is None:
            sites.append(Site(name, layer, adapter))
        else:
            skipped.append(Skipped(module=name, reason=reason))
    return tuple(sites), tuple(skipped), frozenset(adapters)


def _obstacle(layer: Any, adapter: str) -> str | None:
    """Return why a LoRA layer cannot be measured, or None."""
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None:
        return f"its branch is not s B A x but that of {type(variant).__name__}"
    if hasattr(layer, "parameter_name"):
        return "it adapts a parameter, not a layer, and never computes its branch by itself"
    if adapter in getattr(layer, "lora_embedding_A", {}):
        return "it adapts an embedding, which looks A up and has no branch to listen to"
    if adapter not in layer.lora_A:
        return "it holds no factors A and B"
    a, b = (getattr(factors[adapter], "weight", None) for factors in (layer.lora_A, layer.lora_B))
    if a is None or b is None or a.ndim != 2 or b.ndim != 2:
        return "it adapts no linear layer, and its factors are no matrices"
    if a.is_meta or b.is_meta:
        return "its factors hold no data (offloaded, or on the meta device)"
    if a.shape[0] != b.shape[1] or a.device != b.device:
        return "its factors do not fit together, in shape or in device"
    return None


def why_unsupported(model: Module) -> str | None:
    """Return why no factor of this model is whole on this process, or None: ZeRO-3, FSDP, tensor parallelism."""
    for module in model.modules():
        if not SHARDED_MODULES.isdisjoint(base.__name__ for base in type(module).__mro__):
            return "FSDP shards the factors over processes, so no process can measure them"
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_status"):
            return "DeepSpeed ZeRO-3 partitions the parameters, so no process can measure them"
        if type(parameter).__name__ == "DTensor":
            return "the parameters are DTensors, sharded over processes, so no process can measure them"
        if parameter.numel() == 0:
            return "parameters are empty on this process, as ZeRO-3 and FSDP leave them, so it cannot measure them"
    return None


class _Sum:
    """The sum of squares of all outputs of one module, one float64 number per device, and how many they were."""

    __slots__ = ("entries", "totals")

    def __init__(self) -> None:
        self.totals: dict[Any, Tensor] = {}
        self.entries = 0

    def add(self, output: Tensor) -> None:
        square = _norm(output).square()
        if output.device in self.totals:
            self.totals[output.device].add_(square)
        else:
            self.totals[output.device] = square
        self.entries += output.numel()


def _norm(tensor: Tensor) -> Tensor:
    """Return the Frobenius norm, a float64 number on the tensor's device (float32 where that has no float64)."""
    import torch

    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()  # reductions of half types on the CPU take ten times as long as this copy
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    # norms of rows first: one float32 sum over a whole tensor was 0.6 % off at 59 million entries
    norm = torch.linalg.vector_norm(torch.linalg.vector_norm(tensor, dim=-1, dtype=wide))
    return norm if norm.device.type == "mps" else norm.double()


class BranchMeter:
    """Hooks that sum the squares of both branches of LoRA modules while they are armed; no activation is kept.

    Each branch is averaged over its own entries: recomputation in gradient checkpointing may stop inside a layer, after
    the frozen branch and before the other. Forward passes without gradients (evaluation, generation, a reference
    model's) do not count.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)
        self._handles: list[Any] = []
        self._sums: list[tuple[_Sum, _Sum]] = []
        self.seconds = 0.0

    def arm(self) -> None:
        """Begin to listen, from zero."""
        self.disarm()
        self.seconds = 0.0
        self._sums = [(_Sum(), _Sum()) for _ in self._sites]
        for site, (frozen, branch) in zip(self._sites, self._sums, strict=True):
            self._handles.append(site.base.register_forward_hook(self._hook(frozen)))
            self._handles.append(site.layer.lora_B[site.adapter].register_forward_hook(self._hook(branch)))

    def disarm(self) -> None:
        """Remove the hooks; what was heard stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def ratios(self) -> list[float | None]:
        """Return RMS of s B A x over RMS of W x for each site; None where a branch was not heard, or W x is 0."""
        heard = [(totals, i) for i, pair in enumerate(self._sums) for totals in pair]
        numbers = iter(to_floats([total for totals, _ in heard for total in totals.totals.values()]))
        means = [
            sum(next(numbers) for _ in totals.totals) / totals.entries if totals.entries else None
            for totals, _ in heard
        ]
        ratios: list[float | None] = []
        for site, frozen, branch in zip(self._sites, means[::2], means[1::2], strict=True):
            if frozen is None or branch is None or frozen == 0:
                ratios.append(None)
            else:
                ratio = abs(site.scaling) * (branch / frozen) ** 0.5
                ratios.append(ratio if math.isfinite(frozen) else math.nan)  # a quotient by infinity would look quiet
        return ratios

    def _hook(self, total: _Sum) -> Callable[[Any, Any, Any], None]:
        import torch

        def hear(module: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001 - torch calls it so
            started = time.perf_counter()
            if torch.is_grad_enabled() and isinstance(output, torch.Tensor) and output.numel():
                total.add(output)
            self.seconds += time.perf_counter() - started

        return hear


@dataclass(frozen=True, slots=True)
class FactorFigures:
    """Figures of one B A without the scaling: Frobenius norms, and ranks, which are None for B A = 0."""

    norm: float
    update_norm: float | None
    effective_rank: float | None
    stable_rank: float | None


def snapshot(sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]]:
    """Return copies of (A, B) of all sites, in their own dtype and on their device."""
    return [(site.a.detach().clone(), site.b.detach().clone()) for site in sites]


def factor_figures(sites: Sequence[Site], before: Sequence[tuple[Tensor, Tensor]] | None = None) -> list[FactorFigures]:
    """Return the figures of all sites, from the factors alone; B A is never formed.

    Modules of the same shape go through LAPACK and BLAS together. Cost per module O((in + out) r^2 + r^3) in float64.

    Args:
        sites: modules with A (r, in_features) and B (out_features, r).
        before: (A, B) of each site before the last optimizer step, for the update.
    """
    import torch

    pairs = [(site.a, site.b) for site in sites]
    columns: list[Tensor] = []
    order: list[int] = []
    with torch.no_grad():
        for batch in _batches(pairs):
            a, b = _stacked([pairs[i][0] for i in batch]), _stacked([pairs[i][1] for i in batch])
            if before is None:
                a_old = b_old = None
            else:
                a_old, b_old = _stacked([before[i][0] for i in batch]), _stacked([before[i][1] for i in batch])
            columns.append(_figures(a, b, a_old, b_old).cpu())
            order.extend(batch)
    rows = torch.cat(columns, dim=1).T.tolist() if columns else []
    found: dict[int, FactorFigures] = {}
    for i, (energy, update, effective, stable) in zip(order, rows, strict=True):
        known = energy > 0 and effective > 0
        found[i] = FactorFigures(
            norm=max(energy, 0.0) ** 0.5 if energy == energy else energy,
            update_norm=None if before is None else (max(update, 0.0) ** 0.5 if update == update else update),
            effective_rank=effective if known else None,
            stable_rank=stable if known else None,
        )
    return [found[i] for i in range(len(sites))]


def _batches(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[int]]:
    """Yield indices of factors (A, B) that have the same shapes and device, not too many at a time."""
    alike: dict[Any, list[int]] = {}
    for i, (a, b) in enumerate(pairs):
        alike.setdefault((a.shape, b.shape, a.device), []).append(i)
    for (a_shape, b_shape, _), members in alike.items():
        most = max(1, BATCH_ENTRIES // (a_shape.numel() + b_shape.numel()))
        for start in range(0, len(members), most):
            yield members[start : start + most]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one float64 tensor, (n, *shape); on the CPU where the device has no float64."""
    import torch

    stacked = torch.stack([tensor.detach() for tensor in tensors])
    return (stacked.cpu() if stacked.device.type == "mps" else stacked).double()


def _figures(a: Tensor, b: Tensor, a_old: Tensor | None, b_old: Tensor | None) -> Tensor:
    """Return (energy, squared update norm, effective rank, stable rank) of n pairs of factors, shape (4, n).

    The energy is tr(B'B AA'). The update is B A - B_old A_old = [dB, B_old] [A; dA], whose squared norm is the same
    trace over the 2r x 2r Gram matrices of the two blocks: nothing large is subtracted from anything large, so that an
    update of 1e-7 of the adapter keeps its digits. The squared singular values of B A are the eigenvalues of
    L' B'B L with AA' = L L'.

    Args:
        a: shape (n, r, in_features), float64.
        b: shape (n, out_features, r), float64.
        a_old: A before the step, shaped as `a`, or None where it is not known: the update is then NaN.
        b_old: likewise of B.
    """
    import torch

    if a_old is None or b_old is None:
        gram_a, gram_b = a @ a.mT, b.mT @ b  # (n, r, r)
        update = torch.full_like(gram_a[:, 0, 0], torch.nan)
    else:
        d_a, d_b = a - a_old, b - b_old  # exact: the difference of two float32 fits into float64
        gram_a = a @ a.mT
        bb, db, dd = b_old.mT @ b_old, d_b.mT @ b_old, d_b.mT @ d_b
        gram_b = bb + db + db.mT + dd  # b = b_old + d_b
        cross = db * (a @ d_a.mT)
        update = (dd * gram_a + bb * (d_a @ d_a.mT) + 2 * cross).sum(dim=(1, 2))
    energy = (gram_a * gram_b).sum(dim=(1, 2))
    effective, stable = _ranks(gram_a, gram_b, energy.isfinite())
    return torch.stack([energy, update, effective, stable])


def _ranks(gram_a: Tensor, gram_b: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Return effective and stable rank from the Gram matrices; 0 where there is none. `usable`: shape (n,)."""
    import torch

    # LAPACK refuses NaN, and one refusal would lose the whole batch
    gram_a, gram_b = (torch.where(usable[:, None, None], gram, 0.0) for gram in (gram_a, gram_b))
    r, trace = gram_a.shape[-1], gram_a.diagonal(dim1=-2, dim2=-1).sum(-1)
    # a ridge as wide as the rounding of the Gram matrix: a singular A must not stop the factorisation
    ridge = 16 * r * torch.finfo(gram_a.dtype).eps * trace + torch.finfo(gram_a.dtype).tiny
    eye = torch.eye(r, dtype=gram_a.dtype, device=gram_a.device)
    root, failed = torch.linalg.cholesky_ex(gram_a + ridge[:, None, None] * eye)
    core = torch.where((failed == 0)[:, None, None], root.mT @ gram_b @ root, 0.0)  # (n, r, r)
    energies = torch.linalg.eigvalsh(core).clamp(min=0.0)  # (n, r), sigma^2
    total = energies.sum(-1)
    shares = energies / total.clamp(min=torch.finfo(total.dtype).tiny)[:, None]
    effective = torch.exp(-torch.xlogy(shares, shares).sum(-1))
    stable = total / energies[:, -1].clamp(min=torch.finfo(total.dtype).tiny)
    there = total > 0
    return torch.where(there, effective, 0.0), torch.where(there, stable, 0.0)


def base_norms(sites: Sequence[Site]) -> list[float | None]:
    """Return ||W||_F of the frozen weights, None where W is quantised, missing or elsewhere."""
    import torch

    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    sums: list[_Sum | None] = []
    for site in sites:
        layer = site.base
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        weight: Any = getattr(layer, "weight", None)
        whole = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.dtype in plain and not weight.is_meta
        if not whole or weight.numel() != site.a.shape[1] * site.b.shape[0]:
            sums.append(None)
            continue
        total = _Sum()
        total.add(weight)
        sums.append(total)
    squares = iter(to_floats([value for total in sums if total is not None for value in total.totals.values()]))
    return [None if total is None else next(squares) ** 0.5 for total in sums]


def gradient_norms(sites: Sequence[Site]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the Frobenius norms of the gradients of (A, B), still on their device; None where there is none."""

    def norm(parameter: Tensor) -> Tensor | None:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse:
            return None
        return _norm(gradient)

    return [(norm(site.a), norm(site.b)) for site in sites]


def to_floats(tensors: Sequence[Tensor]) -> list[float]:
    """Return numbers held by tensors as floats, with one transfer per device."""
    import torch

    places: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(i)
    found: dict[int, float] = {}
    for members in places.values():
        found.update(zip(members, torch.stack([tensors[i] for i in members]).tolist(), strict=True))
    return [found[i] for i in range(len(tensors))]


def wait_for(sites: Sequence[Site]) -> None:
    """Wait until the devices of the sites are idle, so that a clock sees what comes next and not what came before."""
    import torch

    for device in {site.a.device for site in sites}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
