"""Starved or sufficient: go on from a trained adapter in four ways and see which one lowers the loss.

In: a base, an adapter, the data it was trained on. Out: a counter-test/1 record. Nothing is kept of the steps taken.

A spectrum cannot say whether directions that did not grow were not needed or were starved. So the adapter is continued
as it is, at a larger scale, at a larger rank and at a higher rate, with the same steps on the same batches. All four
begin from the same function: where the scale is multiplied B is divided by as much, and new ranks begin with B = 0.

Under Adam scale and rate are nearly one knob: a scale k times as large with B divided by k is a rate of B k times as
high, while a higher rate moves A too. So a starved adapter often gains by both, and the text says so.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

from rankwise.criteria import Spectrum, effective_rank
from rankwise.errors import DeviceError, NothingToMeasureError, RankwiseError, UsageError
from rankwise.linalg import factored_values
from rankwise.records import RunRecord, now, read_record, version
from rankwise.records.probe import CounterMove, CounterTestRecord
from rankwise.tuning import preparing, recalling, runs
from rankwise.tuning.borrowing import borrowed
from rankwise.tuning.continuing import Layer, Move, layers_of, loss_of, place, take_steps
from rankwise.tuning.finite import check_weights
from rankwise.tuning.options import DEFAULT_RATE, TINY_RATE, Options
from rankwise.tuning.probing.passes import TokenRow, rows_of
from rankwise.tuning.starvation import CAVEATS, VERDICTS, findings_of, judge, paired

Progress = Callable[[str, int, int], None]

STEPS: Final = 40
BATCH: Final = 16
SEEDS: Final = 4
FACTORS: Final = (4, 16, 64)
"""What scale, rank and rate are multiplied by: the next is tried where the last gained more than the one before. A
scale that is a hundred times too small does not show at four times as much: the rate then gains more, until it
breaks."""

JUDGES: Final = 256
"""Rows that the losses are taken on: an even sample of those trained on, since facts about others cannot be learnt."""

CLIMB: Final = 2**31
"""Added to the seed for the order of the batches on which the factors are chosen, which judges nothing."""

LEAST_GAIN: Final = 0.02
LEAST_OF_BASE: Final = 0.005
"""Shares of the loss at the start, and of the base's, that a move has to gain over going on as it is; less is no reason
to train again. Of an adapter that knows its rows a share of the loss alone would be a gain in next to nothing."""


@dataclass(frozen=True, slots=True)
class _Course:
    """How every move goes on.

    Attributes:
        rows: that steps are taken on.
        judges: those of them that the losses are taken on.
        steps: of AdamW.
        batch_size: rows a step.
        rate: before a move's own factor.
        factors: to choose from.
        order: seeds of the batches, one for each loss of a move.
    """

    rows: Sequence[TokenRow]
    judges: Sequence[TokenRow]
    steps: int
    batch_size: int
    rate: float
    factors: Sequence[int]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What going on came to.

    Attributes:
        start: the adapter as it was loaded.
        base_loss: without it.
        start_loss: with it, before any step.
        losses: move -> loss after its steps, for each order of the batches; "as it is" first.
        device: where it was measured.
    """

    start: tuple[Layer, ...]
    base_loss: float
    start_loss: float
    losses: Mapping[Move, Sequence[float]]
    device: str


