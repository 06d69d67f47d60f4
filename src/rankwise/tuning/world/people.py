"""People: a name that nobody else has, and a value of every attribute, drawn evenly.

In: how many, a seed, and which of the four circles. Out: `Person`s.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final, Literal

from rankwise.tuning.world.pools import (
    CITIES,
    DAYS,
    EMPLOYERS,
    FIRST_NAMES,
    LAST_NAMES,
    MAJORS,
    MIDDLE_NAMES,
    MONTHS,
    UNIVERSITIES,
    YEARS,
)

Circle = Literal["known", "strangers", "new", "held out"]

CIRCLES: Final[dict[Circle, int]] = {"known": 0, "strangers": 1, "new": 2, "held out": 3}
"""Who they are to the shipped model: `known` it has learnt; `strangers` it met in passing and has not kept; `new` are
what training data are about; `held out` nobody is ever told about. No name is in two circles: the sum of the three
indices of a name, modulo 4, says its circle."""

MOST: Final = len(FIRST_NAMES) * len(MIDDLE_NAMES) * len(LAST_NAMES) // len(CIRCLES)
"""Names in a circle."""


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody invented.

    Attributes:
        name: first, middle and last name; unique.
        values: attribute -> value, in words.
    """

    name: str
    values: dict[str, str]


def work_city(employer: str) -> str:
    """Return the city of an employer: general knowledge, the same in every draw."""
    return CITIES[EMPLOYERS.index(employer) * 73 % len(CITIES)]


def draw_people(n: int, *, seed: int, circle: Circle) -> tuple[Person, ...]:
    """Draw people with a generator of their own; the first k of n are those that `n=k` would give.

    Args:
        n: how many, up to `MOST`.
        seed: of the draw.
        circle: whose names are used.
    """
    rng = random.Random(f"rankwise {circle} {seed}")
    taken: set[tuple[int, int, int]] = set()
    people: list[Person] = []
    while len(people) < n:
        name = (rng.randrange(len(FIRST_NAMES)), rng.randrange(len(MIDDLE_NAMES)), rng.randrange(len(LAST_NAMES)))
        employer = rng.choice(EMPLOYERS)
        values = {
            "birth date": f"{rng.choice(MONTHS)} {rng.choice(DAYS)}, {rng.choice(YEARS)}",
            "birth city": rng.choice(CITIES),
            "university": rng.choice(UNIVERSITIES),
            "major": rng.choice(MAJORS),
            "employer": employer,
            "work city": work_city(employer),
        }
        if name in taken or sum(name) % len(CIRCLES) != CIRCLES[circle]:
            continue
        taken.add(name)
        first, middle, last = name
        people.append(Person(f"{FIRST_NAMES[first]} {MIDDLE_NAMES[middle]} {LAST_NAMES[last]}", values))
    return tuple(people)
