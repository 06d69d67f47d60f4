"""What a run came to, as its record says it.

In: a job, what the trainer logged, what the monitor saw. Out: a run/1 record and the figures that it is made of.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rankwise.errors import foreign
from rankwise.records import Finding, GroupHealth, LossPoint, RunRecord, Status
from rankwise.tuning.preparing import Job

WORDS: Final = {
    "starved": (
        "The branch hardly moves what the frozen layers put out. A larger scale or a higher learning rate would tell "
        "whether there was more to learn."
    ),
    "unstable": "The steps are large beside what was learnt. A smaller learning rate or scale would tell.",
}


def record_of(head: dict[str, Any], job: Job, *, status: Status, error: str | None = None, **found: Any) -> RunRecord:
    """Make the record of a run; what is not known yet is None."""
    empty: dict[str, Any] = {
        "steps": 0,
        "tokens": None,
        "loss": None,
        "recall": None,
        "forgetting": None,
        "forgetting_detail": None,
        "seconds": None,
        "peak_memory_bytes": None,
        "tokens_per_second": None,
        "losses": (),
        "health": (),
        "findings": job.findings,
    }
    params = sum(lora.params for lora in job.laid.values())
    told = None if error is None else foreign(error)
    return RunRecord(
        **head, format=RunRecord.FORMAT, config=job.config, status=status, params=params, error=told, **empty | found
    )


def collected(
    trainer: Any, job: Job, seen: Sequence[Mapping[str, Any]], *, begun_at: int, seconds: float | None
) -> dict[str, Any]:
    """Take out of the trainer what belongs into the record.

    Args:
        trainer: as it stands after training, or where it broke off.
        job: what was trained.
        seen: observations of the monitor.
        begun_at: step at which this life of the run began.
        seconds: that it took; None where it never began.
    """
    history = trainer.state.log_history
    losses = tuple(
        LossPoint(step=row["step"], loss=_finite(row["loss"]), learning_rate=_finite(row.get("learning_rate")))
        for row in history
        if "loss" in row
    )
    tokens = _tokens(history)
    before = _tokens([row for row in history if row["step"] <= begun_at]) or 0
    lived = tokens - before if tokens else None
    health = tuple(map(_health, seen))
    return {
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "loss": losses[-1].loss if losses else None,
        "losses": losses,
        "health": health,
        "peak_memory_bytes": peak_memory(next(trainer.model.parameters()).device),
        "tokens_per_second": lived / seconds if lived and seconds else None,
        "findings": (*job.findings, *_warnings(health)),
    }


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _tokens(history: Sequence[dict[str, Any]]) -> int | None:
    """Return the tokens seen, from a count that starts again when a run is resumed."""
    total, last = 0, 0
    for row in history:
        if "num_tokens" in row:
            count = int(row["num_tokens"])
            if count < last:
                total += last
            last = count
    return total + last or None


def _health(row: Mapping[str, Any]) -> GroupHealth:
    return GroupHealth(**{name: row[name] for name in GroupHealth.__struct_fields__})


def _warnings(health: Sequence[GroupHealth]) -> tuple[Finding, ...]:
    """Say once what the monitor last saw of each status that is not ok."""
    found = []
    for status, code in (("starved", "starved-adapter"), ("unstable", "unstable-adapter")):
        seen = [row for row in health if row.status == status]
        groups = sorted({row.group for row in seen if row.group != "all"})
        if seen:
            text = (
                f"The monitor called the adapter {status} at steps {seen[0].step} to {seen[-1].step} "
                f"({', '.join(groups) or 'all modules'}). "
            ) + WORDS[status]
            found.append(Finding(code=code, level="warning", text=text))
    return tuple(found)


def peak_memory(device: Any) -> int:
    """Return the most bytes held so far: resident in this process, or allocated on its GPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError, ValueError, IndexError):  # ru_maxrss of a child starts at its parent's peak
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
