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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

from rankwise.criteria import Spectrum, effective_rank
from rankwise.errors import DeviceError, RankwiseError, UnsupportedAdapterError, UsageError
from rankwise.linalg import factored_values
from rankwise.records import Finding, RunRecord, now, read_record, version
from rankwise.records.probe import CounterMove, CounterTestRecord, Interval, StarvedVerdict
from rankwise.tuning import recalling, runs
from rankwise.tuning.options import DEFAULT_RATE, TINY_RATE, Options
from rankwise.tuning.probing.adapting import mean_loss, order_of
from rankwise.tuning.probing.passes import TokenRow, batch_of, rows_of, target_bits, token_bits
from rankwise.tuning.training import borrowed, prepare

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

WARMUP: Final = 5
"""Steps in which the rate rises: Adam's moments begin anew."""

LEAST_GAIN: Final = 0.02
"""Share of the loss at the start that a move has to gain over going on as it is; less is no reason to train again."""

STUDENT: Final = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Degrees of freedom -> 97.5 % quantile of Student's t; beyond, 2.262 is on the safe side."""

USUAL_SCALE: Final = 0.25
"""alpha / r of 16 at rank 64: scales in common recipes lie here or above."""

VERDICTS: Final[dict[str, StarvedVerdict]] = {
    "scale": "starved by scale",
    "rank": "starved by rank",
    "rate": "starved by rate",
}


@dataclass(frozen=True, slots=True)
class Move:
    """A way of going on: "as it is", or a factor on "scale", "rank" or "rate"."""

    name: str
    factor: int = 1

    @property
    def scale(self) -> int:
        """Factor on the scale."""
        return self.factor if self.name == "scale" else 1

    @property
    def rank(self) -> int:
        """Factor on the rank."""
        return self.factor if self.name == "rank" else 1

    @property
    def rate(self) -> int:
        """Factor on the rate."""
        return self.factor if self.name == "rate" else 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """One adapted layer and its factors as they were loaded: A (r, in), B (out, r)."""

    name: str
    layer: Any
    a: Any
    b: Any
    scaling: float


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
    import torch

    begun = time.perf_counter()
    _check(steps, batch_size, seeds, learning_rate, factors)
    say = progress or (lambda *_: None)
    modules = recalling.check_adapter(adapter)
    made = prepare(model, data, Options(rank=1, max_length=max_length, seed=seed), tokenizer=tokenizer, device=device)
    rate = learning_rate or _rate_of(adapter, model)
    rows = rows_of(made.columns)
    judges = random.Random(seed).sample(rows, min(len(rows), JUDGES))
    order = tuple(range(seed, seed + seeds))
    with borrowed(made.loaded.model) as lent, torch.random.fork_rng():
        lent.eval()
        base_loss = _loss(lent, judges)
        tuned = recalling.attach_adapter(lent, fspath(adapter), modules)
        tuned.eval()
        start = _layers(tuned)
        begin_loss = _loss(tuned, judges)
        if not math.isfinite(begin_loss):
            raise UsageError(
                f"{fspath(adapter)}: the loss with this adapter is no finite number; there is nothing to go on from"
            )

        def go(move: Move, draw: int) -> float:
            weights = _set(start, move, seed=draw)
            _steps(tuned, weights, rows, steps=steps, size=batch_size, rate=rate * move.rate, seed=draw)
            return _loss(tuned, judges)

        try:
            moves = [Move("as it is")]
            for number, name in enumerate(VERDICTS):
                say(f"how far to go: {name}", number, len(VERDICTS) + len(order))
                moves.append(_climb(name, factors, lambda move: go(move, CLIMB + seed)))
            losses: dict[str, list[float]] = {move.name: [] for move in moves}
            for number, draw in enumerate(order):
                say("going on in four ways", len(VERDICTS) + number, len(VERDICTS) + len(order))
                for move in moves:
                    losses[move.name].append(go(move, draw))
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                "the counter-test does not fit into the memory of the device; try a smaller --batch-size or "
                "--max-length, or --device cpu"
            ) from error
        where = str(next(tuned.parameters()).device)
    tried = tuple(_move(move, start, losses, rate) for move in moves)
    verdict, text = judge(tried, begin_loss, max(layer.scaling for layer in start))
    call = f"rankwise.counter_test({made.config.model!r}, {fspath(adapter)!r}, {made.examples.name!r}, ...)"
    return CounterTestRecord(
        format=CounterTestRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else (call,),
        device=where,
        seed=seed,
        model=made.config.model,
        adapter=fspath(adapter),
        data=made.examples.name,
        examples=len(rows),
        judged_examples=len(judges),
        rank=max(len(layer.a) for layer in start),
        scaling=max(layer.scaling for layer in start),
        effective_rank=_effective(start),
        learning_rate=rate,
        optimizer="adamw",
        steps=steps,
        batch_size=batch_size,
        seeds=order,
        start_loss=begin_loss,
        base_loss=base_loss,
        least_gain=LEAST_GAIN,
        moves=tried,
        verdict=verdict,
        text=text,
        caveats=CAVEATS,
        findings=_findings(begin_loss, base_loss),
        seconds=time.perf_counter() - begun,
    )


