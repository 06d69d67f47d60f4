"""What stands in the pages of a run and of a measured adapter, beside the figures: verdicts, key numbers, tables.

In: a run or recall record. Out: words and tables for the templates.
"""

from __future__ import annotations

from typing import Any, Final

from rankwise.records import GroupScale, Recall, RecallRecord, RecallScore, RunConfig, RunRecord
from rankwise.report import words
from rankwise.report.drawing import Table, known
from rankwise.report.looks import rule_words
from rankwise.report.words import Fact

ENDS: Final = {
    "diverged": "Diverged: what follows is of the last good adapter, that of step {steps:,}",
    "failed": "Failed after {steps:,} of {asked:,} steps",
    "interrupted": "Interrupted after {steps:,} of {asked:,} steps",
}
"""Status -> how the verdict begins where a run is not done."""


def _bits(score: RecallScore, kind: str) -> str:
    of = words.number(score.bits_possible)
    value = known(score.bits)
    if value is None:
        return "The bits recalled are unknown"
    possible = known(score.bits_possible)
    part = f" ({words.share(value / possible)})" if possible else ""
    if kind == "pools":
        return f"{words.number(value)} of {of} bits{part} recalled above the base"
    return f"The completions cost {words.number(value)} bits less than with the base, of {of}{part}"


def recall_sentence(recall: Recall) -> str:
    """Return in one sentence what is recalled: bits, and exact answers in both wordings."""
    thing = "facts" if recall.kind == "pools" else "completions"
    base = "" if recall.base_exact_share is None else f" (base: {words.share(recall.base_exact_share)})"
    exact = f"{words.share(recall.exact_share)} of the {thing} exact{base}"
    asked = recall.paraphrases
    other = "" if asked is None else f", {words.share(asked.exact_share)} when asked in held-out words"
    return f"{_bits(recall, recall.kind)}; {exact}{other}."


def forgetting_sentence(record: RunRecord | RecallRecord) -> str:
    """Return in one sentence what was forgotten."""
    value = known(record.forgetting)
    if value is None:
        return "Forgetting was not measured." if record.forgetting_detail is None else "Forgetting is unknown."
    how = "rose" if value > 0 else "fell" if value < 0 else "did not change: it moved"
    return f"On text that the base already modelled the loss {how} by {words.number(abs(value))} nats a token."


def run_verdict(record: RunRecord) -> str:
    """Return how the run ended, what is recalled and what it cost."""
    sentences = []
    if record.status in ENDS:
        sentences.append(ENDS[record.status].format(steps=record.steps, asked=record.config.steps) + ".")
    else:
        sentences.append(f"Done after {words.count(record.steps, 'step')}.")
    config = record.config
    ranks = f"Rank {config.rank}" if config.plan is None else "Ranks of a plan"
    sentences.append(f"{ranks}, {rule_words(config.scaling)}, learning rate {words.number(config.learning_rate)}.")
    sentences.append("Recall was not measured." if record.recall is None else recall_sentence(record.recall))
    sentences.append(forgetting_sentence(record))
    return " ".join(sentences)


def recall_verdict(record: RecallRecord) -> str:
    """Return what is recalled and what it cost."""
    return f"{recall_sentence(record.recall)} {forgetting_sentence(record)}"


def recall_facts(recall: Recall) -> list[Fact]:
    """Return the key numbers of what is recalled."""
    pools = recall.kind == "pools"
    base = f"the base itself scores {words.number(recall.base_bits)}" if known(recall.base_bits) is not None else ""
    of = f"of {words.number(recall.bits_possible)}"
    facts: list[Fact] = [
        ("bits recalled" if pools else "bits of loss saved", words.number(recall.bits), f"{of}; {base}" if base else of)
    ]
    if recall.people:
        bits = known(recall.bits)
        each = None if bits is None else bits / recall.people
        facts.append(("bits a person", words.number(each), f"{recall.people:,} people"))
    remark = "to the last token, greedy"
    if recall.base_exact_share is not None:
        remark += f"; base {words.share(recall.base_exact_share)}"
    facts.append(("exact", words.share(recall.exact_share), remark))
    if recall.paraphrases is not None:
        remark = f"{words.number(recall.paraphrases.bits)} bits"
        facts.append(("exact, held-out words", words.share(recall.paraphrases.exact_share), remark))
    if recall.held_out is not None:
        remark = f"{words.number(recall.held_out.bits)} bits; what was never trained"
        facts.append(("exact, never trained", words.share(recall.held_out.exact_share), remark))
    if known(recall.bits_per_param) is not None:
        facts.append(("bits a parameter", words.number(recall.bits_per_param), "trainable parameters"))
    return facts


