"""TRL's trainer, told in its words what our config says in ours.

In: a job, its adapted model, a folder. Out: a trainer with our callbacks on it, and the monitor's among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankwise.errors import UsageError
from rankwise.tuning import runs
from rankwise.tuning.borrowing import quiet
from rankwise.tuning.preparing import Job

POINTS: Final = 50
"""Points of the loss curve."""

CHECKPOINTS: Final = 5
"""Checkpoints of a run, where --save-every does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What is asked of the trainer and is not in the config: how a run is watched and kept.

    Attributes:
        report_to: reporters of transformers.
        save_every: steps between checkpoints; 0 for none, None for `CHECKPOINTS` a run.
        monitor_every: steps between two looks of the monitor; 0 for none, None for its default.
        stop_when_unstable: stop after so many looks in a row that say "unstable".
    """

    report_to: tuple[str, ...]
    save_every: int | None
    monitor_every: int | None
    stop_when_unstable: int | None


def build_trainer(model: Any, job: Job, out: Path, *, extras: Extras, watching: Any, seed: int) -> tuple[Any, Any]:
    """Build TRL's trainer around an adapted model.

    Args:
        model: PEFT's.
        job: what is trained.
        out: folder of the run.
        extras: how it is watched and kept.
        watching: callback that is told of every step.
        seed: of the order of the data.

    Returns:
        The trainer, and the callback of the monitor or None.

    Raises:
        UsageError: transformers refuses the settings, or has no such reporter.
    """
    import datasets
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTTrainer

    args = _arguments(model, job, out, extras, seed)
    _check_reporters(extras.report_to)
    monitor = None if extras.monitor_every == 0 else _monitor(out, extras)
    with quiet():
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=datasets.Dataset.from_dict(job.columns),
            processing_class=job.loaded.tokenizer,
            callbacks=[watching] if monitor is None else [watching, monitor],
        )
    setattr(trainer, "create_model_card", lambda *_, **__: None)  # noqa: B010 - no README beside every checkpoint
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if monitor is not None:
        monitor.attach(trainer)
    return trainer, monitor


def _arguments(model: Any, job: Job, out: Path, extras: Extras, seed: int) -> Any:
    """Return TRL's arguments; refuse what transformers cannot do here."""
    from transformers import Trainer
    from trl import SFTConfig

    c = job.config
    on_cpu = next(model.parameters()).device.type == "cpu"
    every = max(1, c.steps // CHECKPOINTS) if extras.save_every is None else extras.save_every
    try:
        with quiet():
            args = SFTConfig(
                output_dir=str(out),
                max_steps=c.steps,
                per_device_train_batch_size=c.batch_size // c.gradient_accumulation,
                gradient_accumulation_steps=c.gradient_accumulation,
                learning_rate=c.learning_rate,
                lr_scheduler_type=c.schedule,
                warmup_steps=c.warmup_steps,
                weight_decay=c.weight_decay,
                max_grad_norm=c.max_grad_norm,
                optim=c.optimizer,
                logging_steps=max(1, c.steps // POINTS),
                logging_first_step=True,
                logging_nan_inf_filter=False,  # a loss that is no number must not be averaged away
                save_strategy="steps" if every else "no",
                save_steps=every or 500,
                save_total_limit=2,
                seed=seed,
                data_seed=seed,
                report_to=list(extras.report_to) or "none",
                bf16=c.bf16,
                gradient_checkpointing=c.gradient_checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False} if c.gradient_checkpointing else None,
                use_cpu=on_cpu,
                dataloader_pin_memory=not on_cpu,
                max_length=c.max_length,
                packing=c.packing,
                dataset_kwargs=None if c.packing else {"skip_prepare_dataset": True},
                disable_tqdm=True,
            )
            Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"these settings cannot be used here: {' '.join(str(error).split())[:400]}") from error
    return args


def _check_reporters(words: Sequence[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    known = set(get_available_reporting_integrations())
    missing = [word for word in words if word not in {*known, "all", "none"}]
    if missing:
        there = ", ".join(sorted(known)) or "none"
        raise UsageError(f"--report-to {missing[0]}: no such reporter, or it is not installed; there are: {there}")


def _monitor(out: Path, extras: Extras) -> Any:
    from rankwise.tuning.callback import RankMonitorCallback
    from rankwise.tuning.health import MonitorConfig

    config = MonitorConfig() if extras.monitor_every is None else MonitorConfig(interval=extras.monitor_every)
    return RankMonitorCallback(config=config, jsonl=out / runs.HEALTH, stop_after=extras.stop_when_unstable)
