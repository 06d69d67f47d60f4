"""Bits to learn: the length of a code of the targets for a reader who has the base, and has seen their form.

In: a model and rows of tokens. Out: for every row what it costs the base, what it costs once the form is known, and
what it costs after the rows before it, each in bits.

Three things make the loss of a base larger than what has to be stored, and each is taken off by a measurement:

1. Form and style. A low-rank adapter learns them from one half of the data and is judged on the other, and the other
   way round (`adapting`). What it gains there cannot be about the things that only these rows speak of, because rows
   that speak of the same thing stand in the same half (`related`).
2. Repetition. A fact in three wordings is one fact. The rows are coded in their order by a mixture of predictors: the
   adapted model, and the same model restricted to tokens that the targets of earlier related rows are made of. The
   weight of each is learnt from the other half and on the way, from how often it was right (a KT estimator a context),
   and so is which wordings go together. So the sum is the length of a code that a reader who knows the form could
   decode: an upper bound on what there is.
3. What the base knows, which costs it nothing.

What is left out: inferences that take two rows, such as a city that follows from an employer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rankwise.tuning.probing.adapting import Look, adapted
from rankwise.tuning.probing.passes import (
    Said,
    TokenRow,
    batches,
    log_probabilities,
    target_bits,
    token_bits,
    vocabulary_of,
)
from rankwise.tuning.probing.related import Relation, halves, relate, wordings

if TYPE_CHECKING:
    from torch import Tensor

FLOORS: Final = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Edges of the contexts: the share of the model's own belief that falls on tokens of related rows. A name of a city
that is none of 200 known ones leaves 1e-5 of it there, one of them 5e-3."""

PRIOR: Final = 0.5
"""Krichevsky-Trofimov: half a success of each predictor before anything was seen."""

HELD: Final = 3
"""Predictors on what related rows hold: tokens that stand in one of them, in two, in more. A fact that was told in all
its wordings does not come again, and the counts say so."""

SAME: Final = 0.9
"""Share of the bits of a target that another row has to hold to count as holding the same."""

MOST_POOL: Final = 1 << 14
"""Beliefs kept for one row: target tokens times tokens of related rows."""

LESSER: Final = 0.1
"""Share of the largest belief below which another is not counted as there."""

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


@dataclass(frozen=True, slots=True)
class _Place:
    """One target token.

    Attributes:
        bits: -log2 p of the model.
        beliefs: share of the model's belief on tokens that related rows hold once, twice, more often.
        held: which of the three the token is in, or None.
        pool: token -> the model's belief in it, for the tokens of related rows; empty where there are too many.
    """

    bits: float
    beliefs: tuple[float, ...]
    held: int | None
    pool: dict[int, float]


