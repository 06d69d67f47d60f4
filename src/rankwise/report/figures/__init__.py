"""The figures of the pages: one file each, one row each in `FIGURES`.

In: a record. Out: a `Figure`, or None where the record has nothing to draw. No clock and no random numbers:
the same record gives the same bytes.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from rankwise.records import Record, SimulationRecord, SpectraRecord
from rankwise.report.drawing import Figure
from rankwise.report.figures import (
    energy,
    heat_map,
    planted_energy,
    planted_values,
    scaled_error,
    singular_values,
)


class Row(NamedTuple):
    """One row of `FIGURES`: the record that a figure is of, and the function that draws it."""

    record: type[Record]
    draw: Callable[[Any], Figure | None]


FIGURES: Final[dict[str, Row]] = {
    "energy": Row(SpectraRecord, energy.draw),
    "singular-values": Row(SpectraRecord, singular_values.draw),
    "heat-map": Row(SpectraRecord, heat_map.draw),
    "planted-energy": Row(SimulationRecord, planted_energy.draw),
    "planted-values": Row(SimulationRecord, planted_values.draw),
    "scaled-error": Row(SimulationRecord, scaled_error.draw),
}
"""Name of a figure and its anchor in the page -> the record it is of and its function, in reading order."""
