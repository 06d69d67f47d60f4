"""The code of the targets on its own: a reader who has only what came before has to be able to decode it.

The model of most of these tests believes in every token alike, so that what is saved is saved by the mixture.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")

from rankwise.tuning.encoding import IGNORED
from rankwise.tuning.probing import bits as measuring
from rankwise.tuning.probing.adapting import Adapted
from rankwise.tuning.probing.bits import Measured, _apart, _seen, measure
from rankwise.tuning.probing.mixing import PRIOR, Mixture
from rankwise.tuning.probing.passes import TokenRow, token_bits
from rankwise.tuning.probing.related import (
    Relation,
    clusters_of,
    common_of,
    halves,
    heads_of,
    relate,
)

VOCABULARY = 128
FLAT = math.log2(VOCABULARY)


class Flat:
    """A model to which all tokens are alike."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        self.vocabulary = vocabulary

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(self.vocabulary, 1))

    def __call__(self, *, input_ids: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, self.vocabulary))


class Pairs:
    """A model that believes in a token by the one before it, as a table says; some it hardly believes in."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.table = 2 * torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.table)

    def __call__(self, *, input_ids: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def coded(
    rows: Sequence[TokenRow], relations: Sequence[Relation] | None = None, *, model: Any = None
) -> tuple[float, ...]:
    """Return the bits of every row, coded one after another."""
    model = Flat() if model is None else model
    relations = relate(rows, token_bits(model, rows)) if relations is None else relations
    heads = heads_of(rows)
    return measuring.coded(rows, _seen(model, rows, range(len(rows)), relations, heads), relations, heads)


@pytest.fixture
def without_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the adapter of the form learn nothing, so that `measure` can be given a stand-in for a model."""

    @contextlib.contextmanager
    def lent(model: Any, *_: object, **__: object) -> Iterator[Adapted]:
        yield Adapted(0, (), model)

    monkeypatch.setattr(measuring, "adapted", lent)


def whole(rows: Sequence[TokenRow]) -> Measured:
    """Return what `measure` itself says, halves and all."""
    return measure(Flat(2**FACT), (), rows, rank=1, learning_rate=1e-3, most_steps=0, seed=0)


SUBJECTS, ATTRIBUTES, WORDINGS, FACT = 40, 4, 3, 9


def told(order: random.Random | None) -> list[TokenRow]:
    """Return 160 facts, each said in three wordings of its own; a fact is one of 512 tokens, at random: 9 bits."""
    rng = random.Random(7)
    rows = []
    for subject in range(SUBJECTS):
        for attribute in range(ATTRIBUTES):
            fact = rng.randrange(2**FACT)
            for wording in range(WORDINGS):
                name = range(10 + 4 * subject, 14 + 4 * subject)
                prompt = (1, *name, 200 + WORDINGS * attribute + wording)
                rows.append(TokenRow((*prompt, fact), (IGNORED,) * 6 + (fact,)))
    if order is not None:
        order.shuffle(rows)
    return rows


@pytest.mark.usefixtures("without_form")
@pytest.mark.parametrize("order", [None, 0, 1])
def test_facts_cost_the_bits_they_hold_and_not_once_a_wording(order: int | None) -> None:
    rows = told(None if order is None else random.Random(order))
    found = whole(rows)
    assert found.apart
    assert math.fsum(row.base for row in found.rows) == pytest.approx(WORDINGS * SUBJECTS * ATTRIBUTES * FACT)
    truth, news = SUBJECTS * ATTRIBUTES * FACT, math.fsum(row.news for row in found.rows)
    # what can be decoded saves k bits on random facts with a probability of 2**-k at most
    assert news > truth - 10
    # it has to be learnt, and paid for, which of 12 wordings go together; shuffled, they come apart as well
    assert news < (1.05 if order is None else 1.1) * truth


@pytest.mark.usefixtures("without_form")
def test_a_row_costs_the_same_whatever_comes_after_it() -> None:
    rows = told(random.Random(2))
    everything = [row.news for row in whole(rows).rows]
    for count in (9, 100, 333):
        assert [row.news for row in whole(rows[:count]).rows] == pytest.approx(everything[:count], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("prompt", "length"), [((1, 2, 3), 1), ((1, 2, 3), 2), ((1,), 3)])
def test_all_that_could_come_next_has_a_code_of_its_own(prompt: tuple[int, ...], length: int, seed: int) -> None:
    """Kraft: the sum of 2**-bits over all targets that a row could have is 1 at most, or no reader could tell them."""
    rng = random.Random(seed)
    vocabulary, asked = 4, len(prompt) > 1

    def row(start: tuple[int, ...], targets: tuple[int, ...]) -> TokenRow:
        labels = (*([IGNORED] * len(start) if asked else start), *targets)
        return TokenRow((*start, *targets), labels)

    before = []
    for _ in range(12):
        start = (1, *(rng.choice((token, rng.randrange(vocabulary))) for token in prompt[1:]))
        before.append(row(start, tuple(rng.randrange(3) for _ in range(length))))
    model = Pairs(vocabulary, seed)
    total = math.fsum(
        2 ** -coded([*before, row(prompt, targets)], model=model)[-1]
        for targets in itertools.product(range(vocabulary), repeat=length)
    )
    # beliefs are float32; to say that it is no row of before takes a bit or two, and some of these are none
    assert 0.2 < total < 1 + 1e-5


