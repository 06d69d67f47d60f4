"""Watch the LoRA modules of a model in training: a few figures every few steps, and words where they look wrong.

In: a model with PEFT's LoRA layers, and one call after each optimizer step, from any loop. Out: observations. The
training is not changed by a bit; between observations a call costs one comparison of integers.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any, Final

from rankwise.errors import NothingToMeasureError
from rankwise.tuning.groups import group_modules
from rankwise.tuning.health import (
    EVERYTHING,
    NO_LOSS,
    GroupHealth,
    ModuleHealth,
    MonitorConfig,
    Observation,
    group_health,
    module_health,
    worst,
)
from rankwise.tuning.measures import (
    BranchMeter,
    base_norms,
    factor_figures,
    find_sites,
    gradient_norms,
    snapshot,
    to_floats,
    wait_for,
    why_unsupported,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["GroupHealth", "ModuleHealth", "MonitorConfig", "Observation", "RankMonitor"]

logger: Final = logging.getLogger(__name__)

_UNWATCHED: Final = 1 << 62  # a step that never comes


class RankMonitor:
    """Watches the LoRA modules of one adapter of a model, whatever trains it.

    Call `observe` once before training and once after each optimizer step. The step before one that is due arms the
    monitor: it copies the factors (the adapter is in memory twice for one step) and puts hooks on the layers, which
    the observation removes again. The figures are those of this process: with data parallelism its own batch.

    Where gradients are gone when `observe` is called, call `capture_gradients` before the optimizer steps. Layers
    inside a compiled graph (torch.compile) call no hooks: their branch ratios are None, and all else is measured.

    >>> monitor = RankMonitor(model)  # doctest: +SKIP
    >>> monitor.observe(0)  # doctest: +SKIP
    >>> for step, batch in enumerate(batches, start=1):  # doctest: +SKIP
    ...     loss = model(**batch).loss
    ...     loss.backward()
    ...     optimizer.step()
    ...     seen = monitor.observe(step, loss)
    ...     optimizer.zero_grad()
    """

    def __init__(self, model: Module, config: MonitorConfig | None = None) -> None:
        """Find the modules to watch; nothing is hooked or copied yet.

        Args:
            model: with LoRA layers; wrapped by PEFT or not, by DDP or not.
            config: intervals and bounds.

        Raises:
            NothingToMeasureError: the model has no LoRA layer of that adapter.
        """
        self.config = config or MonitorConfig()
        self._model = model
        self._sites, self.skipped, adapters = find_sites(model, self.config.adapter)
        if not self._sites and not self.skipped:
            known = f"its adapters are: {', '.join(sorted(adapters))}" if adapters else "it has no LoRA layer at all"
            raise NothingToMeasureError(
                f"the model has no LoRA layer of an adapter {self.config.adapter!r}; {known}. "
                "Put the adapter on before the monitor, or name it with MonitorConfig(adapter=...)."
            )
        self._groups = group_modules(site.name for site in self._sites)
        self._group_of = {name: group for group, names in self._groups.items() for name in names}
        self._meter = BranchMeter(self._sites)
        self._base_norms: list[float | None] | None = None
        self._due: int | None = None  # None until the first call
        self._watch_from = 0  # steps before it are none of our business
        self._armed_for: int | None = None
        self._before: list[tuple[Tensor, Tensor]] | None = None
        self._gradients: list[tuple[Tensor | None, Tensor | None]] | None = None
        self._loss_sum: Any = 0.0  # a tensor where the losses are
        self._loss_count = 0
        self._losses = NO_LOSS
        self._seconds = 0.0
        self._unsupported: str | None = None

    def observe(self, step: int, loss: float | Tensor | None = None) -> Observation | None:
        """Take note of an optimizer step; measure if one is due.

        The first call, before training, only arms the monitor; its step is 0, or that of the checkpoint from which
        the training goes on.

        Args:
            step: optimizer steps done, counted over the whole training.
            loss: of this step. A tensor is not read before an observation, so that no step waits for the device.

        Returns:
            An observation at the steps that are due (`MonitorConfig.interval`), else None.
        """
        if loss is not None:
            detach = getattr(loss, "detach", None)
            self._loss_sum = self._loss_sum + (loss if detach is None else detach().float())
            self._loss_count += 1
        if step < self._watch_from:
            return None
        seen = None
        if self._due is None:
            self._begin()
        elif step >= self._due:
            seen = self._look(step)
        self._due = self.config.next_due(step)
        self._watch_from = self._due - 1
        if step >= self._watch_from:
            self._arm()
        return seen

    def capture_gradients(self) -> None:
        """Note the norms of the gradients as they are now; call it where `observe` would find them zeroed.

        Does nothing but one comparison unless the step is due.
        """
        if self._armed_for is None:
            return
        started = time.perf_counter()
        self._gradients = gradient_norms(self._sites)
        self._seconds += time.perf_counter() - started

    def close(self) -> None:
        """Remove the hooks and free the copies; later calls of `observe` do nothing."""
        self._disarm()
        self._watch_from = _UNWATCHED

    def _begin(self) -> None:
        """Look at the model once more: wrappers may have been put on since the monitor was made."""
        self._unsupported = why_unsupported(self._model)
        if self._unsupported is None and not self._sites:
            reasons = sorted({item.reason for item in self.skipped})
            self._unsupported = f"none of {len(self.skipped)} modules can be measured: {'; '.join(reasons)}"
        if self._unsupported is not None:
            logger.warning("rankwise does not watch this training: %s", self._unsupported)
        elif self.skipped:
            first = self.skipped[0]
            logger.info("%d modules are not watched; %s: %s", len(self.skipped), first.module, first.reason)

    def _arm(self) -> None:
        """Copy the factors and put the hooks on for the step that is due next."""
        if self._unsupported is not None or self._armed_for is not None:
            return
        import torch

        started = time.perf_counter()
        try:
            self._before = snapshot(self._sites)
        except torch.OutOfMemoryError:  # a figure less is better than a training less
            logger.warning("there is no memory for a copy of the adapter: the size of this update is not measured")
        self._meter.arm()
        self._armed_for = self._due
        self._seconds = time.perf_counter() - started

    def _disarm(self) -> None:
        self._meter.disarm()
        self._before = self._gradients = self._armed_for = None

    def _look(self, step: int) -> Observation:
        """Measure, average and judge."""
        loss = self._take_loss()
        if self._unsupported is not None:
            return Observation(step=step, loss=_finite(loss), status=None, reason=self._unsupported, supported=False)
        wait_for(self._sites)
        started = time.perf_counter()
        modules = self._measure(step)
        self._disarm()
        rows = {module.module: module for module in modules}
        groups = [
            group_health(step, group, [rows[name] for name in names], self.config)
            for group, names in self._groups.items()
        ]
        groups.append(group_health(step, EVERYTHING, modules, self.config, loss=None if loss is None else self._losses))
        status, reason = worst(groups)
        return Observation(
            step=step,
            loss=_finite(loss),
            status=status,
            reason=reason,
            groups=tuple(groups),
            modules=tuple(modules),
            skipped=self.skipped,
            seconds=self._seconds + self._meter.seconds + time.perf_counter() - started,
        )

    def _take_loss(self) -> float | None:
        """Return the mean of the losses since the last observation and begin the next mean."""
        if not self._loss_count:
            return None
        mean = float(self._loss_sum) / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        self._losses = self._losses.then(mean)
        return mean

    def _measure(self, step: int) -> list[ModuleHealth]:
        # what was copied and heard is of this one step only if the call before this one was of the step before
        exact = self._armed_for == step
        branches = self._meter.ratios() if exact else [None] * len(self._sites)
        factors = factor_figures(self._sites, self._before if exact else None)
        gradients = self._gradient_floats()
        if self._base_norms is None:
            self._base_norms = base_norms(self._sites)
        modules = []
        for site, branch, factor, base, (grad_a, grad_b) in zip(
            self._sites, branches, factors, self._base_norms, gradients, strict=True
        ):
            scaling = abs(site.scaling)
            norm = scaling * factor.norm
            update = None if factor.update_norm is None else scaling * factor.update_norm
            figures = {
                "branch_ratio": branch,
                "update_norm": update,
                "update_ratio": update / norm if update is not None and norm > 0 else None,
                "norm": norm,
                "relative_norm": norm / base if base else None,
                "effective_rank": factor.effective_rank,
                "stable_rank": factor.stable_rank,
                "grad_norm_A": grad_a,
                "grad_norm_B": grad_b,
            }
            row = module_health(
                site.name, self._group_of[site.name], r=site.a.shape[0], scaling=site.scaling, figures=figures
            )
            modules.append(row)
        return modules

    def _gradient_floats(self) -> list[tuple[float | None, float | None]]:
        """Return the norms that were captured, or those of the gradients that are there now."""
        pairs = self._gradients or gradient_norms(self._sites)
        values = iter(to_floats([norm for pair in pairs for norm in pair if norm is not None]))
        return [(None if a is None else next(values), None if b is None else next(values)) for a, b in pairs]


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