def counter_test(
    model: Any,
    adapter: str | PathLike[str],
    data: Any,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH,
    learning_rate: float | None = None,
    seeds: int = SEEDS,
    factors: Sequence[int] = FACTORS,
    max_length: int | None = None,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> CounterTestRecord:
    """Say whether a trained adapter was starved by its scale, its rank or its rate, or had enough.

    Args:
        model: the base: folder, hub id, `rankwise:tiny`, or a live causal LM, which comes back as it was.
        adapter: PEFT LoRA adapter: folder or hub id.
        data: what it was trained on; as in `train`.
        steps: of AdamW for every move and order of the batches.
        batch_size: rows a step.
        learning_rate: to go on at; where it is not given that of the run, if run.json lies beside the adapter, else
            2e-4 (3e-3 for `rankwise:tiny`).
        seeds: orders of the batches, 2 or more: the intervals are over them.
        factors: on the scale, the rank and the rate, ascending; how far to go is found on an order of the batches of
            its own.
        max_length: tokens an example is cut at.
        tokenizer: of a live model.
        device: "cpu", "cuda" or "cuda:N".
        seed: first of the seeds.
        command: argv to write into the record.
        progress: called now and then.

    Returns:
        A counter-test/1 record.

    Raises:
        RankwiseError: model, adapter or data cannot be read or do not fit each other, or the adapter is no plain LoRA.
    """
    begun = time.perf_counter()
    _check(steps, batch_size, seeds, learning_rate, factors)
    modules = recalling.check_adapter(adapter)
    options = Options(rank=1, max_length=max_length, seed=seed)
    made = preparing.prepare(model, data, options, tokenizer=tokenizer, device=device)
    check_weights(made.loaded.model, made.config.model)
    rate = learning_rate or _rate_of(adapter, model)
    everything = rows_of(made.columns)
    # rows that no step sees cannot be learnt in it: with more rows than the steps take, some are gone on with
    rows = random.Random(seed).sample(everything, min(len(everything), steps * batch_size))
    judges = random.Random(seed).sample(rows, min(len(rows), JUDGES))
    course = _Course(rows, judges, steps, batch_size, rate, factors, tuple(range(seed, seed + seeds)))
    found = _find(made, fspath(adapter), modules, course, progress or (lambda *_: None))
    tried = tuple(_move(move, found, rate) for move in found.losses)
    least = max(LEAST_GAIN * found.start_loss, LEAST_OF_BASE * found.base_loss)
    scaling = max(layer.scaling for layer in found.start)
    verdict, text = judge(tried, found.start_loss, scaling, least=least)
    call = f"rankwise.counter_test({made.config.model!r}, {fspath(adapter)!r}, {made.examples.name!r}, ...)"
    return CounterTestRecord(
        format=CounterTestRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else (call,),
        device=found.device,
        seed=seed,
        model=made.config.model,
        adapter=fspath(adapter),
        data=made.examples.name,
        examples=len(everything),
        judged_examples=len(judges),
        rank=max(len(layer.a) for layer in found.start),
        scaling=scaling,
        effective_rank=_effective(found.start),
        learning_rate=rate,
        optimizer="adamw",
        steps=steps,
        batch_size=batch_size,
        seeds=course.order,
        start_loss=found.start_loss,
        base_loss=found.base_loss,
        least_gain=least,
        moves=tried,
        verdict=verdict,
        text=text,
        caveats=CAVEATS,
        findings=findings_of(
            found.start_loss, found.base_loss, tried[0].loss, least=least, gone_on=len(rows), count=len(everything)
        ),
        seconds=time.perf_counter() - begun,
    )


def _find(made: preparing.Job, adapter: str, modules: set[str], course: _Course, say: Progress) -> _Found:
    """Put the adapter on and go on from it; the base comes back as it was."""
    import torch

    with borrowed(made.loaded.model) as lent, torch.random.fork_rng():
        lent.eval()
        base_loss = loss_of(lent, course.judges)
        if not math.isfinite(base_loss):
            raise NothingToMeasureError(
                f"{made.config.model}: the loss of the base is no finite number; its weights hold NaN or infinity, or "
                "its dtype is too narrow. Look at the checkpoint, or load it in float32."
            )
        tuned = recalling.attach_adapter(lent, adapter, modules)
        tuned.eval()
        check_weights(tuned, adapter)
        start = layers_of(tuned)
        start_loss = loss_of(tuned, course.judges)
        if not math.isfinite(start_loss):
            raise NothingToMeasureError(
                f"{adapter}: the loss with this adapter is no finite number; there is nothing to go on from"
            )
        try:
            losses = _go_on(tuned, start, course, say)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                "the counter-test does not fit into the memory of the device; try a smaller --batch-size or "
                "--max-length, or --device cpu"
            ) from error
        return _Found(start, base_loss, start_loss, losses, str(next(tuned.parameters()).device))


