"""`convert`: an adapter in another rank, scaling rule, layout or file format; the same function, or its error stated.

In: an adapter (or several, with weights) and what to make of it. Out: a folder or file, and a conversion/1 record. One
module is in memory at a time; what is done stays over a kill and is not done again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

from rankwise.adapters.conversion_job import Job, Progress, open_adapter
from rankwise.adapters.convert_options import checked_options
from rankwise.adapters.kept_ranks import rank_choice
from rankwise.adapters.staging import Staging
from rankwise.errors import RankwiseError, UsageError, without_secrets
from rankwise.linalg import one_thread
from rankwise.records import ConversionRecord
from rankwise.spreading import spread

Source = str | PathLike[str]


def convert(
    adapter: Source,
    out: Source,
    *,
    rank: int | None = None,
    energy: float | None = None,
    relative_error: float | None = None,
    signal: bool = False,
    plan: Source | None = None,
    scaling: str | None = None,
    lora_alpha: float | None = None,
    alpha_equals_r: bool = False,
    bake: bool = False,
    runtime: str | None = None,
    format: str | None = None,
    add: Sequence[tuple[Source, float]] = (),
    weight: float = 1.0,
    dtype: str | None = None,
    drop_others: bool = False,
    cluster: str | None = None,
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ConversionRecord:
    """Write an adapter in another rank, rule, layout or format: the same function, or its error stated.

    Args:
        adapter: what to convert; a folder, file, hub id or URL.
        out: where it goes: a folder, or a file that ends in .safetensors (kohya, diffusers).
        rank: of every module; above the adapter's it is filled with zeros.
        energy: keep this share of each module's energy.
        relative_error: leave at most this error in each module.
        signal: refused: an adapter has no rounding noise to measure against.
        plan: a plan/1 record; its ranks are used.
        scaling: "lora" or "rslora": write alphas for this rule; the factors stay.
        lora_alpha: write this alpha for all modules; the rest of each scale is folded into B.
        alpha_equals_r: write lora_alpha = r; the scale is folded into B.
        bake: fold the scale into B, and fill all modules with zeros to one rank; right in every runtime.
        runtime: do what this runtime needs; a name in `rankwise.runtimes.RUNTIMES`.
        format: "peft", "kohya", "diffusers" or "mlx". None keeps the source's, or takes the runtime's.
        add: (adapter, weight) to add to it.
        weight: of the first adapter in the sum.
        dtype: "float32", "bfloat16", "float16" or "float64" of the factors. None keeps each module's.
        drop_others: leave out what the target cannot hold (whole weights, embeddings) instead of refusing.
        cluster: address of a Ray cluster: its workers read and convert the modules, the same as here. "local" starts
            one on this machine. Every adapter must be readable under its name on every node.
        force: replace an adapter that is at `out`.
        command: argv to write into the record.
        progress: called before each module.

    Returns:
        A conversion/1 record. In a folder it also stands in conversion.json.

    Raises:
        RankwiseError: see `rankwise.errors`. Nothing is at `out` then that was not there before.
    """
    named = {
        "rank": rank,
        "energy": energy,
        "relative-error": relative_error,
        "plan": plan,
        "scaling": scaling,
        "lora-alpha": lora_alpha,
        "alpha-equals-r": alpha_equals_r,
        "bake": bake,
        "for": runtime,
        "format": format,
        "weight": None if weight == 1.0 else weight,
        "dtype": dtype,
        "drop-others": drop_others,
        "cluster": cluster,
        "force": force,
    }
    options = checked_options(
        rank_choice(rank, energy, relative_error, None if plan is None else Path(plan), signal=signal),
        scaling,
        lora_alpha,
        dtype,
        runtime=runtime,
        form=format,
        alpha_equals_r=alpha_equals_r,
        bake=bake,
        drop_others=drop_others,
        weight=weight,
    )
    target = Path(out)
    if _same_place(target, (adapter, *(s for s, _ in add))):
        raise UsageError(f"{target} is the adapter itself; give another path. Nothing was written.")
    if any(not math.isfinite(w) for w in (weight, *(w for _, w in add))):
        raise UsageError("the weight of an adapter must be a finite number")
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_thread())
        sources = [(adapter, weight), *add]
        opened = [(stack.enter_context(open_adapter(source)), factor) for source, factor in sources]
        job = Job(opened, target, options)
        workers = stack.enter_context(spread(cluster, "--cluster"))
        staging = stack.enter_context(
            Staging(target, job.identity([s for s, _ in sources]), force=force, folder=job.folder)
        )
        words = tuple(command) if command is not None else _call(adapter, out, add, named)
        stack.enter_context(staging.cut_short(RankwiseError))
        return job.run(staging, words, progress, workers)


def _same_place(out: Path, sources: Iterable[Source]) -> bool:
    with contextlib.suppress(OSError):
        for source in sources:
            path = Path(source)
            if (
                path.exists()
                and out.exists()
                and (out.samefile(path) or (path.is_file() and out.samefile(path.parent)))
            ):
                return True
    return False


def _call(
    adapter: Source, out: Source, add: Sequence[tuple[Source, float]], named: Mapping[str, object]
) -> tuple[str, ...]:
    """Spell a call from Python as the command that does the same."""
    words = ["rankwise", "convert", fspath(adapter), fspath(out)]
    for name, value in named.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", str(value)]
    if add:
        words += ["--add", *(f"{fspath(source)}={weight!r}" for source, weight in add)]
    return tuple(without_secrets(word) for word in words)
