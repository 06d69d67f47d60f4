"""Tables for runs: records in, text on the terminal out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rankwise.cli.common import PlainConsole
from rankwise.cli.show import Bar, escape, plain_console, plain_table, print_findings
from rankwise.records import (
    DemoRecord,
    DryRunRecord,
    Finding,
    Forgetting,
    GroupScale,
    Recall,
    RecallRecord,
    RecallScore,
    RunConfig,
    RunRecord,
)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _size(count: int | None) -> str:
    if count is None:
        return "not known"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _groups(console: PlainConsole, groups: Sequence[GroupScale]) -> None:
    table = plain_table(("group", "left"), *((h, "right") for h in ("modules", "r", "alpha", "scale of B A", "params")))
    for g in groups:
        alpha = "mixed" if g.lora_alpha is None else f"{g.lora_alpha:g}"
        scale = "mixed" if g.scaling is None else f"{g.scaling:.4g}"
        table.add_row(escape(g.group), str(g.modules), str(g.r or "mixed"), alpha, scale, f"{g.params:,}")
    console.print(table)


def _settings(console: PlainConsole, c: RunConfig) -> None:
    console.print(
        f"{escape(c.data)} on {escape(c.model)}: {c.steps} steps of {c.batch_size} examples, {escape(c.optimizer)}, "
        f"learning rate {c.learning_rate:g} ({escape(c.schedule)}, {c.warmup_steps} steps of warm-up), "
        f"rule {c.scaling}" + (f", preset {escape(c.preset)}" if c.preset else ""),
        soft_wrap=True,
    )


def show_start(config: RunConfig, findings: Sequence[Finding], bar: Bar) -> None:
    """Print on stderr what is about to be trained: the scale of every group, and the traps."""
    bar.clear()
    console = plain_console(sys.stderr)
    _settings(console, config)
    _groups(console, config.groups)
    print_findings(console, findings)


def show_dry_run(record: DryRunRecord) -> None:
    """Print what a run would be and need."""
    console = plain_console()
    _settings(console, record.config)
    _groups(console, record.config.groups)
    console.print(
        f"{record.params:,} trainable parameters, {record.params / record.base_params:.2%} of the base's "
        f"{record.base_params:,}"
    )
    console.print(
        f"{record.examples:,} examples, {record.tokens:,} tokens, {record.target_tokens:,} of them trained on; "
        f"each is seen {record.epochs:.3g} times"
    )
    m = record.memory
    parts = (("base weights", m.weights), ("adapter", m.adapter), ("gradients", m.gradients))
    for name, size in (*parts, ("optimizer state", m.optimizer), ("activations", m.activations)):
        console.print(f"  {name:<16} {_size(size):>12}")
    console.print(f"  {'together':<16} {_size(m.total):>12}  (temporary buffers and the allocator's slack come on top)")
    print_findings(console, record.findings)


def _recall(console: PlainConsole, recall: Recall) -> None:
    pools = recall.kind == "pools"
    heads = ("facts", "bits gained", "of", "a fact", "exact", "base exact")
    table = plain_table(("asked", "left"), *((h, "right") for h in heads))
    splits: list[tuple[str, RecallScore | None]] = [
        ("as in training", recall),
        ("in other words", recall.paraphrases),
        ("about others, never trained on", recall.held_out),
    ]
    for name, score in splits:
        if score is None:
            continue
        each = None if score.bits is None or not score.facts else score.bits / score.facts
        table.add_row(
            name,
            f"{score.facts:,}",
            _number(score.bits),
            _number(score.bits_possible),
            _number(each),
            _share(score.exact_share),
            _share(score.base_exact_share),
        )
    console.print(table)
    if pools and recall.bits is not None and recall.people and recall.bits_possible is not None:
        base = "" if recall.base_bits is None else f"; the base scored {recall.base_bits / recall.people:.2f}"
        console.print(
            f"{recall.bits / recall.people:.1f} bits recalled a person, of {recall.bits_possible / recall.people:.1f}"
            + base
            + ("" if recall.bits_per_param is None else f"; {recall.bits_per_param:.3g} bits a parameter")
        )


def _forgetting(console: PlainConsole, rise: float | None, detail: Forgetting | None) -> None:
    if detail is None or rise is None:
        console.print("forgetting: not known")
        return
    console.print(
        f"forgetting: {rise:+.3f} nats a token ({detail.base_loss:.3f} before) on {detail.tokens:,} tokens, "
        f"{escape(detail.data)}"
    )


def show_run(record: RunRecord, out: Path) -> None:
    """Print what was learnt and what it cost."""
    console = plain_console()
    loss = "" if record.loss is None else f", loss {record.loss:.4g}"
    speed = "" if record.tokens_per_second is None else f", {record.tokens_per_second:,.0f} tokens/s"
    seconds = "" if record.seconds is None else f", {record.seconds:.1f} s"
    memory = "" if record.peak_memory_bytes is None else f", peak {_size(record.peak_memory_bytes)}"
    console.print(f"{record.status}: {record.steps} steps{loss}, {record.params:,} parameters{seconds}{speed}{memory}")
    if record.error:
        console.print(escape(record.error))
    if record.recall is not None:
        _recall(console, record.recall)
    _forgetting(console, record.forgetting, record.forgetting_detail)
    print_findings(console, record.findings)
    console.print(f"adapter and run.json: {escape(str(out))}")


def show_recall(record: RecallRecord) -> None:
    """Print what an adapter recalls."""
    console = plain_console()
    console.print(f"{escape(record.adapter or 'the live adapter')} on {escape(record.data)}")
    _recall(console, record.recall)
    _forgetting(console, record.forgetting, record.forgetting_detail)


def show_demo(record: DemoRecord, out: Path) -> None:
    """Print the story of the demo: caveats first."""
    console = plain_console()
    console.print("Before you read the figures:")
    for line in record.caveats:
        console.print(f"- {escape(line)}")
    console.print()
    base = "" if record.base_bits_per_person is None else f"; the base scores {record.base_bits_per_person:.2f}"
    console.print(
        f"{record.people} people, {record.bits_per_person:.1f} bits each{base}. {record.steps} steps of "
        f"{record.batch_size}, alpha {record.lora_alpha:g}."
    )
    heads = ("rank", "rule", "scale", "lr", "bits/person", "exact", "in other words", "forgetting", "eff. rank", "s")
    table = plain_table(("run", "left"), *((h, "right") for h in heads))
    for run in record.runs:
        table.add_row(
            escape(run.name) + ("" if run.status == "done" else f" ({run.status})"),
            str(run.rank),
            run.scaling,
            f"{run.factor:.3g}",
            f"{run.learning_rate:g}",
            "-" if run.role == "style" else _number(run.bits_per_person),
            _share(run.exact_share),
            _share(run.paraphrased_exact_share),
            "-" if run.forgetting is None else f"{run.forgetting:+.3f}",
            _number(run.effective_rank),
            _number(run.seconds),
        )
    console.print(table)
    for line in record.reading:
        console.print(f"- {escape(line)}")
    console.print(f"{record.seconds:.0f} s. Open {escape(str(out / 'demo.html'))} in a browser.")
