"""From what was measured to a plan to start with: rank, rule, alpha and learning rate, each with its reason.

In: bits, capacity, the ramp of rates, the modules. Out: plan/1, whether the evidence decides, and what to try where it
does not. It says less than it could: what is known of rank and rate was measured on one small model
(docs/explanation/facts-and-rank.md), and no figure here has been judged on a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.records import PlannedModule, PlanRecord
from rankwise.records.plan import PlanChoice
from rankwise.records.probe import Job, ProbeCapacity, SweepCell
from rankwise.scaling import scaling as factor_of
from rankwise.tuning.options import DEFAULT_ALPHA, DEFAULT_RATE, PRESETS, TINY_RATE
from rankwise.tuning.probing.rates import RatePoint

HEADROOM: Final = 2.0
"""Ranks are taken so many times above what holds the bits: densities were reached at the end of training, and learning
slows as room runs out."""

FEWEST_FACTS: Final = 64
MOST: Final = 256
"""Ranks for facts. Under alpha / sqrt(r) a higher rank learns faster, also where there is room to spare: of facts about
10, 20 and 40 people (40, 79 and 158 steps) rank 8 recalled 73, 65 and 98 % of what the best of ranks 1 to 64 did, rank
64 100, 100 and 95 % (bits-to-learn). The first floor was 8."""

BELOW_CLIFF: Final = 3.0
"""The rate is taken so many times below the one at which the ramp was lowest. On rankwise:tiny with 40 people that
gives 9e-3, 5e-3, 3e-3 and 1e-3 for rank 8 and 64 under alpha / r and alpha / sqrt(r), where 160-step runs were best at
3e-3 to 1e-2, 5e-3, 3e-3, and 1e-3 to 3e-3."""

CLEAR: Final = 0.8
"""A ramp whose loss falls to this share of its start has shown what the rate does; one that hardly falls has not."""

NEWS_SHARE: Final = 0.1
NEWS_BITS: Final = 8.0
STORED_BITS: Final = 6.0
STORED_ROWS: Final = 0.25
"""Where at least this share of the base's loss, or so many bits a row, is news, or where so many bits are news in this
share of the rows, the rows have to be stored to be known. The last is for facts told in a manner that the model does
not know: the manner costs so much that the facts vanish beside it. It was set on five data sets: 33 to 35 % of the rows
of facts and of facts mixed with style hold 6 bits, 14 % of those of style (bits-to-learn)."""

KNOWN_BITS: Final = 1.0
"""A row that costs 1 bit at most has a probability of a half at least, so that greedy decoding writes it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the recommendation is made from.

    Attributes:
        bits: to learn, in all rows.
        base_bits: of the base, in all rows.
        rows: of the data.
        job: what it is for.
        job_given: whether the user said so.
        capacity: what holds the bits.
        ramp: of learning rates at the recommended rank; empty where there is none.
        tiny: whether the model is the built-in one.
        epochs: planned.
    """

    bits: float
    base_bits: float
    rows: int
    job: Job
    job_given: bool
    capacity: ProbeCapacity
    ramp: Sequence[RatePoint]
    tiny: bool
    epochs: float


@dataclass(frozen=True, slots=True)
class Start:
    """Rank, rule and alpha, before a rate is known."""

    rank: int
    scaling: str
    lora_alpha: float


def job_of(bits: float, base_bits: float, rows: int, *, stored: float = 0.0) -> Job:
    """Return what the data look like.

    Args:
        bits: to learn.
        base_bits: of the base.
        rows: that they are summed over.
        stored: share of the rows in which STORED_BITS are news.
    """
    if base_bits <= KNOWN_BITS * rows:
        return "nothing"
    much = bits >= NEWS_SHARE * base_bits or bits >= NEWS_BITS * rows
    return "facts" if much or stored >= STORED_ROWS else "style"


def start_of(
    job: Job,
    capacity: ProbeCapacity,
    shapes: Mapping[str, tuple[int, int]],
    *,
    scaling: str | None,
    lora_alpha: float | None,
) -> Start:
    """Return rank, rule and alpha; what the user fixed stays."""
    preset = PRESETS["knowledge" if job == "facts" else "persona"]
    rank = preset.rank
    if job == "facts":
        wanted = max(FEWEST_FACTS, min(MOST, HEADROOM * capacity.min_rank))
        rank = 2 ** math.ceil(math.log2(wanted))
    rank = max(1, min(rank, _sides(shapes)))
    return Start(rank, scaling or preset.scaling, lora_alpha or DEFAULT_ALPHA)


def _sides(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the largest rank that any module can have; a router of one output must not decide for the others."""
    return max(min(shape) for shape in shapes.values())


