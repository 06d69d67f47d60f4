"""`train`: LoRA fine-tuning on transformers, peft and trl, watched while it runs and measured when it is done.

In: a model, data and settings. Out: an ordinary PEFT adapter folder, and a run/1 record of what it learnt and forgot.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.records import Finding, RunConfig, RunRecord, Status
from rankwise.tuning import attach, runs, scoring
from rankwise.tuning.baselines import base_loss, make_keepsake, make_quiz
from rankwise.tuning.borrowing import borrowed, quiet, seeded
from rankwise.tuning.divergence import DivergenceWatch
from rankwise.tuning.options import settle
from rankwise.tuning.preparing import Job, head_of, options_of, prepare
from rankwise.tuning.run_record import collected, record_of
from rankwise.tuning.trl_trainer import Extras, build_trainer
from rankwise.tuning.watching import WatchCallback

Progress = Callable[[str, int, int], None]
"""Called with (what is done, number done, number in all)."""

Answers = dict[str, tuple[scoring.Answer, ...]]
"""Kind of question -> what a model made of each."""


def train(
    model: Any,
    data: Any,
    *,
    out: str | PathLike[str],
    preset: str | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
    scaling: str | None = None,
    plan: str | None = None,
    target_modules: str | Sequence[str] | None = None,
    init: str = "default",
    lora_dropout: float = 0.0,
    optimizer: str = "adamw",
    learning_rate: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    gradient_accumulation: int = 1,
    max_length: int | None = None,
    packing: bool = False,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    report_to: Sequence[str] = (),
    save_every: int | None = None,
    resume: bool = False,
    force: bool = False,
    recall: bool = True,
    forgetting_data: str | None = None,
    monitor_every: int | None = None,
    stop_when_unstable: int | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    announce: Callable[[RunConfig, tuple[Finding, ...]], None] | None = None,
) -> RunRecord:
    """Fine-tune with LoRA, watch it, and measure what was learnt and forgotten.

    Args:
        model: folder, hub id, `rankwise:tiny`, or a live causal LM (which gets its base weights back).
        data: file, folder, hub id, URL, `rankwise:facts`, `rankwise:style`, list of dicts or `datasets.Dataset`.
        out: folder of the run.
        preset: "persona" (alpha / r, rank 8) or "knowledge" (alpha / sqrt(r), rank 64, the default).
        rank: r of every module.
        lora_alpha: alpha of every module; 16 where not given.
        scaling: "lora" (alpha / r), "rslora" (alpha / sqrt(r)) or "unscaled" (alpha).
        plan: path of a plan/1 record: rank and alpha per module.
        target_modules: "all-linear", names as PEFT takes them, or one regular expression.
        init: "default", "gaussian" or "orthogonal", as in PEFT.
        lora_dropout: on the input of A.
        optimizer: "adamw", "sgd", "adafactor" or any word of transformers.
        learning_rate: the highest; 2e-4 where neither a flag nor the plan says (3e-3 for `rankwise:tiny`).
        schedule: of the learning rate, in the words of transformers.
        warmup: share of the steps that rise linearly.
        weight_decay: of the optimizer.
        max_grad_norm: clip gradients to this norm; 0 for never.
        steps: optimizer steps.
        epochs: passes over the data, where `steps` is not given.
        batch_size: examples a step, gradient accumulation included.
        gradient_accumulation: forward passes a step.
        max_length: tokens an example is cut at; default 1024, or the model's context where that is shorter.
        packing: put several examples into one row.
        bf16: activations in bfloat16; None means yes where a GPU can.
        gradient_checkpointing: compute activations twice instead of keeping them.
        report_to: reporters of transformers: "tensorboard", "wandb", "mlflow", ...
        save_every: steps between checkpoints to resume from; 0 for none, None for five a run.
        resume: go on from the last checkpoint in `out`.
        force: replace a run that is in `out`.
        recall: measure recall before and after.
        forgetting_data: texts the base already models; default: built-in text for `rankwise:tiny`, else sampled from
            the base itself.
        monitor_every: steps between two looks of the monitor; 0 for none, None for its default.
        stop_when_unstable: stop after so many looks in a row that say "unstable".
        tokenizer: of a live model.
        device: "cpu", "cuda" or "cuda:N".
        seed: of A, of the order of the data, of sampling.
        command: argv to write into the record.
        progress: called now and then.
        announce: called once with the config and the traps found, before training.

    Returns:
        A run/1 record, which is also in `out`.

    Raises:
        RankwiseError: bad data, model, settings or folder; nothing was trained.
    """
    options = options_of(locals())
    out_path = Path(fspath(out))
    settle(options, model)  # refuse wrong flags before anything is written or loaded
    check_extras(save_every, monitor_every, stop_when_unstable)
    runs.check_run(out_path, force=force, resume=resume)
    _check_alone(device)
    with seeded(seed):
        job = prepare(model, data, options, tokenizer=tokenizer, device=device)
        if resume:
            runs.check_same(out_path, job.config, seed)
        if announce is not None:
            announce(job.config, job.findings)
        head = head_of(command, model, job, seed)
        extras = Extras(tuple(report_to), save_every, monitor_every, stop_when_unstable)
        run = _Run(job, out_path, head, progress)
        return run.run(extras, resume=resume, recall=recall, forgetting_data=forgetting_data)


def check_extras(save_every: int | None, monitor_every: int | None, stop_when_unstable: int | None) -> None:
    """Refuse intervals that are none.

    Raises:
        UsageError: one is below its least.
    """
    for flag, value, least in (
        ("--save-every", save_every, 0),
        ("--monitor-every", monitor_every, 0),
        ("--stop-when-unstable", stop_when_unstable, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} must be {least} or more, got {value}")


def _check_alone(device: str | None) -> None:
    """Refuse what would have several processes write one folder, or the trainer choose another GPU than was asked."""
    try:
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate, whoever imports us
    except ValueError:
        processes = 1
    if processes > 1:
        raise UsageError(f"train works in one process, and was started in {processes}; start it without a launcher")
    if device is not None and device.startswith("cuda:") and device != "cuda:0":
        raise UsageError(
            f"--device {device}: the trainer uses the first GPU it sees; make this one the first with "
            f"CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')} and --device cuda"
        )


class _Run:
    """One training run under way."""

    def __init__(self, job: Job, out: Path, head: dict[str, Any], progress: Progress | None) -> None:
        self.job, self.out, self.head, self.progress = job, out, head, progress
        self.watch = DivergenceWatch(job.config.steps)
        self.watching = WatchCallback(self.watch, progress)
        self.found: dict[str, Any] = {}

    def run(self, extras: Extras, *, resume: bool, recall: bool, forgetting_data: str | None) -> RunRecord:
        """Measure the base, train, measure again."""
        from peft import get_peft_model

        job, seed = self.job, self.head["seed"]
        with borrowed(job.loaded.model) as model:
            self._say("measuring the base", 0)
            quiz = make_quiz(job, seed=seed) if recall else None
            base = None if quiz is None else scoring.take(model, quiz)
            kept = make_keepsake(
                job.loaded, forgetting_data, model=job.config.model, length=job.config.max_length, seed=seed
            )
            self.watch.base_loss = base_loss(model, job)
            with quiet():
                tuned = get_peft_model(model, attach.lora_config(job.settings, job.laid))
            attach.check_attached(tuned, job.laid)
            trainer, monitor = build_trainer(tuned, job, self.out, extras=extras, watching=self.watching, seed=seed)
            if not resume:
                runs.begin_run(self.out, record_of(self.head, job, status="interrupted", error="not finished"))
            status, error = self._train(trainer, monitor, tuned, resume=resume)
            runs.save_adapter(self.out, tuned)
            try:
                self._measure(tuned, quiz, base, kept)
            except BaseException as problem:  # what was trained is safe and on record; what was measured is not
                told = f"{error + '; ' if error else ''}measuring was cut short: {type(problem).__name__}: {problem}"
                self._save(status, told)
                raise
            record = self._save(status, error)
            if status == "done":
                runs.clean(self.out)
            return record

    def _train(self, trainer: Any, monitor: Any, tuned: Any, *, resume: bool) -> tuple[Status, str | None]:
        """Train; return how it ended, with all figures of the training collected and on record."""
        status: Status = "done"
        error = None
        try:
            self._fit(trainer, resume=resume)
            if self.watch.reason is not None:
                status, error = "diverged", self.watch.reason
                self.watch.restore(tuned)
            elif trainer.state.global_step < self.job.config.steps:
                status, error = "interrupted", f"stopped at step {trainer.state.global_step}: called unstable too often"
        except BaseException as problem:
            by_hand = isinstance(problem, KeyboardInterrupt)
            self._collect(trainer, monitor)
            status = "interrupted" if by_hand else "failed"
            error = "interrupted from outside" if by_hand else f"{type(problem).__name__}: {problem}"
            self._save(status, error)
            raise
        self._collect(trainer, monitor)
        if status == "diverged":
            self.found["steps"] = self.watch.good_step
        self._save(status, error)
        return status, error

    def _fit(self, trainer: Any, *, resume: bool) -> None:
        last = runs.last_checkpoint(self.out) if resume else None
        begun = time.perf_counter()
        try:
            with quiet():
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            self.found["seconds"] = time.perf_counter() - begun

    def _collect(self, trainer: Any, monitor: Any) -> None:
        self.found |= collected(
            trainer,
            self.job,
            () if monitor is None else monitor.observations,
            begun_at=self.watching.started_at,
            seconds=self.found.get("seconds"),
        )

    def _measure(
        self, tuned: Any, quiz: scoring.Quiz | None, base: Answers | None, kept: scoring.Keepsake | None
    ) -> None:
        """Find what was learnt and forgotten, beside what the base made of the same questions and texts."""
        self._say("measuring what was learnt", self.job.config.steps)
        if quiz is not None and base is not None:
            params = sum(lora.params for lora in self.job.laid.values())
            self.found["recall"] = scoring.recall_of(quiz, base, scoring.take(tuned, quiz), params=params)
        lost = None if kept is None else scoring.forgetting_of(tuned, kept)
        rise = None if lost is None or lost.tuned_loss is None else lost.tuned_loss - lost.base_loss
        self.found |= {"forgetting": rise, "forgetting_detail": lost}

    def _save(self, status: Status, error: str | None) -> RunRecord:
        """Write what is known by now over the record."""
        record = record_of(self.head, self.job, status=status, error=error, **self.found)
        runs.save_record(self.out, record)
        return record

    def _say(self, what: str, done: int) -> None:
        if self.progress is not None:
            self.progress(what, done, self.job.config.steps)
