"""Records: JSON out and back, field names as in the public contract, and what is refused in words."""

from __future__ import annotations

import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import conversion_samples
import extraction_samples
import lint_samples
import msgspec
import probe_samples
import pytest
import run_samples
import stability_samples
import sweep_samples

from rankwise.errors import MissingDependencyError, RecordError
from rankwise.records import (
    RECORDS,
    DryRunRecord,
    Finding,
    Memory,
    ModuleSpectrum,
    PlannedModule,
    PlanRecord,
    Record,
    ReportFile,
    ReportPart,
    ReportRecord,
    ScaledError,
    ScaleRow,
    SimulatedUpdate,
    SimulationRecord,
    SimulationRow,
    Skipped,
    SpectraRecord,
    SpectraSummary,
    read_any_record,
    read_record,
    to_json,
    version,
)

HEAD: dict[str, Any] = {
    "rankwise": "0.1.0",
    "created": "2026-01-02T03:04:05+00:00",
    "command": ("rankwise", "inspect", "adapter"),
    "device": "cpu",
    "seed": 3,
}

WHOLE: dict[str, Any] = {
    "module": "layers.0.q_proj",
    "shape": (32, 16),
    "r": 4,
    "lora_alpha": 8.0,
    "scaling": 2.0,
    "rule": "lora",
    "dtype": "F32",
    "singular_values": (4.0, 2.0, 1.0, 0.5),
    "complete": True,
    "energy": 21.25,
    "stable_rank": 1.328125,
    "effective_rank": 2.0,
    "rank_90": 2,
    "rank_99": 4,
    "relative_norm": None,
    "unchanged_share": None,
    "noise_edge": None,
    "signal_rank": None,
    "rounding_limited": False,
    "warnings": ("dead-modules",),
}

NULLS = {
    "r": None,
    "lora_alpha": None,
    "scaling": None,
    "rule": None,
    "singular_values": (),
    "complete": False,
    "energy": None,
    "stable_rank": None,
    "effective_rank": None,
    "rank_90": None,
    "rank_99": None,
}


def module_spectrum(name: str = "layers.0.q_proj", **changed: Any) -> ModuleSpectrum:
    return ModuleSpectrum(**(WHOLE | {"module": name} | changed))


def spectra_record(*modules: Any, **changed: Any) -> SpectraRecord:
    fields: dict[str, Any] = {
        "format": "rankwise/spectra/1",
        **HEAD,
        "source": "adapter",
        "base": None,
        "kind": "adapter",
        "modules": modules or (module_spectrum(), module_spectrum("layers.1.q_proj", **NULLS)),
        "skipped": (Skipped(module="layers.0.norm", reason="1-D"),),
        "summary": SpectraSummary(
            modules=2,
            params=1024,
            energy_by_rank={"1": 0.75, "2": None},
            effective_rank_mean=2.5,
            rank_90_mean=None,
            findings=(Finding(code="not-finite", level="error", text="NaN in \u03bb"),),
        ),
    }
    return SpectraRecord(**(fields | changed))


def simulation_record(**changed: Any) -> SimulationRecord:
    row = SimulationRow(
        rank=2,
        energy_share=0.75,
        truncation_error=0.5,
        scaled_error=ScaledError(lora=1.0, rslora=2.0),
        closed_form=ScaledError(lora=1.0, rslora=2.0),
    )
    update = SimulatedUpdate(
        planted="linear:2:1:2",
        shape=(4, 4),
        singular_values=(2.0, 1.0),
        energy=5.0,
        stable_rank=1.25,
        effective_rank=1.65,
        rank_90=2,
        rank_99=2,
        rows=(row,),
    )
    fields: dict[str, Any] = {
        "format": "rankwise/simulation/1",
        **HEAD,
        "lora_alpha": 16.0,
        "size": 4,
        "noise": 0.0,
        "scales": (ScaleRow(rank=1, lora=16.0, rslora=16.0),),
        "updates": {"style": update},
        "notes": ("a note",),
    }
    return SimulationRecord(**(fields | changed))


def dry_run_record() -> DryRunRecord:
    return DryRunRecord(
        format=DryRunRecord.FORMAT,
        **HEAD,
        config=run_samples.CONFIG,
        params=10,
        base_params=100,
        memory=Memory(weights=400, adapter=40, gradients=40, optimizer=80, activations=None, total=560),
        examples=3,
        tokens=30,
        target_tokens=9,
        epochs=1.5,
        findings=(),
    )


