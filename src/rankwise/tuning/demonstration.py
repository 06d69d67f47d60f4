"""`demo`: the whole story on the built-in model and facts.

In: a folder and a seed. Out: a demo/1 record, and a run/1 record of every run.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Final, Literal

from rankwise.errors import OutputError, OutputExistsError, UsageError
from rankwise.files import write_text
from rankwise.inspection import inspect
from rankwise.records import DemoRecord, DemoRun, RunRecord, SpectraRecord, now, to_json, version
from rankwise.scaling import scaling
from rankwise.tuning.training import train
from rankwise.tuning.world.builtin import read_builtin
from rankwise.tuning.world.pools import ATTRIBUTES, BITS_PER_PERSON, bits_of

Progress = Callable[[str, int, int], None]

MODEL: Final = "rankwise:tiny"
PEOPLE: Final = 40
STYLED: Final = 40
STEPS: Final = 160
STYLE_STEPS: Final = 60
STYLE_RATE: Final = 3e-3
BATCH: Final = 32
ALPHA: Final = 16.0
RATE: Final = 1e-3
BEST_RATE: Final = 5e-3
BEST_CHOSEN: Final = (
    "Alpha / r at rank 64 was trained on 40 other people, three times over (seeds 100 to 102, lab/facts_study.py). "
    "At 3e-4, 1e-3, 3e-3, 5e-3 and 1e-2 it recalled 0.5, 4.6, 15.7, 23.1 and 18.3 bits a person in the mean; 5e-3 was "
    "taken. Alpha / sqrt(r) was not given a rate of its own here; at 3e-3 it recalled 29.2 there, and forgot more."
)

OURS: Final = ("demo.html", "demo.json", "runs")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the demo."""

    rank: int
    rule: str
    rate: float
    role: Literal["fixed rate", "best rate", "style"]

    @property
    def name(self) -> str:
        """Unique within the demo."""
        if self.role == "style":
            return f"style, rank {self.rank}, {self.rule}"
        return f"rank {self.rank}, {self.rule}" + (", best rate" if self.role == "best rate" else "")

    @property
    def slug(self) -> str:
        """Name of its files."""
        head = "style," if self.role == "style" else ""
        return f"{head}rank={self.rank},scaling={self.rule},lr={self.rate:g}"


CELLS: Final = (
    Cell(8, "lora", RATE, "fixed rate"),
    Cell(64, "lora", RATE, "fixed rate"),
    Cell(8, "rslora", RATE, "fixed rate"),
    Cell(64, "rslora", RATE, "fixed rate"),
    Cell(64, "lora", BEST_RATE, "best rate"),
    Cell(8, "lora", STYLE_RATE, "style"),
)


def open_demo(out: Path, *, force: bool) -> None:
    """Refuse a folder that cannot be the demo's, before any work is done.

    Raises:
        OutputExistsError: the folder holds a demo, and `force` is not set.
        OutputError: it is a file, holds something else, or cannot be written to.
    """
    try:
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file; a folder was meant. Nothing was written.")
        inside = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
        strangers = [name for name in inside if name not in OURS]
        if inside and not force:
            raise OutputExistsError(str(out))
        if strangers:
            raise OutputError(f"{out} holds more than a demo ({', '.join(strangers[:3])}); choose another folder.")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.") from error
    if not os.access(out, os.W_OK):
        raise OutputError(f"{out} cannot be written: no permission.")


