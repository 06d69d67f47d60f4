"""`rankwise extract`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from rankwise.cli.common import EXIT_OK, Output, Whole, argv, check_outputs, saved, write_outputs

RANKS = Group("Rank: exactly one", sort_key=10)
WHAT = Group("What is adapted", sort_key=20)


@Parameter(name="*", group=RANKS)
@dataclass(frozen=True, slots=True)
class Ranks:
    """How the rank of each module is chosen.

    Attributes:
        rank: One rank for all modules; cut to the smaller side of small ones.
        energy: Smallest rank that keeps this share of the squared norm of each module's delta, such as 0.99. The cast
            of the factors comes on top.
        relative_error: Smallest rank whose error before the cast is at most this share of the norm of each module's
            delta.
        signal: Number of singular values above the noise edge: for pairs stored in 16 bits.
        plan: Rank, alpha and rule of each module, from this plan/1 record.
    """

    rank: Whole | None = None
    energy: float | None = None
    relative_error: float | None = None
    signal: Annotated[bool, Parameter(negative="")] = False
    plan: Path | None = None


@Parameter(name="*", group=WHAT)
@dataclass(frozen=True, slots=True)
class What:
    """What goes into the adapter, and how.

    Attributes:
        modules: Regular expression: only modules whose path it is found in.
        skip: Regular expression: leave out modules whose path it is found in.
        embeddings: Adapt embedding tables that changed.
        lm_head: Adapt the output head if it changed.
        save_whole: Store whole what changed and low rank cannot carry: norms, resized tables.
        scaling: Rule: lora (alpha / r), rslora (alpha / sqrt(r)) or unscaled (alpha). Default: lora, or the plan's.
        lora_alpha: Alpha of every module; the factors make up for it. Default: the rank.
        dtype: Of the factors: float32, float16 or bfloat16. Default: that of each weight.
        calibration: Texts (DATA as in train): minimise the error of the outputs on them, not that of the weights.
        calibration_samples: Texts to measure inputs on. Default: 64.
    """

    modules: str | None = None
    skip: str | None = None
    embeddings: Annotated[bool, Parameter(negative="")] = False
    lm_head: Annotated[bool, Parameter(negative="")] = False
    save_whole: Annotated[bool, Parameter(negative="")] = False
    scaling: str | None = None
    lora_alpha: float | None = None
    dtype: str | None = None
    calibration: str | None = None
    calibration_samples: Whole | None = None


def extract(
    base: str,
    tuned: str,
    adapter: Path,
    /,
    *,
    ranks: Ranks = Ranks(),
    what: What = What(),
    all_rows: Annotated[bool, Parameter(name="--all", negative="")] = False,
    device: str | None = None,
    seed: int = 0,
    cluster: str | None = None,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Make a LoRA adapter out of a full fine-tune.

    Module by module, tuned - base is cut to a rank and written in PEFT's layout. The error of each module is within
    1.001 of the best that its rank allows, and is measured again after the cast to the dtype of the factors. Weights
    that are equal bit by bit are not written; what changed and is not in the adapter is named. A run that was killed
    leaves nothing that loads, and goes on when it is started again.

    Args:
        base: Checkpoint before fine-tuning: a folder, a file, a hub id (org/name[@revision]) or a URL.
        tuned: Checkpoint after it.
        adapter: Folder of the adapter; extraction.json in it is the record.
        ranks: How the rank of each module is chosen.
        what: What goes into the adapter, and how.
        all_rows: Print every module, however many there are.
        device: cpu, cuda or cuda:N, for the products. Default: cuda when there is one; with --cluster, cpu.
        seed: Seed of the randomised route and of the noise estimate.
        cluster: Address of a Ray cluster whose workers read and do the modules; the result is the same. local: start
            Ray on this machine.
        output: Where the results go.
    """
    from dataclasses import asdict

    from rankwise.adapters.extraction import extract as run
    from rankwise.cli.show import Bar
    from rankwise.cli.show_extraction import show_extraction
    from rankwise.errors import UsageError

    for flag, path in (("--out", output.out), ("--report", output.report)):
        if path is not None and path.resolve().is_relative_to(adapter.resolve()):
            raise UsageError(f"{flag} {path} lies in the folder of the adapter; put it beside")
        for source in (base, tuned):
            if path is not None and path.exists() and path.resolve().is_relative_to(Path(source).resolve()):
                raise UsageError(f"{flag} {path} is a file of {source}, which is read; choose another path")
    check_outputs(output)
    with Bar(quiet=output.quiet) as bar:
        record = run(
            base,
            tuned,
            adapter,
            **asdict(ranks),
            **asdict(what),
            device=device,
            seed=seed,
            cluster=cluster,
            force=output.force,
            command=argv(),
            progress=bar,
        )
    write_outputs(record, output)
    if not output.json:
        show_extraction(record, every=all_rows)
    saved(output)
    return EXIT_OK
