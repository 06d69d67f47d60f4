"""`rankwise recall`."""

from __future__ import annotations

from rankwise.cli.common import EXIT_OK, Output, argv, check_outputs, saved, write_outputs


def recall(
    model: str,
    adapter: str,
    data: str,
    /,
    *,
    forgetting_data: str | None = None,
    max_length: int | None = None,
    device: str | None = None,
    seed: int = 0,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Measure what an adapter recalls of a data set, in bits, beside its base, and what it forgot.

    Args:
        model: Base of the adapter: a folder, a hub id or rankwise:tiny.
        adapter: PEFT adapter: a folder or a hub id.
        data: What it was trained on, or anything else to ask for; as in train.
        forgetting_data: Texts the base already models. Default: built-in text for rankwise:tiny, else sampled.
        max_length: Cut examples at so many tokens. Default: 1024, or the model's context where that is shorter.
        device: cpu, cuda or cuda:N. Default: cuda when there is one.
        seed: Of sampling, and of the choice of examples from large data.
        output: Where the results go.
    """
    from rankwise.cli.show import Bar
    from rankwise.cli.show_runs import show_recall
    from rankwise.tuning.recalling import recall as run

    check_outputs(output)
    with Bar(quiet=output.quiet) as bar:
        record = run(
            model,
            adapter,
            data,
            forgetting_data=forgetting_data,
            max_length=max_length,
            device=device,
            seed=seed,
            command=argv(),
            progress=bar.say,
        )
    write_outputs(record, output)
    if not output.json:
        show_recall(record)
    saved(output)
    return EXIT_OK
