"""`check`: is the scaling rule stable over ranks, for this model, data, optimizer and init.

In: a model, data and what to compare. Out: a stability/1 record. What is measured is the adapter's branch s B A x after
a few steps from a common start; what is not measured is whether anything useful is learnt.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from rankwise.errors import DeviceError, MissingDependencyError, NothingToMeasureError, UsageError
from rankwise.records import Skipped, StabilityConfig, StabilityRecord, StabilityRow, Transfer, now, version
from rankwise.tuning.options import ALL_LINEAR, DEFAULT_LENGTH
from rankwise.tuning.stability.advice import advice_of, transfers_of
from rankwise.tuning.stability.first_step import FirstStep
from rankwise.tuning.stability.listening import Site, listen
from rankwise.tuning.stability.settings import ALPHA, BAND, BATCH, RANKS, RULES, SEEDS, STEPS, Cell, Grid, settle
from rankwise.tuning.stability.statistics import Measured
from rankwise.tuning.stability.stepping import base_losses, run_cells
from rankwise.tuning.stability.subject import Subject, frozen, language_model
from rankwise.tuning.stability.verdicts import cells_of, findings_of, last_verdicts

Progress = Callable[[str, int, int], None]
"""Called with (what is done, number done, number in all)."""


def check(
    model: Any,
    data: Any,
    *,
    ranks: Sequence[int] = RANKS,
    scaling: str | Sequence[str] = RULES,
    optimizer: str | Sequence[str] = "adamw",
    init: str | Sequence[str] = "default",
    learning_rate: float | None = None,
    steps: Sequence[int] = STEPS,
    seeds: int = SEEDS,
    lora_alpha: float = ALPHA,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    batch_size: int = BATCH,
    max_length: int | None = None,
    reference_rank: int | None = None,
    band: float = BAND,
    gradient_checkpointing: bool = False,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> StabilityRecord:
    """Measure how the size of LoRA's branch and of its steps goes with the rank, and judge the scaling rules by it.

    Every rule, optimizer, init, rank and seed starts from the same draw of A (a smaller rank has its first rows) and
    takes the same batches. The first step of all of them comes from one forward and backward pass of the frozen model;
    later ones are real optimizer steps.

    Args:
        model: folder, hub id, `rankwise:tiny`, or a live causal LM (which comes back as it was).
        data: file, folder, hub id, URL, `rankwise:facts`, `rankwise:style`, list of dicts or `datasets.Dataset`.
        ranks: two different ones at least.
        scaling: rules: "lora" (alpha / r), "rslora" (alpha / sqrt(r)), "unscaled" (alpha).
        optimizer: "adamw", "sgd"; without weight decay, momentum in sgd, schedule and clipping.
        init: how A begins: "default", "gaussian". B is zero.
        learning_rate: of every optimizer, rank and step; default 2e-4 for adamw (3e-3 for `rankwise:tiny`), 1e-2 for
            sgd.
        steps: after which to measure. (1,) needs no optimizer step.
        seeds: draws of A, the first from `seed`.
        lora_alpha: alpha of every run.
        target_modules: "all-linear", names as PEFT takes them, or one regular expression.
        batch_size: examples a step, and in the batch on which branches are measured.
        max_length: tokens an example is cut at; default 1024, or the model's context where that is shorter.
        reference_rank: whose learning rate is carried to the other ranks; default the smallest.
        band: exponents within +-band are called stable.
        gradient_checkpointing: compute activations twice instead of keeping them.
        tokenizer: of a live model.
        device: "cpu", "cuda" or "cuda:N".
        seed: of the draws of A and of the order of the data.
        command: argv to write into the record.
        progress: called now and then.

    Returns:
        A stability/1 record.

    Raises:
        RankwiseError: bad data, model or settings.
    """
    begun = time.perf_counter()
    say = progress or (lambda *_: None)
    grid = settle(
        model,
        ranks=ranks,
        scaling=scaling,
        optimizer=optimizer,
        init=init,
        learning_rate=learning_rate,
        steps=steps,
        seeds=seeds,
        lora_alpha=lora_alpha,
        batch_size=batch_size,
        band=band,
        reference_rank=reference_rank,
        seed=seed,
    )
    if max_length is not None and max_length < 2:
        raise UsageError(f"--max-length must be 2 or more, got {max_length}")
    say("loading model and data", 0, 1)
    rows = batch_size * (1 + grid.steps[-1])
    prepared = _prepare(model, data, target_modules, max_length, tokenizer, device, rows=rows, seed=seed)
    with frozen(prepared.loaded.model, gradient_checkpointing=gradient_checkpointing) as lent:
        subject = language_model(lent, prepared.names, prepared.columns, steps=grid.steps[-1], size=batch_size)
        found = measure(subject, grid, say)
        parameter = next(lent.parameters())
        where, dtype = str(parameter.device), str(lent.dtype).removeprefix("torch.")
        tokens = int(subject.measuring.mask.sum())
    name = _name_of(model)
    config = StabilityConfig(
        model=name,
        data=prepared.label,
        ranks=grid.ranks,
        scaling=grid.scaling,
        optimizer=grid.optimizer,
        init=grid.init,
        learning_rates=grid.rates,
        steps=grid.steps,
        seeds=grid.seeds,
        lora_alpha=grid.lora_alpha,
        target_modules=prepared.names,
        batch_size=batch_size,
        max_length=prepared.length,
        measured_tokens=tokens,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        band=grid.band,
        reference_rank=grid.reference_rank,
    )
    call = (f"rankwise.check({name!r}, {prepared.label!r}, ...)",)
    head = {"command": call if command is None else tuple(command), "device": where, "seed": seed}
    return _record(grid, found, config, head, begun)


def _name_of(model: Any) -> str:
    return fspath(model) if isinstance(model, str | PathLike) else f"{type(model).__name__} in memory"


def _record(grid: Grid, found: Found, config: StabilityConfig, head: dict[str, Any], begun: float) -> StabilityRecord:
    """Fit and judge what was measured."""
    measured = Measured(grid, found.rows, found.diverged)
    cells = cells_of(measured)
    advice = [advice_of(measured, name, start, found.transfers) for name in grid.optimizer for start in grid.init]
    return StabilityRecord(
        format=StabilityRecord.FORMAT,
        rankwise=version(),
        created=now(),
        **head,
        config=config,
        verdicts=last_verdicts(grid, cells),
        cells=cells,
        rows=found.rows,
        advice=advice[0],
        more_advice=tuple(advice[1:]),
        transfers=found.transfers,
        skipped=found.skipped,
        findings=findings_of(measured, found.diverged),
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True, slots=True)
class _Prepared:
    loaded: Any
    names: tuple[str, ...]
    columns: dict[str, list[list[int]]]
    length: int
    label: str


def _prepare(
    model: Any,
    data: Any,
    wanted: str | Sequence[str],
    max_length: int | None,
    tokenizer: Any,
    device: str | None,
    *,
    rows: int,
    seed: int,
) -> _Prepared:
    """Load the model and as many rows, in a random order, as are needed; refuse what cannot be used."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "train", "check") from error
    from rankwise.tuning.data import Examples, builtin_examples, check_examples, read_data
    from rankwise.tuning.encoding import encode
    from rankwise.tuning.finite import check_weights
    from rankwise.tuning.models import load_model
    from rankwise.tuning.targets import matching_modules
    from rankwise.tuning.world.builtin import is_builtin, read_builtin

    examples = builtin_examples(read_builtin(data)) if is_builtin(data) else read_data(data)
    order = random.Random(seed).sample(range(len(examples)), min(rows, len(examples)))
    examples = Examples(
        name=examples.name,
        form=examples.form,
        rows=tuple(examples.rows[i] for i in order),
        places=[examples.places[i] for i in order],
    )
    loaded = load_model(model, device=device, tokenizer=tokenizer)
    check_weights(loaded.model, _name_of(model))
    if max_length is not None and loaded.context is not None and max_length > loaded.context:
        raise UsageError(f"--max-length {max_length} is past the model's context of {loaded.context} tokens")
    length = max_length or min(DEFAULT_LENGTH, loaded.context or DEFAULT_LENGTH)
    check_examples(examples, loaded.tokenizer, length)
    names = matching_modules(loaded.model, wanted if isinstance(wanted, str) else list(wanted))
    return _Prepared(loaded, names, encode(examples, loaded.tokenizer, length), length, examples.name)


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured.

    Attributes:
        rows: a row a module, cell and step.
        diverged: cell -> step at which it was seen to have left.
        transfers: learning rates by rank, tried.
        skipped: modules without a branch.
    """

    rows: tuple[StabilityRow, ...]
    diverged: dict[Cell, int]
    transfers: tuple[Transfer, ...]
    skipped: tuple[Skipped, ...]


def measure(subject: Subject, grid: Grid, say: Progress) -> Found:
    """Measure every cell of a grid.

    Args:
        subject: a frozen model with its batches.
        grid: what to compare.
        say: told what is being done.

    Raises:
        NothingToMeasureError: no branch can be put on any module, or the base's own loss is no number.
        DeviceError: one run does not fit into memory.
    """
    import torch

    try:
        return _measure(subject, grid, say)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "the frozen model and one batch do not fit into the memory of the device; try a smaller --batch-size or "
            "--max-length, or --gradient-checkpointing"
        ) from error


def _measure(subject: Subject, grid: Grid, say: Progress) -> Found:
    cells = grid.cells()
    later = [step for step in grid.steps if step > 1]
    proofs = 2 * len(list(grid.kinds())) * later[-1] if later else 0
    total = 1 + (len(cells) * later[-1] if later else 0) + proofs
    done = 0

    def said(n: int) -> None:
        nonlocal done
        done += n
        say("steps of all runs", min(done, total), total)

    say("the first step", 0, total)
    sites, skipped = listen(subject)
    if not sites:
        first = f", first {skipped[0].module}: {skipped[0].reason}" if skipped else ""
        raise NothingToMeasureError(f"no module can be given a branch to measure{first}")
    _refuse_ranks(grid, sites)
    first_rows = FirstStep(subject, sites, cells, eps=grid.eps).run()
    if not first_rows or first_rows[0].loss is None:
        why = "its loss is no number" if first_rows else "no gradient reaches the modules"
        raise NothingToMeasureError(
            f"the first step of the frozen model cannot be taken: {why}. Look at the data, or load the model in "
            "float32."
        )
    said(1)
    rows = list(first_rows) if 1 in grid.steps else []
    diverged: dict[Cell, int] = {}
    base = base_losses(subject, later[-1]) if later else ()
    if later:
        stepped, diverged = run_cells(subject, sites, cells, steps=later, eps=grid.eps, said=said, base=base)
        rows += stepped

    def tried(chosen: Sequence[Cell], step: int) -> dict[Cell, float | None]:
        made, lost = run_cells(subject, sites, chosen, steps=[step], eps=grid.eps, said=said, base=base)
        return {cell: None if cell in lost else _size(cell, made, sites) for cell in chosen}

    transfers = transfers_of(Measured(grid, rows, diverged), tried)
    say("done", total, total)
    return Found(tuple(rows), diverged, transfers, skipped)


def _refuse_ranks(grid: Grid, sites: Sequence[Site]) -> None:
    """Refuse a rank that no weight has room for, before memory is asked for it."""
    widest = max(max(site.in_features, site.out_features) for site in sites)
    if grid.ranks[-1] > widest:
        raise UsageError(
            f"--ranks: {grid.ranks[-1]} is above the larger side of every module, {widest} at most; a rank past the "
            "smaller side of a weight reaches no further update"
        )


def _size(cell: Cell, rows: Sequence[StabilityRow], sites: Sequence[Site]) -> float | None:
    """Return the geometric mean of a run's branches over the modules that are heard."""
    mine = [r.branch_rms for r in rows if (r.rule, r.rank, r.seed) == (cell.rule, cell.rank, cell.seed)]
    heard = [math.log(value) for value in mine if value]
    return math.exp(sum(heard) / len(heard)) if heard and len(mine) == len(sites) else None
