"""The figures of the pages: one file each, one row each in `FIGURES`.

In: a record. Out: a `Figure`, or None where the record has nothing to draw. No clock and no random numbers:
the same record gives the same bytes.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from rankwise.records import DemoRecord, RecallRecord, Record, RunRecord, SimulationRecord, SpectraRecord
from rankwise.report.drawing import Figure
from rankwise.report.figures import (
    energy,
    exact_recall,
    health,
    heat_map,
    loss_curve,
    planted_energy,
    planted_values,
    recall_attributes,
    recall_forgetting,
    recall_splits,
    recalled_bits,
    scaled_error,
    singular_values,
    trained_energy,
)


class Row(NamedTuple):
    """One row of `FIGURES`: the record, or records, that a figure is of, and the function that draws it."""

    record: type[Record] | tuple[type[Record], ...]
    draw: Callable[[Any], Figure | None]


FIGURES: Final[dict[str, Row]] = {
    "energy": Row(SpectraRecord, energy.draw),
    "singular-values": Row(SpectraRecord, singular_values.draw),
    "heat-map": Row(SpectraRecord, heat_map.draw),
    "planted-energy": Row(SimulationRecord, planted_energy.draw),
    "planted-values": Row(SimulationRecord, planted_values.draw),
    "scaled-error": Row(SimulationRecord, scaled_error.draw),
    "loss": Row(RunRecord, loss_curve.draw),
    "recall-splits": Row((RunRecord, RecallRecord), recall_splits.draw),
    "recall-attributes": Row((RunRecord, RecallRecord), recall_attributes.draw),
    "branch-ratio": Row(RunRecord, health.draw_branch_ratio),
    "effective-rank": Row(RunRecord, health.draw_effective_rank),
    "recalled-bits": Row(DemoRecord, recalled_bits.draw),
    "exact-recall": Row(DemoRecord, exact_recall.draw),
    "recall-forgetting": Row(DemoRecord, recall_forgetting.draw),
    "trained-energy": Row(DemoRecord, trained_energy.draw),
}
"""Name of a figure and its anchor in the page -> the record it is of and its function, in reading order."""
