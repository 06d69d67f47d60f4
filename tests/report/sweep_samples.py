"""Sweeps with made-up figures of the size that real ones have: planted best rates, an effect of the rank, lost runs."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from page_samples import FIXED

from rankwise.records import SweepDryRunRecord, SweepRecord, SweepRun
from rankwise.sweeping.grid import Cell, make_grid
from rankwise.sweeping.recording import make_record

RANKS = (4, 16, 64)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PARAMS_A_RANK = 10_240
BITS_POSSIBLE = 1866.0


def row(cell: Cell) -> SweepRun:
    """Return a run whose bits are a parabola in log(rate); the best rate falls with the rank under alpha / sqrt(r)."""
    best = 3e-3 if cell.scaling == "lora" else 6e-3 / math.sqrt(cell.rank / 4)
    away = math.log10(cell.learning_rate / best)
    share = max(0.0, 0.3 + 0.15 * math.log(cell.rank, 4) - 0.35 * away**2 + 0.01 * (cell.seed - 1))
    diverged = cell.learning_rate > 8 * best
    failed = cell == Cell(2, 16, "lora", 3e-4)
    known = not (diverged or failed)
    params = PARAMS_A_RANK * cell.rank
    return SweepRun(
        path=f"{cell.name}/run.json",
        rank=cell.rank,
        scaling=cell.scaling,
        lora_alpha=16.0,
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        status="diverged" if diverged else "failed" if failed else "done",
        params=params,
        steps=0 if failed else 70 if diverged else 160,
        tokens=None if failed else 59_733,
        loss=None if failed else 2.6 - 2 * share,
        bits=share * BITS_POSSIBLE if known else None,
        bits_possible=BITS_POSSIBLE if known else None,
        bits_per_param=share * BITS_POSSIBLE / params if known else None,
        exact_share=0.9 * share if known else None,
        paraphrased_exact_share=0.6 * share if known else None,
        forgetting=0.02 + 0.4 * share * (1 + away) ** 2 if known else None,
        seconds=None if failed else 24.5,
        peak_memory_bytes=None if failed else 812_000_000,
        tokens_per_second=None if failed else 2438.0,
        error="RuntimeError: planted" if failed else "the loss was no number" if diverged else None,
    )


def sweep(**changes: Any) -> SweepRecord:
    """Return a sweep over two rules, three ranks, six rates and three seeds."""
    grid = make_grid(RANKS, ("lora", "rslora"), RATES, (0, 1, 2))
    cells = sorted(grid.cells, key=lambda c: (c.scaling, c.rank, c.learning_rate, c.seed))
    record = make_record(
        tuple(map(row, cells)),
        model="rankwise:tiny",
        data="rankwise:facts?n=40",
        settings={"steps": 160, "lora_alpha": None},
        digest="0123456789abcdef",
        command=("rankwise", "sweep"),
        device="cpu",
        seconds=2646.0,
    )
    return msgspec.structs.replace(record, **(FIXED | changes))


def dry_sweep(**changes: Any) -> SweepDryRunRecord:
    """Return what that sweep would be."""
    grid = make_grid(RANKS, ("lora", "rslora"), RATES, (0, 1, 2))
    record = SweepDryRunRecord(
        format=SweepDryRunRecord.FORMAT,
        rankwise="0",
        created="",
        command=("rankwise", "sweep"),
        device="cpu",
        seed=0,
        model="rankwise:tiny",
        data="rankwise:facts?n=40",
        cells=tuple(cell.name for cell in grid.cells),
        there=(grid.cells[0].name,),
        settings={"steps": 160},
        params_by_rank={str(rank): PARAMS_A_RANK * rank for rank in RANKS},
        base_params=1_286_784,
        steps=160,
        tokens=59_733,
        memory_bytes=34_000_000,
        flops=3.6e13,
        seconds=2621.5,
    )
    return msgspec.structs.replace(record, **(FIXED | changes))
