"""`train`: LoRA fine-tuning on transformers, peft and trl, watched while it runs and measured when it is done.

In: a model, data and settings. Out: an ordinary PEFT adapter folder, and a run/1 record of what it learnt and forgot.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import random
import resource
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

from rankwise.errors import MissingDependencyError, UsageError
from rankwise.records import (
    Finding,
    GroupHealth,
    LossPoint,
    RunConfig,
    RunRecord,
    Status,
    now,
    version,
)
from rankwise.tuning import attach, runs, scoring
from rankwise.tuning.divergence import DivergenceWatch
from rankwise.tuning.encoding import IGNORED
from rankwise.tuning.options import DEFAULT_LENGTH, OPTIMIZERS, Options, Settings, settle
from rankwise.tuning.world.builtin import BuiltIn, is_builtin, read_builtin

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (what is done, number done, number in all)."""

POINTS: Final = 50
"""Points of the loss curve."""

CHECKPOINTS: Final = 5
"""Checkpoints of a run, where --save-every does not say otherwise."""

BASE_ROWS: Final = 256
"""Rows on which the loss of the untuned model is taken, to hold divergence against."""

PLAIN: Final = "rankwise:plain"
"""Text that `rankwise:tiny` must not forget."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run, ready to be started: all that can be wrong with the input has been refused.

    Attributes:
        loaded: the base model and its tokenizer.
        builtin: the built-in data set, or None for a user's data.
        examples: the data.
        columns: `input_ids` and `labels`.
        settings: options without gaps.
        laid: the adapter of every module.
        config: for the record.
        findings: traps.
    """

    loaded: Any
    builtin: BuiltIn | None
    examples: Any
    columns: dict[str, list[list[int]]]
    settings: Settings
    laid: dict[str, attach.Lora]
    config: RunConfig
    findings: tuple[Finding, ...]


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
    with _seeded(seed):
        job = prepare(model, data, options, tokenizer=tokenizer, device=device)
        if resume:
            runs.check_same(out_path, job.config, seed)
        if announce is not None:
            announce(job.config, job.findings)
        head = head_of(command, model, job, seed)
        return _Run(job, out_path, head, progress).run(
            report_to=tuple(report_to),
            save_every=save_every,
            resume=resume,
            recall=recall,
            forgetting_data=forgetting_data,
            monitor_every=monitor_every,
            stop_when_unstable=stop_when_unstable,
        )


def options_of(given: dict[str, Any]) -> Options:
    """Return the options among the arguments of `train` or `dry_run`."""
    named = {name: given[name] for name in Options.__dataclass_fields__}
    if named["plan"] is not None:
        named["plan"] = fspath(named["plan"])
    if named["target_modules"] is not None and not isinstance(named["target_modules"], str):
        named["target_modules"] = tuple(named["target_modules"])
    return Options(**named)


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


def _base_loss(model: Any, job: Job) -> float | None:
    """Return the loss of the untuned model on a sample of the data, nats per trained token.

    None where the trained tokens of some row are not all at its end.
    """
    rows = list(zip(job.columns["input_ids"], job.columns["labels"], strict=True))
    rows = random.Random(0).sample(rows, min(len(rows), BASE_ROWS))
    items = []
    for ids, labels in rows:
        start = max(1, next((k for k, label in enumerate(labels) if label != IGNORED), len(labels)))
        if start >= len(ids):
            continue
        if IGNORED in labels[start:]:
            return None
        items.append(scoring.Item(tuple(ids), start))
    found = scoring.answers(model, items)
    tokens = sum(answer.tokens for answer in found)
    loss = sum(answer.loss for answer in found) / tokens if tokens else math.nan
    return loss if math.isfinite(loss) else None


@contextlib.contextmanager
def borrowed(model: Any) -> Iterator[Any]:
    """Lend a model to be adapted, and put back what peft, trl and the trainer change on it."""
    config, forward = model.config, model.__dict__.get("forward")
    kept = {name: getattr(config, name, None) for name in ("use_cache", "pad_token_id")}
    training, wanted = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    embeddings = model.get_input_embeddings()
    hooks = set(embeddings._forward_hooks)
    with quiet():
        checkpointed = bool(model.is_gradient_checkpointing)
    try:
        yield model
    finally:
        unload(model)
        with quiet():
            if not checkpointed and model.is_gradient_checkpointing:
                model.gradient_checkpointing_disable()
        for key in set(embeddings._forward_hooks) - hooks:  # those that make inputs require gradients
            del embeddings._forward_hooks[key]
        for name, p in model.named_parameters():
            p.requires_grad_(wanted.get(name, p.requires_grad))
        for name, value in kept.items():
            setattr(config, name, value)
        if forward is None:
            model.__dict__.pop("forward", None)
        model.train(training)


