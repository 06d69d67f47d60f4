"""Which examples speak of the same thing: those that share what is surprising in them.

In: rows of tokens and what every token costs the base, in bits. Out: for each row the earlier rows that it is related
to, and the clusters that must not be torn apart when one half of the data is used to judge the other.

A name of three rare words costs a model 27 bits, "was born in the city of" a few: so bits say which words of a prompt
tell what it is about, at any size of data, where counts of words in 20 sentences do not.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from rankwise.tuning.probing.passes import TokenRow

RELATED: Final = 0.5
"""Share of the bits of a row's key that another has to hold to count as related."""

MOST_RELATED: Final = 64
"""Earlier rows that are looked at, the nearest."""

TEXT_KEY: Final = 16
"""Tokens at the head of a text that stand for a prompt, a quarter of it at most."""

SHARED: Final = 0.5
"""Share of the rows that have a word in their keys, from which it may be part of a system prompt."""

LARGEST: Final = 0.75
"""Share of the data from which a cluster cannot stay in one half."""

FREQUENT: Final = 2000
"""A token in more rows than this tells nothing, and would cost too much to follow."""


@dataclass(frozen=True, slots=True)
class Relation:
    """The earlier rows that a row is related to.

    Attributes:
        rows: their numbers, nearest first; empty where there is none.
        match: share of the bits of the key that the nearest holds, 0 to 1.
    """

    rows: tuple[int, ...]
    match: float


def key_of(row: TokenRow) -> range:
    """Return the places of the tokens by which a row is looked up: what is given when its targets are asked for.

    The prompt; of a text, its head. The first token is left out: nothing says what it costs.
    """
    targets = row.targets
    first = targets[0] if targets else len(row.ids)
    if first > 1:
        return range(1, first)
    return range(1, 1 + min(TEXT_KEY, max(1, len(row.ids) // 4)))


Head = Mapping[int, Collection[int]]
"""Place in the head of a text -> tokens that earlier texts have after the same words; empty for what has a prompt."""


def heads_of(rows: Sequence[TokenRow]) -> tuple[Head, ...]:
    """Return for each row what earlier ones have in its head.

    >>> same, other = TokenRow((1, 5, 6, 7), (1, 5, 6, 7)), TokenRow((1, 8, 6, 7), (1, 8, 6, 7))
    >>> [{at: sorted(after) for at, after in head.items()} for head in heads_of([same, other, same])]
    [{1: []}, {1: [5]}, {1: [5, 8]}]
    """
    after: dict[tuple[int, ...], set[int]] = {}
    found: list[Head] = []
    for row in rows:
        head: dict[int, Collection[int]] = {}
        if row.targets[:1] == (1,):
            for at in key_of(row):
                known = after.setdefault(row.ids[:at], set())
                head[at] = tuple(known)
                known.add(row.ids[at])
        found.append(head)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Twin:
    """What is known of a row once its prompt is, or its head where it is a text.

    Attributes:
        known: different rows before it that begin so.
        equal: whether it is one of them.
    """

    known: int
    equal: bool


def twins_of(rows: Sequence[TokenRow]) -> tuple[Twin, ...]:
    """Return for each row how many different earlier ones begin as it does, and whether it is one of them.

    >>> one, other = TokenRow((1, 2, 3), (-100, -100, 3)), TokenRow((1, 2, 4), (-100, -100, 4))
    >>> [(twin.known, twin.equal) for twin in twins_of([one, other, one, other])]
    [(0, False), (1, False), (2, True), (2, True)]
    """
    begun: dict[tuple[int, ...], set[TokenRow]] = {}
    found = []
    for row in rows:
        known = begun.setdefault(row.ids[: key_of(row).stop], set())
        found.append(Twin(len(known), row in known))
        known.add(row)
    return tuple(found)


def common_of(rows: Sequence[TokenRow]) -> frozenset[int]:
    """Return the words that stand in the keys of `SHARED` of the rows."""
    holders: Counter[int] = Counter()
    for row in rows:
        holders.update({row.ids[at] for at in key_of(row)})
    return frozenset(token for token, count in holders.items() if count >= SHARED * len(rows))


def relate(
    rows: Sequence[TokenRow], bits: Sequence[Sequence[float]], *, but: Collection[int] = ()
) -> tuple[Relation, ...]:
    """Return for each row the earlier ones that it is related to.

    Args:
        rows: in their order.
        bits: of every token, for the base.
        but: tokens that tell nothing; a row that has no others is looked up by all of its own.
    """
    holders: dict[int, list[int]] = {}
    scores: NDArray[np.float64] = np.zeros(len(rows))
    found = []
    for number, row in enumerate(rows):
        weights: dict[int, float] = {}
        for at in key_of(row):
            token = row.ids[at]
            weights[token] = max(weights.get(token, 0.0), bits[number][at])
        telling = {token: weight for token, weight in weights.items() if token not in but}
        if sum(telling.values()) > 0:  # what is left may cost the base nothing, and tell as little
            weights = telling
        total = sum(weights.values())
        touched: list[NDArray[np.int64]] = []
        for token, weight in weights.items():
            where = holders.get(token, [])
            if weight > 0 and where and len(where) <= FREQUENT:
                index = np.array(where)
                scores[index] += weight
                touched.append(index)
        found.append(_nearest(scores, touched, total))
        for index in touched:
            scores[index] = 0.0
        for token in set(row.ids):
            holders.setdefault(token, []).append(number)
    return tuple(found)


def _nearest(scores: NDArray[np.float64], touched: list[NDArray[np.int64]], total: float) -> Relation:
    if not touched or total <= 0:
        return Relation((), 0.0)
    candidates = np.unique(np.concatenate(touched))
    near = candidates[scores[candidates] >= RELATED * total]
    if not len(near):
        return Relation((), 0.0)
    order = near[np.lexsort((-near, -scores[near]))][:MOST_RELATED]  # the later of two equals first
    return Relation(tuple(int(i) for i in order), min(1.0, float(scores[order[0]]) / total))


def clusters_of(relations: Sequence[Relation], *, links: int = 1) -> list[list[int]]:
    """Return the numbers of the rows, those together that are linked by their nearest relations.

    Args:
        relations: as `relate` returns them.
        links: how many of them count.
    """
    parent = list(range(len(relations)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, relation in enumerate(relations):
        for other in relation.rows[:links]:
            parent[root(i)] = root(other)
    clusters: dict[int, list[int]] = {}
    for i in range(len(relations)):
        clusters.setdefault(root(i), []).append(i)
    return list(clusters.values())


def halves(relations: Sequence[Relation], *, seed: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Cut the rows into two halves without tearing related rows apart.

    Args:
        relations: as `relate` returns them.
        seed: of the order in which clusters are dealt out.

    Returns:
        Two halves, and whether no row has a relation in the other: where one cluster holds most of the data it has to
        be torn.
    """
    groups = clusters_of(relations, links=MOST_RELATED)
    whole = max(map(len, groups)) <= LARGEST * len(relations)
    if not whole:  # by the nearest alone fewer hang together
        groups = clusters_of(relations)
    if max(map(len, groups)) > LARGEST * len(relations):
        groups = [[i] for i in range(len(relations))]
    random.Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)  # large ones first, so that the rest can make up for them
    first: list[int] = []
    second: list[int] = []
    for group in groups:
        (first if len(first) <= len(second) else second).extend(group)
    return tuple(sorted(first)), tuple(sorted(second)), whole
