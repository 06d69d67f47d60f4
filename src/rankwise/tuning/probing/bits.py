"""Bits to learn: the length of a code of the targets for a reader who has the base, their prompts and their form.

In: a model and rows of tokens. Out: for every row what it costs the base, what it costs once the form is known, and
what it costs after the rows before it, each in bits.

Three things make the loss of a base larger than what has to be stored, and each is taken off by a measurement:

1. Form and style. A low-rank adapter learns them from one half of the data and is judged on the other, and the other
   way round (`adapting`). What it gains there cannot be about the things that only these rows speak of, because rows
   that speak of the same thing stand in the same half (`related`).
2. Repetition. A fact in three wordings is one fact. The rows are coded in their order by a mixture of predictors: the
   adapted model, and the same model restricted to tokens that the targets of earlier related rows are made of. The
   weight of each is learnt on the way, from how often it was right in the rows before (`mixing`), and so is which
   wordings go together. A row that equals an earlier one is told as such. So the sum is the length of a code that can
   be decoded, and an upper bound. The reader has to have the base, the prompts and the lengths, the adapters of the
   form, and has to know which of the two a row is coded by. The adapters are not counted, as form is not: the facts in
   each are those of the half that it does not judge. Where the halves could not be kept apart, no bound is claimed.
3. What the base knows, which costs it nothing.

What is left out: inferences that take two rows, such as a city that follows from an employer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rankwise.errors import NothingToMeasureError
from rankwise.tuning.probing.adapting import Look, adapted
from rankwise.tuning.probing.mixing import HELD, Mixture, Place, Seen
from rankwise.tuning.probing.passes import (
    Said,
    TokenRow,
    batches,
    log_probabilities,
    target_bits,
    token_bits,
    vocabulary_of,
)
from rankwise.tuning.probing.related import (
    Head,
    Relation,
    common_of,
    halves,
    heads_of,
    relate,
    twins_of,
)

if TYPE_CHECKING:
    from torch import Tensor

MOST_POOL: Final = 1 << 14
"""Beliefs kept for one row: target tokens times tokens of related rows."""

FEWEST: Final = 8
"""Rows below which there are no halves to judge one by the other."""


@dataclass(frozen=True, slots=True)
class RowBits:
    """What one row costs, in bits.

    Attributes:
        base: the base, on the target tokens.
        formed: once their form is known.
        news: after the rows before it.
        tokens: target tokens.
    """

    base: float
    formed: float
    news: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What the rows come to.

    Attributes:
        rows: in their order.
        looks: of the adaptations, one list a half; empty where there were too few rows.
        steps: that each of them kept.
        apart: whether no row was judged by an adapter that had seen a related one.
        related: rows that are related to an earlier one.
    """

    rows: tuple[RowBits, ...]
    looks: tuple[tuple[Look, ...], ...]
    steps: tuple[int, ...]
    apart: bool
    related: int


def measure(
    model: Any,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    *,
    rank: int,
    learning_rate: float,
    most_steps: int,
    seed: int,
    said: Said | None = None,
) -> Measured:
    """Measure the bits to learn.

    Args:
        model: a causal LM in evaluation mode.
        names: modules that the adapter of the form is put on.
        rows: examples, in the order in which they are coded.
        rank: of that adapter.
        learning_rate: of its AdamW.
        most_steps: for each half.
        seed: of the halves and the adapter.
        said: told the passes and steps done.
    """
    base = token_bits(model, rows)
    plain = [target_bits(row, each) for row, each in zip(rows, base, strict=True)]
    _check(plain)
    relations = relate(rows, base)
    seen: dict[int, Seen] = {}
    looks: list[tuple[Look, ...]] = []
    steps: list[int] = []
    apart = True
    heads = heads_of(rows)
    if len(rows) < FEWEST:
        seen = _seen(model, rows, range(len(rows)), relations, heads)
    else:
        relations, one, two, apart = _apart(rows, base, relations, seed)
        for number, (learn, judge) in enumerate(((one, two), (two, one))):
            with adapted(
                model,
                names,
                [rows[i] for i in learn],
                [rows[i] for i in judge],
                rank=rank,
                learning_rate=learning_rate,
                most_steps=most_steps,
                seed=seed,
                said=None if said is None else _from(said, number * most_steps),
            ) as made:
                looks.append(made.looks)
                steps.append(made.steps)
                seen |= _seen(made.model, rows, judge, relations, heads)
    news = coded(rows, seen, relations, heads)
    found = []
    for i, row in enumerate(rows):
        formed = math.fsum(place.bits for place in seen[i].places)
        found.append(RowBits(plain[i], formed, news[i], len(row.targets)))
    related = sum(bool(relation.rows) for relation in relations)
    return Measured(tuple(found), tuple(looks), tuple(steps), apart, related)