def unload(model: Any) -> None:
    """Take every adapter layer out of a model, whether PEFT had finished putting them in or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random for the run and put their states back: a library must not leave them changed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "train", "training") from error
    import numpy as np

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        transformers.set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def prepare(model: Any, data: Any, options: Options, *, tokenizer: Any = None, device: str | None = None) -> Job:
    """Load model and data and settle every open question; see `train` for the arguments.

    Raises:
        RankwiseError: anything is wrong with them.
    """
    from rankwise.tuning.data import builtin_examples, check_examples, read_data
    from rankwise.tuning.encoding import encode
    from rankwise.tuning.models import load_model
    from rankwise.tuning.targets import matching_modules

    settings = settle(options, model)
    builtin = read_builtin(data) if is_builtin(data) else None
    examples = read_data(data) if builtin is None else builtin_examples(builtin)
    loaded = load_model(model, device=device, tokenizer=tokenizer)
    length = _length(options, loaded.context)
    check_examples(examples, loaded.tokenizer, length)
    planned = settings.planned
    wanted = [m.module for m in planned.modules if m.r > 0] if planned else settings.target_modules
    names = matching_modules(loaded.model, wanted if isinstance(wanted, str) else list(wanted))
    laid = attach.lay_out(settings, _shapes(loaded.model, names))
    columns = encode(examples, loaded.tokenizer, length)
    config = _config(model, settings, laid, loaded, examples, columns, length)
    return Job(loaded, builtin, examples, columns, settings, laid, config, attach.traps(settings, laid))


def _length(options: Options, context: int | None) -> int:
    if options.max_length is not None and context is not None and options.max_length > context:
        raise UsageError(f"--max-length {options.max_length} is past the model's context of {context} tokens")
    return options.max_length or min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)


def _shapes(model: Any, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of the modules; Conv1D keeps its weight the other way round."""
    shapes = {}
    for name in names:
        module = model.get_submodule(name)
        if hasattr(module, "out_features"):
            shapes[name] = (int(module.out_features), int(module.in_features))
        else:
            rows, columns = module.weight.shape
            shapes[name] = (int(columns), int(rows))
    return shapes


def _config(
    model: Any,
    settings: Settings,
    laid: dict[str, attach.Lora],
    loaded: Any,
    examples: Any,
    columns: dict[str, list[list[int]]],
    length: int,
) -> RunConfig:
    o = settings.options
    rows = len(columns["input_ids"])
    if o.packing:  # as many rows as the tokens fill
        rows = math.ceil(sum(map(len, columns["input_ids"])) / length)
    per_epoch = math.ceil(rows / o.batch_size)
    steps = o.steps or max(1, math.ceil(settings.epochs * per_epoch))
    return RunConfig(
        model=_name(model),
        data=examples.name,
        data_digest=_digest(columns),
        preset=o.preset,
        rank=settings.rank,
        lora_alpha=settings.lora_alpha,
        scaling=settings.scaling,
        plan=o.plan,
        target_modules=tuple(laid),
        init=o.init,
        lora_dropout=o.lora_dropout,
        optimizer=_optimizer(o.optimizer),
        learning_rate=settings.learning_rate,
        schedule=_schedule(o.schedule),
        warmup_steps=round(o.warmup * steps),
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        steps=steps,
        batch_size=o.batch_size,
        gradient_accumulation=o.gradient_accumulation,
        max_length=length,
        packing=o.packing,
        bf16=_bf16(o.bf16, loaded.model),
        gradient_checkpointing=o.gradient_checkpointing,
        groups=attach.group_scales(laid),
    )


def _digest(columns: dict[str, list[list[int]]]) -> str:
    """Return what tells data apart that have the same name."""
    told = hashlib.sha256()
    for rows in columns.values():
        for row in rows:
            told.update(array("q", [len(row), *row]).tobytes())
    return told.hexdigest()[:16]


def _name(thing: Any) -> str:
    if isinstance(thing, str | PathLike):
        return fspath(thing)
    return f"{type(thing).__name__} in memory"


