"""`rankwise simulate`."""

from __future__ import annotations

from rankwise.cli.common import EXIT_OK, Numbers, Output, argv, check_outputs, saved, write_outputs


def simulate(
    *,
    style: str = "linear:5:0.5:4",
    facts: str = "linear:3:0.5",
    spectrum: str | None = None,
    size: int = 64,
    noise: float = 0.01,
    lora_alpha: float = 16.0,
    ranks: Numbers = (2, 4, 8, 16, 32, 48),
    scale_ranks: Numbers = (1, 4, 8, 16, 32, 64),
    seed: int = 42,
    device: str = "cpu",
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Plant style and fact updates: what a rank holds, and what scaling collapse is and is not.

    A style-like update (few directions) and a fact-like one (many) are drawn from first principles with
    the spectra given, and each is cut to a row of ranks. Next to the published "scaled error" (the
    truncated SVD times alpha / r or alpha / sqrt(r)) stand the plain truncation error and the closed form
    that explains it. The defaults are those of the published walk-through.

    A spectrum is `linear:TOP:BOTTOM[:COUNT]`, `power:EXPONENT[:TOP[:COUNT]]`,
    `exponential:LENGTH[:TOP[:COUNT]]`, or a file with one singular value a line or a JSON list.

    Args:
        style: Spectrum of the style update.
        facts: Spectrum of the fact update.
        spectrum: Spectrum of a third update of your own.
        size: Rows and columns of each update.
        noise: Standard deviation of the noise added to every entry.
        lora_alpha: Alpha of both scaling rules.
        ranks: Ranks to cut at, with commas or spaces.
        scale_ranks: Ranks of the table of scalings.
        seed: Seed of the random numbers.
        device: Always cpu, as the matrices are small.
        output: Where the results go.
    """
    from rankwise.cli.show import show_simulation
    from rankwise.errors import DeviceError
    from rankwise.simulation import simulate as run

    if device != "cpu":
        raise DeviceError(f"simulate computes on the cpu only, got --device {device}")
    check_outputs(output)
    record = run(
        style=style,
        facts=facts,
        spectrum=spectrum,
        size=size,
        noise=noise,
        lora_alpha=lora_alpha,
        ranks=ranks,
        scale_ranks=scale_ranks,
        seed=seed,
        command=argv(),
    )
    write_outputs(record, output)
    if not output.json:
        show_simulation(record)
    saved(output)
    return EXIT_OK