def plan_record() -> PlanRecord:
    module = PlannedModule(
        module="layers.0.q_proj", shape=(4, 8), r=2, lora_alpha=4.0, scaling=2.0, kept_energy_share=None
    )
    return PlanRecord(
        format=PlanRecord.FORMAT,
        **HEAD,
        rule="lora",
        modules=(module,),
        params=24,
        budget=None,
        relative_error=None,
        learning_rate=1e-3,
        why="planted",
    )


MADE: dict[str, Record] = {
    "rankwise/spectra/1": spectra_record(),
    "rankwise/simulation/1": simulation_record(),
    "rankwise/plan/1": plan_record(),
    "rankwise/run/1": msgspec.structs.replace(run_samples.run(), command=HEAD["command"]),
    "rankwise/dry-run/1": dry_run_record(),
    "rankwise/extraction/1": msgspec.structs.replace(
        extraction_samples.RECORDS["calibrated extraction"], command=HEAD["command"]
    ),
    "rankwise/recall/1": msgspec.structs.replace(run_samples.measured(), command=HEAD["command"]),
    "rankwise/conversion/1": conversion_samples.record(conversion_samples.CUT, command=HEAD["command"]),
    "rankwise/lint/1": lint_samples.lint_record(command=HEAD["command"]),
    "rankwise/stability/1": stability_samples.check(command=HEAD["command"]),
    "rankwise/report/1": ReportRecord(
        format="rankwise/report/1",
        **HEAD,
        title="t",
        verdict="v",
        files=(ReportFile(path="p", format="rankwise/plan/1", created="c"),),
        parts=(ReportPart(kind="plan", title="t", verdict="v", files=("p",), figures=("plan-curve",)),),
        findings=(),
        out="page.html",
    ),
    "rankwise/sweep/1": sweep_samples.sweep(command=HEAD["command"]),
    "rankwise/sweep-dry-run/1": sweep_samples.dry_sweep(command=HEAD["command"]),
    "rankwise/probe/1": probe_samples.probe_record(command=HEAD["command"]),
    "rankwise/counter-test/1": probe_samples.counter_record(command=HEAD["command"]),
    "rankwise/demo/1": msgspec.structs.replace(run_samples.demo(), command=HEAD["command"]),
}


def test_every_kind_is_tested() -> None:
    assert sorted(MADE) == sorted(RECORDS)


@pytest.mark.parametrize("kind", sorted(RECORDS))
def test_a_record_comes_back_equal(kind: str, tmp_path: Path) -> None:
    made = MADE[kind]
    assert type(made).from_json(made.to_json()) == made
    assert type(made).from_json(made.to_json().encode()) == made
    path = tmp_path / "record.json"
    path.write_text(made.to_json(), encoding="utf-8")
    assert read_record(path, type(made)) == made
    assert read_any_record(path) == made


@pytest.mark.parametrize("kind", sorted(RECORDS))
def test_json_begins_with_the_common_fields_and_needs_nothing_but_json(kind: str) -> None:
    plain = json.loads(MADE[kind].to_json())
    assert list(plain)[:6] == ["format", "rankwise", "created", "command", "device", "seed"]
    assert plain["format"] == kind
    assert plain["command"] == ["rankwise", "inspect", "adapter"]


def test_the_fields_of_sweep_1_are_those_of_the_contract() -> None:
    plain = json.loads(MADE["rankwise/sweep/1"].to_json())
    assert len(plain["runs"]) == len(plain["cells"]) == 108
    assert [(b["scaling"], b["rank"], b["on_edge"]) for b in plain["best"]] == [
        (rule, rank, False) for rule in ("lora", "rslora") for rank in (4, 16, 64)
    ]
    assert all(b["learning_rate"] for b in plain["best"])


def test_the_fields_of_spectra_1_are_those_of_the_contract() -> None:
    plain = json.loads(MADE["rankwise/spectra/1"].to_json())
    assert set(plain) >= {"source", "base", "kind", "modules", "skipped", "summary"}
    assert set(plain["modules"][0]) == {
        "module",
        "shape",
        "r",
        "lora_alpha",
        "scaling",
        "rule",
        "dtype",
        "singular_values",
        "complete",
        "energy",
        "stable_rank",
        "effective_rank",
        "rank_90",
        "rank_99",
        "relative_norm",
        "unchanged_share",
        "noise_edge",
        "signal_rank",
        "rounding_limited",
        "warnings",
    }
    assert plain["modules"][0]["shape"] == [32, 16]
    assert set(plain["skipped"][0]) == {"module", "reason"}
    assert set(plain["summary"]) == {
        "modules",
        "params",
        "energy_by_rank",
        "effective_rank_mean",
        "rank_90_mean",
        "findings",
    }
    assert set(plain["summary"]["energy_by_rank"]) == {"1", "2"}
    assert set(plain["summary"]["findings"][0]) == {"code", "level", "text"}


