"""Runs that were made one by one, read as a sweep: those that differ in rank, rule, rate and seed alone.

In: run/1 records. Out: sweep/1 records with the same answers as `sweep` gives; the runs that belong to none.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec

from rankwise.records import Finding, RunConfig, RunRecord, SweepRecord, SweepRun
from rankwise.reporting.reading import Loaded
from rankwise.sweeping import collecting
from rankwise.sweeping.recording import make_record
from rankwise.sweeping.sentences import cut

LEAST: Final = 3
"""Runs that make a grid; two are compared."""

FREE: Final = ("rank", "scaling", "learning_rate", "lora_alpha", "groups")
"""Fields of a run's config that a grid varies, or that follow from those it varies."""

ALIKE: Final = ("model", "data", "data_digest", "target_modules")
"""Fields that are said in other words than those of the settings."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """A grid.

    Attributes:
        record: with its answers.
        files: names of the runs in it.
    """

    record: SweepRecord
    files: tuple[str, ...]


def row_of(one: Loaded) -> SweepRun:
    """Return the figures of a run that are compared."""
    return collecting.row_of(cast("RunRecord", one.record), one.name)


def _shared(config: RunConfig) -> str:
    fields = msgspec.to_builtins(config)
    return json.dumps({name: value for name, value in fields.items() if name not in FREE}, sort_keys=True)


def _groups(runs: Sequence[Loaded]) -> list[list[Loaded]]:
    """Return the runs by what they share.

    Alpha may go with the rank; where it varies beside it, it tells groups apart.
    """
    groups: dict[str, list[Loaded]] = defaultdict(list)
    for one in runs:
        config = cast("RunRecord", one.record).config
        if (
            config.plan is None
            and config.rank >= 1
            and math.isfinite(config.learning_rate)
            and config.learning_rate > 0
        ):
            groups[_shared(config)].append(one)
    found = []
    for members in groups.values():
        alphas: dict[tuple[str, int], set[float]] = defaultdict(set)
        for one in members:
            config = cast("RunRecord", one.record).config
            alphas[config.scaling, config.rank].add(config.lora_alpha)
        if all(len(values) == 1 for values in alphas.values()):
            found.append(members)
            continue
        by_alpha: dict[float, list[Loaded]] = defaultdict(list)
        for one in members:
            by_alpha[cast("RunRecord", one.record).config.lora_alpha].append(one)
        found += by_alpha.values()
    return found


def gather(runs: Sequence[Loaded], command: Sequence[str]) -> tuple[list[Gathered], list[Loaded], list[Finding]]:
    """Return the grids that runs make, the runs in none, and what there is to say.

    Two runs of one setting and seed cannot both be that seed: the first is taken, and the others are named.
    """
    grids: list[Gathered] = []
    findings: list[Finding] = []
    taken: set[int] = set()
    for members in _groups(runs):
        kept: dict[tuple[Any, ...], Loaded] = {}
        again = []
        for one in members:
            row = row_of(one)
            first = kept.setdefault((row.scaling, row.rank, row.learning_rate, row.seed), one)
            if first is not one:
                again.append(f"{one.name} (as {first.name})")
        if len(kept) < LEAST:
            continue
        taken |= {id(one) for one in members}
        grids.append(Gathered(_record(list(kept.values()), command), tuple(one.name for one in kept.values())))
        if again:
            text = f"{len(again)} runs have the setting and the seed of another one and are not counted: {cut(again)}."
            findings.append(Finding(code="runs-repeated", level="warning", text=text))
    grids.sort(key=lambda grid: -len(grid.files))
    return grids, [one for one in runs if id(one) not in taken], findings


def _record(members: Sequence[Loaded], command: Sequence[str]) -> SweepRecord:
    config = cast("RunRecord", members[0].record).config
    fields = msgspec.to_builtins(config)
    rows = sorted(map(row_of, members), key=lambda r: (r.scaling, r.rank, r.learning_rate, r.seed))
    return make_record(
        tuple(rows),
        model=config.model,
        data=config.data,
        settings={name: value for name, value in fields.items() if name not in (*FREE, *ALIKE, "plan")}
        | {"target modules": len(config.target_modules)},
        digest=config.data_digest,
        command=tuple(command),
        device=", ".join(sorted({one.record.device for one in members})),
        seconds=0.0,
        run_here=False,  # runs made one by one have no sweep that could be told to go on
    )
