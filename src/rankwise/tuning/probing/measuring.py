"""`probe`: before any training, how much there is to learn, what could hold it, and what to start with.

In: a model and data. Out: a probe/1 record. The model comes back as it was.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.errors import DeviceError, UsageError
from rankwise.records import now, version
from rankwise.records.probe import Job, ProbeRecord
from rankwise.scaling import SCALINGS
from rankwise.tuning import preparing
from rankwise.tuning.finite import check_weights
from rankwise.tuning.options import PRESETS, TINY_RATE, Options
from rankwise.tuning.probing.adapting import RANK
from rankwise.tuning.probing.bits import measure
from rankwise.tuning.probing.capacity import capacity_of
from rankwise.tuning.probing.gradients import pulls
from rankwise.tuning.probing.passes import rows_of
from rankwise.tuning.probing.rates import RatePoint, ramp
from rankwise.tuning.probing.recommending import STORED_BITS, Evidence, Start, job_of, recommend, start_of
from rankwise.tuning.probing.recording import Drawn, Form, Found, record_of

Progress = Callable[[str, int, int], None]

MOST_EXAMPLES: Final = 5000
"""Rows looked at; where there are more, blocks of neighbours are drawn."""

BLOCK: Final = 64
"""Neighbours drawn together: rows about the same thing often stand together, and would be news where they are torn."""

GRADIENT_EXAMPLES: Final = 256
"""Rows that the gradient is summed over."""

STEPS: Final = 200
"""Steps in which an adapter may learn the form of one half, at most."""

FORM_RATE: Final = 1e-3
"""Learning rate of that adapter; 3e-3 on the built-in model, which is small."""

JOBS: Final = ("facts", "style")

_KINDS: Final = ("base", "formed", "news")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the caller fixed of the recommendation, None where it is to be found; see `probe`."""

    epochs: float | None
    job: str | None
    scaling: str | None
    lora_alpha: float | None
    ramp_rates: bool
    seed: int
    tiny: bool


def probe(
    model: Any,
    data: Any,
    *,
    epochs: float | None = None,
    job: str | None = None,
    scaling: str | None = None,
    lora_alpha: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    max_length: int | None = None,
    examples: int = MOST_EXAMPLES,
    steps: int = STEPS,
    learning_rate: float | None = None,
    ramp_rates: bool = True,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ProbeRecord:
    """Measure what there is to learn in the data, and recommend a rank, rule, alpha and learning rate.

    Args:
        model: folder, hub id, `rankwise:tiny`, or a live causal LM, which comes back as it was.
        data: file, folder, hub id, URL, `rankwise:facts`, `rankwise:style`, list of dicts or `datasets.Dataset`.
        epochs: planned passes over the data; 20 for facts and 3 for style where it is not given.
        job: "facts" (the rows are to be known) or "style" (their manner is); decided by what is measured where it is
            not given.
        scaling: rule to plan for.
        lora_alpha: alpha to plan for.
        target_modules: "all-linear", names as PEFT takes them, or one regular expression.
        max_length: tokens an example is cut at; default 1024, or the model's context where that is shorter.
        examples: rows to look at; of more, blocks of neighbours are drawn.
        steps: in which an adapter may learn the form of one half of the data, at most; 0 takes the form as known.
        learning_rate: of that adapter; 1e-3 (3e-3 for `rankwise:tiny`) where it is not given.
        ramp_rates: measure a learning rate by a ramp at the recommended rank.
        tokenizer: of a live model.
        device: "cpu", "cuda" or "cuda:N".
        seed: of the halves, the adapters and the sample.
        command: argv to write into the record.
        progress: called now and then.

    Returns:
        A probe/1 record.

    Raises:
        RankwiseError: bad data, model or settings.
    """
    begun = time.perf_counter()
    _check(epochs, job, scaling, examples, steps)
    options = Options(
        rank=1,
        lora_alpha=16.0 if lora_alpha is None else lora_alpha,
        scaling=scaling,
        target_modules=_modules(target_modules),
        max_length=max_length,
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
    )
    say = progress or (lambda *_: None)
    say("reading model and data", 0, 4)
    made = preparing.prepare(model, data, options, tokenizer=tokenizer, device=device)
    check_weights(made.loaded.model, made.config.model)
    tiny = model == "rankwise:tiny" if isinstance(model, str) else False
    drawn = _drawn(made, examples, seed)
    shapes = {name: lora.shape for name, lora in made.laid.items()}
    form = Form(_form_rank(shapes), learning_rate or (TINY_RATE if tiny else FORM_RATE), steps)
    asked = _Asked(epochs, job, scaling, lora_alpha, ramp_rates, seed, tiny)
    with _evaluating(made.loaded.model) as subject:
        found, start = _find(subject, shapes, drawn, form, asked, say)
    head = _head(command, made, seed)
    recommended = recommend(start, shapes, found.evidence, head, (made.examples.name, made.config.model))
    return record_of(made, drawn, form, found, recommended, head=head, begun=begun)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[Any]:
    """Put a model into evaluation mode for a while; say what to do where the memory is too small."""
    import torch

    mode = model.training
    try:
        model.eval()
        yield model
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "the probe does not fit into the memory of the device; try a smaller --max-length, a model in bfloat16, or "
            "--device cpu"
        ) from error
    finally:
        model.train(mode)