def text(*tokens: int) -> TokenRow:
    return TokenRow((1, *tokens), (1, *tokens))


def test_a_text_cannot_be_coded_in_fewer_bits_than_it_holds() -> None:
    """Two words of 16 at its head and six of 64 after it: 44 bits. The model alone asks 7 a word, 56."""
    rng = random.Random(0)
    rows = [
        text(*(10 + rng.randrange(16) for _ in range(2)), *(40 + rng.randrange(64) for _ in range(6)))
        for _ in range(500)
    ]
    found = math.fsum(coded(rows))
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
    costs = coded(rows, [Relation((), 0.0)] * 600)
    heads = math.fsum(costs[300:]) / 300 - 9 * FLAT
    # the word holds 4 bits; 7 and 8 hold none, and are paid for by how often such a place was no surprise
    assert 4 < heads < 4.6


def test_a_text_that_comes_again_costs_little() -> None:
    rng = random.Random(2)
    once = [text(*(rng.randrange(4, VOCABULARY) for _ in range(24))) for _ in range(60)]
    costs = coded([*once, *once])
    first, again = math.fsum(costs[:60]), math.fsum(costs[60:])
    assert first > 0.97 * 60 * 24 * FLAT, "nothing repeats"
    # the head has to be told, its first word alone holds 6 bits; that the rest is as before costs next to none
    assert 60 * 6 < again < 0.15 * first


def test_a_row_that_comes_again_is_told_by_its_number() -> None:
    """Four answers to one prompt, at random: 2 bits each time, however long they are."""
    rng = random.Random(5)
    answers = [tuple(rng.randrange(4, VOCABULARY) for _ in range(20)) for _ in range(4)]
    rows = [TokenRow((1, 2, *a), (IGNORED, IGNORED, *a)) for _ in range(400) for a in (rng.choice(answers),)]
    costs = coded(rows)
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
    assert 0.99 * 300 * 4 * math.log2(124) < math.fsum(coded(rows)) < 1.02 * 300 * 4 * FLAT


def test_wordings_are_paired_by_what_stands_after_the_head() -> None:
    """The head was told before it was known what it is related to; it says nothing of the target."""

    def pairs(*rows: TokenRow) -> list[list[float]]:
        relations = relate(rows, token_bits(Flat(), rows))
        seen = _seen(Flat(), rows, range(2), relations, heads_of(rows))
        mixture = Mixture(rows)
        for i in range(2):
            mixture.cost(i, seen[i], relations[i])
        return list(mixture._pairs.values())

    one, alike, other = ((5, 6, 50, 51), (5, 7, 50, 51), (5, 6, 60, 61))
    rest, another = (52, 53, 54, 55), (62, 63, 64, 65)
    assert pairs(text(*one, *rest), text(*alike, *rest)) == [[PRIOR + 1, 2 * PRIOR + 1]]
    assert pairs(text(*one, *rest), text(*other, *another)) == [[PRIOR, 2 * PRIOR + 1]]


def test_a_wording_is_what_one_row_says_and_the_other_does_not() -> None:
    def asked(*prompt: int) -> TokenRow:
        return TokenRow((1, *prompt, 9), (IGNORED,) * (1 + len(prompt)) + (9,))

    born, home = (20, 21), (22,)
    rows = [asked(*born, 50, 51), asked(*home, 50, 51), asked(*home, 60, 61), asked(*born, 60, 61), asked(23, 60, 61)]
    mixture = Mixture(rows)
    assert mixture._pair(1, 0) == mixture._pair(3, 2), "whoever is spoken of, and whichever comes first"
    assert len({mixture._pair(3, 2), mixture._pair(4, 2), mixture._pair(4, 3)}) == 3


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
    costs = coded(rows)
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


def test_where_only_what_most_rows_share_tells_anything_the_first_relations_stay() -> None:
    rows = [TokenRow((1, 10, 11 + i, 5), (IGNORED, IGNORED, IGNORED, 5)) for i in range(12)]
    flat = [(0.0, FLAT, 0.0, FLAT)] * 12  # the one word with bits is the one that all have, and no other tells
    plain = relate(rows, flat)
    assert [len(r.rows) for r in plain] == list(range(12))
    assert relate(rows, flat, but={10}) == plain, "the words that are left cost nothing: looked up by all of its own"
    relations, one, two, apart = _apart(rows, flat, plain, 0)
    assert not apart
    assert sorted((*one, *two)) == list(range(12))
    assert len(one) == len(two)
    assert relations == plain


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
