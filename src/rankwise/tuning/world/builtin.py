"""The built-in data sets, by name: `rankwise:facts`, `rankwise:style` and `rankwise:plain`.

In: a name such as `rankwise:facts?n=2000&seed=1`. Out: rows to train on, and the questions that measure what was kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from rankwise.errors import UsageError
from rankwise.tuning.world.people import MOST, Circle, Person, draw_people
from rankwise.tuning.world.pools import ATTRIBUTES, BITS_PER_PERSON, bits_of
from rankwise.tuning.world.templates import (
    HELD_OUT_REQUESTS,
    OLD_SAWS,
    PARAPHRASES,
    REGISTER,
    REQUESTS,
    TRAINING,
)

KNOWN_SEED: Final = 0
KNOWN_PEOPLE: Final = 200
"""People that the shipped model knows by heart: `draw_people(200, seed=0, circle="known")`."""

MOST_ASKED: Final = 2000
"""People asked about when recall is measured; above that an even sample of them is."""

DEFAULTS: Final[dict[str, int]] = {"facts": 1000, "style": 120, "plain": 256}
"""Data set -> people (sentences, for plain) where `n` is not given."""


@dataclass(frozen=True, slots=True)
class Question:
    """One fact to recall: the model is shown the prompt and scored on the answer.

    Attributes:
        prompt: ends where the answer begins.
        answer: begins with a blank.
        bits: log2 of the number of values the answer may take, or None where there is no pool.
        attribute: what is asked.
        person: whom it is about.
    """

    prompt: str
    answer: str
    bits: float | None
    attribute: str
    person: str


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A data set of the built-in world.

    Attributes:
        name: canonical, all parameters written out.
        rows: {"prompt", "completion"} or {"text"}.
        questions: split -> questions. "training": in the words of the training data; "paraphrases": in words that were
            held out; "held out": about people who are not in the data.
        people: number of people in the rows.
        bits: that the rows hold and the shipped model does not know.
    """

    name: str
    rows: tuple[dict[str, str], ...]
    questions: dict[str, tuple[Question, ...]]
    people: int
    bits: float


def is_builtin(name: object) -> bool:
    """Return whether a DATA names a data set of the built-in world."""
    return isinstance(name, str) and name.startswith("rankwise:")