def rate_of(start: Start, evidence: Evidence) -> tuple[float, bool, str]:
    """Return the learning rate, whether it was measured clearly, and its reason."""
    usual = TINY_RATE if evidence.tiny else DEFAULT_RATE
    finite = [p for p in evidence.ramp if math.isfinite(p.smoothed)]
    if not finite:
        place = "the built-in model" if evidence.tiny else "adapters of large models"
        words = f"Learning rate {usual:g}: a usual one for {place}, not measured here; it may be off by ten times."
        return usual, False, words
    lowest = min(finite, key=lambda p: p.smoothed)
    rate = _rounded(lowest.learning_rate / BELOW_CLIFF)
    clear = lowest.smoothed <= CLEAR * finite[0].smoothed
    words = (
        f"Learning rate {rate:g}: a third of {lowest.learning_rate:.2g}, where a ramp of {len(finite)} steps at rank "
        f"{start.rank} had its lowest loss ({finite[0].smoothed:.3g} at the start, {lowest.smoothed:.3g} there, "
        f"{finite[-1].smoothed:.3g} at {finite[-1].learning_rate:.2g}). "
    )
    words += (
        "Off by three times either way is within what a ramp can tell."
        if clear
        else "The loss hardly fell on the way, as with facts that take many exposures: it says where training breaks "
        "rather than where it is best."
    )
    return rate, clear, words


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def recommend(
    start: Start,
    shapes: Mapping[str, tuple[int, int]],
    evidence: Evidence,
    head: Mapping[str, Any],
    names: tuple[str, str],
) -> tuple[PlanRecord, bool, tuple[SweepCell, ...]]:
    """Return the plan, whether the evidence decides, and the runs to try.

    Args:
        start: rank, rule and alpha.
        shapes: module -> (out_features, in_features).
        evidence: what was measured.
        head: what the record begins with.
        names: of the data and the model.
    """
    rate, clear, rate_words = rate_of(start, evidence)
    capacity, job = evidence.capacity, evidence.job
    enough = start.rank >= capacity.rank_interval[1]
    decided = job == "nothing" or (clear and (job == "style" or enough))
    why = " ".join([_rank_words(start, evidence), _rule_words(start, job), rate_words, _module_words(start, shapes)])
    if not decided:
        why += " The evidence does not decide: try the three runs of `sweep`, and read recall and forgetting."
    scale = factor_of(start.scaling, start.lora_alpha, start.rank)
    modules = tuple(
        PlannedModule(
            module=module,
            shape=shape,
            r=min(start.rank, *shape),
            lora_alpha=_alpha(start, min(start.rank, *shape)),
            scaling=scale,
            kept_energy_share=None,
        )
        for module, shape in shapes.items()
    )
    plan = PlanRecord(
        **head,
        format=PlanRecord.FORMAT,
        rule=start.scaling,
        modules=modules,
        params=sum(m.r * sum(m.shape) for m in modules),
        budget=None,
        relative_error=None,
        learning_rate=rate,
        why=why,
        source=names[0],
        base=names[1],
        choice=PlanChoice(
            kind="probe", value=max(0.0, evidence.bits), text=f"{job}: {evidence.bits:,.0f} bits to learn"
        ),
        scale=scale,
        reference_rank=start.rank,
    )
    return plan, decided, () if decided else _sweep(start, rate, shapes, facts=job == "facts")


