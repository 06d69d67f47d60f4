"""The code of the targets: a mixture of predictors, weighted by how often each was right.

In: what a model makes of every target token, and which earlier rows speak of the same thing. Out: bits, row by row.
One pass in the order of the rows, and nothing is taken from later ones: a reader who has the model, the prompts, the
lengths and the rows before could decode the next. What it takes to learn which predictor to trust is in the bits.

Of a text there is no prompt: which rows it is related to is known after its head alone, so the head is coded by what
earlier texts have after the same words.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rankwise.tuning.probing.passes import TokenRow
from rankwise.tuning.probing.related import Relation, key_of, twins_of

FLOORS: Final = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Edges of the contexts: the share of the model's own belief that falls on tokens of related rows. A name of a city
that is none of 200 known ones leaves 1e-5 of it there, one of them 5e-3."""

PRIOR: Final = 0.5
"""Krichevsky-Trofimov: half a success of each predictor before anything was seen. In a finer context the same weight is
shared out as the coarser ones around it found: what few rows show need not be learnt again in every corner."""

HELD: Final = 3
"""Predictors on what related rows hold: tokens that stand in one of them, in two, in more. A fact that was told in all
its wordings does not come again, and the counts say so."""

SAME: Final = 0.9
"""Share of the bits of a target that another row has to hold to count as holding the same."""

LESSER: Final = 0.1
"""Share of the largest belief below which another is not counted as there."""

HEAD: Final = -1
"""Trust in the context of a text's head, whose related rows are not known before it is read."""


