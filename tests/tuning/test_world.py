"""The built-in world: pools of exact size, people nobody else is, sentences that hold what they say."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter

import pytest

from rankwise.errors import UsageError
from rankwise.tuning.world import templates
from rankwise.tuning.world.builtin import KNOWN_PEOPLE, plain_text, read_builtin
from rankwise.tuning.world.people import CIRCLES, draw_people, work_city
from rankwise.tuning.world.pools import ATTRIBUTES, BITS_PER_PERSON, CITIES, EMPLOYERS, POOLS, bits_of

BIOS_SIZES = {
    "first name": 400,
    "middle name": 400,
    "last name": 1000,
    "month": 12,
    "day": 28,
    "year": 200,
    "birth city": 200,
    "university": 300,
    "major": 100,
    "employer": 263,
}
"""Allen-Zhu & Li (2024), arXiv:2404.05405, as counted in the authors' generator."""


def test_pools_have_the_sizes_of_bios() -> None:
    assert {name: len(pool) for name, pool in POOLS.items()} == BIOS_SIZES


def test_no_word_is_in_two_pools_or_twice_in_one() -> None:
    words = Counter(word for pool in POOLS.values() for word in pool)
    assert max(words.values()) == 1


def test_bits_per_person_are_those_of_bios_without_gender() -> None:
    assert pytest.approx(math.log2(12 * 28 * 200 * 200 * 300 * 100 * 263), abs=1e-12) == BITS_PER_PERSON
    assert round(BITS_PER_PERSON, 2) == 46.59


def test_values_are_drawn_evenly() -> None:
    """Chi-square over 200 cities, 20,000 draws: mean 199, standard deviation 20."""
    people = draw_people(20_000, seed=5, circle="new")
    counts = Counter(p.values["birth city"] for p in people)
    expected = len(people) / len(CITIES)
    chi2 = sum((counts[city] - expected) ** 2 / expected for city in CITIES)
    assert abs(chi2 - 199) < 5 * math.sqrt(2 * 199)


def test_circles_never_share_a_name() -> None:
    drawn = {circle: {p.name for s in range(3) for p in draw_people(2000, seed=s, circle=circle)} for circle in CIRCLES}
    for one in CIRCLES:
        for other in CIRCLES:
            assert one == other or not drawn[one] & drawn[other]


def test_names_are_unique_and_a_longer_draw_begins_like_a_shorter_one() -> None:
    people = draw_people(5000, seed=1, circle="new")
    assert len({p.name for p in people}) == 5000
    assert people[:100] == draw_people(100, seed=1, circle="new")
    assert people != draw_people(5000, seed=2, circle="new")


def test_the_work_city_follows_from_the_employer() -> None:
    assert {work_city(employer) for employer in EMPLOYERS} <= set(CITIES)
    for person in draw_people(200, seed=3, circle="new"):
        assert person.values["work city"] == work_city(person.values["employer"])
    assert bits_of("work city") == 0


def test_every_attribute_has_sentences_and_none_is_both_trained_and_held_out() -> None:
    assert set(templates.TRAINING) == set(templates.PARAPHRASES) == set(templates.REGISTER) == set(ATTRIBUTES)
    trained = {t for group in templates.TRAINING.values() for t in group}
    held = {t for group in templates.PARAPHRASES.values() for t in group}
    assert not trained & held
    assert all(t.count("{name}") == 1 for t in trained | held)
    assert not set(templates.REQUESTS) & set(templates.HELD_OUT_REQUESTS)


def test_facts_say_what_the_people_are() -> None:
    facts = read_builtin("rankwise:facts?n=20&seed=4")
    people = {p.name: p for p in draw_people(20, seed=4, circle="new")}
    assert len(facts.rows) == 20 * sum(map(len, templates.TRAINING.values()))
    told = {(row["prompt"], row["completion"]) for row in facts.rows}
    for person in people.values():
        for attribute, prompts in templates.TRAINING.items():
            for prompt in prompts:
                assert (prompt.format(name=person.name), f" {person.values[attribute]}.") in told
    assert facts.bits == pytest.approx(20 * BITS_PER_PERSON)


def test_paraphrases_ask_the_same_facts_in_words_that_are_in_no_row() -> None:
    facts = read_builtin("rankwise:facts?n=30")
    prompts = {row["prompt"] for row in facts.rows}
    asked = {(q.person, q.attribute, q.answer) for q in facts.questions["training"]}
    assert {q.prompt for q in facts.questions["training"]} <= prompts
    assert {(q.person, q.attribute, q.answer) for q in facts.questions["paraphrases"]} == asked
    assert not {q.prompt for q in facts.questions["paraphrases"]} & prompts


def test_held_out_people_are_in_no_row() -> None:
    for name in ("rankwise:facts?n=40", "rankwise:style?n=40"):
        data = read_builtin(name)
        text = "\n".join(row["prompt"] for row in data.rows)
        others = {q.person for q in data.questions["held out"]}
        assert others
        assert not [person for person in others if person in text]


def test_style_rows_tell_known_people_what_is_true_in_another_register() -> None:
    style = read_builtin("rankwise:style?n=15&seed=2")
    known = {p.name: p for p in draw_people(KNOWN_PEOPLE, seed=0, circle="known")}
    assert style.bits == 0
    for question in (*style.questions["training"], *style.questions["held out"]):
        assert known[question.person].values[question.attribute] in question.answer
    plain = "\n".join(plain_text(3000, seed=0, circle="strangers"))
    assert not [q.answer for q in style.questions["training"] if q.answer in plain]


def test_data_sets_do_not_depend_on_the_process() -> None:
    """Hash randomisation must not reach the draws: a seed means the same people everywhere."""
    code = "from rankwise.tuning.world.builtin import read_builtin as r; print(r('rankwise:facts?n=3&seed=7').rows)"
    words = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert words == {f"{read_builtin('rankwise:facts?n=3&seed=7').rows}\n"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rankwise:fact", "there is no data set rankwise:fact; there are rankwise:facts"),
        ("rankwise:facts?n=0", "n must be from 1 to"),
        ("rankwise:facts?n=-3", "n=-3 is not understood"),
        ("rankwise:facts?n=99999999999", "n must be from 1 to"),
        ("rankwise:style?n=5000", "n must be from 1 to 160, got 5000"),
        ("rankwise:facts?people=3", "people=3 is not understood; write rankwise:facts"),
        ("rankwise:facts?n=", "n= is not understood"),
        ("rankwise:plain?seed=99999999999999999999", "seed must be below"),
    ],
)
def test_a_name_that_is_none_is_refused_in_words(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_builtin(name)
    assert words in str(caught.value)
