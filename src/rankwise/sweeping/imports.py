"""Result files of PEFT's `method_comparison`, as the rows of a sweep.

In: a folder of its `results/*.json`, or one file. Out: a sweep/1 record: the same answers, tables and figures.

What corresponds: `test accuracy` is the share of exact answers, `forgetting` is forgetting, `train loss` is the loss.
Only LoRA runs with one rank for all modules are taken; runs that differ in more than rank, rule, rate and seed are put
into the largest group that agrees, and the others are named.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from rankwise.errors import NothingToMeasureError, OutputError, OutputExistsError, RecordError, UsageError
from rankwise.records import Finding, Status, SweepRecord, SweepRun
from rankwise.sweeping import collecting, folder
from rankwise.sweeping.recording import make_record, write_tables
from rankwise.sweeping.sentences import cut

STATUSES: Final[dict[str, Status]] = {"success": "done", "failed": "failed", "canceled": "interrupted"}

VARIANTS: Final = ("lora_bias", "layer_replication", "alora_invocation_tokens", "arrow_config")
"""Keys of a LoRA config that make another method of it, where they are set; so does every other `use_...`."""

CONFIG: Final = ("target_modules", "exclude_modules", "init_lora_weights", "lora_dropout", "modules_to_save", "bias")
"""Keys of the LoRA config that must agree, beside the whole train config but rate and seed."""


@dataclass(frozen=True, slots=True)
class _Result:
    """One file, read."""

    name: str
    row: SweepRun
    shared: dict[str, Any]


def import_method_comparison(path: Path, out: Path, *, force: bool = False, command: Sequence[str] = ()) -> SweepRecord:
    """Read results of PEFT's method_comparison, and write them as a sweep's record and tables.

    Args:
        path: a folder of them, or one file.
        out: folder for the record and the tables; made if it is not there.
        force: whether those that are there are replaced.
        command: argv for the record.

    Raises:
        UsageError: `out` is the folder of a sweep that was run here.
        OutputError: it cannot be written, or is taken.
        RankwiseError: as `read_method_comparison`.
    """
    folder.check_sweep_folder(out, force=force, imported=True)
    if (out / folder.HIDDEN).is_dir() or collecting.list_cells(out):
        raise UsageError(
            f"{out} is the folder of a sweep that was run here, and its record is made from its runs; choose another "
            "folder for what is imported"
        )
    for name in (folder.RECORD, *folder.TABLES):
        if not force and (out / name).exists():
            raise OutputExistsError(str(out / name))
    record = read_method_comparison(path, command=command)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    write_tables(out, record)
    return record


def read_method_comparison(path: Path, *, command: Sequence[str] = ()) -> SweepRecord:
    """Read results of PEFT's method_comparison.

    Args:
        path: a folder of them, or one file.
        command: argv for the record.

    Raises:
        RecordError: a file is no such result.
        NothingToMeasureError: none of them is a LoRA run.
    """
    try:
        paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    if not paths:
        raise NothingToMeasureError(f"{path} holds no .json file; give a results folder of PEFT's method_comparison")
    results: list[_Result] = []
    skipped: list[str] = []
    for file in paths:
        found = _read(file)
        if isinstance(found, str):
            skipped.append(f"{file.stem} ({found})")
        else:
            results.append(found)
    kept, others = _largest(results)
    if not kept:
        raise NothingToMeasureError(f"{path}: no LoRA run with one rank in {len(paths)} files: {cut(skipped)}")
    skipped += others
    shared = kept[0].shared
    order = sorted((r.row for r in kept), key=lambda r: (r.scaling, r.rank, r.learning_rate, r.seed, r.path))
    record = make_record(
        tuple(order),
        run_here=False,
        model=str(shared["train"].get("model_id")),
        data="MetaMathQA and GSM8K" if "query_template" in shared["train"] else "method_comparison",
        settings=shared,
        digest=hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16],
        command=tuple(command) or (f"rankwise.sweeping.imports.read_method_comparison({str(path)!r})",),
        device=shared["gpu"],
        seconds=0.0,
    )
    noted = list(record.findings)
    alphas = sorted({(row.scaling, row.rank, row.lora_alpha) for row in order if row.lora_alpha is not None})
    if len({alpha for _, _, alpha in alphas}) > 1:
        named = "; ".join(f"rank {rank}, {rule}: {alpha:g}" for rule, rank, alpha in alphas)
        text = f"Alpha is not the same in all runs, so that ranks differ in it as well: {named}."
        noted.append(Finding(code="alpha-differs", level="warning", text=text))
    if skipped:
        text = f"{len(skipped)} of {len(paths)} files are not in this record: {cut(skipped)}."
        noted.append(Finding(code="results-left-out", level="info", text=text))
    return msgspec.structs.replace(record, findings=tuple(noted))


def _read(path: Path) -> _Result | str:
    """Return what one file holds, or why it is no row."""
    try:
        whole = json.loads(path.read_bytes())
        run, train, meta = whole["run_info"], whole["train_info"], whole.get("meta_info", {})
        peft, settings = run["peft_config"], dict(run["train_config"])
        status = STATUSES.get(train["status"])
        rows = train["metrics"]
        if not isinstance(rows, list):
            raise TypeError("metrics is no list")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(
            f"{path} is no result of PEFT's method_comparison ({type(error).__name__}: {error}); it should have "
            "run_info and train_info"
        ) from error
    why = _no_row(peft, status, train["status"])
    if why is not None:
        return why
    try:
        optimizer = dict(settings.pop("optimizer_kwargs"))
        rate, seed = float(optimizer.pop("lr")), int(settings.pop("seed"))
        last = rows[-1] if rows else {}
        row = SweepRun(
            path=path.name,
            rank=int(peft["r"]),
            scaling="rslora" if peft.get("use_rslora") else "lora",
            lora_alpha=float(peft["lora_alpha"]),
            learning_rate=rate,
            seed=seed,
            status=status or "failed",
            params=_figure(train.get("num_trainable_params"), int),
            steps=_figure(last.get("step"), int),
            tokens=_figure(last.get("train total tokens"), int),
            loss=_figure(last.get("train loss"), float),
            bits=None,
            bits_possible=None,
            bits_per_param=None,
            exact_share=_figure(last.get("test accuracy"), float),
            paraphrased_exact_share=None,
            forgetting=_figure(last.get("forgetting"), float),
            seconds=_figure(train.get("train_time"), float),
            peak_memory_bytes=_figure(train.get("accelerator_memory_max", train.get("cuda_memory_max")), int),
            tokens_per_second=None,
            error=run.get("error_msg") or None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: a field of this result cannot be read ({type(error).__name__}: {error})") from error
    system = meta.get("system_info") or {}
    shared = {
        # what is None or off may as well be missing: later versions have more fields
        "train": {key: value for key, value in settings.items() if value} | {"optimizer_kwargs": optimizer},
        "lora": {key: _sorted(peft.get(key)) for key in CONFIG if peft.get(key)},
        "gpu": str(system.get("accelerator") or system.get("gpu")),  # the key's new name and its old one
    }
    return _Result(path.stem, row, shared)


def _no_row(peft: Any, status: Status | None, word: Any) -> str | None:
    if not isinstance(peft, dict):
        return "full fine-tuning"
    if peft.get("peft_type") != "LORA":
        return str(peft.get("peft_type"))
    if peft.get("rank_pattern") or peft.get("alpha_pattern"):
        return "ranks by module"
    used = [key for key, value in peft.items() if value and (key in VARIANTS or key.startswith("use_"))]
    variants = [key for key in used if key != "use_rslora"]
    if variants:
        return str(variants[0])
    return None if status is not None else f"status {word!r}"


def _figure(value: Any, kind: Any) -> Any:
    return None if value is None else kind(value)


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _largest(results: Sequence[_Result]) -> tuple[list[_Result], list[str]]:
    """Return the largest set of results that differ in rank, rule, rate and seed alone, and the names of the others.

    Two results of one setting and seed (runs at other times, or alpha's that differ) cannot both be one seed: the first
    by name is kept. Alpha may go with the rank, so it is no part of what must agree.
    """
    groups: dict[str, list[_Result]] = defaultdict(list)
    for result in results:
        groups[json.dumps(result.shared, sort_keys=True)].append(result)
    members = max(groups.values(), key=len, default=[])
    seen: dict[tuple[Any, ...], _Result] = {}
    left_out = []
    for result in members:
        row = result.row
        first = seen.setdefault((row.scaling, row.rank, row.learning_rate, row.seed), result)
        if first is not result:
            left_out.append(f"{result.name} (the same setting and seed as {first.name})")
    kept = list(seen.values())
    rest = [result for group in groups.values() if group is not members for result in group]
    return kept, left_out + [f"{result.name} (other settings)" for result in rest]
