"""A sweep that is asked for, with no question left open.

In: arguments or flags, and a config file. Out: `Asked`, checked before anything is loaded or started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.sweeping.grid import DEFAULT_RANKS, DEFAULT_SCALING, DEFAULT_SEEDS, Grid, make_grid, seeds_of
from rankwise.sweeping.halving import check_halving
from rankwise.sweeping.settings import (
    GRID,
    MACHINES,
    Request,
    check_cells,
    default_rates,
    make_request,
    of_kind,
    read_config,
)


@dataclass(frozen=True, slots=True)
class Machines:
    """Where, how many at once, and which of them."""

    cluster: str | None = None
    jobs: int | None = None
    cpus_per_run: float = 1.0
    gpus_per_run: float | None = None
    memory_per_run: float | None = None
    device: str | None = None
    keep_adapters: bool = False
    asha: float | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A sweep with no question left open."""

    request: Request
    grid: Grid
    machines: Machines


def settle_sweep(
    model: Any, data: Any, given: Mapping[str, Any], *, seed: int = 0, config: str | PathLike[str] | None = None
) -> Asked:
    """Put arguments over a config file over the defaults, and refuse what cannot be.

    Raises:
        RankwiseError: anything is wrong with them.
    """
    settings: dict[str, Any] = {} if config is None else read_config(Path(fspath(config)))
    settings |= {name: value for name, value in given.items() if value is not None}
    asked_model, asked_data = settings.pop("model", None), settings.pop("data", None)
    model, data = asked_model if model is None else model, asked_data if data is None else data
    if model is None or data is None:
        raise UsageError("sweep needs a MODEL and DATA, as arguments or in the config file")
    grid_given = {name: settings.pop(name, None) for name in GRID}
    if isinstance(grid_given["scaling"], str):
        grid_given["scaling"] = (grid_given["scaling"],)
    machines_given: dict[str, Any] = {name: settings.pop(name) for name in MACHINES if name in settings}
    request = make_request(model, data, settings)
    seeds = DEFAULT_SEEDS if grid_given["seeds"] is None else grid_given["seeds"]
    grid = make_grid(
        DEFAULT_RANKS if grid_given["ranks"] is None else grid_given["ranks"],
        DEFAULT_SCALING if grid_given["scaling"] is None else grid_given["scaling"],
        default_rates(request.model) if grid_given["learning_rates"] is None else grid_given["learning_rates"],
        seeds_of(seeds, seed),
    )
    check_cells(request, grid)
    machines = _machines(machines_given)
    check_halving(machines.asha, rates=len(grid.learning_rates), seeds=len(grid.seeds), cluster=machines.cluster)
    return Asked(request, grid, machines)


def _machines(given: Mapping[str, Any]) -> Machines:
    """Check what a cell asks of a machine."""
    machines = Machines(**{name: of_kind(name, value) for name, value in given.items()})
    for flag, value, least in (
        ("--jobs", machines.jobs, 1),
        ("--cpus-per-run", machines.cpus_per_run, 0.01),
        ("--gpus-per-run", machines.gpus_per_run, 0),
        ("--memory-per-run", machines.memory_per_run, 0.001),
    ):
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UsageError(f"{flag} must be {least} or more, got {value}")
    if machines.device not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--device {machines.device}: in a sweep it is cpu or cuda, since Ray gives each run its own GPU. To keep "
            "to some GPUs of this machine, name them in CUDA_VISIBLE_DEVICES"
        )
    gpus = machines.gpus_per_run
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise UsageError(f"--gpus-per-run {gpus:g}: a share of one GPU, or a whole number of them")
    if gpus and machines.device == "cpu":
        raise UsageError(f"--device cpu and --gpus-per-run {gpus:g} contradict each other")
    return machines