def test_the_fields_of_simulation_1_are_those_of_the_contract() -> None:
    plain = json.loads(MADE["rankwise/simulation/1"].to_json())
    assert set(plain) >= {"scales", "updates"}
    assert set(plain["scales"][0]) == {"rank", "lora", "rslora"}
    update = plain["updates"]["style"]
    assert set(update) >= {"singular_values", "rows"}
    assert set(update["rows"][0]) >= {"rank", "energy_share", "truncation_error", "scaled_error"}
    assert set(update["rows"][0]["scaled_error"]) == {"lora", "rslora"}


def test_the_fields_of_run_1_and_plan_1_are_those_of_the_contract() -> None:
    plain = json.loads(MADE["rankwise/run/1"].to_json())
    assert set(plain) >= {"config", "status", "params", "steps", "tokens", "loss", "recall", "forgetting", "seconds"}
    assert set(plain) >= {"peak_memory_bytes", "tokens_per_second", "health", "error"}
    assert set(plain["recall"]) >= {"facts", "bits", "bits_possible", "bits_per_param", "exact_share", "base_bits"}
    assert set(plain["health"][0]) >= {"step", "group"}
    plan = json.loads(MADE["rankwise/plan/1"].to_json())
    assert set(plan) >= {"rule", "modules", "params", "budget", "relative_error", "learning_rate", "why"}
    assert set(plan["modules"][0]) >= {"module", "shape", "r", "lora_alpha", "scaling", "kept_energy_share"}


def test_what_is_not_known_is_null_and_never_left_out() -> None:
    plain = json.loads(MADE["rankwise/spectra/1"].to_json())
    full, unknown = plain["modules"]
    assert set(full) == set(unknown)
    assert {name for name, value in unknown.items() if value is None} >= set(NULLS) - {
        "singular_values",
        "complete",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null(value: float) -> None:
    text = spectra_record(module_spectrum(energy=value, singular_values=(value, 1.0))).to_json()
    module = json.loads(text, parse_constant=pytest.fail)["modules"][0]
    assert module["energy"] is None
    assert module["singular_values"] == [None, 1.0]


def test_floats_come_back_bit_by_bit() -> None:
    values = (1e300, math.pi, 1 / 3, 5e-324)
    back = SpectraRecord.from_json(spectra_record(module_spectrum(singular_values=values)).to_json())
    assert back.modules[0].singular_values == values


def test_a_path_that_is_not_utf_8_is_written_with_its_bytes_spelled() -> None:
    text = spectra_record(command=("rankwise", "inspect", "bad\udcff")).to_json()
    assert SpectraRecord.from_json(text).command[-1] == r"bad\udcff"
    assert "\u03bb" in text, "what is proper text stays as it is"


REFUSED = {
    "not JSON": ("{", "is not JSON"),
    "empty": ("", "is not JSON"),
    "not UTF-8": (b"\xff\xfe\xfa", "is not JSON"),
    "deep": ("[" * 200_000, "is not JSON"),
    "a list": ("[]", "is not a rankwise record"),
    "a number": ("3", "is not a rankwise record"),
    "no format": ("{}", "is not a rankwise record: it has no field `format`"),
    "a format that is no text": ('{"format": ["rankwise/spectra/1"]}', "it has no field `format`"),
    "another tool's": ('{"format": "pt"}', "is not a rankwise record"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("kind", sorted(RECORDS))
def test_what_is_no_record_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    text, words = REFUSED[name]
    with pytest.raises(RecordError, match=words):
        RECORDS[kind].from_json(text)
    path = tmp_path / "thing.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecordError, match=r"thing\.json is "):
        read_any_record(path)


@pytest.mark.parametrize("found", ["2", "10"])
@pytest.mark.parametrize("kind", sorted(RECORDS))
def test_a_newer_format_is_refused_in_words(kind: str, found: str, tmp_path: Path) -> None:
    newer = kind.rpartition("/")[0] + "/" + found
    text = json.dumps({"format": newer, "whatever": 1})
    words = rf"is {newer}, newer than the {kind} .*; update rankwise"
    with pytest.raises(RecordError, match=words):
        RECORDS[kind].from_json(text)
    path = tmp_path / "newer.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=words):
        read_any_record(path)


@pytest.mark.parametrize("found", ["spectra/0", "spectra/x", "spectra/\u00b2", "spectra", "spectra/1/2", "plan/1"])
def test_a_format_that_is_not_newer_is_not_called_newer(found: str) -> None:
    with pytest.raises(RecordError, match=f"^the record is rankwise/{found}; wanted rankwise/spectra/1$"):
        SpectraRecord.from_json(json.dumps({"format": f"rankwise/{found}"}))


def test_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sim.json"
    path.write_text(MADE["rankwise/simulation/1"].to_json())
    with pytest.raises(RecordError, match=r"sim\.json is rankwise/simulation/1; wanted rankwise/spectra/1"):
        read_record(path, SpectraRecord)


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"format": "rankwise/horoscope/1"}')
    with pytest.raises(RecordError, match=r"'rankwise/horoscope/1'; this version reads: .*/simulation/1, .*/spectra/1"):
        read_any_record(path)


def test_unknown_missing_and_mistyped_fields_are_refused_by_name() -> None:
    plain = json.loads(MADE["rankwise/spectra/1"].to_json())
    first = plain["modules"][0] | {"extra": 1}
    with pytest.raises(RecordError, match=r"unknown field `extra` - at `\$\.modules\[0\]`"):
        SpectraRecord.from_json(json.dumps(plain | {"modules": [first]}))
    with pytest.raises(RecordError, match="missing required field `summary`"):
        SpectraRecord.from_json(json.dumps({k: v for k, v in plain.items() if k != "summary"}))
    with pytest.raises(RecordError, match=r"Expected `int.*`, got `str` - at `\$\.seed`"):
        SpectraRecord.from_json(json.dumps(plain | {"seed": "3"}))
    with pytest.raises(RecordError, match=r"at `\$\.kind`"):
        SpectraRecord.from_json(json.dumps(plain | {"kind": "nonsense"}))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("NaN", "is not JSON: it holds NaN, where a record has a finite number or null"),
        ("Infinity", "is not JSON: it holds Infinity, where a record has a finite number or null"),
        ("1e999", "is not a whole rankwise/simulation/1 record"),
    ],
)
def test_numbers_that_json_does_not_have_are_refused(number: str, said: str) -> None:
    """Python's json module reads them; the record's reader must not."""
    text = MADE["rankwise/simulation/1"].to_json().replace('"noise": 0.0', f'"noise": {number}')
    assert number in text
    with pytest.raises(RecordError, match=said):
        SimulationRecord.from_json(text)