def _optimizer(word: str) -> str:
    from transformers.training_args import OptimizerNames

    names = [name.value for name in OptimizerNames]
    if OPTIMIZERS.get(word, word) not in names:
        raise UsageError(f"--optimizer: there is no {word!r}; there are {', '.join(OPTIMIZERS)} and {', '.join(names)}")
    return OPTIMIZERS.get(word, word)


def _schedule(word: str) -> str:
    from transformers import SchedulerType

    names = [name.value for name in SchedulerType]
    if word not in names:
        raise UsageError(f"--schedule: there is no {word!r}; there are: {', '.join(names)}")
    return word


def _bf16(asked: bool | None, model: Any) -> bool:
    import torch

    device = next(model.parameters()).device
    can = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return can if asked is None else asked


def head_of(command: Sequence[str] | None, model: Any, job: Job, seed: int) -> dict[str, Any]:
    """Return what a record of this job begins with."""
    call = f"rankwise.train({_name(model)!r}, {job.examples.name!r}, ...)"
    return {
        "rankwise": version(),
        "created": now(),
        "command": tuple(command) if command is not None else (call,),
        "device": str(next(job.loaded.model.parameters()).device),
        "seed": seed,
    }


def _record(head: dict[str, Any], job: Job, *, status: Status, error: str | None = None, **found: Any) -> RunRecord:
    """Make the record of a run; what is not known yet is None."""
    empty: dict[str, Any] = {
        "steps": 0,
        "tokens": None,
        "loss": None,
        "recall": None,
        "forgetting": None,
        "forgetting_detail": None,
        "seconds": None,
        "peak_memory_bytes": None,
        "tokens_per_second": None,
        "losses": (),
        "health": (),
        "findings": job.findings,
    }
    params = sum(lora.params for lora in job.laid.values())
    return RunRecord(
        **head, format=RunRecord.FORMAT, config=job.config, status=status, params=params, error=error, **empty | found
    )


