"""stability/1: how the size of a LoRA branch and of its steps goes with the rank.

In: what was measured, and what was fitted to it. Out: the record.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, Skipped, data_frame

Verdict = Literal["stable", "collapsing", "growing", "undecided"]

Interval = tuple[float, float]


class StabilityConfig(Part, frozen=True, kw_only=True):
    """Everything that a check was asked for, every default written out.

    Attributes:
        model: MODEL as given.
        data: DATA as given; built-in names with all their parameters.
        ranks: ascending.
        scaling: rules.
        optimizer: optimizers.
        init: how A begins.
        learning_rates: optimizer -> learning rate, the same at every rank and step.
        steps: after which the branch was measured.
        seeds: of the draws of A; the data are the same for all.
        lora_alpha: alpha of every run.
        target_modules: names of the modules, in full.
        batch_size: examples a step.
        max_length: tokens an example is cut at.
        measured_tokens: tokens of the batch on which branches are measured; it is not trained on where the data have
            other rows.
        gradient_checkpointing: whether activations were computed twice.
        dtype: of the base's activations.
        band: an exponent whose interval lies within +-band is called stable.
        reference_rank: whose learning rate is carried to the others.
    """

    model: str
    data: str
    ranks: tuple[int, ...]
    scaling: tuple[str, ...]
    optimizer: tuple[str, ...]
    init: tuple[str, ...]
    learning_rates: dict[str, float]
    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    lora_alpha: float
    target_modules: tuple[str, ...]
    batch_size: int
    max_length: int
    measured_tokens: int
    gradient_checkpointing: bool
    dtype: str
    band: float
    reference_rank: int


class StabilityRow(Part, frozen=True, kw_only=True):
    """One module of one run after one step.

    Attributes:
        rule: scaling rule.
        optimizer: "adamw" or "sgd".
        init: how A began.
        rank: r.
        seed: of the draw of A.
        step: optimizer steps made.
        module: dotted path.
        branch_rms: RMS of s B A x over the measuring batch; x is what the frozen model puts into the module.
        relative_rms: the same over the RMS of what the frozen module puts out.
        update_rms: RMS of the change that this step made to s B A x.
        grad_norm_A: Frobenius norm of the gradient of A that this step was made with.
        grad_norm_B: the same of B.
        loss: of this step's batch, before the step, nats per token that is trained on.
    """

    rule: str
    optimizer: str
    init: str
    rank: int
    seed: int
    step: int
    module: str
    branch_rms: float | None
    relative_rms: float | None
    update_rms: float | None
    grad_norm_A: float | None  # noqa: N815 - the name in the public contract
    grad_norm_B: float | None  # noqa: N815
    loss: float | None


class StabilityCell(Part, frozen=True, kw_only=True):
    """How one group of modules goes with the rank, after one step.

    An exponent e says that the statistic goes like rank^e: the slope of a straight line through its logarithm against
    that of the rank, by least squares, as a mean over the seeds; with a 95 % t-interval over the seeds. The statistic
    of a group is the geometric mean over its modules.

    Attributes:
        rule: scaling rule.
        optimizer: "adamw" or "sgd".
        init: how A began.
        learning_rate: of every rank.
        group: "all", "attention/early" and so on.
        step: optimizer steps made.
        modules: number of modules that the means are over.
        runs_diverged: runs, of all ranks and seeds, that had diverged by this step. They are in no figure.
        seeds: number of seeds of which every rank is there.
        rms_exponent: of `branch_rms`, and of `relative_rms` alike.
        rms_exponent_ci: 95 % interval, or None of fewer than two seeds.
        update_exponent: of `update_rms`.
        update_exponent_ci: the same.
        grad_A_exponent: of `grad_norm_A`; None at step 1, where it is zero.
        grad_A_exponent_ci: the same.
        grad_B_exponent: of `grad_norm_B`.
        grad_B_exponent_ci: the same.
        loss_exponent: of the loss.
        loss_exponent_ci: the same.
        relative_rms_by_rank: geometric mean over modules and seeds.
        update_rms_by_rank: the same of `update_rms`.
        spread: largest of `relative_rms_by_rank` over the smallest.
        verdict: "stable": the interval of `rms_exponent` lies within the band; "collapsing", "growing": below it, above
            it; "undecided": it straddles an edge, there is none, or a run diverged.
    """

    rule: str
    optimizer: str
    init: str
    learning_rate: float
    group: str
    step: int
    modules: int
    runs_diverged: int
    seeds: int
    rms_exponent: float | None
    rms_exponent_ci: Interval | None
    update_exponent: float | None
    update_exponent_ci: Interval | None
    grad_A_exponent: float | None  # noqa: N815
    grad_A_exponent_ci: Interval | None  # noqa: N815
    grad_B_exponent: float | None  # noqa: N815
    grad_B_exponent_ci: Interval | None  # noqa: N815
    loss_exponent: float | None
    loss_exponent_ci: Interval | None
    relative_rms_by_rank: dict[str, float | None]
    update_rms_by_rank: dict[str, float | None]
    spread: float | None
    verdict: Verdict


class TransferProof(Part, frozen=True, kw_only=True):
    """What the transferred rate did at another rank.

    Attributes:
        rank: the rank it was tried at.
        learning_rate: transferred to it.
        how: "steps": run anew with that rate; "closed form": from the first step, which is linear in the rate.
        seeds: number of seeds.
        ratio_before: RMS of the branch there over that at the reference rank, both at the reference's rate.
        ratio_after: the same with the transferred rate.
    """

    rank: int
    learning_rate: float
    how: Literal["steps", "closed form"]
    seeds: int
    ratio_before: float
    ratio_after: float | None


class Transfer(Part, frozen=True, kw_only=True):
    """The learning rate that makes the branch as large at every rank, for one rule, optimizer and init.

    Attributes:
        rule: scaling rule.
        optimizer: "adamw" or "sgd".
        init: how A began.
        step: after which the branch is made equal: the last one measured without a diverged run.
        exponent: of the branch over all modules there, at one learning rate.
        reference_rank: keeps its rate.
        learning_rate_by_rank: learning_rate * (rank / reference_rank)^-exponent.
        proof: what came of it, or None where nothing was to be transferred.
    """

    rule: str
    optimizer: str
    init: str
    step: int
    exponent: float
    reference_rank: int
    learning_rate_by_rank: dict[str, float]
    proof: TransferProof | None


class StabilityAdvice(Part, frozen=True, kw_only=True):
    """What would be flat, for one optimizer and init.

    Attributes:
        optimizer: "adamw" or "sgd".
        init: how A began.
        rule: the measured rule that comes nearest to it.
        step: after which.
        exponent: the g with which a scale of r^-g would make the branch as large at every rank; alpha / r is g = 1.
        exponent_ci: 95 % t-interval over the seeds, or None.
        lora_alpha_by_rank: the alpha that gives this scale under `rule`, equal to lora_alpha at the reference rank.
        learning_rate_by_rank: what does the same under `rule` at a fixed alpha.
        text: both in words, and what they do not say.
    """

    optimizer: str
    init: str
    rule: str | None
    step: int | None
    exponent: float | None
    exponent_ci: Interval | None
    lora_alpha_by_rank: dict[str, float]
    learning_rate_by_rank: dict[str, float]
    text: str


class StabilityVerdict(Part, frozen=True, kw_only=True):
    """All modules after the last step: the line to read first."""

    rule: str
    optimizer: str
    init: str
    step: int
    exponent: float | None
    exponent_ci: Interval | None
    verdict: Verdict


class StabilityRecord(Record, frozen=True, kw_only=True):
    """stability/1: whether a scaling rule keeps the branch at one size over the ranks.

    Attributes:
        config: what was asked for.
        verdicts: all modules after the last step, a line a rule, optimizer and init.
        cells: exponents by group and step.
        rows: what was measured, a row a module, run and step.
        advice: for the first optimizer and init.
        more_advice: for the others.
        transfers: learning rates by rank, for every rule, optimizer and init.
        skipped: modules without a branch, and why.
        findings: runs that diverged, intervals that cannot be.
        seconds: of measuring.
    """

    FORMAT: ClassVar[str] = "rankwise/stability/1"

    config: StabilityConfig
    verdicts: tuple[StabilityVerdict, ...]
    cells: tuple[StabilityCell, ...]
    rows: tuple[StabilityRow, ...]
    advice: StabilityAdvice
    more_advice: tuple[StabilityAdvice, ...]
    transfers: tuple[Transfer, ...]
    skipped: tuple[Skipped, ...]
    findings: tuple[Finding, ...]
    seconds: float

    def failing(self, what: str) -> tuple[StabilityCell, ...]:
        """Return the cells over all modules, at any step, that `check --fail-on WHAT` fails on.

        Args:
            what: "collapsing", "growing", or "unstable" for either, and for steps at which a run had diverged: that
                one cannot be called either is no reason to let it pass.
        """
        wanted = ("collapsing", "growing") if what == "unstable" else (what,)
        return tuple(
            cell
            for cell in self.cells
            if cell.group == "all" and (cell.verdict in wanted or (what == "unstable" and cell.runs_diverged))
        )

    def to_dataframe(self) -> Any:
        """Return one row a rule, optimizer, init, group and step as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(cell) for cell in self.cells])

    def __repr__(self) -> str:
        parts = [f"{v.rule}, {v.optimizer}, {v.init}: {exponent_words(v)} {v.verdict}" for v in self.verdicts]
        return f"StabilityRecord({self.config.model!r} on {self.config.data!r}; {'; '.join(parts)})"


def exponent_words(found: StabilityVerdict) -> str:
    """Write an exponent with its interval.

    >>> line = dict(rule="lora", optimizer="sgd", init="default", step=1, verdict="collapsing")
    >>> exponent_words(StabilityVerdict(exponent=-1.02, exponent_ci=(-1.1, -0.94), **line))
    '-1.02 (-1.10 to -0.94)'
    """
    if found.exponent is None:
        return "unknown"
    if found.exponent_ci is None:
        return f"{found.exponent:+.2f}"
    return f"{found.exponent:+.2f} ({found.exponent_ci[0]:+.2f} to {found.exponent_ci[1]:+.2f})"
