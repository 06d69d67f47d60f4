"""The public API as a user types it. mypy --strict reads this file; nothing runs it."""

from pathlib import Path
from typing import assert_type

import rankwise
from rankwise import (
    SCALINGS,
    ConversionRecord,
    ExtractionRecord,
    Finding,
    LintRecord,
    ModuleSpectrum,
    PlanRecord,
    RankwiseError,
    ReportRecord,
    SimulationRecord,
    SpectraRecord,
    SpectraSummary,
    StabilityRecord,
    SweepRecord,
    check,
    convert,
    extract,
    figures,
    inspect,
    lint,
    lora_approximation,
    plan,
    read_record,
    render_page,
    report,
    scaling,
    simulate,
    sweep,
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


def conversions(adapter: Path, out: Path) -> None:
    made = convert(adapter, out, rank=8, bake=True, add=[("org/other", 0.5)])
    assert_type(made, ConversionRecord)
    assert_type(made.modules[0].relative_error, float)
    assert_type(made.modules[0].after.lora_alpha, float | None)
    assert_type(convert(adapter, out, runtime="vllm", dtype="float32").exact, bool)
    convert(adapter, out, 8)  # type: ignore[call-arg]


def plans(adapter: Path, record: SpectraRecord) -> None:
    made = plan(record, budget="rank:16", weights={"mlp": 2.0})
    assert_type(made, PlanRecord)
    assert_type(plan(adapter, energy=0.9, multiple_of=8).relative_error, float | None)
    assert_type(made.modules[0].r, int)
    assert_type(made.why, str)
    assert_type(render_page(made), str)
    plan(record, "rank:16")  # type: ignore[call-arg]


def records(path: Path) -> None:
    record = simulate(ranks=[4, 8], lora_alpha=32)
    assert_type(record, SimulationRecord)
    assert_type(record.to_json(), str)
    assert_type(SimulationRecord.from_json(record.to_json()), SimulationRecord)
    assert_type(read_record(path, SpectraRecord), SpectraRecord)
    assert_type(render_page(record), str)


def lints(folder: Path) -> None:
    record = lint([folder, "config.yml"], runtime="vllm", model=folder, ignore=["small-scale"])
    assert_type(record, LintRecord)
    for finding in record.findings:
        assert_type(finding.value, float | None)
    lint(folder, for_="vllm")  # type: ignore[call-arg]


def approximations() -> None:
    made = lora_approximation([[3.0, 0.0], [0.0, 4.0]], r=1, alpha=1.0, rule="lora")
    assert_type(made.relative_error, float)


def checks(path: Path) -> None:
    record = check("rankwise:tiny", "rankwise:facts", ranks=[4, 16], scaling="lora", steps=[1])
    assert_type(record, StabilityRecord)
    assert_type(record.cells[0].rms_exponent_ci, tuple[float, float] | None)
    assert_type(record.advice.learning_rate_by_rank, dict[str, float])
    assert_type(read_record(path, StabilityRecord), StabilityRecord)
    check("rankwise:tiny", "rankwise:facts", [4, 16])  # type: ignore[call-arg]


def sweeps(path: Path) -> None:
    record = sweep("rankwise:tiny", "rankwise:facts", out=path, ranks=[4, 16], scaling="lora", seeds=3, epochs=2.0)
    assert_type(record, SweepRecord)
    assert_type(record.best[0].learning_rate, float | None)
    assert_type(record.points[0].score.ci, tuple[float, float] | None)
    assert_type(record.answers, tuple[str, ...])
    sweep("rankwise:tiny", "rankwise:facts", path)  # type: ignore[call-arg]


def reports(record: SpectraRecord, path: Path) -> None:
    made = report(record, path, "facts", out="page.html")
    assert_type(made, ReportRecord)
    assert_type(made.parts[0].figures, tuple[str, ...])
    for name, figure in figures(record, path).items():
        assert_type(name, str)
        assert_type(figure.to_html(), str)
        assert_type(figure.to_csv(), str)
        figure.to_plotly("dim")  # type: ignore[arg-type]
    report(record)  # type: ignore[call-arg]


def errors() -> None:
    try:
        inspect("nowhere")
    except RankwiseError as error:
        assert_type(error.slug, str)


def extractions() -> None:
    """extract takes one way of choosing ranks and returns its record."""
    record = extract("base", "tuned", Path("out"), rank=8, scaling="rslora", dtype="bfloat16")
    assert_type(record, ExtractionRecord)
    assert_type(record.modules[0].relative_error, float)
