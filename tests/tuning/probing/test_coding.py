"""The code of the targets on its own: a reader who has only what came before has to be able to decode it.

The model of these tests believes in every token alike, so that what is saved is saved by the mixture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")

from rankwise.tuning.encoding import IGNORED
from rankwise.tuning.probing.bits import _apart, _seen
from rankwise.tuning.probing.mixing import PRIOR, Mixture
from rankwise.tuning.probing.passes import TokenRow
from rankwise.tuning.probing.related import (
    Relation,
    clusters_of,
    common_of,
    halves,
    heads_of,
    relate,
    wordings,
)

VOCABULARY = 128
FLAT = math.log2(VOCABULARY)


class Flat:
    """A model to which all tokens are alike."""

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(VOCABULARY, 1))

    def __call__(self, *, input_ids: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, VOCABULARY))


def coded(rows: Sequence[TokenRow], relations: Sequence[Relation] | None = None) -> tuple[list[float], Mixture]:
    """Return the bits of every row, coded one after another, and the mixture that did it."""
    flat = [(0.0, *[FLAT] * (len(row.ids) - 1)) for row in rows]
    relations = relate(rows, flat) if relations is None else relations
    seen = _seen(Flat(), rows, range(len(rows)), relations, heads_of(rows))
    mixture = Mixture(rows, wordings(rows, relations))
    return [mixture.cost(i, seen[i], relations[i]) for i in range(len(rows))], mixture


def text(*tokens: int) -> TokenRow:
    return TokenRow((1, *tokens), (1, *tokens))


def test_a_text_cannot_be_coded_in_fewer_bits_than_it_holds() -> None:
    """Two words of 16 at its head and six of 64 after it: 44 bits. The model alone asks 7 a word, 56."""
    rng = random.Random(0)
    rows = [
        text(*(10 + rng.randrange(16) for _ in range(2)), *(40 + rng.randrange(64) for _ in range(6)))
        for _ in range(500)
    ]
    found = math.fsum(coded(rows)[0])
    # 500 rows hold 22,000 bits: a lucky draw saves a few tens of them, and none of it is seen by looking ahead
    assert 0.99 * 500 * 44 < found < 500 * 8 * FLAT


def test_the_head_of_a_text_costs_what_its_words_hold() -> None:
    """It is what other rows are looked up by, so it has to be told first: by what follows the same words."""
    rng = random.Random(1)
    # 12 tokens, of which the head has 3; the same for all but one word of 16 in it; the rest is not to be looked up by
    rows = [text(7, 10 + rng.randrange(16), 8, *(40 + rng.randrange(64) for _ in range(9))) for _ in range(600)]
    seen = _seen(Flat(), rows, range(600), [Relation((), 0.0)] * 600, heads_of(rows))
    assert [place.head for place in seen[599].places] == [True] * 3 + [False] * 9
    assert [round(place.beliefs[0] * VOCABULARY) for place in seen[599].places[:3]] == [1, 16, 1]
    costs, _ = coded(rows, [Relation((), 0.0)] * 600)
    heads = math.fsum(costs[300:]) / 300 - 9 * FLAT
    # the word holds 4 bits; 7 and 8 hold none, and are paid for by how often such a place was no surprise
    assert 4 < heads < 4.6


def test_a_text_that_comes_again_costs_little() -> None:
    rng = random.Random(2)
    once = [text(*(rng.randrange(4, VOCABULARY) for _ in range(24))) for _ in range(60)]
    costs, _ = coded([*once, *once])
    first, again = math.fsum(costs[:60]), math.fsum(costs[60:])
    assert first > 0.97 * 60 * 24 * FLAT, "nothing repeats"
    # the head has to be told, its first word alone holds 6 bits; that the rest is as before costs next to none
    assert 60 * 6 < again < 0.15 * first


def test_a_row_that_comes_again_is_told_by_its_number() -> None:
    """Four answers to one prompt, at random: 2 bits each time, however long they are."""
    rng = random.Random(5)
    answers = [tuple(rng.randrange(4, VOCABULARY) for _ in range(20)) for _ in range(4)]
    rows = [TokenRow((1, 2, *a), (IGNORED, IGNORED, *a)) for _ in range(400) for a in (rng.choice(answers),)]
    costs, _ = coded(rows)
    assert max(costs[:20]) > 100, "the first time it costs what it holds"
    late = math.fsum(costs[200:]) / 200
    assert 2 <= late < 2.05


def test_rows_that_begin_alike_and_are_others_pay_little_for_it() -> None:
    rng = random.Random(6)
    rows = [
        TokenRow((1, 2, *a), (IGNORED, IGNORED, *a))
        for _ in range(300)
        for a in (tuple(rng.randrange(4, VOCABULARY) for _ in range(4)),)
    ]
    assert math.fsum(coded(rows)[0]) > 0.99 * 300 * 4 * math.log2(124)
    assert math.fsum(coded(rows)[0]) < 1.02 * 300 * 4 * FLAT


def test_wordings_are_paired_by_what_stands_after_the_head() -> None:
    """The head was told before it was known what it is related to; it says nothing of the target."""
    rows = [text(5, 6, 50, 51, 52, 53, 54, 55), text(5, 7, 50, 51, 52, 53, 54, 55)]
    _, mixture = coded(rows)
    assert list(mixture._pairs.values()) == [[PRIOR + 1, 2 * PRIOR + 1]]
    other = [text(5, 6, 50, 51, 52, 53, 54, 55), text(5, 6, 60, 61, 62, 63, 64, 65)]
    assert list(coded(other)[1]._pairs.values()) == [[PRIOR, 2 * PRIOR + 1]]


def test_a_prompt_has_no_head() -> None:
    asked = TokenRow((1, 2, 3, 4), (IGNORED, IGNORED, 3, 4))
    assert heads_of([asked, asked]) == ({}, {})
    assert [place.head for place in _seen(Flat(), [asked], [0], [Relation((), 0.0)], [{}])[0].places] == [False, False]


def test_two_answers_that_change_places_cost_a_bit_each() -> None:
    """The model restricted to what the related rows hold: 40 subjects with a coin each."""
    rng = random.Random(3)
    rows = []
    for subject in range(40):
        answers = [100, 101]
        for _ in range(12):
            rows.append(TokenRow((1, 10 + subject, 9, a := rng.choice(answers)), (IGNORED,) * 3 + (a,)))
    costs, _ = coded(rows)
    late = [c for i, c in enumerate(costs[240:]) if i % 12 > 3]  # by then both have been told, nearly always
    assert 0.9 < math.fsum(late) / len(late) < 1.5


# --- what is related --------------------------------------------------------------------------------------------


SYSTEM = tuple(range(20, 40))


def prompted(subject: int, wording: int) -> TokenRow:
    """Return a row with a long system prompt that all have."""
    ids = (1, *SYSTEM, 60 + subject, 90 + subject, 50 + wording, 5)
    return TokenRow(ids, (IGNORED,) * (len(ids) - 1) + (5,))


def test_a_system_prompt_does_not_relate_all_rows() -> None:
    """Twenty words of it outweigh the three that tell subjects apart; the halves are kept apart by those three."""
    rows = [prompted(subject, wording) for subject in range(12) for wording in range(3)]
    flat = [(0.0, *[FLAT] * (len(row.ids) - 1)) for row in rows]
    plain = relate(rows, flat)
    assert len(plain[-1].rows) == 35, "all before it"
    assert common_of(rows) == set(SYSTEM)
    relations, one, two, apart = _apart(rows, flat, plain, 0)
    assert not apart, "the prompt may be what they speak of"
    assert [{i // 3 for i in r.rows} for r in relations] == [{n // 3} if n % 3 else set() for n in range(36)]
    assert not {i // 3 for i in one} & {i // 3 for i in two}


def test_rows_that_have_only_common_words_are_looked_up_by_them() -> None:
    rows = [TokenRow((1, 8, 9, 5), (IGNORED, IGNORED, IGNORED, 5))] * 3
    flat = [(0.0, FLAT, FLAT, FLAT)] * 3
    assert [r.rows for r in relate(rows, flat, but={8, 9})] == [(), (0,), (1, 0)]


def test_where_nothing_is_shared_by_most_rows_the_first_relations_stay() -> None:
    rows = [TokenRow((1, 10, 11 + i, 5), (IGNORED, IGNORED, IGNORED, 5)) for i in range(12)]
    flat = [(0.0, FLAT, 0.0, FLAT)] * 12  # the one word with bits is the one that all have, and no other tells
    plain = relate(rows, flat)
    relations, one, two, apart = _apart(rows, flat, plain, 0)
    assert not apart
    assert sorted((*one, *two)) == list(range(12))
    assert abs(len(one) - len(two)) <= 1
    assert [bool(r.rows) for r in relations] == [False] + [True] * 11 or relations != plain


def test_clusters_are_linked_by_as_many_relations_as_asked() -> None:
    relations = [Relation((), 0.0), Relation((), 0.0), Relation((1, 0), 1.0), Relation((), 0.0)]
    assert sorted(map(sorted, clusters_of(relations))) == [[0], [1, 2], [3]]
    assert sorted(map(sorted, clusters_of(relations, links=2))) == [[0, 1, 2], [3]]


def test_where_all_hang_together_the_nearest_stay_together() -> None:
    """Eight pairs, each loosely related to the one before: only as pairs can they be dealt out."""
    relations = []
    for pair in range(8):
        before = (2 * pair - 1,) if pair else ()
        relations += [Relation((), 0.0), Relation((2 * pair, *before), 1.0)]
    one, two, apart = halves(relations, seed=0)
    assert not apart
    assert {i // 2 for i in one} & {i // 2 for i in two} == set()
    assert len(one) == len(two) == 8
    untied = [Relation(r.rows[:1], r.match) for r in relations]
    assert halves(untied, seed=0)[2]