def demo(
    *,
    out: str | PathLike[str] = "rankwise-demo",
    seed: int = 0,
    device: str | None = "cpu",
    force: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> DemoRecord:
    """Show on the built-in model how many facts a rank buys under each scaling rule, at one rate and at the best one.

    Args:
        out: folder; gets demo.json and a run/1 record of each run in ``runs`` (the command line adds demo.html).
        seed: of the people, of the adapters' start and of the order of the data. The best rate was chosen at others.
        device: "cpu", "cuda" or "cuda:0"; None takes a GPU when there is one. The figures that this project publishes
            are those of a CPU.
        force: replace a demo that is in the folder.
        command: argv to write into the record.
        progress: called with (what, done, total) over all runs.

    Returns:
        A demo/1 record.

    Raises:
        RankwiseError: the folder is taken or cannot be written to.
    """
    begun = time.perf_counter()
    folder = Path(fspath(out))
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be from 0 to {2**32 - 1}, got {seed}")
    open_demo(folder, force=force)
    facts = read_builtin(f"rankwise:facts?n={PEOPLE}&seed={seed}")
    style = read_builtin(f"rankwise:style?n={STYLED}&seed={seed}")
    for name in OURS:  # an old demo must not be taken for this one, should this one be cut short
        old = folder / name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    records: list[RunRecord] = []
    rows: list[DemoRun] = []
    work = folder / "runs" / ".work"
    try:
        for i, cell in enumerate(CELLS):
            record, spectra = _run(cell, facts.name, style.name, seed, device, work, progress, i)
            records.append(record)
            path = f"runs/{cell.slug}.json"
            write_text(folder / path, to_json(record), force=True)
            rows.append(_row(cell, record, spectra, path))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    first = records[0].recall
    base = None if first is None or first.base_bits is None else first.base_bits / PEOPLE
    made = DemoRecord(
        format=DemoRecord.FORMAT,
        rankwise=version(),
        created=now(),
        command=tuple(command) if command is not None else (f"rankwise.demo(out={fspath(out)!r}, seed={seed})",),
        device=records[0].device,
        seed=seed,
        model=MODEL,
        model_params=_model_params(),
        data=facts.name,
        style_data=style.name,
        people=PEOPLE,
        facts=PEOPLE * sum(bits_of(attribute) > 0 for attribute in ATTRIBUTES),
        bits_per_person=BITS_PER_PERSON,
        base_bits_per_person=base,
        steps=STEPS,
        batch_size=BATCH,
        lora_alpha=ALPHA,
        learning_rate=RATE,
        best_learning_rate=BEST_RATE,
        best_chosen=BEST_CHOSEN,
        runs=tuple(rows),
        caveats=CAVEATS,
        reading=reading(rows),
        seconds=time.perf_counter() - begun,
    )
    write_text(folder / "demo.json", to_json(made), force=True)
    return made


def _run(
    cell: Cell,
    facts: str,
    style: str,
    seed: int,
    device: str | None,
    work: Path,
    progress: Progress | None,
    index: int,
) -> tuple[RunRecord, SpectraRecord]:
    """Train one cell and take the spectra of its adapter."""

    def say(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{cell.name}: {what}", index * total + done, len(CELLS) * total)

    work.mkdir(parents=True, exist_ok=True)
    record = train(
        MODEL,
        style if cell.role == "style" else facts,
        out=work / cell.slug,
        rank=cell.rank,
        lora_alpha=ALPHA,
        scaling=cell.rule,
        learning_rate=cell.rate,
        steps=STYLE_STEPS if cell.role == "style" else STEPS,
        batch_size=BATCH,
        save_every=0,
        seed=seed,
        device=device,
        force=True,
        progress=say,
    )
    return record, inspect(work / cell.slug, base=_folder())


def _folder() -> Path:
    from rankwise.tuning.tiny import folder

    return folder()


def _model_params() -> int:
    from rankwise.checkpoints import open_source
    from rankwise.checkpoints.model import Checkpoint

    with open_source(_folder()) as opened:
        assert isinstance(opened, Checkpoint)
        total = 0
        for name in opened.names():
            size = 1
            for side in opened.info(name).shape:
                size *= side
            total += size
    return total


def _row(cell: Cell, record: RunRecord, spectra: SpectraRecord, path: str) -> DemoRun:
    recall = record.recall
    people = (recall.people if recall else None) or 1
    if cell.role == "style":
        people = recall.facts if recall else 1  # a sentence each
    other = recall.paraphrases if recall else None
    norms = [m.relative_norm for m in spectra.modules if m.relative_norm is not None]
    return DemoRun(
        name=cell.name,
        role=cell.role,
        path=path,
        rank=cell.rank,
        scaling=cell.rule,
        factor=scaling(cell.rule, ALPHA, cell.rank),
        learning_rate=cell.rate,
        steps=record.steps,
        params=record.params,
        status=record.status,
        loss=record.loss,
        bits_per_person=None if recall is None or recall.bits is None else recall.bits / people,
        exact_share=None if recall is None else recall.exact_share,
        paraphrased_bits_per_person=None if other is None or other.bits is None else other.bits / people,
        paraphrased_exact_share=None if other is None else other.exact_share,
        forgetting=record.forgetting,
        relative_norm=statistics.fmean(norms) if norms else None,
        effective_rank=spectra.summary.effective_rank_mean,
        rank_90=spectra.summary.rank_90_mean,
        energy_by_rank=dict(spectra.summary.energy_by_rank),
        seconds=record.seconds,
    )


CAVEATS: Final = (
    "One model of 1.3 million parameters, invented people, one seed, one schedule: the direction of these figures is "
    "what to look at, not their size. Measure your own model and data before you choose.",
    "The learning rate does much of what the rule does. Alpha / r at rank 64 is shown twice, at the rate that all runs "
    "share and at a rate that suits it, chosen beforehand on other people.",
    "Here learning speed binds, not room: at rank 8 the adapter has parameters enough to hold these bits. How much "
    "more time would give each run is not shown.",
    "The paraphrases are held out of this training, not of the model's pretraining: it has met these wordings about "
    "other people, as a language model has met most wordings. They test whether a fact is tied to its words.",
    "A low effective rank of an adapter can mean that few directions were needed, or that a small scale or rate "
    "starved the others. The spectra alone do not tell which.",
    "The style run is shorter and has a rate of its own: its spectrum beside those of the facts is an illustration, "
    "not a comparison at equal steps or equal norm. At equal norm the two were alike in a study of full fine-tuning.",
    "Two thirds of the text that forgetting is measured on are about people the model does not know: to become surer "
    "about them than it can be counts as forgetting.",
)
"""What the figures do not show. Printed before them."""


def reading(rows: Sequence[DemoRun]) -> tuple[str, ...]:
    """Say what the figures show, in sentences that are only made where the figures are there."""
    at = {(r.role, r.rank, r.scaling): r for r in rows}
    lines = []
    for rule, word in (("lora", "alpha / r"), ("rslora", "alpha / sqrt(r)")):
        low, high = at["fixed rate", 8, rule], at["fixed rate", 64, rule]
        if low.bits_per_person is None or high.bits_per_person is None:
            lines.append(f"Under {word} at {low.learning_rate:g} a run gave no figures ({low.status}, {high.status}).")
            continue
        lines.append(
            f"Under {word} at a learning rate of {low.learning_rate:g}, raising the rank from 8 to 64 changed what is "
            f"recalled of a person from {low.bits_per_person:.1f} to {high.bits_per_person:.1f} bits and exact recall "
            f"from {_percent(low.exact_share)} to {_percent(high.exact_share)}."
        )
    for run in rows:
        if run.status != "done" and run.bits_per_person is not None:
            lines.append(f"The run {run.name} is {run.status}; its figures are those of the adapter that was kept.")
    fixed, best = at["fixed rate", 64, "lora"], at["best rate", 64, "lora"]
    stable = at["fixed rate", 64, "rslora"]
    if None not in (fixed.bits_per_person, best.bits_per_person, stable.bits_per_person):
        assert fixed.bits_per_person is not None  # for the type checker
        assert best.bits_per_person is not None
        assert stable.bits_per_person is not None
        line = (
            f"Alpha / r at rank 64 at its own rate of {best.learning_rate:g} recalls {best.bits_per_person:.1f} bits, "
            f"against {fixed.bits_per_person:.1f} at the shared rate and {stable.bits_per_person:.1f} of "
            f"alpha / sqrt(r) at the shared rate."
        )
        gap = stable.bits_per_person - fixed.bits_per_person
        share = (best.bits_per_person - fixed.bits_per_person) / gap if gap > 1 else 0.0
        if share >= 1:
            line += " The rate alone closes the gap, and more."
        elif gap > 1:
            line += f" The rate alone closes {share:.0%} of the gap."
        lines.append(line)
    asked = [r for r in rows if r.role != "style" and r.exact_share and r.paraphrased_exact_share is not None]
    if asked:
        top = max(asked, key=lambda r: r.exact_share or 0)
        lines.append(
            f"Of the best run ({top.name}), {_percent(top.exact_share)} of the facts are right in the words of the "
            f"training data and {_percent(top.paraphrased_exact_share)} in words that were held out."
        )
    forgot = [r for r in rows if r.forgetting is not None]
    if forgot:
        most, least = max(forgot, key=lambda r: r.forgetting or 0), min(forgot, key=lambda r: r.forgetting or 0)
        lines.append(
            f"Forgetting, in nats a token of plain text: from {least.forgetting:+.3f} ({least.name}) to "
            f"{most.forgetting:+.3f} ({most.name})."
        )
    style = at["style", 8, "lora"]
    if style.exact_share is not None:
        lines.append(
            f"The style run at rank 8, alpha / r, lowers the loss of a sentence by {style.bits_per_person or 0:.0f} "
            f"bits and writes {_percent(style.exact_share)} of them to the letter, after {style.steps} steps."
        )
    return tuple(lines)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"
