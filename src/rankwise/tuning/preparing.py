"""All that is settled before a run: model, data and adapter are there, and what can be wrong with them was refused.

In: a model, data and options. Out: a `Job`, with the config for the record.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from rankwise.errors import UsageError, without_secrets
from rankwise.records import Finding, RunConfig, now, version
from rankwise.tuning import attach
from rankwise.tuning.options import DEFAULT_LENGTH, OPTIMIZERS, Options, Settings, settle
from rankwise.tuning.world.builtin import BuiltIn, is_builtin, read_builtin


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


def options_of(given: dict[str, Any]) -> Options:
    """Return the options among the arguments of `train` or `dry_run`."""
    named = {name: given[name] for name in Options.__dataclass_fields__}
    if named["plan"] is not None:
        named["plan"] = fspath(named["plan"])
    if named["target_modules"] is not None and not isinstance(named["target_modules"], str):
        named["target_modules"] = tuple(named["target_modules"])
    return Options(**named)


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
        return without_secrets(fspath(thing))
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
        "command": tuple(map(without_secrets, command)) if command is not None else (call,),
        "device": str(next(job.loaded.model.parameters()).device),
        "seed": seed,
    }
