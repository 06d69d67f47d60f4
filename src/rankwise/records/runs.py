"""run/1, dry-run/1 and recall/1: what was trained, what it recalls and what it forgot.

In: figures of a training run or of an adapter. Out: the records.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, data_frame

Status = Literal["done", "diverged", "failed", "interrupted"]


class GroupScale(Part, frozen=True, kw_only=True):
    """What LoRA is on one group of modules.

    Attributes:
        group: "attention/early" and so on.
        modules: number of modules.
        r: rank, or None where it differs within the group.
        lora_alpha: alpha, or None where it differs.
        scaling: the factor on B @ A, or None where it differs.
        params: trainable parameters.
    """

    group: str
    modules: int
    r: int | None
    lora_alpha: float | None
    scaling: float | None
    params: int


class RunConfig(Part, frozen=True, kw_only=True):
    """Everything that a run was asked for, every default written out.

    Attributes:
        model: MODEL as given.
        data: DATA as given; built-in names with all their parameters.
        data_digest: SHA-256 of the token ids and labels, its first 16 digits.
        preset: name of the preset, or None.
        rank: r of the modules without a rank of their own.
        lora_alpha: alpha of the same.
        scaling: rule: "lora", "rslora" or "unscaled".
        plan: path of the plan, or None.
        target_modules: the names of the modules, in full.
        init: how A begins, in PEFT's words.
        lora_dropout: dropout on the input of A.
        optimizer: in the words of transformers.
        learning_rate: highest learning rate.
        schedule: in the words of transformers.
        warmup_steps: steps of linear rise.
        weight_decay: of the optimizer.
        max_grad_norm: gradients are clipped to this norm; 0 for never.
        steps: optimizer steps asked for.
        batch_size: examples a step, gradient accumulation included.
        gradient_accumulation: forward passes a step.
        max_length: tokens an example is cut at.
        packing: whether examples share a row.
        bf16: whether activations are bfloat16.
        gradient_checkpointing: whether activations are computed twice.
        groups: the scale of every group of modules.
    """

    model: str
    data: str
    data_digest: str
    preset: str | None
    rank: int
    lora_alpha: float
    scaling: str
    plan: str | None
    target_modules: tuple[str, ...]
    init: str
    lora_dropout: float
    optimizer: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    steps: int
    batch_size: int
    gradient_accumulation: int
    max_length: int
    packing: bool
    bf16: bool
    gradient_checkpointing: bool
    groups: tuple[GroupScale, ...]


class RecallScore(Part, frozen=True, kw_only=True):
    """What a tuned model recalls of a set of facts, beside its base.

    With known pools a fact scores log2(pool size) - loss / ln 2 bits; a model that knows the pool and not the value
    scores 0, one that is sure and wrong scores less. Without pools the score of a completion is -loss / ln 2, so that
    `bits` is the loss reduction.

    Attributes:
        facts: number of facts asked.
        bits: score of the tuned model minus that of the base, summed over the facts. With pools a rise up
            to 0 counts for nothing: learning the form, and with it the pools, is not recall.
        bits_possible: in the facts: log2 of their pools, summed; without pools, what `bits` would be at a loss of zero.
        base_bits: score of the untuned base, summed; None without pools.
        exact_share: share of the facts that greedy decoding gets right to the last token.
        base_exact_share: the same of the untuned base.
    """

    facts: int
    bits: float | None
    bits_possible: float | None
    base_bits: float | None
    exact_share: float
    base_exact_share: float | None


class AttributeRecall(Part, frozen=True, kw_only=True):
    """The score of one attribute, a fact each person.

    Attributes:
        attribute: what is asked.
        facts: number of people asked about.
        bits_per_fact: mean score, minus that of the base; None where the answer follows from another.
        bits_possible: log2 of the pool of its values; without pools, what `bits_per_fact` would be at a loss of zero.
        exact_share: share that greedy decoding gets right.
    """

    attribute: str
    facts: int
    bits_per_fact: float | None
    bits_possible: float | None
    exact_share: float


class Recall(RecallScore, frozen=True, kw_only=True):
    """Recall in the words of the training data, and what puts it in proportion.

    Attributes:
        kind: "pools" where the pool of every value is known, else "loss".
        people: number of people the facts are about, or None.
        asked_share: share of the facts in the data that were asked; below 1 an even sample was.
        bits_per_param: bits / trainable parameters, carried on from those asked to all.
        paraphrases: the same facts asked in words held out of training.
        held_out: facts that are in no training data: what was learnt about the form alone.
        by_attribute: the score by attribute.
    """

    kind: Literal["pools", "loss"]
    people: int | None
    asked_share: float
    bits_per_param: float | None
    paraphrases: RecallScore | None
    held_out: RecallScore | None
    by_attribute: tuple[AttributeRecall, ...] = ()


class Forgetting(Part, frozen=True, kw_only=True):
    """Loss on text that the base already modelled, before and after. The rise is `forgetting` of the record.

    Attributes:
        data: what text: a data set, or "sampled from the base".
        tokens: tokens scored.
        base_loss: nats per token of the base.
        tuned_loss: nats per token with the adapter.
    """

    data: str
    tokens: int
    base_loss: float
    tuned_loss: float | None


class LossPoint(Part, frozen=True, kw_only=True):
    """Training loss, nats per token that is trained on, as a mean over the steps since the point before."""

    step: int
    loss: float | None
    learning_rate: float | None


class GroupHealth(Part, frozen=True, kw_only=True):
    """What `RankMonitor` saw in one group of modules at one step: geometric means over its modules.

    Attributes:
        step: optimizer steps done.
        group: "all", or a group such as "mlp/late".
        modules: number of modules measured.
        scaling: the factor on B @ A, or None where it differs.
        branch_ratio: RMS of scaling * B A x over RMS of W x.
        relative_norm: norm(scaling * B A) / norm(W).
        update_norm: norm of the last change of scaling * B A.
        update_ratio: the same over norm(scaling * B A).
        effective_rank: exp(entropy) of scaling * B A.
        stable_rank: energy / sigma_1^2 of scaling * B A.
        grad_norm_A: norm of the gradient of A.
        grad_norm_B: norm of the gradient of B.
        status: "ok", "starved" or "unstable".
    """

    step: int
    group: str
    modules: int
    scaling: float | None
    branch_ratio: float | None
    relative_norm: float | None
    update_norm: float | None
    update_ratio: float | None
    effective_rank: float | None
    stable_rank: float | None
    grad_norm_A: float | None  # noqa: N815 - A and B are the field's names
    grad_norm_B: float | None  # noqa: N815
    status: str


class Memory(Part, frozen=True, kw_only=True):
    """Bytes that a run needs.

    Attributes:
        weights: of the base.
        adapter: of A and B.
        gradients: of A and B.
        optimizer: state for A and B.
        activations: kept for the backward pass of a forward pass of the longest rows, carried on from passes of one
            and two rows; None where these do not fit. Allocator slack and temporary buffers come on top.
        total: sum of what is known.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    total: int


