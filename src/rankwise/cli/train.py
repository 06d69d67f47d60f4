"""`rankwise train`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from rankwise.cli.common import EXIT_OK, OUTPUT, Whole, Words, argv

LORA = Group("LoRA", sort_key=10)
LOOP = Group("Training", sort_key=20)
WATCH = Group("Measuring and watching", sort_key=30)


@Parameter(name="*", group=LORA)
@dataclass(frozen=True, slots=True)
class Lora:
    """What the adapter is.

    Attributes:
        preset: persona (alpha / r, rank 8) or knowledge (alpha / sqrt(r), rank 64): fills what no flag says.
        rank: Rank r of every module.
        lora_alpha: Alpha of every module. Default: 16.
        scaling: Rule: lora (alpha / r), rslora (alpha / sqrt(r)) or unscaled (alpha).
        plan: Take rank and alpha per module from this plan/1 record.
        target_modules: Names as PEFT takes them, one regular expression, or all-linear.
        init: How A begins: default, gaussian or orthogonal.
        lora_dropout: Dropout on the input of A.
    """

    preset: str | None = None
    rank: Whole | None = None
    lora_alpha: float | None = None
    scaling: str | None = None
    plan: Path | None = None
    target_modules: Words | None = None
    init: str = "default"
    lora_dropout: float = 0.0


@Parameter(name="*", group=LOOP)
@dataclass(frozen=True, slots=True)
class Loop:
    """How it is trained.

    Attributes:
        optimizer: adamw, sgd, adafactor, or any word of transformers.
        learning_rate: Highest learning rate. Default: the plan's, else 2e-4 (3e-3 for rankwise:tiny).
        schedule: Of the learning rate, in the words of transformers.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Of the optimizer.
        max_grad_norm: Clip gradients to this norm; 0 for never.
        steps: Optimizer steps.
        epochs: Passes over the data, where --steps is not given. Default: the preset's.
        batch_size: Examples a step, gradient accumulation included.
        gradient_accumulation: Forward passes a step.
        max_length: Cut examples at so many tokens. Default: 1024, or the model's context where that is shorter.
        packing: Put several examples into one row.
        bf16: Activations in bfloat16. Default: where a GPU can.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        device: cpu, cuda or cuda:N. Default: cuda when there is one.
        seed: Of A, of the order of the data, and of sampling.
    """

    optimizer: str = "adamw"
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    gradient_accumulation: int = 1
    max_length: int | None = None
    packing: Annotated[bool, Parameter(negative="")] = False
    bf16: bool | None = None
    gradient_checkpointing: Annotated[bool, Parameter(negative="")] = False
    device: str | None = None
    seed: int = 0


@Parameter(name="*", group=WATCH)
@dataclass(frozen=True, slots=True)
class Watch:
    """What is measured, and who is told.

    Attributes:
        recall: Measure what is recalled of the data, before and after.
        forgetting_data: Texts the base already models. Default: built-in text for rankwise:tiny, else sampled.
        monitor_every: Steps between two looks at the adapter; 0 for none. Default: 50.
        stop_when_unstable: Stop after so many looks in a row that say "unstable".
        report_to: Reporters of transformers, such as tensorboard, wandb, mlflow.
        save_every: Steps between checkpoints to resume from; 0 for none. Default: five a run.
    """

    recall: bool = True
    forgetting_data: str | None = None
    monitor_every: int | None = None
    stop_when_unstable: int | None = None
    report_to: Words = ()
    save_every: int | None = None


def train(
    model: str,
    data: str,
    /,
    *,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"], group=OUTPUT)] = None,
    lora: Lora = Lora(),
    loop: Loop = Loop(),
    watch: Watch = Watch(),
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(name="--json", negative="", group=OUTPUT)] = False,
    report: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    force: Annotated[bool, Parameter(negative="", group=OUTPUT)] = False,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative="", group=OUTPUT)] = False,
) -> int:
    """Fine-tune with LoRA at high rank, watched for collapse; recall and forgetting are measured.

    The folder RUN is an ordinary PEFT adapter, with run.json beside it.

    Args:
        model: Base: a folder, a hub id or rankwise:tiny.
        data: Data: a .jsonl, .json, .parquet or .txt file, a folder, a hub id, rankwise:facts or rankwise:style.
        out: Folder of the run.
        lora: What the adapter is.
        loop: How it is trained.
        watch: What is measured.
        dry_run: Only say what would be done: parameters, memory, steps, scales, traps.
        resume: Go on from the last checkpoint in the folder.
        json: Put the record on stdout instead of the table, and nothing else.
        report: Also write a self-contained page to this path.
        force: Replace a run, or a page, that is there.
        quiet: Show no progress.
    """
    from dataclasses import asdict

    from rankwise.cli.show import Bar
    from rankwise.cli.show_runs import show_dry_run, show_run, show_start
    from rankwise.errors import UsageError
    from rankwise.files import check_writable, write_text
    from rankwise.records import to_json

    settings = {**asdict(lora), **asdict(loop)}
    if settings["target_modules"] is not None:
        words = settings["target_modules"]
        settings["target_modules"] = words[0] if len(words) == 1 and _one(words[0]) else words
    if dry_run:
        if report is not None or resume:
            raise UsageError("--dry-run writes nothing and starts nothing: leave out --report and --resume")
        from rankwise.tuning.memory import dry_run as plan_run
        from rankwise.tuning.training import check_extras

        check_extras(watch.save_every, watch.monitor_every, watch.stop_when_unstable)

        planned = plan_run(model, data, **settings, command=argv())
        sys.stdout.write(to_json(planned)) if json else show_dry_run(planned)
        return EXIT_OK
    if out is None:
        raise UsageError("train needs a folder for the run: -o RUN (or --dry-run, which writes nothing)")
    if report is not None:
        if report.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"--report {report} lies in the folder of the run; put the page beside it")
        check_writable(report, force=force)
    from rankwise.tuning.training import train as run

    with Bar(quiet=quiet) as bar:
        record = run(
            model,
            data,
            out=out,
            **settings,
            **asdict(watch),
            resume=resume,
            force=force,
            command=argv(),
            progress=bar.say,
            announce=None if quiet else lambda config, findings: show_start(config, findings, bar),
        )
    if report is not None:
        from rankwise.report import render_page

        write_text(report, render_page(record), force=force)
    sys.stdout.write(to_json(record)) if json else show_run(record, out)
    return EXIT_OK


def _one(word: str) -> bool:
    """Return whether a single word is all-linear or a regular expression, and not the name of one module."""
    return word == "all-linear" or any(c in word for c in "\\^$*+?()[]|")