def coded(
    rows: Sequence[TokenRow], seen: Mapping[int, Seen], relations: Sequence[Relation], heads: Sequence[Head]
) -> tuple[float, ...]:
    """Return the bits of every row, coded one after another; nothing is taken from the rows after it.

    Args:
        rows: in their order.
        seen: what a model that has not seen a row makes of it, by its number.
        relations: as `relate` returns them.
        heads: as `heads_of` returns them.
    """
    mixture = Mixture(rows)
    found = []
    for i, (relation, head, twin) in enumerate(zip(relations, heads, twins_of(rows), strict=True)):
        if relation.rows or head or twin.known:
            found.append(mixture.cost(i, seen[i], relation))
        else:
            found.append(math.fsum(place.bits for place in seen[i].places))
    return tuple(found)


def _check(bits: Sequence[float]) -> None:
    """Refuse a base that gives no figures."""
    wrong = [i for i, each in enumerate(bits) if not math.isfinite(each)]
    if wrong:
        raise NothingToMeasureError(
            f"the base gives no finite loss on {len(wrong):,} of {len(bits):,} rows, first row {wrong[0]} (from 0): "
            "its weights hold NaN or infinity, or its dtype is too narrow. Look at the checkpoint, or load it in "
            "float32."
        )


def _apart(
    rows: Sequence[TokenRow], bits: Sequence[Sequence[float]], relations: tuple[Relation, ...], seed: int
) -> tuple[tuple[Relation, ...], tuple[int, ...], tuple[int, ...], bool]:
    """Return relations, two halves, and whether they are free of relations.

    Where most rows are one cluster, what nearly all of them share is left out: a system prompt, most often. It may be
    the one thing that they all speak of, so the halves are not called apart.
    """
    one, two, apart = halves(relations, seed=seed)
    if apart:
        return relations, one, two, True
    fewer = relate(rows, bits, but=common_of(rows))
    again = halves(fewer, seed=seed)
    return (fewer, again[0], again[1], False) if again[2] else (relations, one, two, False)


def _from(said: Said, start: int) -> Said:
    return lambda step: said(start + step)


def _seen(
    model: Any,
    rows: Sequence[TokenRow],
    numbers: Sequence[int],
    relations: Sequence[Relation],
    heads: Sequence[Head],
) -> dict[int, Seen]:
    """Return what a model makes of the targets of some rows, and how much of its belief falls on related ones."""
    import torch

    done = {}
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        for batch in batches(rows, numbers, vocabulary=vocabulary_of(model), device=device):
            logs = log_probabilities(model, batch)
            for place, i in enumerate(batch.rows):
                pool: Counter[int] = Counter()
                for other in relations[i].rows:
                    pool.update({rows[other].ids[at] for at in rows[other].targets})
                done[i] = _of_row(logs[place], rows[i], pool, heads[i])
    return done


def _of_row(logs: Tensor, row: TokenRow, pool: Counter[int], head: Head) -> Seen:
    """Return the target tokens of one row; `logs` is (tokens - 1, vocabulary)."""
    import torch

    at = torch.tensor(row.targets, device=logs.device)
    if not len(at):
        return Seen((), np.empty(0, np.int64), np.empty((0, 0), np.float32))
    tokens = [row.ids[t] for t in row.targets]
    before = logs[at - 1]  # (targets, vocabulary)
    bits = (before.gather(-1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].double() / -math.log(2)).tolist()
    members = list(pool)
    shares = before[:, members].double().exp().cpu()  # (targets, pool)
    beliefs = torch.zeros(len(tokens), HELD, dtype=torch.float64)
    beliefs.index_add_(1, torch.tensor([_class(pool[token]) for token in members], dtype=torch.long), shares)
    places = []
    for i, (bit, token) in enumerate(zip(bits, tokens, strict=True)):
        if row.targets[i] in head:
            after = head[row.targets[i]]
            belief = float(before[i, list(after)].double().exp().sum()) if after else 0.0
            places.append(Place(bit, (min(1.0, belief), 0.0, 0.0), 0 if token in after else None, head=True))
        else:
            told = tuple(min(1.0, belief) for belief in beliefs[i].tolist())
            places.append(Place(bit, told, _class(pool[token]) if token in pool else None))
    if shares.numel() > MOST_POOL:
        members, shares = [], shares[:, :0]
    return Seen(tuple(places), np.array(members, np.int64), shares.float().numpy())


def _class(count: int) -> int:
    """Return the class of a token that stands in so many related rows."""
    return min(count, HELD) - 1
