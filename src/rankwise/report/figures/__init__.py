"""The figures of the pages: one file each, one row each in `FIGURES`.

In: a record. Out: a `Figure`, or None where the record has nothing to draw. No clock and no random numbers:
the same record gives the same bytes.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from rankwise.records import (
    ConversionRecord,
    CounterTestRecord,
    DemoRecord,
    ExtractionRecord,
    PlanRecord,
    ProbeRecord,
    RecallRecord,
    Record,
    RunRecord,
    SimulationRecord,
    SpectraRecord,
    StabilityRecord,
    SweepRecord,
)
from rankwise.report.drawing import Figure
from rankwise.report.figures import (
    conversion_error,
    counter_moves,
    energy,
    exact_recall,
    extraction_error,
    health,
    heat_map,
    loss_curve,
    plan_curve,
    plan_ranks,
    planted_energy,
    planted_values,
    probe_bits,
    probe_gradient,
    recall_attributes,
    recall_forgetting,
    recall_splits,
    recalled_bits,
    scaled_error,
    singular_values,
    stability,
    sweep_exponents,
    sweep_forgetting,
    sweep_ranks,
    sweep_rates,
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
    "plan-curve": Row(PlanRecord, plan_curve.draw),
    "plan-ranks": Row(PlanRecord, plan_ranks.draw),
    "conversion-error": Row(ConversionRecord, conversion_error.draw),
    "extraction-error": Row(ExtractionRecord, extraction_error.draw_error),
    "extraction-ranks": Row(ExtractionRecord, extraction_error.draw_ranks),
    "loss": Row(RunRecord, loss_curve.draw),
    "recall-splits": Row((RunRecord, RecallRecord), recall_splits.draw),
    "recall-attributes": Row((RunRecord, RecallRecord), recall_attributes.draw),
    "branch-ratio": Row(RunRecord, health.draw_branch_ratio),
    "effective-rank": Row(RunRecord, health.draw_effective_rank),
    "recalled-bits": Row(DemoRecord, recalled_bits.draw),
    "exact-recall": Row(DemoRecord, exact_recall.draw),
    "recall-forgetting": Row(DemoRecord, recall_forgetting.draw),
    "trained-energy": Row(DemoRecord, trained_energy.draw),
    "stability-ranks": Row(StabilityRecord, stability.draw_ranks),
    "stability-steps": Row(StabilityRecord, stability.draw_steps),
    "probe-parts": Row(ProbeRecord, probe_bits.draw_parts),
    "probe-rows": Row(ProbeRecord, probe_bits.draw_rows),
    "probe-rates": Row(ProbeRecord, probe_bits.draw_rates),
    "probe-gradient": Row(ProbeRecord, probe_gradient.draw),
    "counter-moves": Row(CounterTestRecord, counter_moves.draw),
    "sweep-answer": Row(SweepRecord, sweep_ranks.draw_answer),
    "sweep-ranks": Row(SweepRecord, sweep_ranks.draw_ranks),
    "sweep-rates": Row(SweepRecord, sweep_rates.draw),
    "sweep-forgetting": Row(SweepRecord, sweep_forgetting.draw),
    "sweep-exponents": Row(SweepRecord, sweep_exponents.draw),
}
"""Name of a figure and its anchor in the page -> the record it is of and its function, in reading order."""
