"""The folder of a run: what stands in it, and that nothing in it lies about being whole.

In: a path. Out: an adapter folder with `run.json`, written so that a kill at any moment leaves a record that says so.

    RUN/adapter_config.json, adapter_model.safetensors   the adapter, at the end
    RUN/run.json                                         run/1; "interrupted" from the first step until the end
    RUN/health.jsonl                                     what the monitor saw, module by module
    RUN/checkpoint-N/                                    to resume from; gone at the end
    RUN/runs/                                            what TensorBoard reads, where it is a reporter
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import msgspec

from rankwise.errors import OutputError, OutputExistsError, UsageError
from rankwise.files import write_text
from rankwise.records import RunConfig, RunRecord, read_record, to_json

RECORD: Final = "run.json"
HEALTH: Final = "health.jsonl"
LOGS: Final = "runs"
ADAPTER: Final = ("adapter_model.safetensors", "adapter_config.json")
"""In the order in which they are put in place: a folder without its config is no adapter."""


def _ours(name: str) -> bool:
    """Tell whether an entry of a run's folder was put there by a run."""
    return name in (RECORD, HEALTH, LOGS, *ADAPTER) or name.startswith(("checkpoint-", ".adapter."))


def check_run(out: Path, *, force: bool, resume: bool) -> None:
    """Refuse a folder that cannot be the run's, before any work is done for it. Nothing is changed.

    Raises:
        OutputExistsError: the folder holds something, and neither `force` nor `resume` is set.
        OutputError: it cannot be made or written to.
        UsageError: there is nothing to resume.
    """
    if resume:
        if not (out / RECORD).is_file():
            raise UsageError(f"{out} holds no run to resume (no {RECORD} in it); leave out --resume to start one")
        return
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; a folder was meant. Nothing was written.")
        if out.is_dir() and any(out.iterdir()):
            if not force:
                raise OutputExistsError(str(out))
            strangers = sorted(p.name for p in out.iterdir() if not _ours(p.name))
            if strangers:
                raise OutputError(
                    f"{out} holds more than a run ({', '.join(strangers[:3])}); --force replaces a run and deletes "
                    "nothing else. Choose another folder. Nothing was written."
                )
        there = next(p for p in (out, *out.resolve().parents) if p.exists())
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    if not os.access(there, os.W_OK) or not there.is_dir():
        raise OutputError(f"{out} cannot be written: no permission to write into {there}.")


def begin_run(out: Path, record: RunRecord) -> None:
    """Make the folder, take away what an earlier run left, and write the first record: all input has been checked.

    Raises:
        OutputError: it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ADAPTER[-1]).unlink(missing_ok=True)  # from now on it is no adapter
        for path in sorted(out.iterdir()):
            if _ours(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    save_record(out, record)


def check_same(out: Path, config: RunConfig, seed: int) -> RunRecord:
    """Return the record of a run that is to be resumed; refuse another config or a run that is over.

    Raises:
        UsageError: the run is done, or was started with other settings; the first that differs is named.
        RecordError: its record cannot be read.
    """
    before = read_record(out / RECORD, RunRecord)
    if before.status in ("done", "diverged"):
        raise UsageError(f"{out}: this run is over ({before.status}); there is nothing to resume")
    pairs = [("seed", before.seed, seed)]
    pairs += [(name, getattr(before.config, name), getattr(config, name)) for name in RunConfig.__struct_fields__]
    for name, was, now in pairs:
        if was != now:
            raise UsageError(
                f"{out} was started with {name.replace('_', ' ')} {_short(was)}, not {_short(now)}; a run is resumed "
                "with the settings it was started with"
            )
    return before


def _short(value: object) -> str:
    text = json.dumps(msgspec.to_builtins(value))
    return text if len(text) <= 60 else text[:57] + "..."


def last_checkpoint(out: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None.

    transformers writes `trainer_state.json` last; a kill before that leaves a folder without it, or with a part of it.
    """
    found = []
    for path in out.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            state = json.loads((path / "trainer_state.json").read_bytes())
            found.append((int(state["global_step"]), path))
    return max(found)[1] if found else None


def save_record(out: Path, record: RunRecord) -> None:
    """Write the record of a run over the one before."""
    write_text(out / RECORD, to_json(record), force=True)


def save_adapter(out: Path, model: Any) -> None:
    """Write an ordinary PEFT adapter into the folder, whole or not at all.

    Raises:
        OutputError: the disk is full, or may not be written to.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".adapter.", dir=out) as name:
            staging = Path(name)
            model.save_pretrained(staging, save_embedding_layers=False)
            mask = os.umask(0)
            os.umask(mask)
            for part in ADAPTER:
                (staging / part).chmod(0o666 & ~mask)  # safetensors makes its files private
                with (staging / part).open("rb") as file:
                    os.fsync(file.fileno())
                (staging / part).replace(out / part)
    except (OSError, RuntimeError) as error:  # safetensors raises its own kind of RuntimeError on a full disk
        raise OutputError(f"the adapter cannot be written to {out}: {error}") from error


def clean(out: Path) -> None:
    """Remove what was only there to resume from."""
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