class DryRunRecord(Record, frozen=True, kw_only=True):
    """dry-run/1: what a training run would be, without running it.

    Attributes:
        config: what was asked for, every default written out.
        params: trainable parameters.
        base_params: parameters of the base.
        memory: bytes.
        examples: in the data.
        tokens: in the data, cut at the context.
        target_tokens: of these, the ones that are trained on.
        epochs: how often each example is seen.
        findings: traps found.
    """

    FORMAT: ClassVar[str] = "rankwise/dry-run/1"

    config: RunConfig
    params: int
    base_params: int
    memory: Memory
    examples: int
    tokens: int
    target_tokens: int
    epochs: float
    findings: tuple[Finding, ...]

    def to_dataframe(self) -> Any:
        """Return one row a group of modules as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(group) for group in self.config.groups])

    def __repr__(self) -> str:
        return f"DryRunRecord({self.params:,} trainable parameters, {self.config.steps} steps)"


class RunRecord(Record, frozen=True, kw_only=True):
    """run/1: one training run.

    Attributes:
        config: what was asked for, every default written out.
        status: "done"; "diverged": the loss was no number or left for good, the adapter is the last good one;
            "failed": an error ended it, see `error`; "interrupted": stopped from outside, can be resumed.
        params: trainable parameters.
        steps: optimizer steps done; of the adapter kept, where the run diverged.
        tokens: tokens seen, padding left out.
        loss: last training loss, nats per token that is trained on.
        recall: what is recalled of the data, or None where it was not measured.
        forgetting: rise of the loss, nats per token, on text the base already modelled.
        forgetting_detail: on which text, and the two losses.
        seconds: of training alone.
        peak_memory_bytes: highest resident set of the process, or highest allocation of the GPU.
        tokens_per_second: in training.
        losses: the loss curve.
        health: what the monitor saw.
        findings: traps found before training, and what the monitor warned of.
        error: why the status is not "done".
    """

    FORMAT: ClassVar[str] = "rankwise/run/1"

    config: RunConfig
    status: Status
    params: int
    steps: int
    tokens: int | None
    loss: float | None
    recall: Recall | None
    forgetting: float | None
    forgetting_detail: Forgetting | None
    seconds: float | None
    peak_memory_bytes: int | None
    tokens_per_second: float | None
    losses: tuple[LossPoint, ...]
    health: tuple[GroupHealth, ...]
    findings: tuple[Finding, ...]
    error: str | None

    def to_dataframe(self) -> Any:
        """Return the loss curve as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(point) for point in self.losses])

    def __repr__(self) -> str:
        c = self.config
        return (
            f"RunRecord({self.status}: {c.data!r} on {c.model!r}, rank {c.rank}, {c.scaling}, "
            f"learning rate {c.learning_rate:g}, {self.steps} steps; {score_words(self.recall)})"
        )


class RecallRecord(Record, frozen=True, kw_only=True):
    """recall/1: what any adapter recalls of a data set, and what it forgot.

    Attributes:
        model: MODEL as given.
        adapter: ADAPTER as given, or None for the base alone.
        data: DATA as given.
        params: parameters of the adapter.
        recall: what is recalled.
        forgetting: rise of the loss, nats per token, or None.
        forgetting_detail: on which text, and the two losses.
        seconds: of measuring.
    """

    FORMAT: ClassVar[str] = "rankwise/recall/1"

    model: str
    adapter: str | None
    data: str
    params: int | None
    recall: Recall
    forgetting: float | None
    forgetting_detail: Forgetting | None
    seconds: float

    def to_dataframe(self) -> Any:
        """Return one row an attribute as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(row) for row in self.recall.by_attribute])

    def __repr__(self) -> str:
        return f"RecallRecord({self.adapter!r} on {self.data!r}: {score_words(self.recall)})"


def score_words(recall: Recall | None) -> str:
    """Return what is recalled in a few words.

    >>> score_words(None)
    'recall not measured'
    """
    if recall is None:
        return "recall not measured"
    bits = "unknown" if recall.bits is None else f"{recall.bits:,.0f}"
    possible = "unknown" if recall.bits_possible is None else f"{recall.bits_possible:,.0f}"
    return f"{bits} of {possible} bits, {recall.exact_share:.1%} exact"