def _go_on(tuned: Any, start: Sequence[Layer], course: _Course, say: Progress) -> dict[Move, list[float]]:
    """Choose a factor for every way of going on, then go all ways on the same batches."""

    def go(move: Move, draw: int) -> float:
        weights = place(start, move, seed=draw)
        rate = course.rate * move.rate
        take_steps(tuned, weights, course.rows, steps=course.steps, size=course.batch_size, rate=rate, seed=draw)
        return loss_of(tuned, course.judges)

    done = len(VERDICTS) + len(course.order)
    moves = [Move("as it is")]
    for number, name in enumerate(VERDICTS):
        say(f"how far to go: {name}", number, done)
        moves.append(_climb(name, course.factors, lambda move: go(move, CLIMB + course.order[0])))
    losses: dict[Move, list[float]] = {move: [] for move in moves}
    for number, draw in enumerate(course.order):
        say("going on in four ways", len(VERDICTS) + number, done)
        for move in moves:
            losses[move].append(go(move, draw))
    return losses


def _check(steps: int, size: int, seeds: int, rate: float | None, factors: Sequence[int]) -> None:
    """Refuse what cannot be, before a model is loaded."""
    for flag, whole, least in (("--steps", steps, 1), ("--batch-size", size, 1), ("--seeds", seeds, 2)):
        if isinstance(whole, bool) or not isinstance(whole, int) or whole < least:
            raise UsageError(f"{flag} must be a whole number of {least} or more for a counter-test, got {whole!r}")
    wrong = [f for f in factors if isinstance(f, bool) or not isinstance(f, int) or f < 2]
    if not factors or wrong or list(factors) != sorted(set(factors)):
        raise UsageError(f"factors must be whole numbers of 2 or more, ascending, got {list(factors)}")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"--learning-rate must be a finite number above 0, got {rate}")


def _climb(name: str, factors: Sequence[int], go: Callable[[Move], float]) -> Move:
    """Return the factor after which the loss no longer falls, the first at least."""
    best, lowest = factors[0], math.inf
    for factor in factors:
        loss = go(Move(name, factor))
        if not loss < lowest:
            break
        best, lowest = factor, loss
    return Move(name, best)


def _rate_of(adapter: str | PathLike[str], model: object) -> float:
    """Return the rate that the adapter was trained at, where its run says so and AdamW would bear it."""
    beside = Path(fspath(adapter)) / runs.RECORD
    if beside.is_file():
        try:
            config = read_record(beside, RunRecord).config
            if "adam" in config.optimizer:  # a rate for SGD is a hundred times too high here
                return config.learning_rate
        except RankwiseError:  # of a newer version, or cut off: only a default hangs on it
            pass
    return TINY_RATE if model == "rankwise:tiny" else DEFAULT_RATE


def _effective(start: Sequence[Layer]) -> float | None:
    """Return the mean effective rank of the updates; None where all are zero."""
    ranks = []
    for layer in start:
        a, b = layer.a.double().cpu().numpy(), layer.b.double().cpu().numpy()
        values = factored_values(a, b, layer.scaling)
        shape = int(b.shape[0]), int(a.shape[1])
        rank = effective_rank(Spectrum(layer.name, shape, tuple(map(float, values.sigma)), values.energy))
        if rank is not None:
            ranks.append(rank)
    return statistics.fmean(ranks) if ranks else None


def _move(move: Move, found: _Found, rate: float) -> CounterMove:
    rank = max(len(layer.a) for layer in found.start)
    scale = max(layer.scaling for layer in found.start)
    side = max(min(layer.a.shape[1], layer.b.shape[0]) for layer in found.start)
    losses = found.losses[move]
    gains = [before - after for before, after in zip(found.losses[Move("as it is")], losses, strict=True)]
    gain, interval = paired(gains) if move.name != "as it is" else (None, None)
    new_rank = min(rank * move.rank, side)
    texts = {
        "as it is": "as it is",
        "scale": f"scale {scale:.3g} -> {scale * move.scale:.3g}",
        "rank": f"rank {rank} -> {new_rank}",
        "rate": f"rate {rate:.3g} -> {rate * move.rate:.3g}",
    }
    finite = [loss for loss in losses if math.isfinite(loss)]
    return CounterMove(
        move=move.name,
        text=texts[move.name],
        rank=new_rank,
        factor=float(move.factor),
        losses=tuple(loss if math.isfinite(loss) else None for loss in losses),
        loss=statistics.fmean(finite) if len(finite) == len(losses) else None,
        gain=gain,
        gain_interval=interval,
    )