CAVEATS: Final = (
    "The loss is that of rows the adapter was trained on. A lower one is not better answers to other questions, and "
    "what is forgotten on the way is not measured here.",
    "A few dozen steps tell what binds now. What binds after as many again may be something else.",
    "Under Adam a larger scale and a higher rate are nearly the same thing: where both gain, take the cheaper to "
    "change.",
)


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
    """Return the rate that the adapter was trained at, where its run says so."""
    beside = Path(fspath(adapter)) / runs.RECORD
    if beside.is_file():
        try:
            return read_record(beside, RunRecord).config.learning_rate
        except RankwiseError:  # of a newer version, or cut off: only a default hangs on it
            pass
    return TINY_RATE if model == "rankwise:tiny" else DEFAULT_RATE


def _layers(tuned: Any) -> tuple[_Layer, ...]:
    """Return the adapted layers with copies of their factors; refuse what is more than s B A."""
    from peft.tuners.lora import LoraLayer

    found = []
    for name, module in tuned.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if "default" not in module.lora_A or module.use_dora.get("default", False):
            kind = "DoRA" if module.use_dora.get("default", False) else "an adapter of an embedding"
            raise UnsupportedAdapterError(
                f"{name} has {kind}; the counter-test goes on from plain LoRA on linear layers (A, B and a scale) only"
            )
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        if a.ndim != 2 or b.ndim != 2:
            raise UnsupportedAdapterError(f"{name} is a convolution; the counter-test goes on from linear layers only")
        found.append(_Layer(name, module, a.detach().clone(), b.detach().clone(), float(module.scaling["default"])))
    return tuple(found)


def _set(start: Sequence[_Layer], move: Move, *, seed: int) -> list[Any]:
    """Put every layer where a move begins; return the weights to train."""
    import torch
    from torch import nn

    draw = torch.Generator().manual_seed(seed)
    weights = []
    for layer in start:
        r, into = layer.a.shape
        out = layer.b.shape[0]
        more = min(r * move.rank, min(out, into)) - r
        a, b = layer.a, layer.b / move.scale
        if move.rank > 1 and more > 0:
            bound = 1 / math.sqrt(into)  # PEFT's: kaiming_uniform with a = sqrt(5)
            rows = (2 * torch.rand(more, into, generator=draw) - 1) * bound
            a = torch.cat([a, rows.to(a)])
            b = torch.cat([b, b.new_zeros(out, more)], dim=1)
        for factors, value in ((layer.layer.lora_A, a), (layer.layer.lora_B, b)):
            factors["default"].weight = nn.Parameter(value.clone())
            weights.append(factors["default"].weight)
        layer.layer.scaling["default"] = layer.scaling * move.scale
    return weights


def _steps(
    model: Any, weights: list[Any], rows: Sequence[TokenRow], *, steps: int, size: int, rate: float, seed: int
) -> None:
    """Take the steps. The order of the rows hangs on the seed alone, so that all moves see the same batches."""
    import torch

    device = model.get_input_embeddings().weight.device
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    for step, numbers in enumerate(order_of(len(rows), steps=steps, size=min(size, len(rows)), seed=seed), start=1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / WARMUP)
        mean_loss(model, batch_of(rows, numbers, device)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, rows: Sequence[TokenRow]) -> float:
    """Return nats a target token."""
    bits = token_bits(model, rows)
    tokens = sum(len(row.targets) for row in rows)
    return (
        math.log(2) * math.fsum(target_bits(row, each) for row, each in zip(rows, bits, strict=True)) / max(1, tokens)
    )


def _effective(start: Sequence[_Layer]) -> float | None:
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