def test_other_encodings_and_lone_surrogates_are_refused() -> None:
    text = MADE["rankwise/simulation/1"].to_json()
    for broken in (
        text.encode("utf-16"),
        text.replace("a note", "\\ud800"),
        text.replace("a note", "\ud800"),
    ):
        with pytest.raises(RecordError, match=r"not a whole|not JSON"):
            SimulationRecord.from_json(broken)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(RecordError, match=f"^{path} cannot be read: (No such file|Is a directory)"):
            read_record(path, SpectraRecord)
        with pytest.raises(RecordError, match=f"^{path} cannot be read: (No such file|Is a directory)"):
            read_any_record(path)


def test_records_are_frozen() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        MADE["rankwise/spectra/1"].seed = 4  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Finding("code", "info", "text")  # type: ignore[misc]


def test_repr_is_for_people() -> None:
    assert repr(spectra_record()) == (
        "SpectraRecord(adapter of 'adapter': 2 modules, mean rank for 90 % of the energy unknown, findings: not-finite)"
    )
    assert repr(simulation_record()) == (
        "SimulationRecord(alpha 16: style (linear:2:1:2) needs rank 2 for 90 % of its energy)"
    )


def test_spectra_become_a_row_a_module() -> None:
    pd = pytest.importorskip("pandas")
    frame = spectra_record().to_dataframe()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame["module"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    assert frame["energy"][0] == 21.25
    assert pd.isna(frame["energy"][1])
    assert list(frame.columns) == list(msgspec.structs.asdict(module_spectrum()))


def test_a_simulation_becomes_a_row_an_update_and_rank() -> None:
    pytest.importorskip("pandas")
    frame = simulation_record().to_dataframe()
    assert frame.to_dict("records") == [
        {
            "update": "style",
            "rank": 2,
            "energy_share": 0.75,
            "truncation_error": 0.5,
            "scaled_error_lora": 1.0,
            "scaled_error_rslora": 2.0,
        }
    ]


def test_without_pandas_the_words_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"needs pandas.*pip install 'rankwise\["):
        spectra_record().to_dataframe()


def test_time_and_version_are_what_they_say() -> None:
    from rankwise.records import now

    assert datetime.datetime.fromisoformat(now()).utcoffset() == datetime.timedelta(0)
    assert version()[0].isdigit()


def test_to_json_ends_with_a_newline_and_is_indented() -> None:
    text = to_json(MADE["rankwise/spectra/1"])
    assert text.endswith("}\n")
    assert text.startswith('{\n "format": "rankwise/spectra/1",\n')
