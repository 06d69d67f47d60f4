"""`rankwise check`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from rankwise.cli.common import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    Numbers,
    Output,
    Whole,
    Words,
    argv,
    check_outputs,
    saved,
    write_outputs,
)


def check(
    model: str,
    data: str,
    /,
    *,
    ranks: Numbers = (4, 16, 64),
    scaling: Words = ("lora", "rslora"),
    optimizer: Words = ("adamw",),
    init: Words = ("default",),
    learning_rate: float | None = None,
    steps: Numbers = (1, 2, 5, 10, 20),
    seeds: int = 5,
    lora_alpha: float = 16.0,
    target_modules: Words | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    reference_rank: Whole | None = None,
    band: float = 0.1,
    gradient_checkpointing: Annotated[bool, Parameter(negative="")] = False,
    adapter: str | None = None,
    fail_on: str | None = None,
    device: str | None = None,
    seed: int = 0,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Measure whether a scaling rule is stable over ranks, for this model, data, optimizer and init.

    Every rule, rank and seed takes a few real optimizer steps from a common start. How the size of the adapter's branch
    goes with the rank is fitted as an exponent with its interval, and judged by a band. --steps 1 needs one forward and
    backward pass for all of them. Stable does not mean that anything will be recalled.

    Args:
        model: Base: a folder, a hub id or rankwise:tiny.
        data: Data, as in train.
        ranks: Ranks to compare, with commas or spaces; two at least.
        scaling: Rules to compare: lora (alpha / r), rslora (alpha / sqrt(r)), unscaled (alpha).
        optimizer: adamw, sgd or both.
        init: How A begins: default, gaussian or both.
        learning_rate: Of every rank and step. Default: 2e-4 for adamw (3e-3 on rankwise:tiny), 1e-2 for sgd.
        steps: Steps after which to measure.
        seeds: Number of draws of A; the interval is over them.
        lora_alpha: Alpha of every run.
        target_modules: Names as PEFT takes them, one regular expression, or all-linear, which is the default.
        batch_size: Examples a step.
        max_length: Cut examples at so many tokens. Default: 1024, or the model's context where that is shorter.
        reference_rank: Whose learning rate is carried to the other ranks. Default: the smallest.
        band: Exponents within plus and minus this are called stable.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        adapter: Ask instead whether this trained PEFT adapter was starved: go on as it is, at a larger scale, at a
            larger rank and at a higher rate, all from the same start. --steps is then a number of steps; default 40.
        fail_on: collapsing, growing, or unstable for either and for runs that diverge: exit with 3 where all modules
            are so after any step.
            With --adapter: starved.
        device: cpu, cuda or cuda:N. Default: cuda when there is one.
        seed: First seed of A, and of the order of the data.
        output: Where the results go.
    """
    from rankwise.cli.show import Bar
    from rankwise.cli.show_checks import show_check, show_failing
    from rankwise.errors import UsageError

    failures = ("unstable", "collapsing", "growing") if adapter is None else ("starved",)
    if fail_on is not None and fail_on not in failures:
        raise UsageError(f"--fail-on: there is no {fail_on!r}; there are: {', '.join(failures)}")
    if adapter is not None:
        fixed = (ranks, scaling, optimizer, init, lora_alpha, target_modules, reference_rank, band)
        if gradient_checkpointing or fixed != (
            (4, 16, 64),
            ("lora", "rslora"),
            ("adamw",),
            ("default",),
            16.0,
            None,
            None,
            0.1,
        ):
            raise UsageError(
                "--adapter goes on from an adapter that is there: it takes --learning-rate, --steps, --seeds, "
                "--batch-size and --max-length, and none about ranks, rules, optimizer, init, alpha, modules or bands"
            )
    check_outputs(output)
    if adapter is not None:
        from rankwise.cli.show_probes import show_counter_test
        from rankwise.tuning.countertest import STEPS, counter_test

        with Bar(quiet=output.quiet) as bar:
            tested = counter_test(
                model,
                adapter,
                data,
                steps=STEPS if steps == (1, 2, 5, 10, 20) else max(steps),
                batch_size=batch_size,
                learning_rate=learning_rate,
                seeds=seeds,
                max_length=max_length,
                device=device,
                seed=seed,
                command=argv(),
                progress=bar.say,
            )
        write_outputs(tested, output)
        if not output.json:
            show_counter_test(tested)
        saved(output)
        return EXIT_CHECK_FAILED if fail_on is not None and tested.verdict.startswith("starved") else EXIT_OK
    from rankwise.tuning.stability.checking import check as run

    with Bar(quiet=output.quiet) as bar:
        record = run(
            model,
            data,
            ranks=ranks,
            scaling=scaling,
            optimizer=optimizer,
            init=init,
            learning_rate=learning_rate,
            steps=steps,
            seeds=seeds,
            lora_alpha=lora_alpha,
            target_modules="all-linear" if target_modules is None else _modules(target_modules),
            batch_size=batch_size,
            max_length=max_length,
            reference_rank=reference_rank,
            band=band,
            gradient_checkpointing=gradient_checkpointing,
            device=device,
            seed=seed,
            command=argv(),
            progress=bar.say,
        )
    write_outputs(record, output)
    if not output.json:
        show_check(record)
    saved(output)
    failing = () if fail_on is None else record.failing(fail_on)
    if fail_on is not None and failing:
        show_failing(failing, fail_on)
        return EXIT_CHECK_FAILED
    return EXIT_OK


def _modules(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """Return a single word that is all-linear or a regular expression as such, and names as names."""
    alone = len(words) == 1 and (words[0] == "all-linear" or any(c in words[0] for c in "\\^$*+?()[]|"))
    return words[0] if alone else words
