"""The public API as a user types it. mypy --strict reads this file; nothing runs it."""

from pathlib import Path
from typing import assert_type

import rankwise
from rankwise import (
    SCALINGS,
    Finding,
    ModuleSpectrum,
    RankwiseError,
    SimulationRecord,
    SpectraRecord,
    SpectraSummary,
    inspect,
    lora_approximation,
    read_record,
    render_page,
    scaling,
    simulate,
)


def scalings() -> None:
    assert_type(scaling("rslora", 16, 64), float)
    assert_type(rankwise.scaling("lora", lora_alpha=16.0, r=8), float)
    assert_type(SCALINGS["lora"](16.0, 8), float)
    scaling("lora", "16", 8)  # type: ignore[arg-type]


def spectra(adapter: Path) -> None:
    record = inspect(adapter)
    assert_type(record, SpectraRecord)
    assert_type(rankwise.inspect("org/tuned@main", base="org/base", modules="q_proj", values=64), SpectraRecord)
    assert_type(record.summary, SpectraSummary)
    for module in record.modules:
        assert_type(module, ModuleSpectrum)
        assert_type(module.rank_90, int | None)
        assert_type(module.singular_values, tuple[float, ...])
    for finding in record.summary.findings:
        assert_type(finding, Finding)
        assert_type(finding.code, str)
    record.source = "other"  # type: ignore[misc]
    inspect(adapter, bases="org/base")  # type: ignore[call-arg]


def records(path: Path) -> None:
    record = simulate(ranks=[4, 8], lora_alpha=32)
    assert_type(record, SimulationRecord)
    assert_type(record.to_json(), str)
    assert_type(SimulationRecord.from_json(record.to_json()), SimulationRecord)
    assert_type(read_record(path, SpectraRecord), SpectraRecord)
    assert_type(render_page(record), str)


def approximations() -> None:
    made = lora_approximation([[3.0, 0.0], [0.0, 4.0]], r=1, alpha=1.0, rule="lora")
    assert_type(made.relative_error, float)


def errors() -> None:
    try:
        inspect("nowhere")
    except RankwiseError as error:
        assert_type(error.slug, str)