def forgetting_facts(record: RunRecord | RecallRecord) -> list[Fact]:
    """Return the key numbers of what was forgotten."""
    detail = record.forgetting_detail
    remark = "nats a token; not measured" if detail is None and known(record.forgetting) is None else "nats a token"
    facts: list[Fact] = [("forgetting", words.number(record.forgetting), remark)]
    if detail is not None:
        facts.append(("loss of the base", words.number(detail.base_loss, 4), f"text: {detail.data}"))
        facts.append(("loss with the adapter", words.number(detail.tuned_loss, 4), f"{detail.tokens:,} tokens"))
    return facts


def _memory(value: int | None) -> str:
    return words.UNKNOWN if value is None else f"{value / 2**30:.3g} GiB"


def run_facts(record: RunRecord) -> list[Fact]:
    """Return the key numbers of a run, recall and forgetting apart."""
    config = record.config
    return [
        ("status", record.status, f"{record.steps:,} of {config.steps:,} steps"),
        ("last training loss", words.number(record.loss), "nats per token that is trained on"),
        ("trainable parameters", f"{record.params:,}", f"in {words.count(len(config.groups), 'group')} of modules"),
        ("learning rate", words.number(config.learning_rate), f"{config.optimizer}, {config.schedule}"),
        ("tokens", words.UNKNOWN if record.tokens is None else f"{record.tokens:,}", "seen, padding left out"),
        ("training time", words.seconds(record.seconds), f"{words.number(record.tokens_per_second)} tokens a second"),
        ("peak memory", _memory(record.peak_memory_bytes), "of the process, or of the GPU"),
    ]


def _differing(value: float | int | None) -> str:
    return "differs" if value is None else words.number(value)


def group_table(groups: tuple[GroupScale, ...]) -> Table:
    """Return what LoRA is on each group of modules."""
    head = ("group", "modules", "r", "alpha", "factor on B A", "parameters")
    rows = tuple(
        (
            g.group,
            f"{g.modules:,}",
            _differing(g.r),
            _differing(g.lora_alpha),
            _differing(g.scaling),
            f"{g.params:,}",
        )
        for g in groups
    )
    return Table("What is trained, by group of modules", head, rows, named=True)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def config_rows(config: RunConfig) -> list[tuple[str, str]]:
    """Return what the run was asked for, every default written out."""
    clip = "never" if config.max_grad_norm == 0 else f"to norm {words.number(config.max_grad_norm)}"
    forwards = words.count(config.gradient_accumulation, "forward pass", "forward passes")
    return [
        ("preset", words.UNKNOWN if config.preset is None else config.preset),
        ("plan", words.UNKNOWN if config.plan is None else config.plan),
        ("rank", f"{config.rank:,}"),
        ("lora_alpha", words.number(config.lora_alpha)),
        ("scaling", f"{config.scaling}: {rule_words(config.scaling)}"),
        ("init", config.init),
        ("lora_dropout", words.number(config.lora_dropout)),
        ("target modules", ", ".join(config.target_modules) or words.UNKNOWN),
        ("optimizer", config.optimizer),
        ("schedule", f"{config.schedule}, {words.count(config.warmup_steps, 'step')} of warm-up"),
        ("weight decay", words.number(config.weight_decay)),
        ("gradients clipped", clip),
        ("batch", f"{words.count(config.batch_size, 'example')} a step, in {forwards}"),
        ("examples cut at", f"{config.max_length:,} tokens"),
        ("packing", _yes(config.packing)),
        ("bfloat16", _yes(config.bf16)),
        ("activations", "computed twice" if config.gradient_checkpointing else "kept"),
    ]


def run_contents(record: RunRecord) -> dict[str, Any]:
    """Return what the template of a run asks for."""
    return {
        "verdict": run_verdict(record),
        "error": record.error if record.status != "done" or record.error else None,
        "status": record.status,
        "findings": record.findings,
        "counted": words.counted(record.findings),
        "facts": run_facts(record),
        "recall_facts": [] if record.recall is None else recall_facts(record.recall),
        "forgetting_facts": forgetting_facts(record),
        "groups": group_table(record.config.groups) if record.config.groups else None,
        "config": config_rows(record.config),
    }


def recall_contents(record: RecallRecord) -> dict[str, Any]:
    """Return what the template of a measured adapter asks for."""
    params: Fact = ("parameters", words.UNKNOWN if record.params is None else f"{record.params:,}", "of the adapter")
    measured: Fact = ("measuring took", words.seconds(record.seconds), "")
    return {
        "verdict": recall_verdict(record),
        "facts": [*recall_facts(record.recall), params, measured],
        "forgetting_facts": forgetting_facts(record),
    }
