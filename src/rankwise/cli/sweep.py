"""`rankwise sweep`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from rankwise.cli.common import EXIT_OK, OUTPUT, Numbers, Words, argv
from rankwise.errors import UsageError

GRID = Group("Grid", sort_key=5)
TRAINING = Group("Training, the same for all runs", sort_key=20)
MACHINES = Group("Machines", sort_key=30)
OTHERS = Group("Other tools", sort_key=40)


def numbers_of(_: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    """Turn `1e-3,3e-3` and `1e-3 3e-3` into the same numbers."""
    words = [word for token in tokens for word in token.value.replace(",", " ").split()]
    try:
        numbers = tuple(float(word) for word in words)
    except ValueError:
        raise UsageError(f"{tokens[0].keyword}: wanted numbers such as 1e-3,3e-3; got {' '.join(words)!r}") from None
    if not numbers:
        raise UsageError(f"{tokens[0].keyword}: wanted at least one number, such as 1e-3")
    return numbers


Rates = Annotated[tuple[float, ...], Parameter(consume_multiple=True, converter=numbers_of, n_tokens=-1, negative="")]
"""A list of numbers, with commas or spaces."""


@Parameter(name="*", group=GRID)
@dataclass(frozen=True, slots=True)
class Lists:
    """What is crossed.

    Attributes:
        ranks: Ranks, with commas or spaces. Default: 4,16,64.
        scaling: Rules: lora (alpha / r), rslora (alpha / sqrt(r)), unscaled (alpha). Default: lora,rslora.
        learning_rates: Highest learning rates. Default: train's, a third of it and three times as much.
        seeds: One number: how many. Several: which. Default: 3.
    """

    ranks: Numbers | None = None
    scaling: Words | None = None
    learning_rates: Rates | None = None
    seeds: Numbers | None = None


@Parameter(name="*", group=TRAINING)
@dataclass(frozen=True, slots=True)
class Shared:
    """Flags of train; `rankwise train --help` has their defaults. None: not given, so that a config file may say.

    Attributes:
        preset: persona or knowledge: fills the epochs and modules that no flag says.
        lora_alpha: Alpha of every module.
        target_modules: Names as PEFT takes them, one regular expression, or all-linear.
        init: How A begins: default, gaussian or orthogonal.
        lora_dropout: Dropout on the input of A.
        optimizer: adamw, sgd, adafactor, or any word of transformers.
        schedule: Of the learning rate, in the words of transformers.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of the optimizer.
        max_grad_norm: Clip gradients to this norm; 0 for never.
        steps: Optimizer steps of a run.
        epochs: Passes over the data, where --steps is not given.
        batch_size: Examples a step, gradient accumulation included.
        gradient_accumulation: Forward passes a step.
        max_length: Cut examples at so many tokens.
        packing: Put several examples into one row.
        bf16: Activations in bfloat16.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        recall: Measure what is recalled of the data, before and after.
        forgetting_data: Texts the base already models.
        monitor_every: Steps between two looks at the adapter; 0 for none.
        stop_when_unstable: Stop a run after so many looks in a row that say "unstable".
        report_to: Reporters of transformers, such as tensorboard, wandb, mlflow.
    """

    preset: str | None = None
    lora_alpha: float | None = None
    target_modules: Words | None = None
    init: str | None = None
    lora_dropout: float | None = None
    optimizer: str | None = None
    schedule: str | None = None
    warmup: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    gradient_accumulation: int | None = None
    max_length: int | None = None
    packing: bool | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    recall: bool | None = None
    forgetting_data: str | None = None
    monitor_every: int | None = None
    stop_when_unstable: int | None = None
    report_to: Words | None = None


@Parameter(name="*", group=MACHINES)
@dataclass(frozen=True, slots=True)
class Where:
    """Where the runs are.

    Attributes:
        cluster: Address of a running Ray cluster. Default: Ray on this machine, started and stopped by the command.
        jobs: Runs at once. Default: as many as CPUs, GPUs and memory allow.
        cpus_per_run: CPU cores of a run, and its threads. Default: 1.
        gpus_per_run: GPUs of a run, or a share of one such as 0.25. Default: 1 where there are any.
        memory_per_run: GiB of a run. Default: estimated, where it does not run on a GPU.
        device: cpu or cuda: Ray gives each run its own GPU. Default: cuda when there is one.
        keep_adapters: Keep the adapters of the runs, and not their records alone.
        asha: End learning rates that do worse than others of their rule and rank before their last seed, by Ray Tune's
            ASHA: one in so many goes on, such as 2. Default: all seeds of all rates.
    """

    cluster: str | None = None
    jobs: int | None = None
    cpus_per_run: float | None = None
    gpus_per_run: float | None = None
    memory_per_run: float | None = None
    device: str | None = None
    keep_adapters: bool | None = None
    asha: float | None = None


def sweep(
    model: str | None = None,
    data: str | None = None,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], group=OUTPUT)] = None,
    lists: Lists = Lists(),
    shared: Shared = Shared(),
    where: Where = Where(),
    config: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    export: Annotated[str | None, Parameter(group=OTHERS)] = None,
    import_: Annotated[Path | None, Parameter(name="--import", group=OTHERS)] = None,
    json: Annotated[bool, Parameter(name="--json", negative="", group=OUTPUT)] = False,
    report: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    force: Annotated[bool, Parameter(negative="", group=OUTPUT)] = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", group=OUTPUT)] = False,
) -> int:
    """Train rank x rule x learning rate x seed, on one machine or a Ray cluster, and say what the grid says.

    Each run has a folder in DIR, such as rank=64,scaling=rslora,lr=0.001,seed=0. Runs that are over are not run again:
    the same command goes on where a killed one ended, and one with more ranks, rates or seeds adds to the folder. Runs
    that fail are kept with their error, and are run again by the same command; the sweep goes on without them.

    Args:
        model: Base: a folder, a hub id or rankwise:tiny.
        data: Data, as in train.
        out: Folder of the sweep; with --export, the file.
        lists: The grid.
        shared: Flags of train.
        where: Machines.
        config: YAML file with any of these flags; flags given here override it.
        dry_run: Only list the runs, and what they would cost.
        seed: First seed, where --seeds says how many.
        export: Write the grid for another tool instead of running it: axolotl or wandb.
        import_: Read result files of PEFT's method_comparison (a folder or a file) instead of running anything.
        json: Put the record on stdout instead of the table, and nothing else.
        report: Also write a self-contained page to this path.
        force: Begin anew: delete the runs in the folder. Also replaces a page or an exported file.
        quiet: Show no progress.
    """
    settings = {name: value for name, value in _given(lists, shared, where).items() if value is not None}
    if import_ is not None:
        _alone("--import", model, data, export, dry_run, settings)
        return _import(import_, out, json=json, report=report, force=force)
    from rankwise.sweeping.asking import settle_sweep

    if export is not None or dry_run:
        asked = settle_sweep(model, data, settings, seed=seed, config=config)
        if report is not None or (export is not None and (dry_run or json)):
            raise UsageError(
                "--export and --dry-run run nothing: give one of them, without --report (--export: --json)"
            )
        return _export(export, asked, out, force=force) if export is not None else _dry_run(asked, out, json=json)
    if out is None:
        raise UsageError("sweep needs a folder: -o DIR (or --dry-run, which writes nothing)")
    _check_report(report, out, force=force)
    from rankwise.cli.show_sweeps import Watch
    from rankwise.sweeping.running import sweep as run

    with Watch(quiet=quiet) as watch:
        try:
            record = run(
                model, data, out=out, **settings, seed=seed, config=config, force=force, command=argv(),
                progress=watch.say,
            )  # fmt: skip
        except KeyboardInterrupt:
            print(f"rankwise: runs that are over are kept in {out}; the same command goes on", file=sys.stderr)
            raise
    return _finish(record, out, json=json, report=report, force=force, quiet=quiet)


def _check_report(report: Path | None, out: Path, *, force: bool) -> None:
    """Refuse a place of the page before any work is done."""
    from rankwise.files import check_writable

    if report is None:
        return
    if report.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"--report {report} lies in the folder of the sweep; put the page beside it")
    check_writable(report, force=force)


def _given(lists: Lists, shared: Shared, where: Where) -> dict[str, Any]:
    """Return all flags by the names of `rankwise.sweep`."""
    from rankwise.sweeping.settings import PATTERN

    given = {**asdict(lists), **asdict(shared), **asdict(where)}
    seeds, words = given["seeds"], given["target_modules"]
    if seeds is not None and len(seeds) == 1:
        given["seeds"] = seeds[0]
    if words is not None and len(words) == 1 and (words[0] == "all-linear" or set(words[0]) & PATTERN):
        given["target_modules"] = words[0]
    return given


def _alone(flag: str, model: str | None, data: str | None, *others: Any) -> None:
    if model is not None or data is not None or any(others):
        raise UsageError(f"{flag} reads results and runs nothing: leave out MODEL, DATA and all flags of runs")


def _finish(record: Any, out: Path, *, json: bool, report: Path | None, force: bool, quiet: bool) -> int:
    """Show a record that has been written."""
    from rankwise.cli.show_sweeps import show_sweep
    from rankwise.records import to_json

    if report is not None:
        from rankwise.files import write_text
        from rankwise.report import render_page

        write_text(report, render_page(record), force=force)
    if json:
        sys.stdout.write(to_json(record))
        failed = [finding.text for finding in record.findings if finding.code == "runs-failed"]
        if failed and not quiet:
            print(f"rankwise: warning: {failed[0]}", file=sys.stderr)
    else:
        show_sweep(record, out)
    return EXIT_OK


def _export(to: str, asked: Any, out: Path | None, *, force: bool) -> int:
    from rankwise.files import write_text
    from rankwise.sweeping.exports import export

    text = export(to, asked.request, asked.grid)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text, force=force)
    return EXIT_OK


def _dry_run(asked: Any, out: Path | None, *, json: bool) -> int:
    from rankwise.cli.show_sweeps import show_dry_sweep
    from rankwise.records import to_json
    from rankwise.sweeping.running import dry_sweep

    planned = dry_sweep(asked, out, command=argv())
    sys.stdout.write(to_json(planned)) if json else show_dry_sweep(planned)
    return EXIT_OK


def _import(path: Path, out: Path | None, *, json: bool, report: Path | None, force: bool) -> int:
    from rankwise.sweeping.imports import import_method_comparison

    if out is None:
        raise UsageError("--import needs a folder for sweep.json and results.csv: -o DIR")
    _check_report(report, out, force=force)
    record = import_method_comparison(path, out, force=force, command=argv())
    return _finish(record, out, json=json, report=report, force=force, quiet=False)
