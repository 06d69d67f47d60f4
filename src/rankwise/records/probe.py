"""probe/1: what there is to learn in a data set; counter-test/1: whether a trained adapter had room left.

In: what was measured. Out: the records.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, data_frame
from rankwise.records.plan import PlanRecord

Interval = tuple[float, float]

Job = Literal["facts", "style", "nothing"]

StarvedVerdict = Literal["starved by scale", "starved by rank", "starved by rate", "sufficient", "undecided"]


class ProbeRow(Part, frozen=True, kw_only=True):
    """What one row costs, in bits.

    Attributes:
        row: its number in the data, from 0.
        tokens: target tokens.
        base_bits: for the base.
        formed_bits: once the form of the data is known.
        news_bits: after the rows before it too: what has to be stored.
    """

    row: int
    tokens: int
    base_bits: float
    formed_bits: float
    news_bits: float


class ProbeLook(Part, frozen=True, kw_only=True):
    """Held-out bits while a low-rank adapter learnt the form of the other half.

    Attributes:
        half: 0 or 1: which half was judged.
        step: optimizer steps made.
        bits_per_token: held-out bits a target token.
    """

    half: int
    step: int
    bits_per_token: float | None


class ProbeCapacity(Part, frozen=True, kw_only=True):
    """What could hold the bits.

    Attributes:
        bits_per_param: density that the rank below is taken at: the geometric middle of the interval.
        bits_per_param_interval: lowest and highest density that the sources allow at these exposures.
        source: where the densities come from, in words.
        exposures: times that a fact is seen: epochs times the rows that say it.
        params_per_rank: parameters of rank 1 on all target modules.
        params: that hold the bits at `bits_per_param`.
        min_rank: rank that holds them at `bits_per_param`; 0 where there is nothing to hold.
        rank_interval: ranks at the highest and at the lowest density.
    """

    bits_per_param: float
    bits_per_param_interval: Interval
    source: str
    exposures: float
    params_per_rank: int
    params: float
    min_rank: int
    rank_interval: tuple[int, int]


class ProbeGradient(Part, frozen=True, kw_only=True):
    """The gradient of one module at the base, summed over rows.

    Attributes:
        module: dotted path.
        shape: (out_features, in_features).
        energy: squared Frobenius norm; nats squared.
        stable_rank: energy / sigma_1^2.
        effective_rank: exp of the entropy of sigma^2 / energy.
        rank_90: smallest rank that holds 90 % of the energy.
        rank_99: the same for 99 %.
        coherence: 1 where all rows pull the same way, 1 / rows where they have nothing in common.
        sketched: whether the spectrum is that of a random sketch: high ranks are then too low.
    """

    module: str
    shape: tuple[int, int]
    energy: float | None
    stable_rank: float | None
    effective_rank: float | None
    rank_90: int
    rank_99: int
    coherence: float | None
    sketched: bool = False


class ProbeRate(Part, frozen=True, kw_only=True):
    """One step of the ramp of learning rates.

    Attributes:
        learning_rate: of the step.
        loss: nats a target token, before the step.
        smoothed: the same, averaged over the steps before.
    """

    learning_rate: float
    loss: float | None
    smoothed: float | None


class SweepCell(Part, frozen=True, kw_only=True):
    """One run to try.

    Attributes:
        rank: r of every module.
        scaling: rule.
        lora_alpha: alpha.
        learning_rate: highest.
        why: what it would tell.
    """

    rank: int
    scaling: str
    lora_alpha: float
    learning_rate: float
    why: str


class ProbeRecord(Record, frozen=True, kw_only=True):
    """probe/1: bits to learn, capacity, gradient, and what to start with.

    Attributes:
        model: MODEL as given.
        data: DATA as given; built-in names with all their parameters.
        examples: rows of the data.
        measured_examples: rows that were looked at; the bits of the others are taken to be like theirs.
        tokens: of the rows looked at.
        target_tokens: those of them that are trained on.
        max_length: tokens an example was cut at.
        target_modules: names of the modules, in full.
        bits_to_learn: what has to be stored to know all rows by heart: base_bits - form_bits - repeated_bits. The
            length of a code of the rows in their order, and so an upper bound where the halves are `apart`.
        base_bits: summed loss of the base on the target tokens, in bits.
        form_bits: of these, what held-out rows saved once a low-rank adapter knew the form. Below 0 where it did not
            help.
        repeated_bits: of the rest, what earlier rows about the same thing save.
        bits_by_example: quantile -> bits to learn of a row.
        base_bits_by_example: quantile -> bits of a row for the base.
        known_rows: rows that cost 1 bit at most once the form is known: greedy decoding writes them.
        repeated_rows: rows that cost more than that, and 1 bit at most after the rows before them.
        rows: all rows looked at.
        adaptation_rank: rank of the adapter that learnt the form.
        adaptation_rate: its learning rate.
        adaptation_steps: steps that were kept, for each half.
        adaptation: held-out bits on the way.
        apart: whether no row was judged by an adapter that had seen a row about the same thing.
        epochs: planned passes over the data.
        job: what the recommendation is for: "facts" (know the rows by heart), "style" (write in their manner),
            "nothing".
        job_given: whether the user said so.
        capacity: what could hold the bits.
        gradient: of every module.
        gradient_examples: rows it was summed over.
        rates: the ramp of learning rates at the recommended rank and rule; empty where it was not asked for.
        recommendation: plan/1.
        decided: whether the evidence decides; else `sweep` says what would.
        sweep: runs to try, best guess first.
        caveats: what the figures do not say.
        findings: worst first.
        seconds: taken.
    """

    FORMAT: ClassVar[str] = "rankwise/probe/1"

    model: str
    data: str
    examples: int
    measured_examples: int
    tokens: int
    target_tokens: int
    max_length: int
    target_modules: tuple[str, ...]
    bits_to_learn: float
    base_bits: float
    form_bits: float
    repeated_bits: float
    bits_by_example: dict[str, float]
    base_bits_by_example: dict[str, float]
    known_rows: int
    repeated_rows: int
    rows: tuple[ProbeRow, ...]
    adaptation_rank: int
    adaptation_rate: float
    adaptation_steps: tuple[int, ...]
    adaptation: tuple[ProbeLook, ...]
    apart: bool
    epochs: float
    job: Job
    job_given: bool
    capacity: ProbeCapacity
    gradient: tuple[ProbeGradient, ...]
    gradient_examples: int
    rates: tuple[ProbeRate, ...]
    recommendation: PlanRecord
    decided: bool
    sweep: tuple[SweepCell, ...]
    caveats: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float

    def to_dataframe(self) -> Any:
        """Return one row an example as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(row) for row in self.rows])

    def __repr__(self) -> str:
        ranks = sorted({m.r for m in self.recommendation.modules})
        return (
            f"ProbeRecord({self.examples:,} examples, {self.bits_to_learn:,.0f} bits to learn, {self.job}, "
            f"rank {' to '.join(map(str, ranks[:: max(1, len(ranks) - 1)]))} {self.recommendation.rule})"
        )