def _move(move: Move, start: Sequence[_Layer], losses: dict[str, list[float]], rate: float) -> CounterMove:
    rank = max(len(layer.a) for layer in start)
    scale = max(layer.scaling for layer in start)
    side = max(min(layer.a.shape[1], layer.b.shape[0]) for layer in start)
    found = losses[move.name]
    asis = losses["as it is"]
    gains = [before - after for before, after in zip(asis, found, strict=True)]
    gain, interval = paired(gains) if move.name != "as it is" else (None, None)
    new_rank = min(rank * move.rank, side)
    texts = {
        "as it is": "as it is",
        "scale": f"scale {scale:.3g} -> {scale * move.scale:.3g}",
        "rank": f"rank {rank} -> {new_rank}",
        "rate": f"rate {rate:.3g} -> {rate * move.rate:.3g}",
    }
    finite = [loss for loss in found if math.isfinite(loss)]
    return CounterMove(
        move=move.name,
        text=texts[move.name],
        rank=new_rank,
        factor=float(move.factor),
        losses=tuple(loss if math.isfinite(loss) else None for loss in found),
        loss=statistics.fmean(finite) if len(finite) == len(found) else None,
        gain=gain,
        gain_interval=interval,
    )


def paired(gains: Sequence[float]) -> tuple[float | None, Interval | None]:
    """Return the mean of paired differences with its 95 % interval; None where one is no number.

    >>> paired([1.0, 1.0, 1.0])
    (1.0, (1.0, 1.0))
    """
    if not all(map(math.isfinite, gains)):
        return None, None
    mean = statistics.fmean(gains)
    half = STUDENT.get(len(gains) - 1, 2.262) * statistics.stdev(gains) / math.sqrt(len(gains))
    return mean, (mean - half, mean + half)


def judge(moves: Sequence[CounterMove], start_loss: float, scaling: float) -> tuple[StarvedVerdict, str]:
    """Return the verdict and its reason: the move that gains most beyond noise, if any does.

    Args:
        moves: as tried, the first "as it is".
        start_loss: before any step.
        scaling: of the adapter, which decides between scale and rate where both gain alike.
    """
    least = LEAST_GAIN * start_loss
    asis = moves[0]
    went = "" if asis.loss is None else f" As it is, the loss went from {start_loss:.4g} to {asis.loss:.4g}."
    sure = [m for m in moves[1:] if m.gain_interval is not None and m.gain_interval[0] > least]
    if not sure:
        open_ones = [m.text for m in moves[1:] if not _gains_nothing(m, least)]
        if not open_ones:
            return "sufficient", f"No move gains {least:.4f} nats a token over going on as it is.{went}"
        differ = f"The orders of the batches differ by more than what may be gained ({', '.join(open_ones)})"
        return "undecided", f"{differ}: take more --seeds.{went}"
    best = max(sure, key=lambda m: m.gain or 0.0)
    tie = ""
    if best.move in _STEP and (other := next((m for m in sure if m.move in _STEP and m is not best), None)) is not None:
        gap, interval = paired([x - y for x, y in zip(_known(other), _known(best), strict=True)])
        if gap is not None and interval is not None and (interval[0] <= 0 or gap <= least):
            low = scaling < USUAL_SCALE
            best = next(m for m in (best, other) if m.move == ("scale" if low else "rate"))
            tie = (
                f" Scale and rate gain alike, within {max(gap, least):.3g}: under Adam they are nearly one knob. A "
                f"scale of {scaling:.3g} is {'below' if low else 'not below'} {USUAL_SCALE:g}, so it is called "
                f"{best.move}."
            )
    more = "".join(f" {m.text} gains {m.gain:.4f}." for m in sure if m is not best)
    text = f"{best.text} lowers the loss by {best.gain:.4f} nats a token more than going on as it is.{tie}{more}{went}"
    return VERDICTS[best.move], text


_STEP: Final = ("scale", "rate")


def _gains_nothing(move: CounterMove, least: float) -> bool:
    """Tell whether a move gains nothing: not on average, or surely less than what counts. Divergence is no gain."""
    if move.gain is None or move.gain_interval is None:
        return True
    return move.gain <= 0 or move.gain_interval[1] <= least


def _known(move: CounterMove) -> list[float]:
    return [math.nan if loss is None else loss for loss in move.losses]


def _findings(start_loss: float, base_loss: float) -> tuple[Finding, ...]:
    if start_loss <= base_loss:
        return ()
    text = (
        f"With the adapter these rows cost {start_loss:.4g} nats a token, without it {base_loss:.4g}: it was "
        "trained on other data, or it is broken. Give the data that it was trained on."
    )
    return (Finding(code="worse-than-base", level="warning", text=text),)