class _Run:
    """One training run under way."""

    def __init__(self, job: Job, out: Path, head: dict[str, Any], progress: Progress | None) -> None:
        self.job, self.out, self.head, self.progress = job, out, head, progress
        self.watch = DivergenceWatch(job.config.steps)
        self.found: dict[str, Any] = {}
        self.watching: Any = None

    def run(
        self,
        *,
        report_to: tuple[str, ...],
        save_every: int | None,
        resume: bool,
        recall: bool,
        forgetting_data: str | None,
        monitor_every: int | None,
        stop_when_unstable: int | None,
    ) -> RunRecord:
        """Measure the base, train, measure again."""
        from peft import get_peft_model

        job = self.job
        with borrowed(job.loaded.model) as model:
            self._say("measuring the base", 0, job.config.steps)
            quiz = self._quiz() if recall else None
            base = None if quiz is None else scoring.take(model, quiz)
            kept = self._keepsake(forgetting_data)
            self.watch.base_loss = _base_loss(model, job)
            with quiet():
                tuned = get_peft_model(model, attach.lora_config(job.settings, job.laid))
            attach.check_attached(tuned, job.laid)
            trainer, callback = self._trainer(tuned, report_to, save_every, monitor_every, stop_when_unstable)
            if not resume:
                runs.begin_run(self.out, _record(self.head, job, status="interrupted", error="not finished"))
            status, error = self._train(trainer, callback, tuned, resume)
            runs.save_adapter(self.out, tuned)
            try:
                self._say("measuring what was learnt", job.config.steps, job.config.steps)
                if quiz is not None and base is not None:
                    params = sum(lora.params for lora in job.laid.values())
                    self.found["recall"] = scoring.recall_of(quiz, base, scoring.take(tuned, quiz), params=params)
                lost = None if kept is None else scoring.forgetting_of(tuned, kept)
                rise = None if lost is None or lost.tuned_loss is None else lost.tuned_loss - lost.base_loss
                self.found |= {"forgetting": rise, "forgetting_detail": lost}
            except BaseException as problem:  # what was trained is safe and on record; what was measured is not
                told = f"{error + '; ' if error else ''}measuring was cut short: {type(problem).__name__}: {problem}"
                runs.save_record(self.out, _record(self.head, job, status=status, error=told, **self.found))
                raise
            record = _record(self.head, job, status=status, error=error, **self.found)
            runs.save_record(self.out, record)
            if status == "done":
                runs.clean(self.out)
            return record

    def _train(self, trainer: Any, callback: Any, tuned: Any, resume: bool) -> tuple[Status, str | None]:
        """Train; return how it ended, with all figures of the training collected and on record."""
        status: Status = "done"
        error = None
        try:
            self._fit(trainer, resume)
            if self.watch.reason is not None:
                status, error = "diverged", self.watch.reason
                self.watch.restore(tuned)
            elif trainer.state.global_step < self.job.config.steps:
                status, error = "interrupted", f"stopped at step {trainer.state.global_step}: called unstable too often"
        except BaseException as problem:
            by_hand = isinstance(problem, KeyboardInterrupt)
            self._collect(trainer, callback)
            status = "interrupted" if by_hand else "failed"
            error = "interrupted from outside" if by_hand else f"{type(problem).__name__}: {problem}"
            runs.save_record(self.out, _record(self.head, self.job, status=status, error=error, **self.found))
            raise
        self._collect(trainer, callback)
        if status == "diverged":
            self.found["steps"] = self.watch.good_step
        runs.save_record(self.out, _record(self.head, self.job, status=status, error=error, **self.found))
        return status, error

    def _say(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)

    def _quiz(self) -> scoring.Quiz:
        job = self.job
        if job.builtin is not None and job.builtin.questions:
            return scoring.quiz_of(job.builtin, job.loaded.tokenizer)
        return scoring.quiz_of_examples(
            job.examples, job.loaded.tokenizer, job.config.max_length, seed=self.head["seed"]
        )

    def _keepsake(self, data: str | None) -> scoring.Keepsake | None:
        job = self.job
        return make_keepsake(
            job.loaded, data, model=job.config.model, length=job.config.max_length, seed=self.head["seed"]
        )

    def _trainer(
        self,
        model: Any,
        report_to: tuple[str, ...],
        save_every: int | None,
        monitor_every: int | None,
        stop_when_unstable: int | None,
    ) -> tuple[Any, Any]:
        """Build TRL's trainer around the model."""
        import datasets
        from transformers import PrinterCallback, ProgressCallback, Trainer
        from transformers.integrations import get_available_reporting_integrations
        from trl import SFTConfig, SFTTrainer

        from rankwise.tuning.health import MonitorConfig
        from rankwise.tuning.watching import WatchCallback

        c = self.job.config
        on_cpu = next(model.parameters()).device.type == "cpu"
        every = max(1, c.steps // CHECKPOINTS) if save_every is None else save_every
        try:
            with quiet():
                args = self._arguments(SFTConfig, report_to, every, on_cpu)
                Trainer.get_optimizer_cls_and_kwargs(args, model)
        except (ValueError, ImportError, RuntimeError) as error:
            raise UsageError(f"these settings cannot be used here: {' '.join(str(error).split())[:400]}") from error
        known = set(get_available_reporting_integrations())
        missing = [word for word in report_to if word not in {*known, "all", "none"}]
        if missing:
            there = ", ".join(sorted(known)) or "none"
            raise UsageError(f"--report-to {missing[0]}: no such reporter, or it is not installed; there are: {there}")
        callback = None
        self.watching = WatchCallback(self.watch, self.progress)
        extra: list[Any] = [self.watching]
        if monitor_every != 0:
            from rankwise.tuning.callback import RankMonitorCallback

            config = MonitorConfig() if monitor_every is None else MonitorConfig(interval=monitor_every)
            callback = RankMonitorCallback(config=config, jsonl=self.out / runs.HEALTH, stop_after=stop_when_unstable)
            extra.append(callback)
        with quiet():
            trainer = SFTTrainer(
                model=model,
                args=args,
                train_dataset=datasets.Dataset.from_dict(self.job.columns),
                processing_class=self.job.loaded.tokenizer,
                callbacks=extra,
            )
        setattr(trainer, "create_model_card", lambda *_, **__: None)  # noqa: B010 - no README beside every checkpoint
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if callback is not None:
            callback.attach(trainer)
        return trainer, callback

    def _arguments(self, config: Any, report_to: tuple[str, ...], every: int, on_cpu: bool) -> Any:
        """Say in TRL's words what the config says in ours."""
        c = self.job.config
        return config(
            output_dir=str(self.out),
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
            seed=self.head["seed"],
            data_seed=self.head["seed"],
            report_to=list(report_to) or "none",
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

    def _fit(self, trainer: Any, resume: bool) -> None:
        last = runs.last_checkpoint(self.out) if resume else None
        begun = time.perf_counter()
        try:
            with quiet():
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            self.found["seconds"] = time.perf_counter() - begun

    def _collect(self, trainer: Any, callback: Any) -> None:
        """Take out of the trainer what belongs into the record."""
        history = trainer.state.log_history
        losses = tuple(
            LossPoint(step=row["step"], loss=_finite(row["loss"]), learning_rate=_finite(row.get("learning_rate")))
            for row in history
            if "loss" in row
        )
        tokens = _tokens(history)
        before = _tokens([row for row in history if row["step"] <= self.watching.started_at]) or 0
        lived = tokens - before if tokens else None
        seconds = self.found.get("seconds")
        health = () if callback is None else tuple(map(_health, callback.observations))
        self.found |= {
            "steps": trainer.state.global_step,
            "tokens": tokens,
            "loss": losses[-1].loss if losses else None,
            "losses": losses,
            "health": health,
            "peak_memory_bytes": peak_memory(next(trainer.model.parameters()).device),
            "tokens_per_second": lived / seconds if lived and seconds else None,
            "findings": (*self.job.findings, *_warnings(health)),
        }


def make_keepsake(loaded: Any, data: str | None, *, model: str, length: int, seed: int) -> scoring.Keepsake | None:
    """Take text that must not be forgotten and score the base on it.

    Args:
        loaded: the model and its tokenizer.
        data: DATA of texts; None for the built-in text of `rankwise:tiny`, else for text sampled from the base.
        model: the model's name.
        length: tokens a text is cut at.
        seed: of the sampling.
    """
    from rankwise.tuning.data import read_data

    name = data if data is not None else PLAIN if model == "rankwise:tiny" else None
    texts: Sequence[str] | None = None
    if name is not None:
        if is_builtin(name):
            builtin = read_builtin(name)
            name = builtin.name
            rows: Sequence[dict[str, Any]] = builtin.rows
        else:
            rows = read_data(name).rows
        if len(rows) > scoring.MOST_EXAMPLES:
            rows = random.Random(seed).sample(list(rows), scoring.MOST_EXAMPLES)
        texts = [_text(row, loaded.tokenizer) for row in rows]
    return scoring.keepsake(
        loaded.model,
        loaded.tokenizer,
        name if name is not None else "sampled from the base",
        texts,
        seed=seed,
        length=length,
    )


def _text(row: dict[str, Any], tokenizer: Any) -> str:
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return str(row["text"] if "text" in row else row["prompt"] + row["completion"])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers, datasets and trl from writing on our terminal; errors still come."""
    import datasets
    import transformers

    level = transformers.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # the words of transformers 5.0 to 5.x; some have another name in 6
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _tokens(history: Sequence[dict[str, Any]]) -> int | None:
    """Return the tokens seen, from a count that starts again when a run is resumed."""
    total, last = 0, 0
    for row in history:
        if "num_tokens" in row:
            count = int(row["num_tokens"])
            if count < last:
                total += last
            last = count
    return total + last or None


def _health(row: Mapping[str, Any]) -> GroupHealth:
    return GroupHealth(**{name: row[name] for name in GroupHealth.__struct_fields__})


def _warnings(health: Sequence[GroupHealth]) -> tuple[Finding, ...]:
    """Say once what the monitor last saw of each status that is not ok."""
    found = []
    for status, code in (("starved", "starved-adapter"), ("unstable", "unstable-adapter")):
        seen = [row for row in health if row.status == status]
        groups = sorted({row.group for row in seen if row.group != "all"})
        if seen:
            text = (
                f"The monitor called the adapter {status} at steps {seen[0].step} to {seen[-1].step} "
                f"({', '.join(groups) or 'all modules'}). "
            ) + WORDS[status]
            found.append(Finding(code=code, level="warning", text=text))
    return tuple(found)


WORDS: Final = {
    "starved": (
        "The branch hardly moves what the frozen layers put out. A larger scale or a higher learning rate would tell "
        "whether there was more to learn."
    ),
    "unstable": "The steps are large beside what was learnt. A smaller learning rate or scale would tell.",
}


def peak_memory(device: Any) -> int:
    """Return the most bytes held so far: resident in this process, or allocated on its GPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, IndexError):  # ru_maxrss of a child starts at its parent's peak
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
