"""`recall`: what any adapter recalls of a data set, in bits, and what it forgot.

In: a base, an adapter, data. Out: a recall/1 record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from os import PathLike, fspath
from typing import Any

from rankwise.errors import MalformedFileError, NothingToMeasureError, UsageError, WrongKindError
from rankwise.records import RecallRecord, now, version
from rankwise.tuning import scoring
from rankwise.tuning.training import make_keepsake
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
    if adapter is not None:
        _check_adapter(adapter)
    loaded = load_model(model, device=device, tokenizer=tokenizer)
    length = max_length or min(1024, loaded.context or 1024)
    if builtin is not None:
        quiz = scoring.quiz_of(builtin, loaded.tokenizer)
    else:
        assert examples is not None
        quiz = scoring.quiz_of_examples(examples, loaded.tokenizer, length, seed=seed)
    tuned = loaded.model if adapter is None else _attach(loaded.model, fspath(adapter))
    if not hasattr(tuned, "disable_adapter"):
        raise WrongKindError("the model has no adapter, and none was given; there is nothing to compare with its base")
    try:
        say("measuring the base", 0, 3)
        with scoring.base_of(tuned):
            base = scoring.take(tuned, quiz)
        name = model if isinstance(model, str) else type(model).__name__
        kept = make_keepsake(
            type(loaded)(**_fields(loaded) | {"model": tuned}), forgetting_data, model=name, length=length, seed=seed
        )
        say("measuring the adapter", 1, 3)
        params = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
        found = scoring.recall_of(quiz, base, scoring.take(tuned, quiz), params=params)
        lost = None if kept is None else scoring.forgetting_of(tuned, kept)
    finally:
        if adapter is not None:
            tuned.unload()
    if found is None:
        raise NothingToMeasureError(f"{data}: no example has a token to recall")
    rise = None if lost is None or lost.tuned_loss is None else lost.tuned_loss - lost.base_loss
    label = builtin.name if builtin is not None else examples.name if examples is not None else ""
    return RecallRecord(
        format=RecallRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else (f"rankwise.recall({name!r}, {adapter!r}, {label!r})",),
        device=str(next(tuned.parameters()).device),
        seed=seed,
        model=fspath(model) if isinstance(model, str | PathLike) else f"{type(model).__name__} in memory",
        adapter=None if adapter is None else fspath(adapter),
        data=label,
        params=params,
        recall=found,
        forgetting=rise,
        forgetting_detail=lost,
        seconds=time.perf_counter() - begun,
    )


def _fields(loaded: Any) -> dict[str, Any]:
    return {name: getattr(loaded, name) for name in type(loaded).__dataclass_fields__}


def _check_adapter(adapter: str | PathLike[str]) -> None:
    """Refuse what is no PEFT LoRA adapter, from its files, before a model is loaded."""
    from rankwise.checkpoints import open_source
    from rankwise.checkpoints.model import Adapter

    with open_source(adapter) as opened:
        if not isinstance(opened, Adapter):
            raise WrongKindError(f"{fspath(adapter)} is a full checkpoint; ADAPTER is meant to be a LoRA adapter")


def _attach(model: Any, adapter: str) -> Any:
    """Put an adapter on its base; refuse one that does not fit."""
    import warnings

    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            return PeftModel.from_pretrained(model, adapter.removeprefix("hf://"))
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, UserWarning) as error:
        raise MalformedFileError(f"{adapter} does not fit the model: {_first_lines(str(error))}") from error


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:600]
