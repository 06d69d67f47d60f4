"""The pools that every value is drawn from, evenly: so a value holds log2(pool size) bits, exactly.

In: nothing. Out: tuples of invented words, no word in two pools.

The sizes are those of bioS (Allen-Zhu & Li 2024, arXiv:2404.05405): 400 first, 400 middle and 1000 last names, 200
cities, 300 universities, 100 majors, 263 employers, and birth dates of 12 months, 28 days and 200 years. The words are
not: they are put together from parts, so that no real person or place is meant and every value is one token of the
model that ships with rankwise.
"""

from __future__ import annotations

import math
from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _joined(starts: str, ends: str, size: int) -> tuple[str, ...]:
    words = tuple(start + end for end in ends.split() for start in starts.split())
    return tuple(sorted(words[:size]))


FIRST_NAMES: Final = _joined(
    "Al Bel Cor Dan El Fen Gar Hal Il Jor Kel Lor Mar Nor Or Per Quin Ros Sal Tor",
    "a an da den ic iel in is la len lo mon na ra rick sa ton us vin wyn",
    400,
)
MIDDLE_NAMES: Final = _joined(
    "Ab Bri Ced Dor Em Fla Gwen Her Isa Jul Ke Lea Mel Ned Ol Pia Reu Ste Theo Vi",
    "ba bert ca dine do dra fa fred go ky lina lyn mara mund nia ro selle ta theus xa",
    400,
)
LAST_NAMES: Final = _joined(
    "Ash Black Brook Clay Cross Dun East Fair Farn Glen Green Hart Hazel Hill Holm King Lang Mill Moor North Oak Pen "
    "Rad Stan Thorn",
    "ford by well ton ley worth wood field ham stead bourne bridge side burn bury combe cote croft dale acre den don "
    "ell ender gate grave hurst ing land low man mere more ridge row shaw smith son stone wick",
    1000,
)
CITIES: Final = _joined(
    "Alder Bramble Copper Dover Ember Falcon Granite Harbor Iron Juniper Kestrel Linden Maple Nettle Otter Pebble "
    "Quarry Raven Silver Timber",
    "burgh haven mouth port chester minster polis view bay heath",
    200,
)
UNIVERSITIES: Final = _joined(
    "Aur Bel Cal Dor Ever Fal Gal Hel Ist Jas Kal Lum Mer Nov Oph Pal Quil Rud Ser Tal Umb Val Wex Xan Yor Zel Cas Dam "
    "Fen Lor",
    "adia anth eum ician idge iford ineum onia oria uscan",
    300,
)
MAJORS: Final = _words(
    "Accounting Acoustics Agronomy Algebra Anatomy Anthropology Archaeology Architecture Astronomy "
    "Astrophysics Bacteriology Ballistics Biochemistry Biology Biophysics Botany Cardiology Cartography "
    "Ceramics Chemistry Choreography Cinematography Climatology Combinatorics Cosmology Criminology "
    "Cryptography Cybernetics Dentistry Dermatology Dramaturgy Ecology Econometrics Economics Education "
    "Electronics Embryology Entomology Epidemiology Ergonomics Ethics Ethnography Finance Forestry Gastronomy "
    "Genetics Geography Geology Geometry Geophysics Glaciology Hematology Heraldry Histology History "
    "Horticulture Hydraulics Hydrology Immunology Jurisprudence Kinesiology Lexicography Linguistics "
    "Literature Logic Logistics Management Marketing Mathematics Mechanics Medicine Metallurgy Meteorology "
    "Microbiology Mineralogy Musicology Mycology Neurology Nursing Nutrition Oceanography Optics Ornithology "
    "Paleontology Pathology Pedagogy Pharmacy Philology Philosophy Phonetics Physics Physiology Poetics "
    "Psychology Robotics Sculpture Seismology Sociology Statistics Theology"
)
EMPLOYERS: Final = _joined(
    "Acro Beta Citro Delta Equi Flexi Giga Hydro Inter Jet Kilo Lumi Macro Nano Omni Penta Quanta Retro Spectra Tera "
    "Ultra Vector Wave Xeno Yotta Zephyr Astro",
    "corp dyne gen labs line matic soft tek ware works",
    263,
)
MONTHS: Final = _words("January February March April May June July August September October November December")
DAYS: Final = tuple(str(day) for day in range(1, 29))
YEARS: Final = tuple(str(year) for year in range(1801, 2001))

POOLS: Final[dict[str, tuple[str, ...]]] = {
    "first name": FIRST_NAMES,
    "middle name": MIDDLE_NAMES,
    "last name": LAST_NAMES,
    "month": MONTHS,
    "day": DAYS,
    "year": YEARS,
    "birth city": CITIES,
    "university": UNIVERSITIES,
    "major": MAJORS,
    "employer": EMPLOYERS,
}

ATTRIBUTES: Final[dict[str, int]] = {
    "birth date": len(MONTHS) * len(DAYS) * len(YEARS),
    "birth city": len(CITIES),
    "university": len(UNIVERSITIES),
    "major": len(MAJORS),
    "employer": len(EMPLOYERS),
    "work city": 1,
}
"""Attribute -> number of values it may take, given those before it. The work city follows from the employer."""


def bits_of(attribute: str) -> float:
    """Return the bits in one value of an attribute: log2 of its pool.

    >>> round(bits_of("birth city"), 3), bits_of("work city")
    (7.644, 0.0)
    """
    return math.log2(ATTRIBUTES[attribute])


BITS_PER_PERSON: Final = sum(map(bits_of, ATTRIBUTES))
"""46.59, as in bioS without the gender bit; the name stands in the question and is not counted."""