@dataclass(frozen=True, slots=True)
class Place:
    """One target token.

    Attributes:
        bits: -log2 p of the model.
        beliefs: share of the model's belief on tokens that related rows hold once, twice, more often; at the head of a
            text, on tokens that earlier rows have after the same words.
        held: which of the three the token is in, or None.
        head: whether it stands in the head of a text.
    """

    bits: float
    beliefs: tuple[float, ...]
    held: int | None
    head: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model makes of one row.

    Attributes:
        places: of its target tokens.
        pool: (pool), tokens in the targets of related rows; empty where there are none, or too many to keep.
        shares: (targets, pool), the model's belief in each, float32.
    """

    places: tuple[Place, ...]
    pool: NDArray[np.int64]
    shares: NDArray[np.float32]

    def on(self, members: set[int]) -> list[float]:
        """Return how much of the belief falls on some of the pool, for every target."""
        if not members or not len(self.pool):
            return [0.0] * len(self.places)
        found: list[float] = self.shares[:, np.isin(self.pool, list(members))].sum(axis=1, dtype=np.float64).tolist()
        return found


class Mixture:
    """Five predictors, weighted by how often each was right in the same context.

    The model; the model restricted to tokens that one, two or more related rows hold; and the model restricted to the
    one related row whose wording most often went with the same target: "the home town of" with "was born in".

    All of them see bags of tokens, which is too little for a long row that comes again. So where earlier rows begin as
    this one does, it is told first whether it is one of them, and which.
    """

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = rows
        self._keys = [frozenset(row.ids[at] for at in key_of(row)) for row in rows]
        self._counts: dict[tuple[object, ...], list[float]] = {}
        self._pairs: dict[int, list[float]] = {}
        self._twins = twins_of(rows)
        self._equal: dict[int, list[float]] = {}

    def cost(self, number: int, seen: Seen, relation: Relation) -> float:
        """Return the bits of one row, and learn from it."""
        pairs = [self._pair(number, other) for other in relation.rows]
        partner, trust = self._partner(relation, pairs)
        members = set() if partner is None else self._targets(partner)
        tokens = [self._rows[number].ids[at] for at in self._rows[number].targets]
        found = [self._twin(number)]
        for place, token, theirs in zip(seen.places, tokens, seen.on(members), strict=True):
            if place.head:
                found.append(self._token(place, [(HEAD,)], 0.0, inside=False))
            elif not self._twins[number].equal:
                context = self._context(place, theirs, trust, relation.match)
                nested = [context[:depth] for depth in range(len(context) + 1)]
                found.append(self._token(place, nested, theirs, inside=token in members))
        self._learn(number, seen.places, relation, pairs)
        return math.fsum(found)

    def _twin(self, number: int) -> float:
        """Return the bits that say whether a row is one of those that begin as it does, and which."""
        twin = self._twins[number]
        if not twin.known:
            return 0.0
        counts = self._equal.setdefault(min(twin.known, 2), [PRIOR, PRIOR])  # the only one, or one of several
        bits = -math.log2(counts[twin.equal] / math.fsum(counts))
        counts[twin.equal] += 1
        return bits + (math.log2(twin.known) if twin.equal else 0.0)

    def _targets(self, number: int) -> set[int]:
        row = self._rows[number]
        return {row.ids[at] for at in row.targets}

    def _pair(self, number: int, other: int) -> int:
        """Return a number for the wordings of two rows: what each says of the thing that the other does not.

        A hash, since all these words would be many to keep; should two be the same, it costs bits and no more.
        """
        mine, theirs = self._keys[number], self._keys[other]
        return hash(frozenset((mine - theirs, theirs - mine)))  # either may come first

    def _partner(self, relation: Relation, pairs: Sequence[int]) -> tuple[int | None, int]:
        """Return the related row that is most likely to hold the same target, and how likely, in steps from 0 to 4."""
        best, share = None, -1.0
        for other, pair in zip(relation.rows, pairs, strict=True):
            right, tried = self._pairs.get(pair, (PRIOR, 2 * PRIOR))
            if right / tried > share:
                best, share = other, right / tried
        return best, 0 if best is None else 1 + sum(share > edge for edge in (0.25, 0.5, 0.75))

    def _learn(self, number: int, places: Sequence[Place], relation: Relation, pairs: Sequence[int]) -> None:
        """Note with which wordings this one shared its target: nearly all of its bits."""
        tokens = [self._rows[number].ids[at] for at in self._rows[number].targets]
        told = [(place.bits, token) for place, token in zip(places, tokens, strict=True) if not place.head]
        total = math.fsum(bits for bits, _ in told)
        for other, pair in zip(relation.rows, pairs, strict=True):
            theirs = self._targets(other)
            shared = math.fsum(bits for bits, token in told if token in theirs)
            counts = self._pairs.setdefault(pair, [PRIOR, 2 * PRIOR])
            counts[0] += shared >= SAME * total
            counts[1] += 1

    def _context(self, place: Place, theirs: float, trust: int, match: float) -> tuple[object, ...]:
        level = sum(sum(place.beliefs) >= edge for edge in FLOORS)
        most = max(place.beliefs)
        there = tuple(belief > 0 and belief >= LESSER * most for belief in place.beliefs)
        fits = theirs >= LESSER * most
        # where the wordings say enough, what the candidates look like would only split the counts
        return (trust, fits, level // 2) if trust in (1, 4) else (trust, fits, level, match >= 0.75, *there)

    def _token(self, place: Place, nested: Sequence[tuple[object, ...]], theirs: float, *, inside: bool) -> float:
        """Return the bits of one token, and count which predictor told it in each of the contexts it stands in."""
        own = 2.0**-place.bits
        found = [own] + [0.0] * (1 + HELD)
        if place.held is not None and place.beliefs[place.held] > 0:
            found[1 + place.held] = min(1.0, own / place.beliefs[place.held])
        if inside and theirs > 0:
            found[-1] = min(1.0, own / theirs)
        parts = [weight * p for weight, p in zip(self._weights(nested), found, strict=True)]
        mixed = math.fsum(parts)
        if mixed <= 0:
            return place.bits
        shares = [part / mixed for part in parts]
        for context in nested:
            counts = self._counts.get(context)
            self._counts[context] = shares if counts is None else list(map(operator.add, counts, shares))
        return -math.log2(mixed)

    def _weights(self, nested: Sequence[tuple[object, ...]]) -> list[float]:
        """Return how much to trust each predictor, coarsest context first; they add up to 1."""
        predictors = 2 + HELD
        weights = [1 / predictors] * predictors
        for context in nested:
            counts = self._counts.get(context)
            if counts is None:
                break  # a finer one has not been seen either
            before = PRIOR * predictors
            total = sum(counts) + before
            weights = [(count + before * weight) / total for count, weight in zip(counts, weights, strict=True)]
        return weights