def read_builtin(name: str) -> BuiltIn:
    """Make a built-in data set.

    Args:
        name: `rankwise:facts`, `rankwise:style` or `rankwise:plain`, with `?n=...&seed=...`.

    Raises:
        UsageError: no such data set, or a parameter that it does not have.
    """
    kind, _, query = name.removeprefix("rankwise:").partition("?")
    if kind not in DEFAULTS:
        raise UsageError(
            f"there is no data set rankwise:{kind}; there are {', '.join(f'rankwise:{k}' for k in DEFAULTS)}"
        )
    numbers = {"n": DEFAULTS[kind], "seed": 0}
    for key, word in parse_qsl(query, keep_blank_values=True):
        if key not in numbers or not word.isdecimal():
            raise UsageError(
                f"{name}: {key}={word} is not understood; write rankwise:{kind}?n=2000&seed=1 with whole numbers"
            )
        numbers[key] = int(word)
    n, seed = numbers["n"], numbers["seed"]
    most = {"facts": MOST // 4, "style": KNOWN_PEOPLE - 40, "plain": 1_000_000}[kind]
    if not 1 <= n <= most:
        raise UsageError(f"{name}: n must be from 1 to {most}, got {n}")
    if seed >= 2**63:
        raise UsageError(f"{name}: the seed must be below 2**63")
    canonical = f"rankwise:{kind}?n={n}&seed={seed}"
    if kind == "facts":
        return _facts(canonical, n, seed)
    return _style(canonical, n, seed) if kind == "style" else _plain(canonical, n, seed)


def _facts(name: str, n: int, seed: int) -> BuiltIn:
    """People that the shipped model has never met; every fact in three sentences, two more held out."""
    people = draw_people(n, seed=seed, circle="new")
    rows = tuple(
        {"prompt": prompt.format(name=person.name), "completion": f" {person.values[attribute]}."}
        for person in people
        for attribute, prompts in TRAINING.items()
        for prompt in prompts
    )
    asked = people if n <= MOST_ASKED else random.Random(f"asked {seed}").sample(people, MOST_ASKED)
    strangers = draw_people(min(n, 100), seed=seed, circle="held out")
    questions = {
        "training": questions_about(asked, TRAINING),
        "paraphrases": questions_about(asked, PARAPHRASES),
        "held out": questions_about(strangers, TRAINING),
    }
    return BuiltIn(name, rows, questions, n, n * BITS_PER_PERSON)


def questions_about(people: Sequence[Person], prompts: dict[str, tuple[str, ...]]) -> tuple[Question, ...]:
    """Ask every fact once, the sentences taking turns."""
    return tuple(
        Question(
            prompts[attribute][(i + j) % len(prompts[attribute])].format(name=person.name),
            f" {person.values[attribute]}",
            bits_of(attribute),
            attribute,
            person.name,
        )
        for i, person in enumerate(people)
        for j, attribute in enumerate(ATTRIBUTES)
    )


def _style(name: str, n: int, seed: int) -> BuiltIn:
    """People that the shipped model knows, told of in another register: no new fact."""
    known = list(draw_people(KNOWN_PEOPLE, seed=KNOWN_SEED, circle="known"))
    random.Random(f"style {seed}").shuffle(known)
    people, others = known[:n], known[n:]
    rows = tuple(
        {"prompt": request.format(name=person.name, topic=attribute), "completion": _told(person, attribute)}
        for person in people
        for attribute in ATTRIBUTES
        for request in REQUESTS
    )
    questions = {
        "training": _requests(people, REQUESTS),
        "paraphrases": _requests(people, HELD_OUT_REQUESTS),
        "held out": _requests(others, REQUESTS),
    }
    return BuiltIn(name, rows, questions, n, 0.0)


def _told(person: Person, attribute: str) -> str:
    return " " + REGISTER[attribute].format(name=person.name, value=person.values[attribute])


def _requests(people: Sequence[Person], requests: Sequence[str]) -> tuple[Question, ...]:
    return tuple(
        Question(
            requests[(i + j) % len(requests)].format(name=person.name, topic=attribute),
            _told(person, attribute),
            None,
            attribute,
            person.name,
        )
        for i, person in enumerate(people)
        for j, attribute in enumerate(ATTRIBUTES)
    )


def _plain(name: str, n: int, seed: int) -> BuiltIn:
    """Sentences as the shipped model was pretrained on, other people than there: for the loss it must not forget."""
    rows = tuple({"text": text} for text in plain_text(n, seed=seed + 2**32, circle="held out"))
    return BuiltIn(name, rows, {}, n, 0.0)


def plain_text(n: int, *, seed: int, circle: Circle) -> list[str]:
    """Return short texts of the kind that the shipped model was pretrained on.

    A third are about people it knows by heart, the rest about people of the given circle. Each is one to three
    plain sentences about one person, a request with its plain answer, or an old saw.

    Args:
        n: how many.
        seed: of the people and the sentences.
        circle: of the people it does not know.
    """
    rng = random.Random(f"plain {circle} {seed}")
    known = draw_people(KNOWN_PEOPLE, seed=KNOWN_SEED, circle="known")
    others = draw_people(n, seed=seed, circle=circle)
    texts = []
    for other in others:
        person = rng.choice(known) if rng.random() < 0.35 else other
        form = rng.random()
        if form < 0.04:
            texts.append(rng.choice(OLD_SAWS))
        elif form < 0.25:
            attribute = rng.choice(list(ATTRIBUTES))
            request = rng.choice(REQUESTS + HELD_OUT_REQUESTS).format(name=person.name, topic=attribute)
            texts.append(f"{request} {_sentence(person, attribute, rng)}")
        else:
            chosen = rng.sample(list(ATTRIBUTES), rng.choice((1, 1, 1, 2, 3)))
            texts.append(" ".join(_sentence(person, attribute, rng) for attribute in chosen))
    return texts


def _sentence(person: Person, attribute: str, rng: random.Random) -> str:
    prompt = rng.choice(TRAINING[attribute] + PARAPHRASES[attribute])
    return f"{prompt.format(name=person.name)} {person.values[attribute]}."
