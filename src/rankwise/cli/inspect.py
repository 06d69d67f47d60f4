"""`rankwise inspect`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from rankwise.cli.common import EXIT_OK, Output, argv, check_outputs, saved, write_outputs


def inspect(
    source: str,
    /,
    *,
    base: str | None = None,
    modules: str | None = None,
    skip: str | None = None,
    values: str = "all",
    all_rows: Annotated[bool, Parameter(name="--all", negative="")] = False,
    device: str | None = None,
    seed: int = 0,
    cluster: str | None = None,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Show what an update is made of: the spectrum of every module of an adapter or of tuned - base.

    For an adapter the spectra are those of scaling * B @ A, from the factors alone. For a checkpoint with
    --base they are those of tuned - base, with the noise edge: the largest singular value that rounding
    to the checkpoint's dtype alone would produce.

    Args:
        source: Adapter or tuned checkpoint: a folder, a file, a hub id (org/name[@revision]) or a URL.
        base: Base checkpoint. Needed for a checkpoint; for an adapter it adds the relative norm.
        modules: Regular expression: only modules whose path it is found in.
        skip: Regular expression: leave out modules whose path it is found in.
        values: Singular values to compute of a delta: a number (faster where these stand clear of the rest), or all.
        all_rows: Print every module, however many there are.
        device: cpu, cuda or cuda:N, for deltas. Default: cuda when there is one; with --cluster, cpu.
        seed: Seed of the randomised route and of the noise estimate.
        cluster: Address of a Ray cluster whose workers read and do the modules; the result is the same. local: start
            Ray on this machine.
        output: Where the results go.
    """
    from rankwise.cli.show import Bar, show_spectra
    from rankwise.errors import UsageError
    from rankwise.inspection import inspect as run

    if values != "all" and not values.isdecimal():
        raise UsageError(f"--values must be a whole number or all, got {values!r}")
    check_outputs(output)
    with Bar(quiet=output.quiet) as bar:
        record = run(
            source,
            base=base,
            modules=modules,
            skip=skip,
            values=None if values == "all" else int(values),
            device=device,
            seed=seed,
            cluster=cluster,
            command=argv(),
            progress=bar,
        )
    write_outputs(record, output)
    if not output.json:
        show_spectra(record, every=all_rows)
    saved(output)
    return EXIT_OK
