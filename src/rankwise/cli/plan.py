"""`rankwise plan`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Group, Parameter

from rankwise.cli.common import EXIT_OK, Output, Whole, argv, check_outputs, saved, write_outputs
from rankwise.errors import UsageError

if TYPE_CHECKING:
    from rankwise.records import PlanRecord
    from rankwise.trainers import Export

CHOICE: Final = Group("Choice (exactly one)", sort_key=10)
RANKS: Final = Group("Ranks", sort_key=20)
SCALE: Final = Group("Scale", sort_key=30)
EXPORT: Final = Group("Export", sort_key=40)


@Parameter(name="*", group=CHOICE)
@dataclass(frozen=True, slots=True)
class Choice:
    """What decides the ranks.

    Attributes:
        budget: Lowest error within so many parameters (2000000 or 2M), or what rank N everywhere costs (rank:N).
        energy: Fewest parameters that keep this share of the energy, in (0, 1].
        relative_error: Fewest parameters with at most this norm(dW - dW_r) / norm(dW), in [0, 1).
        signal: The directions above the noise edge of each module (full fine-tunes).
        rank: This rank in every module.
    """

    budget: str | None = None
    energy: float | None = None
    relative_error: float | None = None
    signal: Annotated[bool, Parameter(negative="")] = False
    rank: Whole | None = None


@Parameter(name="*", group=RANKS)
@dataclass(frozen=True, slots=True)
class Ranks:
    """Which ranks are allowed, and what counts how much.

    Attributes:
        min_rank: Least rank of every module that has an update; 0 lets modules be left out.
        max_rank: Largest rank of any module.
        multiple_of: Ranks are multiples of this, or the whole smaller side of a weight.
        fuse: One rank for weights that runtimes join: q/k/v, gate/up.
        per_module: Every module reaches --energy or --relative-error by itself, not all together.
        within_signal: Directions at or under the noise edge count for nothing.
        relative: Count the energy of every module as 1, whatever its size.
        weights: PATTERN=W, a factor on the squared error of modules it is found in; or a JSON file. May be repeated.
        modules: Regular expression: only modules whose path it is found in.
        skip: Regular expression: leave out modules whose path it is found in.
        embeddings: Plan embeddings and output heads of a full fine-tune too.
        serve: Runtime to serve with, such as vllm: ranks stay within its cap, and its factors are checked.
    """

    min_rank: Whole = 0
    max_rank: Whole | None = None
    multiple_of: Whole = 1
    fuse: Annotated[bool, Parameter(negative="")] = False
    per_module: Annotated[bool, Parameter(negative="")] = False
    within_signal: Annotated[bool, Parameter(negative="")] = False
    relative: Annotated[bool, Parameter(negative="")] = False
    weights: Annotated[tuple[str, ...] | None, Parameter(negative="")] = None
    modules: str | None = None
    skip: str | None = None
    embeddings: Annotated[bool, Parameter(negative="")] = False
    serve: str | None = None


@Parameter(name="*", group=SCALE)
@dataclass(frozen=True, slots=True)
class Scale:
    """The factor on B A, the same in every module; alpha follows the rank.

    Attributes:
        scaling: Rule: lora (alpha / r), rslora (alpha / sqrt(r)) or unscaled (alpha).
        scale: The factor. Default: 1.
        lora_alpha: Instead of --scale: the alpha that means the factor at --reference-rank.
        reference_rank: Default: N of --rank or --budget rank:N, else the uniform rank the plan's parameters would buy.
        learning_rate: Written into the plan: a spectrum does not say it.
    """

    scaling: str = "lora"
    scale: float | None = None
    lora_alpha: float | None = None
    reference_rank: Whole | None = None
    learning_rate: float | None = None


@Parameter(name="*", group=EXPORT)
@dataclass(frozen=True, slots=True)
class Exports:
    """What else is made of the plan.

    Attributes:
        export: Write the config of a trainer, read back and checked: axolotl, litgpt, llamafactory, mlx, peft,
            torchtune, trl or unsloth.
        export_out: Where to. Default: stdout, in place of the table.
        uniform: Export the best uniform rank instead, for trainers without ranks by module.
        alpha_tolerance: Largest relative error of the factor where a trainer takes whole alphas only.
        as_adapter: Write an untrained adapter (B = 0) into this folder, for trainers that start from one.
        model: Base whose architecture exports are read back on.
    """

    export: str | None = None
    export_out: Path | None = None
    uniform: Annotated[bool, Parameter(negative="")] = False
    alpha_tolerance: float = 1e-3
    as_adapter: Path | None = None
    model: str | None = None


def plan(
    source: str,
    /,
    *,
    base: str | None = None,
    choice: Choice = Choice(),
    ranks: Ranks = Ranks(),
    scale: Scale = Scale(),
    exports: Exports = Exports(),
    all_rows: Annotated[bool, Parameter(name="--all", negative="")] = False,
    device: str | None = None,
    seed: int = 0,
    output: Output = Output(),  # noqa: B008
) -> int:
    """Choose a rank and an alpha for every module, under a budget or an error, and write trainers' configs.

    Ranks are those that leave the smallest squared error of the weights for their parameters; the record says
    what a uniform rank would leave, and why the plan is as it is.

    Args:
        source: spectra/1 file that inspect wrote, or what inspect takes: an adapter, or a checkpoint with --base.
        base: Checkpoint before fine-tuning, where the source is the one after.
        choice: What decides the ranks.
        ranks: Which ranks are allowed.
        scale: The factor on B A.
        exports: What else is made of the plan.
        all_rows: Print every module, however many there are.
        device: cpu, cuda or cuda:N, where a checkpoint is inspected. Default: cuda when there is one.
        seed: Of the inspection, and of A in --as-adapter.
        output: Where the results go.
    """
    from rankwise.cli.show import Bar
    from rankwise.cli.show_plans import show_plan
    from rankwise.planning import plan as run

    _check_exports(exports, output)
    check_outputs(output)
    with Bar(quiet=output.quiet) as bar:
        record = run(
            source,
            base=base,
            budget=choice.budget,
            energy=choice.energy,
            relative_error=choice.relative_error,
            signal=choice.signal,
            rank=choice.rank,
            min_rank=ranks.min_rank,
            max_rank=ranks.max_rank,
            multiple_of=ranks.multiple_of,
            fuse=ranks.fuse,
            per_module=ranks.per_module,
            relative=ranks.relative,
            weights=parsed_weights(ranks.weights),
            within_signal=ranks.within_signal,
            modules=ranks.modules,
            skip=ranks.skip,
            embeddings=ranks.embeddings,
            serve=ranks.serve,
            scaling=scale.scaling,
            scale=scale.scale,
            lora_alpha=scale.lora_alpha,
            reference_rank=scale.reference_rank,
            learning_rate=scale.learning_rate,
            device=device,
            seed=seed,
            command=argv(),
            progress=bar,
        )
    printed = _export(record, exports, output, source=source, seed=seed)
    write_outputs(record, output)
    if printed is not None:
        sys.stdout.write(printed)
    elif not output.json:
        show_plan(record, every=all_rows)
    saved(output)
    return EXIT_OK


def parsed_weights(words: Sequence[str] | None) -> Mapping[str, float] | str | None:
    """Turn `PATTERN=W ...`, or the path of one JSON file, into what `rankwise.plan` takes.

    >>> parsed_weights(["mlp=2", "q_proj=0.5"]), parsed_weights(["weights.json"])
    ({'mlp': 2.0, 'q_proj': 0.5}, 'weights.json')
    """
    if not words:
        return None
    if len(words) == 1 and Path(words[0]).suffix.lower() == ".json":
        return words[0]
    found = {}
    for word in words:
        pattern, _, weight = word.rpartition("=")
        try:
            found[pattern] = float(weight)
        except ValueError:
            pattern = ""
        if not pattern:
            raise UsageError(f"--weights: wanted PATTERN=W such as 'mlp=2', or one JSON file; got {word!r:.80}")
    return found


def _check_exports(exports: Exports, output: Output) -> None:
    """Refuse what cannot be exported before any work is done."""
    if exports.export is not None:
        from rankwise.trainers import TRAINERS

        if exports.export not in TRAINERS:
            raise UsageError(f"--export: there is no {exports.export!r:.40}; there are: {', '.join(sorted(TRAINERS))}")
        if output.json and exports.export_out is None:
            raise UsageError("--json and --export both want stdout; give the export a place with --export-out PATH")
    elif exports.export_out is not None or exports.uniform:
        flag = "--export-out" if exports.export_out is not None else "--uniform"
        raise UsageError(f"{flag} is about an export; name a trainer with --export")
    if exports.model is not None and exports.export is None and exports.as_adapter is None:
        raise UsageError("--model is what exports are compared with; name a trainer with --export, or use --as-adapter")
    if exports.uniform and exports.as_adapter is not None:
        raise UsageError("--as-adapter carries the planned ranks and --uniform one rank; give one of the two")
    if not 0 <= exports.alpha_tolerance < 1:
        raise UsageError(f"--alpha-tolerance is a relative error in [0, 1), got {exports.alpha_tolerance}")
    if exports.export_out is not None and not exports.export_out.is_dir():
        from rankwise.files import check_writable

        check_writable(exports.export_out, force=output.force)
    if exports.as_adapter is not None:
        from rankwise.trainers.as_adapter import check_out

        check_out(exports.as_adapter, force=output.force)
    places = {"--out": output.out, "--report": output.report, "--export-out": exports.export_out}
    places["--as-adapter"] = exports.as_adapter
    taken: dict[Path, str] = {}
    for flag, path in places.items():
        if path is not None and (other := taken.setdefault(path.resolve(), flag)) != flag:
            raise UsageError(f"{other} and {flag} both name {path}; give each its own path")


def _export(record: PlanRecord, exports: Exports, output: Output, *, source: str, seed: int) -> str | None:
    """Write what was asked for beside the record, and return what is to be printed instead of the table."""
    made = _exported(record, exports, source, read_adapter=False)  # refuses before anything is written
    if exports.as_adapter is not None:
        from rankwise.trainers.as_adapter import write_untrained

        write_untrained(record, exports.as_adapter, model=exports.model, force=output.force, seed=seed)
        if not output.quiet:
            print(f"wrote {exports.as_adapter}", file=sys.stderr)
        made = _exported(
            record, exports, source, read_adapter=True
        )  # once more, now that the folder can be compared with the plan
    if made is None:
        return None
    if exports.export_out is not None:
        _write(made.files, exports.export_out, force=output.force, quiet=output.quiet)
    for note in made.notes:
        print(note, file=sys.stderr)
    return next(iter(made.files.values())) if exports.export_out is None else None


def _exported(record: PlanRecord, exports: Exports, source: str, *, read_adapter: bool) -> Export | None:
    """Return the config of the trainer that was asked for, read back and checked."""
    if exports.export is None:
        return None
    from rankwise.planning import measured
    from rankwise.trainers import export

    made = export(
        record,
        exports.export,
        uniform=exports.uniform,
        alpha_tolerance=exports.alpha_tolerance,
        adapter=None if exports.as_adapter is None else str(exports.as_adapter),
        model=exports.model,
        spectra=measured(source) if exports.uniform and Path(source).is_file() else None,
        read_adapter=read_adapter,
    )
    if exports.export_out is None and len(made.files) != 1:
        names = ", ".join(made.files)
        raise UsageError(f"--export {exports.export} is {len(made.files)} files ({names}); give --export-out FOLDER")
    return made


def _write(files: Mapping[str, str], out: Path, *, force: bool, quiet: bool) -> None:
    """Write one file to a path, or into a folder that is there; several into a folder."""
    from rankwise.errors import OutputError
    from rankwise.files import write_texts

    if len(files) == 1 and not out.is_dir():
        texts = {out: next(iter(files.values()))}
    else:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{out} cannot be made a folder: {error.strerror or error}. Nothing was written."
            ) from error
        texts = {out / name: text for name, text in files.items()}
    write_texts(texts, force=force)
    if not quiet:
        for path in texts:
            print(f"wrote {path}", file=sys.stderr)
