"""sweep/1 and sweep-dry-run/1: a grid of runs, and what it says about rank, rule and learning rate.

In: figures of many runs, and what was worked out from them. Out: the records.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, data_frame
from rankwise.records.runs import Status

Score = Literal["bits", "exact_share", "loss"]
Edge = Literal["lowest", "highest", "only"]
Effect = Literal["helps", "hurts", "undecided"]


class Estimate(Part, frozen=True, kw_only=True):
    """A mean over seeds.

    Attributes:
        mean: or None where there is no seed.
        ci: 95 % t-interval over the seeds, or None of fewer than two.
        n: number of seeds.
    """

    mean: float | None
    ci: tuple[float, float] | None
    n: int


class SweepConfig(Part, frozen=True, kw_only=True):
    """What was asked for.

    Attributes:
        model: MODEL; a local path in full.
        data: DATA; a local path in full.
        ranks: in the folder, ascending.
        scaling: rules.
        learning_rates: ascending.
        seeds: ascending.
        score: what settings are compared by: recalled "bits", "exact_share", or the last training "loss".
        settings: flags of train that are the same for all runs, those left at their default included.
        digest: SHA-256 of model, data and settings, its first 16 digits.
    """

    model: str
    data: str
    ranks: tuple[int, ...]
    scaling: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    score: Score
    settings: dict[str, Any]
    digest: str


class SweepRun(Part, frozen=True, kw_only=True):
    """One run, in the figures that are compared; the rest stands in its run/1 record.

    Attributes:
        path: of the run/1 record, relative to the folder.
        rank: r of every module.
        scaling: rule.
        lora_alpha: alpha of every module.
        learning_rate: highest.
        seed: of A and of the order of the data.
        status: as in run/1.
        params: trainable parameters.
        steps: optimizer steps done.
        tokens: seen.
        loss: last training loss, nats a token.
        bits: recalled, the base's taken off.
        bits_possible: in the facts.
        bits_per_param: recalled bits / trainable parameters.
        exact_share: share of the facts got right to the last token.
        paraphrased_exact_share: the same, asked in held-out words.
        forgetting: rise of the loss on text that the base modelled, nats a token.
        seconds: of training.
        peak_memory_bytes: as in run/1.
        tokens_per_second: in training.
        error: why the status is not "done".
    """

    path: str
    rank: int
    scaling: str
    lora_alpha: float | None
    learning_rate: float
    seed: int
    status: Status
    params: int | None
    steps: int | None
    tokens: int | None
    loss: float | None
    bits: float | None
    bits_possible: float | None
    bits_per_param: float | None
    exact_share: float | None
    paraphrased_exact_share: float | None
    forgetting: float | None
    seconds: float | None
    peak_memory_bytes: int | None
    tokens_per_second: float | None
    error: str | None


class SweepPoint(Part, frozen=True, kw_only=True):
    """One setting: the runs that differ in their seed alone. Means are over those that are done.

    Attributes:
        scaling: rule.
        rank: r.
        learning_rate: highest.
        params: trainable parameters.
        runs: number of runs.
        done: of these, to their end.
        diverged: of these, the loss of which left for good.
        failed: of these, ended by an error or from outside.
        score: what settings are compared by.
        loss: last training loss.
        exact_share: share of the facts got right.
        forgetting: rise of the loss on other text.
        bits_per_param: recalled bits a trainable parameter.
        eligible: no seed diverged or was ended, and as many are done as of the fullest point of this rule and rank.
        on_front: eligible, and no other eligible point of the sweep has a better mean score and less mean forgetting.
    """

    scaling: str
    rank: int
    learning_rate: float
    params: int | None
    runs: int
    done: int
    diverged: int
    failed: int
    score: Estimate
    loss: Estimate
    exact_share: Estimate
    forgetting: Estimate
    bits_per_param: Estimate
    eligible: bool
    on_front: bool


class SweepBest(Part, frozen=True, kw_only=True):
    """The learning rate with the best mean score, for one rule and rank.

    Attributes:
        scaling: rule.
        rank: r.
        learning_rate: of the eligible point with the best mean; None where none is eligible.
        on_edge: whether a better one may lie outside the grid.
        edge: "lowest" or "highest" of the rates tried (those that diverged included), the "only" one, or None.
        tied: other rates whose interval overlaps the best one's, or that have none: not told apart from it.
        score: at this rate. It was chosen by these same seeds, which flatters it.
        forgetting: at this rate.
        bits_per_param: at this rate.
        params: trainable parameters.
    """

    scaling: str
    rank: int
    learning_rate: float | None
    on_edge: bool
    edge: Edge | None
    tied: tuple[float, ...]
    score: Estimate
    forgetting: Estimate
    bits_per_param: Estimate
    params: int | None


class RankEffect(Part, frozen=True, kw_only=True):
    """What raising the rank does to the score, under one rule.

    Attributes:
        scaling: rule.
        low_rank: from.
        high_rank: to.
        at: "best": each rank at its own best rate; "rate": both at one rate.
        low_learning_rate: of the lower rank.
        high_learning_rate: of the higher rank.
        difference: score at the higher rank minus that at the lower, seed by seed.
        verdict: "helps" or "hurts" where the interval of the difference leaves out 0 and the intervals of the two
            scores do not overlap; else "undecided".
    """

    scaling: str
    low_rank: int
    high_rank: int
    at: Literal["best", "rate"]
    low_learning_rate: float
    high_learning_rate: float
    difference: Estimate
    verdict: Effect


class RateExponent(Part, frozen=True, kw_only=True):
    """How the best learning rate goes with the rank, under one rule: like rank^e.

    Attributes:
        scaling: rule.
        exponent: the slope of log(best rate) against log(rank), by least squares for each seed, as a mean over them.
        ci: its 95 % t-interval over the seeds, made wider by what half a step of the grid at every rank could do.
        from_grid: that widening, on either side.
        seeds: number of seeds.
        ranks: that it was fitted to.
        left_out: rank -> why it could not be used.
    """

    scaling: str
    exponent: float | None
    ci: tuple[float, float] | None
    from_grid: float | None
    seeds: int
    ranks: tuple[int, ...]
    left_out: dict[str, str]


class SweepRecord(Record, frozen=True, kw_only=True):
    """sweep/1: rank x rule x learning rate x seed.

    Attributes:
        config: what was asked for.
        runs: paths of the run/1 records, relative to the folder.
        best: the best rate of each rule and rank.
        cells: the runs, a row each.
        points: means over seeds, a row a rule, rank and rate.
        rank_effects: does raising the rank help.
        exponents: of the best rate in the rank, a row a rule.
        answers: all of this in sentences made from the figures. Intervals are 95 % each, not corrected for their
            number.
        findings: best rates on the grid's edge, runs that diverged or failed.
        seconds: of this call; runs that were there already are not counted.
    """

    FORMAT: ClassVar[str] = "rankwise/sweep/1"

    config: SweepConfig
    runs: tuple[str, ...]
    best: tuple[SweepBest, ...]
    cells: tuple[SweepRun, ...]
    points: tuple[SweepPoint, ...]
    rank_effects: tuple[RankEffect, ...]
    exponents: tuple[RateExponent, ...]
    answers: tuple[str, ...]
    findings: tuple[Finding, ...]
    seconds: float

    def to_dataframe(self) -> Any:
        """Return one row a run as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(cell) for cell in self.cells])

    def __repr__(self) -> str:
        c = self.config
        ended = {status: sum(cell.status == status for cell in self.cells) for status in ("done", "diverged", "failed")}
        states = ", ".join(f"{n} {status}" for status, n in ended.items() if n)
        best = "; ".join(f"rank {b.rank}, {b.scaling}: {b.learning_rate:g}" for b in self.best if b.learning_rate)
        return f"SweepRecord({c.data!r} on {c.model!r}, {len(self.cells)} runs: {states}; best rates: {best})"