def _find(
    model: Any, shapes: dict[str, tuple[int, int]], drawn: Drawn, form: Form, asked: _Asked, say: Progress
) -> tuple[Found, Start]:
    """Measure bits, gradient and rates, each with what the ones before it came to."""
    rows, count = drawn.rows, len(drawn.everything)
    measured = measure(
        model,
        tuple(shapes),
        rows,
        rank=form.rank,
        learning_rate=form.learning_rate,
        most_steps=form.most_steps,
        seed=asked.seed,
        said=lambda step: say("learning the form of one half, judging by the other", step, 2 * form.most_steps),
    )
    some = random.Random(asked.seed).sample(rows, min(len(rows), GRADIENT_EXAMPLES))
    gradient = pulls(
        model, shapes, some, seed=asked.seed, said=lambda done: say("gradient at the base", done, len(some))
    )
    scale = count / len(rows)
    base, formed, news = (scale * math.fsum(getattr(r, kind) for r in measured.rows) for kind in _KINDS)
    stored = sum(row.news >= STORED_BITS for row in measured.rows) / max(1, len(measured.rows))
    job: Job = _job(asked.job) if asked.job is not None else job_of(news, base, count, stored=stored)
    preset = PRESETS["knowledge" if job == "facts" else "persona"]
    epochs = asked.epochs if asked.epochs is not None else preset.epochs
    exposures = epochs * max(1.0, formed / news if news > 0 else 1.0)
    capacity = capacity_of(news, exposures, tuple(shapes.values()))
    start = start_of(job, capacity, shapes, scaling=asked.scaling, lora_alpha=asked.lora_alpha)
    points: tuple[RatePoint, ...] = ()
    if asked.ramp_rates and job != "nothing":
        points = ramp(
            model,
            tuple(shapes),
            rows,
            rank=start.rank,
            scaling=start.scaling,
            lora_alpha=start.lora_alpha,
            seed=asked.seed,
            said=lambda step: say("raising the learning rate", step, 60),
        )
    evidence = Evidence(news, base, count, job, asked.job is not None, capacity, points, asked.tiny, epochs)
    return Found(measured, formed, gradient, len(some), evidence), start


def _check(epochs: float | None, job: str | None, scaling: str | None, examples: int, steps: int) -> None:
    """Refuse what cannot be, before a model is loaded; numbers that `train` has too are checked there."""
    if job is not None and job not in JOBS:
        raise UsageError(f"--job: there is no {job!r}; there are: {', '.join(JOBS)}")
    if scaling is not None and scaling not in SCALINGS:
        raise UsageError(f"--scaling: there is no {scaling!r}; there are: {', '.join(SCALINGS)}")
    if examples < 1:
        raise UsageError(f"--examples must be 1 or more, got {examples}")
    if steps < 0:
        raise UsageError(f"--steps must be 0 or more, got {steps}")
    if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
        raise UsageError(f"--epochs must be a finite number above 0, got {epochs}")


def _modules(given: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return given if given is None or isinstance(given, str) else tuple(given)


def _drawn(made: preparing.Job, most: int, seed: int) -> Drawn:
    """Return the rows, and which of them are looked at."""
    everything = rows_of(made.columns)
    numbers = list(range(len(everything)))
    if len(numbers) > most:
        numbers = _sampled(len(numbers), most, seed)
    return Drawn(everything, numbers)


def _sampled(count: int, most: int, seed: int) -> list[int]:
    """Draw blocks of neighbours until there are `most` rows.

    >>> len(_sampled(1000, 100, 0)), _sampled(3, 2, 0)[0] >= 0
    (100, True)
    """
    starts = list(range(0, count, BLOCK))
    random.Random(seed).shuffle(starts)
    drawn = [i for start in starts for i in range(start, min(count, start + BLOCK))]
    return sorted(drawn[:most])


def _job(word: str) -> Job:
    return "facts" if word == "facts" else "style"


def _form_rank(shapes: dict[str, tuple[int, int]]) -> int:
    return min(RANK, max(min(shape) for shape in shapes.values()))


def _head(command: Sequence[str] | None, made: preparing.Job, seed: int) -> dict[str, Any]:
    call = f"rankwise.probe({made.config.model!r}, {made.examples.name!r}, ...)"
    return {
        "rankwise": version(),
        "created": now(),
        "command": tuple(command) if command is not None else (call,),
        "device": str(next(made.loaded.model.parameters()).device),
        "seed": seed,
    }
