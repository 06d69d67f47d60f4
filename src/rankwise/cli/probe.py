"""`rankwise probe`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rankwise.cli.common import EXIT_OK, OUTPUT, Output, Words, argv, check_outputs, saved, write_outputs


def probe(
    model: str,
    data: str,
    /,
    *,
    epochs: float | None = None,
    job: str | None = None,
    scaling: str | None = None,
    lora_alpha: float | None = None,
    target_modules: Words | None = None,
    max_length: int | None = None,
    examples: int = 5000,
    steps: int = 200,
    learning_rate: float | None = None,
    ramp_rates: bool = True,
    device: str | None = None,
    seed: int = 0,
    plan_out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    all_rows: Annotated[bool, Parameter(name="--all", negative="")] = False,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Say before any training how much there is to learn, what holds it, and what to start with.

    Nothing is trained for good, and the model comes back as it was. --plan-out writes what `rankwise train --plan`
    takes.

    Args:
        model: Base: a folder, a hub id or rankwise:tiny.
        data: Data: a .jsonl, .json, .parquet or .txt file, a folder, a hub id, rankwise:facts or rankwise:style.
        epochs: Passes over the data that are planned. Default: 20 for facts, 3 for style.
        job: facts (the rows are to be known) or style (their manner is). Default: what the bits say.
        scaling: Plan for this rule: lora (alpha / r), rslora (alpha / sqrt(r)) or unscaled (alpha).
        lora_alpha: Plan for this alpha. Default: 16.
        target_modules: Names as PEFT takes them, one regular expression, or all-linear.
        max_length: Cut examples at so many tokens. Default: 1024, or the model's context where that is shorter.
        examples: Look at so many rows at most.
        steps: Let a small adapter learn the form of the data for so many steps a half, at most.
        learning_rate: Of that adapter. Default: 1e-3 (3e-3 for rankwise:tiny).
        ramp_rates: Measure a learning rate to train at.
        device: cpu, cuda or cuda:N. Default: cuda when there is one.
        seed: Of the halves, the adapters and the sample.
        plan_out: Write the recommendation to this path, as a plan/1 record.
        all_rows: Print every module and row, not the first.
        output: Where the results go.
    """
    from rankwise.cli.show import Bar
    from rankwise.cli.show_probes import show_probe
    from rankwise.errors import UsageError
    from rankwise.files import check_writable, write_text
    from rankwise.records import to_json
    from rankwise.tuning.probing.measuring import probe as run

    check_outputs(output)
    if plan_out is not None:
        if any(path is not None and path.resolve() == plan_out.resolve() for path in (output.out, output.report)):
            raise UsageError(f"--plan-out and another output both name {plan_out}; give each its own path")
        check_writable(plan_out, force=output.force)
    modules: str | tuple[str, ...] | None = target_modules
    if target_modules is not None and len(target_modules) == 1 and _one(target_modules[0]):
        modules = target_modules[0]
    with Bar(quiet=output.quiet) as bar:
        record = run(
            model,
            data,
            epochs=epochs,
            job=job,
            scaling=scaling,
            lora_alpha=lora_alpha,
            target_modules=modules,
            max_length=max_length,
            examples=examples,
            steps=steps,
            learning_rate=learning_rate,
            ramp_rates=ramp_rates,
            device=device,
            seed=seed,
            command=argv(),
            progress=bar.say,
        )
    if plan_out is not None:
        write_text(plan_out, to_json(record.recommendation), force=output.force)
    write_outputs(record, output)
    if not output.json:
        show_probe(record, every=all_rows)
    saved(output)
    if plan_out is not None and not output.quiet:
        print(f"wrote {plan_out}", file=sys.stderr)
    return EXIT_OK


def _one(word: str) -> bool:
    """Return whether a single word is all-linear or a regular expression, and not the name of one module."""
    return word == "all-linear" or any(c in word for c in "\\^$*+?()[]|")
