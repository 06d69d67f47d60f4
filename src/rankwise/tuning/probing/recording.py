"""What a probe found, as its record says it, with what the figures do not say and what makes them worth less.

In: what was measured, and what is recommended. Out: a probe/1 record.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.records import Finding
from rankwise.records.plan import PlanRecord
from rankwise.records.probe import Job, ProbeGradient, ProbeLook, ProbeRate, ProbeRecord, ProbeRow, SweepCell
from rankwise.tuning import preparing
from rankwise.tuning.probing.bits import FEWEST, Measured
from rankwise.tuning.probing.gradients import Pull
from rankwise.tuning.probing.passes import TokenRow
from rankwise.tuning.probing.recommending import KNOWN_BITS, Evidence

QUANTILES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rows of the data, and those that are looked at.

    Attributes:
        everything: all rows.
        numbers: places of those looked at, ascending.
    """

    everything: Sequence[TokenRow]
    numbers: Sequence[int]

    @property
    def rows(self) -> tuple[TokenRow, ...]:
        """Those looked at."""
        return tuple(self.everything[i] for i in self.numbers)


@dataclass(frozen=True, slots=True)
class Form:
    """The adapter that learns the form of one half.

    Attributes:
        rank: r of every module.
        learning_rate: of its AdamW.
        most_steps: for each half.
    """

    rank: int
    learning_rate: float
    most_steps: int


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured on the model.

    Attributes:
        measured: bits of the rows that were looked at.
        formed_bits: of all rows, once their form is known.
        gradient: at the base.
        gradient_rows: that it was summed over.
        evidence: for the recommendation.
    """

    measured: Measured
    formed_bits: float
    gradient: Sequence[Pull]
    gradient_rows: int
    evidence: Evidence


def record_of(
    made: preparing.Job,
    drawn: Drawn,
    form: Form,
    found: Found,
    recommended: tuple[PlanRecord, bool, tuple[SweepCell, ...]],
    *,
    head: Mapping[str, Any],
    begun: float,
) -> ProbeRecord:
    """Return the record of a probe.

    Args:
        made: model and data.
        drawn: rows looked at.
        form: how the form was learnt.
        found: what was measured.
        recommended: a plan, whether the evidence decides, and the runs to try.
        head: what the record begins with.
        begun: `time.perf_counter()` at the start.
    """
    plan, decided, sweep = recommended
    measured, evidence = found.measured, found.evidence
    rows = drawn.rows
    return ProbeRecord(
        **head,
        format=ProbeRecord.FORMAT,
        model=made.config.model,
        data=made.examples.name,
        examples=len(drawn.everything),
        measured_examples=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        target_tokens=sum(len(row.targets) for row in rows),
        max_length=made.config.max_length,
        target_modules=tuple(made.laid),
        bits_to_learn=evidence.bits,
        base_bits=evidence.base_bits,
        form_bits=evidence.base_bits - found.formed_bits,
        repeated_bits=found.formed_bits - evidence.bits,
        bits_by_example=quantiles([r.news for r in measured.rows]),
        base_bits_by_example=quantiles([r.base for r in measured.rows]),
        known_rows=sum(r.formed <= KNOWN_BITS for r in measured.rows),
        repeated_rows=sum(r.formed > KNOWN_BITS >= r.news for r in measured.rows),
        rows=_rows(drawn, measured),
        adaptation_rank=form.rank,
        adaptation_rate=form.learning_rate,
        adaptation_steps=measured.steps,
        adaptation=_looks(measured),
        apart=measured.apart,
        epochs=evidence.epochs,
        job=evidence.job,
        job_given=evidence.job_given,
        capacity=evidence.capacity,
        gradient=tuple(map(_gradient, found.gradient)),
        gradient_examples=found.gradient_rows,
        rates=_rates(evidence),
        recommendation=plan,
        decided=decided,
        sweep=sweep,
        caveats=caveats(tiny=evidence.tiny, form=made.examples.form, job=evidence.job),
        findings=findings_of(measured, rows, len(drawn.everything), form.most_steps, drawn.everything),
        seconds=time.perf_counter() - begun,
    )


def _rows(drawn: Drawn, measured: Measured) -> tuple[ProbeRow, ...]:
    return tuple(
        ProbeRow(
            row=i,
            tokens=r.tokens,
            base_bits=_digits(r.base),
            formed_bits=_digits(r.formed),
            news_bits=_digits(r.news),
        )
        for i, r in zip(drawn.numbers, measured.rows, strict=True)
    )


def _looks(measured: Measured) -> tuple[ProbeLook, ...]:
    return tuple(
        ProbeLook(half=half, step=look.step, bits_per_token=_finite(look.bits_per_token))
        for half, looks in enumerate(measured.looks)
        for look in looks
    )


def _rates(evidence: Evidence) -> tuple[ProbeRate, ...]:
    return tuple(
        ProbeRate(learning_rate=p.learning_rate, loss=_finite(p.loss), smoothed=_finite(p.smoothed))
        for p in evidence.ramp
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _digits(value: float) -> float:
    """Round to what a row's bits are good for: a thousandth."""
    return round(value, 3)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return quantiles, each that of a row that is there.

    >>> quantiles([3.0, 1.0, 2.0])["0.5"]
    2.0
    """
    ordered = sorted(values)
    return {f"{q:g}": ordered[min(len(ordered) - 1, math.floor(q * len(ordered)))] for q in QUANTILES}


def _gradient(pull: Any) -> ProbeGradient:
    return ProbeGradient(
        module=pull.module,
        shape=pull.shape,
        energy=_finite(pull.energy),
        stable_rank=pull.stable_rank,
        effective_rank=pull.effective_rank,
        rank_90=pull.rank_90,
        rank_99=pull.rank_99,
        coherence=pull.coherence,
        sketched=pull.sketched,
    )


def caveats(*, tiny: bool, form: str, job: Job) -> tuple[str, ...]:
    """Return what the figures do not say."""
    found = [
        "Bits to learn are what it takes to know these rows by heart. They are the length of a code, and so an upper "
        "bound where the halves were kept apart: what follows only from two rows together, or from reasoning, is "
        "counted as news.",
        "That the bits fit into a rank does not mean that they will be learnt: in our runs learning rate and exposures "
        "bound before room did.",
        "The gradient at the base says how training begins. Its effective rank did not tell facts from style in our "
        "measurements, so that no rank is taken from it.",
    ]
    if not tiny:
        found.append(
            "The densities below 100 exposures and the comparison of rules were measured on a model of 1.3 million "
            "parameters; nobody has shown that they hold for yours."
        )
    if form == "text" and job == "facts":
        found.append(
            "In running text every turn of phrase counts as news. Where only the facts in it matter, give them as "
            "prompt and completion; where only the manner does, say --job style."
        )
    return tuple(found)


def findings_of(
    measured: Measured, rows: Sequence[TokenRow], count: int, steps: int, everything: Sequence[TokenRow]
) -> tuple[Finding, ...]:
    """Name what makes the figures worth less than usual."""
    found = []
    if not measured.apart:
        text = (
            "So many rows share the rare words of their prompts (a system prompt, or one subject) that the halves "
            "could not be kept apart for sure: the adapter of the form may have seen the facts that it was judged on, "
            "and the bits to learn may be too low."
        )
        found.append(Finding(code="halves-not-apart", level="warning", text=text))
    if len(rows) < FEWEST:
        few = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
        text = f"{few} too few to learn their form from one half: the bits to learn contain it."
        found.append(Finding(code="too-few-rows", level="warning", text=text))
    late = [half for half, looks in enumerate(measured.looks) if steps and measured.steps[half] >= steps]
    if late:
        text = (
            f"Held-out rows were still getting cheaper after {steps} steps: the bits to learn contain form. Give more "
            "--steps, or a higher --learning-rate."
        )
        found.append(Finding(code="form-not-learnt", level="warning", text=text))
    if count > len(rows):
        text = (
            f"{len(rows):,} of {count:,} rows were looked at. What a row repeats of one that was not is counted as "
            "news, so that the bits to learn are too high where rows repeat one another."
        )
        found.append(Finding(code="sampled-rows", level="info", text=text))
    same = sum(n - 1 for n in Counter(row.ids for row in everything).values())
    if same:
        found.append(
            Finding(code="equal-rows", level="info", text=f"{same:,} of {count:,} rows are equal to an earlier one.")
        )
    return tuple(found)