def _alpha(start: Start, rank: int) -> float:
    """Return the alpha at which a module too small for the rank has the scale of the others."""
    per_alpha = factor_of(start.scaling, 1.0, start.rank) / factor_of(start.scaling, 1.0, rank)
    return start.lora_alpha * per_alpha


def _rank_words(start: Start, evidence: Evidence) -> str:
    capacity = evidence.capacity
    if evidence.job == "nothing":
        return (
            f"The base writes these rows already: there is nothing to store. Rank {start.rank} is what a change of "
            "manner would need, if there is any."
        )
    if evidence.job == "style":
        asked = "You asked for their manner" if evidence.job_given else "Hardly anything in these rows is news"
        return (
            f"Rank {start.rank}: {asked} ({evidence.bits / max(1, evidence.rows):.2g} bits a row), and an adapter of "
            "rank 4 learnt their form in the probe. To know the rows by heart would take rank "
            f"{capacity.rank_interval[0]} to {capacity.rank_interval[1]}."
        )
    low, high = capacity.rank_interval
    bound = f", and no less than {FEWEST_FACTS}" if start.rank == FEWEST_FACTS else ""
    if start.rank < HEADROOM * capacity.min_rank:
        bound = f" would be more than {start.rank}, which is the most that " + (
            "is recommended" if start.rank == MOST else "these modules can have"
        )
    return (
        f"Rank {start.rank}: {evidence.bits:,.0f} bits need {capacity.params:,.0f} parameters at "
        f"{capacity.bits_per_param:.2g} bits each ({capacity.exposures:.3g} exposures in {evidence.epochs:g} "
        f"epochs), that is rank {capacity.min_rank} ({low} to {high} by what the sources allow); twice that, as a "
        f"power of two{bound}. Where room does not bind, rank is speed: on rankwise:tiny rank 8 recalled 65 to 98 % of "
        "the best rank's bits in the same steps, rank 64 95 to 100 %; on larger models this is not known."
    )


def _rule_words(start: Start, job: Job) -> str:
    scale = factor_of(start.scaling, start.lora_alpha, start.rank)
    words = f"Rule {start.scaling}, alpha {start.lora_alpha:g}: a scale of {scale:.3g} on B A. "
    if job == "facts":
        return words + (
            "At the best rate of each, alpha / sqrt(r) recalled more than alpha / r on rankwise:tiny (29.2 against "
            "23.1 bits at rank 64) and forgot more; a higher rate makes up most of it. `rankwise check` says which "
            "is stable on your model."
        )
    return words + "At rank 8 both rules can be made equal by alpha; alpha / r is what most tools and runtimes expect."


def _module_words(start: Start, shapes: Mapping[str, tuple[int, int]]) -> str:
    small = sum(min(shape) < start.rank for shape in shapes.values())
    bounded = f" ({small} of {len(shapes)} are smaller than that, and get their full rank at the same scale)"
    return (
        f"The same rank in every module{bounded if small else ''}: the gradient's spectrum at the base did not say, in "
        "our measurements, where rank is needed."
    )


def _sweep(start: Start, rate: float, shapes: Mapping[str, tuple[int, int]], *, facts: bool) -> tuple[SweepCell, ...]:
    """Return the best guess, one with a lower rate, and one with a higher rank, or rate where rank is not in doubt.

    Of facts it always is: that rank does not bind was measured on one small model.
    """

    def cell(rank: int, learning_rate: float, why: str) -> SweepCell:
        return SweepCell(
            rank=rank,
            scaling=start.scaling,
            lora_alpha=start.lora_alpha,
            learning_rate=_rounded(learning_rate),
            why=why,
        )

    higher = min(4 * start.rank, _sides(shapes))
    last = (
        cell(higher, rate, "more here: rank binds, or speeds learning at this rate")
        if facts and higher > start.rank
        else cell(start.rank, 3 * rate, "more here: the rate was too low")
    )
    return (
        cell(start.rank, rate, "the best guess"),
        cell(start.rank, rate / 3, "as much recall with less forgetting: the rate was too high"),
        last,
    )