class CounterMove(Part, frozen=True, kw_only=True):
    """One way of going on from the adapter.

    Attributes:
        move: "as it is", "scale", "rank" or "rate".
        text: what was changed, in words.
        rank: largest r.
        factor: that the scale, the rank or the rate was multiplied by; 1 for "as it is".
        losses: loss after the steps on the judging rows, one for each order of the batches, nats a target token.
        loss: their mean.
        gain: mean of the paired differences to "as it is": above 0 is better; None for "as it is" itself.
        gain_interval: 95 % interval of that mean, by Student's t.
    """

    move: str
    text: str
    rank: int
    factor: float
    losses: tuple[float | None, ...]
    loss: float | None
    gain: float | None
    gain_interval: Interval | None


class CounterTestRecord(Record, frozen=True, kw_only=True):
    """counter-test/1: was a trained adapter starved, or had it enough?

    Attributes:
        model: MODEL as given.
        adapter: ADAPTER as given.
        data: DATA as given.
        examples: rows of the data.
        judged_examples: rows that the losses are taken on, of those that the steps see.
        rank: largest r of the adapter.
        scaling: largest factor on B @ A.
        effective_rank: mean over modules of exp(entropy of sigma^2 / energy) of B @ A.
        learning_rate: that the adapter is continued at.
        optimizer: of all moves.
        steps: of every move.
        batch_size: rows a step.
        seeds: of the orders of the batches.
        start_loss: before any step, the same for all moves, nats a target token.
        base_loss: of the base without the adapter.
        least_gain: gain below which a move counts as none, nats a token.
        moves: what was tried.
        verdict: in five words at most.
        text: the verdict in a sentence.
        caveats: what it does not say.
        findings: worst first.
        seconds: taken.
    """

    FORMAT: ClassVar[str] = "rankwise/counter-test/1"

    model: str
    adapter: str
    data: str
    examples: int
    judged_examples: int
    rank: int
    scaling: float
    effective_rank: float | None
    learning_rate: float
    optimizer: str
    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    start_loss: float
    base_loss: float
    least_gain: float
    moves: tuple[CounterMove, ...]
    verdict: StarvedVerdict
    text: str
    caveats: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float

    def to_dataframe(self) -> Any:
        """Return one row a move as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(move) for move in self.moves])

    def __repr__(self) -> str:
        return f"CounterTestRecord({self.verdict}: {self.text})"
