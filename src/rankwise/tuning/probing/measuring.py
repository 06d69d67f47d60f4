"""`probe`: before any training, how much there is to learn, what could hold it, and what to start with.

In: a model and data. Out: a probe/1 record. The model comes back as it was.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from rankwise.errors import DeviceError, UsageError
from rankwise.records import Finding, now, version
from rankwise.records.probe import (
    Job,
    ProbeGradient,
    ProbeLook,
    ProbeRate,
    ProbeRecord,
    ProbeRow,
)
from rankwise.scaling import SCALINGS
from rankwise.tuning import training
from rankwise.tuning.options import PRESETS, TINY_RATE, Options
from rankwise.tuning.probing.adapting import RANK
from rankwise.tuning.probing.bits import FEWEST, Measured, measure
from rankwise.tuning.probing.capacity import capacity_of
from rankwise.tuning.probing.gradients import pulls
from rankwise.tuning.probing.passes import TokenRow, rows_of
from rankwise.tuning.probing.rates import RatePoint, ramp
from rankwise.tuning.probing.recommending import KNOWN_BITS, Evidence, job_of, recommend, start_of

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

QUANTILES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

JOBS: Final = ("facts", "style")


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
    made = training.prepare(model, data, options, tokenizer=tokenizer, device=device)
    tiny = model == "rankwise:tiny" if isinstance(model, str) else False
    rate = learning_rate or (TINY_RATE if tiny else FORM_RATE)
    everything = rows_of(made.columns)
    numbers = list(range(len(everything)))
    if len(numbers) > examples:
        numbers = _sampled(len(numbers), examples, seed)
    rows = [everything[i] for i in numbers]
    shapes = {name: lora.shape for name, lora in made.laid.items()}
    subject = made.loaded.model
    mode = subject.training
    import torch

    try:
        subject.eval()
        measured = measure(
            subject,
            tuple(shapes),
            rows,
            rank=_form_rank(shapes),
            learning_rate=rate,
            most_steps=steps,
            seed=seed,
            said=lambda step: say("learning the form of one half, judging by the other", step, 2 * steps),
        )
        some = random.Random(seed).sample(rows, min(len(rows), GRADIENT_EXAMPLES))
        gradient = pulls(
            subject, shapes, some, seed=seed, said=lambda done: say("gradient at the base", done, len(some))
        )
        scale = len(everything) / len(rows)
        base, formed, news = (scale * math.fsum(getattr(r, kind) for r in measured.rows) for kind in _KINDS)
        meant: Job = _job(job) if job is not None else job_of(news, base, len(everything))
        planned = epochs if epochs is not None else PRESETS["knowledge" if meant == "facts" else "persona"].epochs
        exposures = planned * max(1.0, formed / news if news > 0 else 1.0)
        capacity = capacity_of(news, exposures, tuple(shapes.values()))
        start = start_of(meant, capacity, shapes, scaling=scaling, lora_alpha=lora_alpha)
        points: tuple[RatePoint, ...] = ()
        if ramp_rates and start.scaling != "unscaled" and meant != "nothing":
            points = ramp(
                subject,
                tuple(shapes),
                rows,
                rank=start.rank,
                scaling=start.scaling,
                lora_alpha=start.lora_alpha,
                seed=seed,
                said=lambda step: say("raising the learning rate", step, 60),
            )
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "the probe does not fit into the memory of the device; try a smaller --max-length, a model in bfloat16, or "
            "--device cpu"
        ) from error
    finally:
        subject.train(mode)
    head = _head(command, made, seed)
    evidence = Evidence(news, base, len(everything), meant, job is not None, capacity, points, tiny, planned)
    plan, decided, sweep = recommend(start, shapes, evidence, head, (made.examples.name, made.config.model))
    return ProbeRecord(
        **head,
        format=ProbeRecord.FORMAT,
        model=made.config.model,
        data=made.examples.name,
        examples=len(everything),
        measured_examples=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        target_tokens=sum(len(row.targets) for row in rows),
        max_length=made.config.max_length,
        target_modules=tuple(shapes),
        bits_to_learn=news,
        base_bits=base,
        form_bits=base - formed,
        repeated_bits=formed - news,
        bits_by_example=_quantiles([r.news for r in measured.rows]),
        base_bits_by_example=_quantiles([r.base for r in measured.rows]),
        known_rows=sum(r.formed <= KNOWN_BITS for r in measured.rows),
        repeated_rows=sum(r.formed > KNOWN_BITS >= r.news for r in measured.rows),
        rows=tuple(
            ProbeRow(
                row=i,
                tokens=r.tokens,
                base_bits=_digits(r.base),
                formed_bits=_digits(r.formed),
                news_bits=_digits(r.news),
            )
            for i, r in zip(numbers, measured.rows, strict=True)
        ),
        adaptation_rank=_form_rank(shapes),
        adaptation_rate=rate,
        adaptation_steps=measured.steps,
        adaptation=tuple(
            ProbeLook(half=half, step=look.step, bits_per_token=_finite(look.bits_per_token))
            for half, looks in enumerate(measured.looks)
            for look in looks
        ),
        apart=measured.apart,
        epochs=planned,
        job=meant,
        job_given=job is not None,
        capacity=capacity,
        gradient=tuple(_gradient(p) for p in gradient),
        gradient_examples=len(some),
        rates=tuple(
            ProbeRate(learning_rate=p.learning_rate, loss=_finite(p.loss), smoothed=_finite(p.smoothed)) for p in points
        ),
        recommendation=plan,
        decided=decided,
        sweep=sweep,
        caveats=_caveats(tiny=tiny, form=made.examples.form, job=meant),
        findings=_findings(measured, rows, len(everything), steps, everything),
        seconds=time.perf_counter() - begun,
    )


_KINDS: Final = ("base", "formed", "news")


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
    return max(1, min(RANK, min(min(shape) for shape in shapes.values())))


def _head(command: Sequence[str] | None, made: training.Job, seed: int) -> dict[str, Any]:
    call = f"rankwise.probe({made.config.model!r}, {made.examples.name!r}, ...)"
    return {
        "rankwise": version(),
        "created": now(),
        "command": tuple(command) if command is not None else (call,),
        "device": str(next(made.loaded.model.parameters()).device),
        "seed": seed,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digits(value: float) -> float:
    """Round to what a row's bits are good for: a thousandth."""
    return round(value, 3)


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return quantiles, each that of a row that is there.

    >>> _quantiles([3.0, 1.0, 2.0])["0.5"]
    2.0
    """
    ordered = sorted(values)
    return {f"{q:g}": ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))] for q in QUANTILES}


def _gradient(pull: Any) -> ProbeGradient:
    return ProbeGradient(
        module=pull.module,
        shape=pull.shape,
        energy=_finite(pull.energy),
        stable_rank=pull.stable_rank,
        effective_rank=pull.effective_rank,
        rank_90=pull.rank_90,
        rank_99=pull.rank_99,
        coherence=pull.coherence,
        sketched=pull.sketched,
    )


def _caveats(*, tiny: bool, form: str, job: Job) -> tuple[str, ...]:
    """Return what the figures do not say."""
    found = [
        "Bits to learn are what it takes to know these rows by heart. They are an upper bound: what follows only "
        "from two rows together, or from reasoning, is counted as news.",
        "That the bits fit into a rank does not mean that they will be learnt: in our runs learning rate and exposures "
        "bound before room did.",
        "The gradient at the base says how training begins. Its effective rank did not tell facts from style in our "
        "measurements, so that no rank is taken from it.",
    ]
    if not tiny:
        found.append(
            "The densities below 100 exposures and the comparison of rules were measured on a model of 1.3 million "
            "parameters; nobody has shown that they hold for yours."
        )
    if form == "text" and job == "facts":
        found.append(
            "In running text every turn of phrase counts as news. Where only the facts in it matter, give them as "
            "prompt and completion; where only the manner does, say --job style."
        )
    return tuple(found)


def _findings(
    measured: Measured, rows: Sequence[TokenRow], count: int, steps: int, everything: Sequence[TokenRow]
) -> tuple[Finding, ...]:
    """Name what makes the figures worth less than usual."""
    found = []
    if not measured.apart:
        text = (
            "Most rows speak of the same thing, so that the halves could not be kept apart: an adapter of the form "
            "had seen rows like those it was judged on, and the bits to learn may be too low."
        )
        found.append(Finding(code="halves-not-apart", level="warning", text=text))
    if len(rows) < FEWEST:
        text = f"{len(rows)} rows are too few to learn their form from one half: the bits to learn contain it."
        found.append(Finding(code="too-few-rows", level="warning", text=text))
    late = [half for half, looks in enumerate(measured.looks) if steps and measured.steps[half] >= steps]
    if late:
        text = (
            f"Held-out rows were still getting cheaper after {steps} steps: the bits to learn contain form. Give more "
            "--steps, or a higher --learning-rate."
        )
        found.append(Finding(code="form-not-learnt", level="warning", text=text))
    if count > len(rows):
        text = (
            f"{len(rows):,} of {count:,} rows were looked at. What a row repeats of one that was not is counted as "
            "news, so that the bits to learn are too high where rows repeat one another."
        )
        found.append(Finding(code="sampled-rows", level="info", text=text))
    same = sum(n - 1 for n in Counter(row.ids for row in everything).values())
    if same:
        found.append(
            Finding(code="equal-rows", level="info", text=f"{same:,} of {count:,} rows are equal to an earlier one.")
        )
    return tuple(found)
