"""`recall`: what any adapter recalls of a data set, in bits, and what it forgot.

In: a base, an adapter, data. Out: a recall/1 record.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from rankwise.errors import MalformedFileError, NothingToMeasureError, UsageError, WrongKindError
from rankwise.records import RecallRecord, now, version
from rankwise.tuning import scoring
from rankwise.tuning.baselines import make_keepsake
from rankwise.tuning.borrowing import borrowed
from rankwise.tuning.world.builtin import is_builtin, read_builtin

Progress = Callable[[str, int, int], None]


def recall(
    model: Any,
    adapter: str | PathLike[str] | None,
    data: Any,
    *,
    forgetting_data: str | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> RecallRecord:
    """Measure what an adapter recalls of a data set, beside its base, and what it forgot.

    Args:
        model: the base: folder, hub id, `rankwise:tiny`, or a live causal LM.
        adapter: PEFT adapter: folder or hub id. None measures a live PEFT model as it is.
        data: file, folder, hub id, `rankwise:facts`, `rankwise:style`, list of dicts or `datasets.Dataset`. For the
            built-in sets name the same n and seed that the adapter was trained on.
        forgetting_data: texts the base already models; default as in `train`.
        max_length: tokens an example is cut at; default 1024, or the context where that is shorter.
        tokenizer: of a live model.
        device: "cpu", "cuda" or "cuda:N".
        seed: of the sampling of forgetting text, and of the choice of examples from large data.
        command: argv to write into the record.
        progress: called now and then.

    Returns:
        A recall/1 record.

    Raises:
        RankwiseError: model, adapter or data cannot be read, or do not fit each other.
    """
    from rankwise.tuning.data import read_data
    from rankwise.tuning.models import load_model

    begun = time.perf_counter()
    say = progress or (lambda *_: None)
    if max_length is not None and max_length < 2:
        raise UsageError(f"--max-length must be 2 or more, got {max_length}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    say("reading the data", 0, 3)
    builtin = read_builtin(data) if is_builtin(data) else None
    if builtin is not None and not builtin.questions:
        raise NothingToMeasureError(f"{data} holds no facts to ask for; see rankwise:facts and rankwise:style")
    examples = None if builtin is not None else read_data(data)
    modules = None if adapter is None else check_adapter(adapter)
    if adapter is None and not hasattr(model, "disable_adapter"):
        raise WrongKindError("the model has no adapter, and none was given; there is nothing to compare with its base")
    bare = model if adapter is not None else model.get_base_model()
    loaded = load_model(bare, device=device, tokenizer=tokenizer, adapted=adapter is None)
    if max_length is not None and loaded.context is not None and max_length > loaded.context:
        raise UsageError(f"--max-length {max_length} is past the model's context of {loaded.context} tokens")
    length = max_length or min(1024, loaded.context or 1024)
    if builtin is not None:
        quiz = scoring.quiz_of(builtin, loaded.tokenizer)
    else:
        assert examples is not None
        quiz = scoring.quiz_of_examples(examples, loaded.tokenizer, length, seed=seed)
    with contextlib.ExitStack() as stack:
        if modules is None:
            tuned = model
        else:
            stack.enter_context(borrowed(loaded.model))
            tuned = attach_adapter(loaded.model, fspath(adapter) if adapter is not None else "", modules)
        say("measuring the base", 0, 3)
        with scoring.base_of(tuned):
            base = scoring.take(tuned, quiz)
        name = fspath(model) if isinstance(model, str | PathLike) else f"{type(model).__name__} in memory"
        kept = make_keepsake(replace(loaded, model=tuned), forgetting_data, model=name, length=length, seed=seed)
        say("measuring the adapter", 1, 3)
        params = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n or ".modules_to_save." in n)
        found = scoring.recall_of(quiz, base, scoring.take(tuned, quiz), params=params)
        lost = None if kept is None else scoring.forgetting_of(tuned, kept)
        where = str(next(tuned.parameters()).device)
    if found is None:
        raise NothingToMeasureError(f"{data}: no example has a token to recall")
    rise = None if lost is None or lost.tuned_loss is None else lost.tuned_loss - lost.base_loss
    given = None if adapter is None else fspath(adapter)
    label = builtin.name if builtin is not None else examples.name if examples is not None else ""
    return RecallRecord(
        format=RecallRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else (f"rankwise.recall({name!r}, {given!r}, {label!r})",),
        device=where,
        seed=seed,
        model=name,
        adapter=None if adapter is None else fspath(adapter),
        data=label,
        params=params,
        recall=found,
        forgetting=rise,
        forgetting_detail=lost,
        seconds=time.perf_counter() - begun,
    )


def check_adapter(adapter: str | PathLike[str]) -> set[str]:
    """Refuse what is no LoRA adapter, from its files, before a model is loaded; return its modules."""
    from rankwise.checkpoints import open_source
    from rankwise.checkpoints.model import Adapter

    if "://" in fspath(adapter) and not fspath(adapter).startswith("hf://"):
        raise UsageError(f"{fspath(adapter)}: recall reads adapters from a folder or the hub; copy it here first")
    with open_source(adapter) as opened:
        if not isinstance(opened, Adapter):
            raise WrongKindError(f"{fspath(adapter)} is a full checkpoint; ADAPTER is meant to be a LoRA adapter")
        return {module.module for module in opened.modules}


def attach_adapter(model: Any, adapter: str, modules: set[str]) -> Any:
    """Put an adapter on its base; refuse one that does not fit."""
    import torch
    from peft import PeftModel

    name, revision = adapter, ""
    if not Path(adapter).exists():
        name, _, revision = adapter.removeprefix("hf://").partition("@")
    try:
        with warnings.catch_warnings(record=True) as said, torch.random.fork_rng():  # peft draws A before it reads it
            warnings.simplefilter("always")
            tuned = PeftModel.from_pretrained(model, name, revision=revision or None)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        raise MalformedFileError(f"{adapter} does not fit the model: {_first_lines(str(error))}") from error
    missing = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        raise MalformedFileError(f"{adapter} does not fit the model: {_first_lines(missing[0])}")
    names = [n.removeprefix("base_model.model.") for n, _ in tuned.named_parameters() if ".lora_" in n]
    strangers = sorted(modules - {n.partition(".lora_")[0] for n in names})
    if strangers:
        raise MalformedFileError(
            f"{adapter} does not fit the model: it has weights for {len(strangers)} modules that the model has not, "
            f"first {strangers[0]}; it was made for another base"
        )
    return tuned


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:600]