class SweepDryRunRecord(Record, frozen=True, kw_only=True):
    """sweep-dry-run/1: what a sweep would be, without running it.

    Attributes:
        model: MODEL; a local path in full.
        data: DATA; a local path in full.
        cells: names of the folders of the runs, in the order in which they start.
        there: of these, those that are in the folder already and would be skipped.
        settings: flags of train that are the same for all runs.
        params_by_rank: trainable parameters.
        base_params: parameters of the base.
        steps: optimizer steps of a run.
        tokens: that a run is trained on, padding left out.
        memory_bytes: that a run of the highest rank needs, by the count of `train --dry-run`.
        flops: of training all runs that are still to do: 4 a token and parameter of the base, 6 of the adapter;
            attention's own and the measuring are not counted.
        seconds: of training all runs that are still to do, one after another, at the pace of the runs in the folder;
            None where there is none. Measuring comes on top.
    """

    FORMAT: ClassVar[str] = "rankwise/sweep-dry-run/1"

    model: str
    data: str
    cells: tuple[str, ...]
    there: tuple[str, ...]
    settings: dict[str, Any]
    params_by_rank: dict[str, int]
    base_params: int
    steps: int
    tokens: int
    memory_bytes: int
    flops: float
    seconds: float | None

    def to_dataframe(self) -> Any:
        """Return one row a run as a pandas DataFrame (needs pandas)."""
        return data_frame([{"cell": name, "there": name in self.there} for name in self.cells])

    def __repr__(self) -> str:
        return (
            f"SweepDryRunRecord({len(self.cells)} runs, {len(self.there)} of them there; {self.flops:.3g} FLOP to do)"
        )