class _Mixture:
    """Five predictors, weighted by how often each was right in the same context.

    The model; the model restricted to tokens that one, two or more related rows hold; and the model restricted to the
    one related row whose wording most often went with the same target: "the home town of" with "was born in".
    """

    def __init__(self, rows: Sequence[TokenRow], wordings: Sequence[int]) -> None:
        self._rows, self._wordings = rows, wordings
        self._counts: dict[tuple[object, ...], list[float]] = {}
        self._pairs: dict[tuple[int, int], list[float]] = {}

    def cost(self, number: int, places: Sequence[_Place], relation: Relation) -> float:
        """Return the bits of one row, and learn from it."""
        partner, trust = self._partner(number, relation)
        members = set() if partner is None else self._targets(partner)
        tokens = [self._rows[number].ids[at] for at in self._rows[number].targets]
        found = [
            self._token(place, token, members, trust, relation.match)
            for place, token in zip(places, tokens, strict=True)
        ]
        self._learn(number, places, relation)
        return math.fsum(found)

    def _targets(self, number: int) -> set[int]:
        row = self._rows[number]
        return {row.ids[at] for at in row.targets}

    def _partner(self, number: int, relation: Relation) -> tuple[int | None, int]:
        """Return the related row that is most likely to hold the same target, and how likely, in steps from 0 to 4."""
        best, share = None, -1.0
        for other in relation.rows:
            right, tried = self._pairs.get((self._wordings[number], self._wordings[other]), (PRIOR, 2 * PRIOR))
            if right / tried > share:
                best, share = other, right / tried
        return best, 0 if best is None else 1 + sum(share > edge for edge in (0.25, 0.5, 0.75))

    def _learn(self, number: int, places: Sequence[_Place], relation: Relation) -> None:
        """Note with which wordings this one shared its target: nearly all of its bits."""
        total = math.fsum(place.bits for place in places)
        tokens = [self._rows[number].ids[at] for at in self._rows[number].targets]
        for other in relation.rows:
            theirs = self._targets(other)
            shared = math.fsum(place.bits for place, token in zip(places, tokens, strict=True) if token in theirs)
            pair = self._pairs.setdefault((self._wordings[number], self._wordings[other]), [PRIOR, 2 * PRIOR])
            pair[0] += shared >= SAME * total
            pair[1] += 1

    def _token(self, place: _Place, token: int, members: set[int], trust: int, match: float) -> float:
        level = sum(sum(place.beliefs) >= edge for edge in FLOORS)
        most = max(place.beliefs)
        there = tuple(belief > 0 and belief >= LESSER * most for belief in place.beliefs)
        theirs = math.fsum(place.pool.get(member, 0.0) for member in members)
        fits = theirs >= LESSER * most
        # where the wordings say enough, what the candidates look like would only split the counts
        context = (trust, fits, level // 2) if trust in (1, 4) else (trust, fits, level, match >= 0.75, *there)
        counts = self._counts.setdefault(context, [PRIOR] * (2 + HELD))
        own = 2.0**-place.bits
        found = [own] + [0.0] * (1 + HELD)
        if place.held is not None and place.beliefs[place.held] > 0:
            found[1 + place.held] = min(1.0, own / place.beliefs[place.held])
        if token in members and theirs > 0:
            found[-1] = min(1.0, own / theirs)
        total = math.fsum(counts)
        parts = [count / total * p for count, p in zip(counts, found, strict=True)]
        mixed = math.fsum(parts)
        if mixed <= 0:
            return place.bits
        for number, part in enumerate(parts):
            counts[number] += part / mixed
        return -math.log2(mixed)


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
    relations = relate(rows, base)
    plain = [target_bits(row, each) for row, each in zip(rows, base, strict=True)]
    pools = _pools(rows, relations)
    places: dict[int, tuple[_Place, ...]] = {}
    looks: list[tuple[Look, ...]] = []
    steps: list[int] = []
    apart = True
    both: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (((), tuple(range(len(rows)))),)
    if len(rows) < FEWEST:
        places = _placed(model, rows, range(len(rows)), pools)
    else:
        one, two, apart = halves(relations, seed=seed)
        both = ((one, two), (two, one))
        for number, (learn, judge) in enumerate(both):
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
                places |= _placed(made.model, rows, judge, pools)
    told = wordings(rows, relations)
    news: dict[int, float] = {}
    for learn, judge in both:
        mixture = _Mixture(rows, told)
        for i in learn:
            if relations[i].rows:
                mixture.cost(i, places[i], relations[i])
        news |= {i: mixture.cost(i, places[i], relations[i]) for i in judge if relations[i].rows}
    found = []
    for i, row in enumerate(rows):
        formed = math.fsum(place.bits for place in places[i])
        found.append(RowBits(plain[i], formed, news.get(i, formed), len(row.targets)))
    related = sum(bool(relation.rows) for relation in relations)
    return Measured(tuple(found), tuple(looks), tuple(steps), apart, related)


def _from(said: Said, start: int) -> Said:
    return lambda step: said(start + step)


def _pools(rows: Sequence[TokenRow], relations: Sequence[Relation]) -> tuple[dict[int, int], ...]:
    """Return for each row the tokens in the targets of its related rows, and in how many of them each stands."""
    made = []
    for relation in relations:
        pool: Counter[int] = Counter()
        for other in relation.rows:
            pool.update({rows[other].ids[at] for at in rows[other].targets})
        made.append(dict(pool))
    return tuple(made)


def _placed(
    model: Any, rows: Sequence[TokenRow], numbers: Sequence[int], pools: Sequence[dict[int, int]]
) -> dict[int, tuple[_Place, ...]]:
    """Return what a model makes of the targets of some rows, and how much of its belief falls on their pools."""
    import torch

    done = {}
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        for batch in batches(rows, numbers, vocabulary=vocabulary_of(model), device=device):
            logs = log_probabilities(model, batch)
            for place, i in enumerate(batch.rows):
                done[i] = _of_row(logs[place], rows[i], pools[i])
    return done


def _of_row(logs: Tensor, row: TokenRow, pool: dict[int, int]) -> tuple[_Place, ...]:
    """Return the target tokens of one row; `logs` is (tokens - 1, vocabulary)."""
    import torch

    at = torch.tensor(row.targets, device=logs.device)
    if not len(at):
        return ()
    tokens = [row.ids[t] for t in row.targets]
    before = logs[at - 1]  # (targets, vocabulary)
    bits = (before.gather(-1, torch.tensor(tokens, device=logs.device)[:, None])[:, 0].double() / -math.log(2)).tolist()
    if not pool:
        return tuple(_Place(bit, (0.0,) * HELD, None, {}) for bit in bits)
    members = list(pool)
    shares = before[:, members].double().exp().cpu()  # (targets, pool)
    beliefs = torch.zeros(len(tokens), HELD, dtype=torch.float64)
    beliefs.index_add_(1, torch.tensor([_class(pool[token]) for token in members]), shares)
    few = shares.numel() <= MOST_POOL
    return tuple(
        _Place(
            bit,
            tuple(min(1.0, belief) for belief in beliefs[i].tolist()),
            _class(pool[token]) if token in pool else None,
            dict(zip(members, shares[i].tolist(), strict=True)) if few else {},
        )
        for i, (bit, token) in enumerate(zip(bits, tokens, strict=True))
    )


def _class(count: int) -> int:
    """Return the class of a token that stands in so many related rows."""
    return min(count, HELD) - 1
