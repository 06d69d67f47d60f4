"""extract on files with a planted truth: what is written, what is left out, resuming, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import rankwise
from planting import planted, write_checkpoint
from rankwise.adapters.staging import Staging
from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter
from rankwise.errors import (
    CriterionError,
    NothingToMeasureError,
    OutputError,
    OutputExistsError,
    RecordError,
    UsageError,
    WrongKindError,
)
from rankwise.records import ExtractionRecord, PlannedModule, PlanRecord, from_json, now, read_record, version

Array = NDArray[Any]
Q, K, DOWN = (f"model.layers.0.{end}" for end in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def base(rng: np.random.Generator) -> dict[str, Array]:
    def draw(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "model.embed_tokens.weight": draw(40, 16),
        f"{Q}.weight": draw(16, 16),
        f"{Q}.bias": draw(16),
        f"{K}.weight": draw(8, 16),
        f"{DOWN}.weight": draw(16, 24),
        "model.layers.0.input_layernorm.weight": draw(16),
        "model.norm.weight": draw(16),
        "lm_head.weight": draw(40, 16),
    }


@pytest.fixture
def make(tmp_path: Path, base: dict[str, Array]) -> Make:
    """Write a base, and a tuned copy with some tensors changed."""

    def write(changes: dict[str, Array], dtype: Any = np.float32, **config: Any) -> tuple[Path, Path]:
        settings = {"architectures": ["LlamaForCausalLM"]} | config
        start = {n: a.astype(dtype) for n, a in base.items()}
        after = {n: (base[n] + changes[n]).astype(dtype) if n in changes else a for n, a in start.items()}
        return (
            write_checkpoint(tmp_path / "base", start, **settings),
            write_checkpoint(tmp_path / "tuned", after, **settings),
        )

    return write


def _delta(out: Path, module: str) -> Array:
    """Return scaling * B @ A of one module, as rankwise's reader finds it in the folder."""
    with open_source(out, want="adapter") as opened:
        assert isinstance(opened, Adapter)
        found = next(m for m in opened.modules if m.module == module)
        a, b = opened.read_factors(found)
        assert found.scaling is not None
        return np.asarray(found.scaling * b @ a)


def test_planted_deltas_come_back(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    wanted = {
        f"{Q}.weight": planted(rng, (16, 16), [2, 1]),
        f"{K}.weight": planted(rng, (8, 16), [3, 1, 1]),
        f"{DOWN}.weight": planted(rng, (16, 24), [1, 0.5]),
    }
    before, after = make(wanted)
    record = rankwise.extract(before, after, tmp_path / "out", rank=3, device="cpu")
    assert {m.module for m in record.modules} == {Q, K, DOWN}
    for name, delta in wanted.items():
        np.testing.assert_allclose(_delta(tmp_path / "out", name.removesuffix(".weight")), delta, atol=2e-6)
    assert all((m.r, m.lora_alpha, m.scaling) == (3, 3, 1) for m in record.modules)
    assert all(m.relative_error < 2e-6 for m in record.modules)  # what the float32 weights leave of the delta
    assert record.unchanged == 5
    assert record.left_out == ()
    assert record.carried_energy_share == pytest.approx(1.0)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(before)
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
    on_file = read_record(tmp_path / "out" / "extraction.json", ExtractionRecord)
    assert on_file == from_json(record.to_json(), ExtractionRecord)


def test_suffixes_only_where_they_select_nothing_else(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    """q_proj alone changed: `q_proj` selects it. With a second, unchanged q_proj the full name is needed."""
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1])})
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert record.target_modules == ("q_proj",)
    more = rng.standard_normal((16, 16)).astype(np.float32)
    for folder in (before, after):
        tensors = load_file(folder / "model.safetensors") | {"model.layers.1.self_attn.q_proj.weight": more}
        write_checkpoint(folder, tensors)
    record = rankwise.extract(before, after, tmp_path / "again", rank=1, device="cpu")
    assert record.target_modules == (Q,)


def test_bit_equal_weights_meet_no_arithmetic(
    make: Make, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.deltas import Delta

    subtracted = []
    whole = Delta.subtract
    monkeypatch.setattr(Delta, "subtract", lambda self: subtracted.append(self.module) or whole(self))
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1])})
    rankwise.extract(before, after, tmp_path / "out", rank=2, device="cpu")
    assert subtracted == [Q]
    assert all(Q in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_energy_and_error_choose_by_module(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    """sigma = 3, 1, 1: one direction holds 9 of 11; 0.1 % of the norm needs all three."""
    changes = {f"{K}.weight": planted(rng, (8, 16), [3, 1, 1]), f"{Q}.weight": planted(rng, (16, 16), [1])}
    before, after = make(changes)
    for options, wanted in (({"energy": 0.8}, 1), ({"energy": 0.9}, 2), ({"relative_error": 1e-3}, 3)):
        record = rankwise.extract(before, after, tmp_path / "out", **options, force=True, device="cpu")
        assert {m.module: m.r for m in record.modules} == {K: wanted, Q: 1}
        assert {m.module: m.lora_alpha for m in record.modules} == {K: wanted, Q: 1}
    assert all(m.relative_error <= 1e-3 for m in record.modules)


def test_signal_stops_at_the_noise_edge(tmp_path: Path, rng: np.random.Generator) -> None:
    start = rng.standard_normal((128, 96)).astype(ml_dtypes.bfloat16)
    tuned = (start.astype(np.float32) + planted(rng, (128, 96), [4, 3, 2])).astype(ml_dtypes.bfloat16)
    before = write_checkpoint(tmp_path / "b", {"a.weight": start, "n.weight": start})
    rounded = (start.astype(np.float32) * (1 + 2.0**-8)).astype(ml_dtypes.bfloat16)
    after = write_checkpoint(tmp_path / "t", {"a.weight": tuned, "n.weight": rounded})
    record = rankwise.extract(before, after, tmp_path / "out", signal=True, skip="n", device="cpu")
    assert [m.r for m in record.modules] == [3]
    assert record.dtype == "bfloat16"


def test_signal_on_a_float32_pair_says_that_it_kept_everything(
    make: Make, tmp_path: Path, rng: np.random.Generator
) -> None:
    before, after = make({f"{Q}.weight": rng.standard_normal((16, 16))})
    record = rankwise.extract(before, after, tmp_path / "out", signal=True, device="cpu")
    assert [m.r for m in record.modules] == [16]
    assert "all-signal" in [f.code for f in record.findings]


@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_factors_make_up_for_the_scale(
    rule: str, alpha: float | None, make: Make, tmp_path: Path, rng: np.random.Generator
) -> None:
    wanted = planted(rng, (8, 16), [3, 1])
    before, after = make({f"{K}.weight": wanted})
    out = tmp_path / "out"
    record = rankwise.extract(before, after, out, rank=2, scaling=rule, lora_alpha=alpha, device="cpu")
    np.testing.assert_allclose(_delta(out, K), wanted, atol=2e-6)
    factor = rankwise.scaling(rule, alpha or (1 if rule == "unscaled" else 2), 2)
    assert record.modules[0].scaling == pytest.approx(factor)
    tensors = load_file(out / "adapter_model.safetensors")
    norms = [np.linalg.norm(t) for t in tensors.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # the scale is shared too


def test_plan_gives_rank_alpha_and_rule(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    changes = {f"{n}.weight": planted(rng, s, [2, 1]) for n, s in ((Q, (16, 16)), (K, (8, 16)), (DOWN, (16, 24)))}
    before, after = make(changes)

    def planned(module: str, shape: tuple[int, int], r: int) -> PlannedModule:
        return PlannedModule(module=module, shape=shape, r=r, lora_alpha=6, scaling=6 / max(r, 1) ** 0.5,
                             kept_energy_share=None)  # fmt: skip

    modules = (planned(Q, (16, 16), 2), planned(K, (8, 16), 4), planned(DOWN, (16, 24), 0))
    plan = PlanRecord(
        format=PlanRecord.FORMAT, rankwise=version(), created=now(), command=(), device="cpu", seed=None,
        rule="rslora", modules=modules, params=0, budget=None, relative_error=None, learning_rate=None, why="",
    )  # fmt: skip
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    record = rankwise.extract(before, after, tmp_path / "out", plan=path, device="cpu")
    assert record.rule == "rslora"
    assert {m.module: (m.r, m.lora_alpha) for m in record.modules} == {Q: (2, 6.0), K: (4, pytest.approx(6.0))}
    assert [(n.module, n.reason) for n in record.left_out] == [(DOWN, "the plan gives it rank 0")]
    np.testing.assert_allclose(_delta(tmp_path / "out", Q), changes[f"{Q}.weight"], atol=2e-6)
    stranger = msgspec.structs.replace(plan, modules=(*modules, planned("model.layers.9.x", (2, 2), 1)))
    with pytest.raises(UsageError, match=r"model\.layers\.9\.x"):
        rankwise.extract(before, after, tmp_path / "no", plan=stranger, device="cpu")
    with pytest.raises(UsageError, match="leave out --scaling"):
        rankwise.extract(before, after, tmp_path / "no", plan=plan, scaling="lora", device="cpu")
    with pytest.raises(RecordError):
        rankwise.extract(before, after, tmp_path / "no", plan=tmp_path / "out" / "extraction.json", device="cpu")
    assert not (tmp_path / "no").exists()


def test_what_low_rank_cannot_carry_is_named_with_its_size(make: Make, tmp_path: Path, base: dict[str, Array]) -> None:
    changes = {
        f"{Q}.weight": np.ones((16, 16)),
        f"{Q}.bias": 0.5 * base[f"{Q}.bias"],
        "model.norm.weight": 0.25 * base["model.norm.weight"],
        "model.embed_tokens.weight": np.full((40, 16), 0.1),
        "lm_head.weight": np.full((40, 16), 0.2),
    }
    before, after = make(changes)
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    left = {n.module: n for n in record.left_out}
    assert set(left) == {f"{Q}.bias", "model.norm", "model.embed_tokens", "lm_head"}
    assert left[f"{Q}.bias"].relative_norm == pytest.approx(0.5, rel=1e-5)
    assert left["model.norm"].relative_norm == pytest.approx(0.25, rel=1e-5)
    assert "--embeddings" in left["model.embed_tokens"].reason
    assert "--lm-head" in left["lm_head"].reason
    whole = sum(float(np.sum(np.square(c))) for c in changes.values())
    assert record.carried_energy_share == pytest.approx(256 / whole, rel=1e-4)
    assert "left-out" in [f.code for f in record.findings]
    record = rankwise.extract(
        before, after, tmp_path / "all", rank=1, embeddings=True, lm_head=True, save_whole=True, device="cpu"
    )
    assert [n.module for n in record.left_out] == [f"{Q}.bias"]
    assert [w.module for w in record.whole] == ["model.norm"]
    stored = load_file(tmp_path / "all" / "adapter_model.safetensors")
    tuned = load_file(after / "model.safetensors")
    np.testing.assert_array_equal(stored["base_model.model.model.norm.weight"], tuned["model.norm.weight"])
    assert json.loads((tmp_path / "all" / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm"]


def test_a_resized_vocabulary_is_stored_whole_or_named(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1])})
    tensors = load_file(after / "model.safetensors")
    tensors["model.embed_tokens.weight"] = rng.standard_normal((44, 16)).astype(np.float32)
    write_checkpoint(after, tensors)
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, embeddings=True, device="cpu")
    assert [(n.module, n.reason) for n in record.left_out] == [("model.embed_tokens", "resized")]
    record = rankwise.extract(before, after, tmp_path / "whole", rank=1, save_whole=True, device="cpu")
    assert [(w.module, w.params) for w in record.whole] == [("model.embed_tokens", 44 * 16)]


def test_rank_is_cut_to_the_smaller_side_with_a_note(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after = make({f"{n}.weight": rng.standard_normal(s) for n, s in ((Q, (16, 16)), (K, (8, 16)))})
    record = rankwise.extract(before, after, tmp_path / "out", rank=12, device="cpu")
    assert {m.module: (m.r, m.lora_alpha) for m in record.modules} == {Q: (12, 12), K: (8, 8)}
    assert "rank-capped" in [f.code for f in record.findings]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {*config["rank_pattern"].values(), config["r"]} == {8, 12}


def test_half_precision_states_the_error_after_the_cast(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    delta = planted(rng, (16, 16), 0.8 ** np.arange(16))
    before, after = make({f"{Q}.weight": delta})
    stored = load_file(after / "model.safetensors")[f"{Q}.weight"].astype(float)
    wanted = stored - load_file(before / "model.safetensors")[f"{Q}.weight"].astype(float)
    for dtype in ("bfloat16", "float16", "float32"):
        record = rankwise.extract(before, after, tmp_path / dtype, rank=14, dtype=dtype, device="cpu")
        module = record.modules[0]
        missed = np.linalg.norm(wanted - _delta(tmp_path / dtype, Q)) / np.linalg.norm(wanted)
        assert module.relative_error == pytest.approx(float(missed), rel=1e-3)
        assert module.relative_error >= module.least_relative_error
    assert {m.dtype for m in open_source(tmp_path / "bfloat16", want="adapter").modules} == {"BF16"}


def test_b_is_fitted_to_the_rounded_a(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    """Rounding both factors of a complete delta to 8 bits costs more than rounding one of them."""
    from rankwise.adapters.truncation import residual_energy, truncate

    delta = planted(rng, (16, 24), np.linspace(2, 1, 16)).astype(np.float32)
    before, after = make({f"{DOWN}.weight": delta})
    record = rankwise.extract(before, after, tmp_path / "out", rank=16, dtype="bfloat16", device="cpu")
    found = truncate(delta, 16)
    both = residual_energy(delta, found.a.astype(ml_dtypes.bfloat16), found.b.astype(ml_dtypes.bfloat16))
    assert record.modules[0].relative_error ** 2 < 0.75 * both / found.energy


def test_factors_too_large_for_float16_are_refused(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after = make({f"{Q}.weight": 1e12 * planted(rng, (16, 16), [1])})
    with pytest.raises(UsageError, match="do not fit into float16"):
        rankwise.extract(before, after, tmp_path / "out", rank=1, dtype="float16", device="cpu")
    assert not (tmp_path / "out").exists()


def test_not_finite_is_left_out_and_an_error_finding(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    broken = planted(rng, (8, 16), [1])
    broken[0, 0] = np.inf
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1]), f"{K}.weight": broken})
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert [m.module for m in record.modules] == [Q]
    assert record.findings[0].code == "not-finite"
    assert record.findings[0].level == "error"


def _experts(tmp_path: Path, rng: np.random.Generator, model_type: str) -> tuple[Path, Path, dict[str, Array]]:
    holder = "model.layers.0.mlp.experts"
    start = {
        f"{holder}.down_proj": rng.standard_normal((3, 16, 12)).astype(np.float32),
        f"{holder}.gate_up_proj": rng.standard_normal((3, 24, 16)).astype(np.float32),
        "model.layers.0.mlp.gate.weight": rng.standard_normal((3, 16)).astype(np.float32),
    }
    changes = {n: np.zeros_like(a) for n, a in start.items()}
    for name in (f"{holder}.down_proj", f"{holder}.gate_up_proj"):
        for index, values in ((0, [2.0]), (2, [3.0, 2.0, 1.0])):  # the second expert stays as it is
            changes[name][index] = planted(rng, start[name].shape[1:], values)
    changes["model.layers.0.mlp.gate.weight"] = planted(rng, (3, 16), [1]).astype(np.float32)
    before = write_checkpoint(tmp_path / "base", start, model_type=model_type)
    after = write_checkpoint(tmp_path / "tuned", {n: start[n] + changes[n] for n in start}, model_type=model_type)
    return before, after, changes


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_experts_share_the_largest_rank(model_type: str, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after, changes = _experts(tmp_path, rng, model_type)
    record = rankwise.extract(before, after, tmp_path / "out", relative_error=1e-3, device="cpu")
    ranks = {m.module: m.r for m in record.modules}
    holder = "model.layers.0.mlp.experts"
    assert ranks == {
        f"{holder}.gate_up_proj[0]": 3,
        f"{holder}.gate_up_proj[2]": 3,
        f"{holder}.down_proj[0]": 3,
        f"{holder}.down_proj[2]": 3,
        "model.layers.0.mlp.gate": 1,
    }
    assert any("raised" in note for m in record.modules for note in m.notes)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{holder}{wrapped}.lora_{side}.weight"
        for wrapped in ("", ".base_layer")  # gate_up_proj is declared first, so it is innermost
        for side in "AB"
    } | {f"base_model.model.model.layers.0.mlp.gate.lora_{side}.weight" for side in "AB"}
    turned = model_type == "gpt_oss"  # stored (in, out): PEFT's factors are those of the transpose
    for name in ("gate_up_proj", "down_proj"):
        for index in (0, 1, 2):
            wanted = changes[f"{holder}.{name}"][index]
            np.testing.assert_allclose(
                _delta(tmp_path / "out", f"{holder}.{name}[{index}]"), wanted.T if turned else wanted, atol=3e-6
            )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [
        f"{holder}.gate_up_proj", f"{holder}.down_proj", "model.layers.0.mlp.gate.weight"
    ]  # fmt: skip


def test_names_of_the_model_with_its_head_are_used(tmp_path: Path, rng: np.random.Generator) -> None:
    """GPT-2 on the hub has no `transformer.`; PEFT on GPT2LMHeadModel needs it. Conv1D is stored (in, out)."""
    widths = {"c_attn": 24, "c_proj": 8}
    start = {f"h.0.attn.{n}.weight": rng.standard_normal((8, w)).astype(np.float32) for n, w in widths.items()}
    delta = planted(rng, (8, 24), [2, 1]).astype(np.float32)
    tuned = {f"transformer.{n}": a + delta if "c_attn" in n else a for n, a in start.items()}
    before, after = write_checkpoint(tmp_path / "b", start), write_checkpoint(tmp_path / "t", tuned)
    record = rankwise.extract(before, after, tmp_path / "out", rank=2, device="cpu")
    assert [(m.module, m.shape) for m in record.modules] == [("transformer.h.0.attn.c_attn", (24, 8))]
    np.testing.assert_allclose(_delta(tmp_path / "out", "transformer.h.0.attn.c_attn"), delta.T, atol=2e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert "names-differ" in [f.code for f in record.findings]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, UsageError, "--rank N, --energy SHARE"),
        ({"rank": 2, "energy": 0.5}, UsageError, "--rank and --energy"),
        ({"rank": 0}, UsageError, "--rank must be"),
        ({"rank": 0.5}, UsageError, "--energy"),
        ({"energy": 1.5}, CriterionError, "at most 1"),
        ({"energy": 0.0}, CriterionError, "above 0"),
        ({"relative_error": float("nan")}, CriterionError, "above 0"),
        ({"rank": 2, "scaling": "half"}, UsageError, "lora, rslora"),
        ({"rank": 2, "lora_alpha": -1.0}, UsageError, "--lora-alpha"),
        ({"rank": 2, "dtype": "int8"}, UsageError, "--dtype"),
        ({"rank": 2, "modules": "("}, UsageError, "--modules"),
        ({"rank": 2, "seed": -1}, UsageError, "--seed"),
        ({"plan": "nowhere.json"}, RecordError, "nowhere.json"),
        ({"relative_error": 1.0}, CriterionError, "--relative-error must be above 0 and below 1"),
        ({"rank": 2, "calibration_samples": 5}, UsageError, "needs --calibration"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], words: str, make: Make, tmp_path: Path) -> None:
    before, after = make({f"{Q}.weight": np.ones((16, 16))})
    with pytest.raises(error, match=words):
        rankwise.extract(before, after, tmp_path / "out", **options, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_nothing_changed_is_an_error_that_says_so(make: Make, tmp_path: Path) -> None:
    before, after = make({})
    with pytest.raises(NothingToMeasureError, match="all 8 tensors asked for are equal"):
        rankwise.extract(before, after, tmp_path / "out", rank=2, device="cpu")
    assert not (tmp_path / "out").exists()


def _plan(*modules: tuple[str, tuple[int, int], int, float], rule: str = "lora") -> PlanRecord:
    parts = tuple(
        PlannedModule(module=m, shape=s, r=r, lora_alpha=scale * r, scaling=scale, kept_energy_share=None)
        for m, s, r, scale in modules
    )
    return PlanRecord(
        format=PlanRecord.FORMAT, rankwise=version(), created=now(), command=(), device="cpu", seed=None, rule=rule,
        modules=parts, params=0, budget=None, relative_error=None, learning_rate=None, why="",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (_plan((Q, (16, 16), -2, 1.0)), "rank -2"),
        (_plan((Q, (16, 16), 2, -1.0)), "scaling -1"),
        (_plan((Q, (16, 16), 2, 1.0), (Q, (16, 16), 3, 1.0)), "more than once"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan: PlanRecord, words: str, make: Make, tmp_path: Path) -> None:
    before, after = make({f"{Q}.weight": np.ones((16, 16))})
    with pytest.raises(RecordError, match=words):
        rankwise.extract(before, after, tmp_path / "out", plan=plan, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_what_a_plan_names_needs_no_flag(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    table, head = "model.embed_tokens", "lm_head"
    before, after = make({f"{n}.weight": planted(rng, (40, 16), [2, 1]) for n in (table, head)})
    plan = _plan((table, (40, 16), 2, 1.0), (head, (40, 16), 1, 1.0))
    record = rankwise.extract(before, after, tmp_path / "out", plan=plan, device="cpu")
    assert {m.module: m.r for m in record.modules} == {table: 2, head: 1}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 1}, NothingToMeasureError),  # nothing is placed
        ({"plan": _plan((Q, (17, 16), 1, 1.0))}, UsageError),  # found at the module, after the place was opened
        ({"rank": 1, "modules": "k_proj", "dtype": "float16"}, UsageError),  # does not fit
    ],
)
def test_a_job_that_cannot_succeed_leaves_no_parts(
    options: dict[str, Any], error: type[Exception], make: Make, tmp_path: Path
) -> None:
    change = {"plan": {f"{Q}.weight": np.ones((16, 16))}, "dtype": {f"{K}.weight": np.full((8, 16), 1e12)}}
    before, after = make(next((c for name, c in change.items() if name in options), {}))
    with pytest.raises(error):
        rankwise.extract(before, after, tmp_path / "out", **options, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("save_whole", [False, True])
def test_a_norm_that_is_not_finite_is_an_error_and_never_stored(
    save_whole: bool, make: Make, tmp_path: Path, rng: np.random.Generator
) -> None:
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1]), "model.norm.weight": np.full(16, np.nan)})
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, save_whole=save_whole, device="cpu")
    assert [n.module for n in record.left_out] == ["model.norm"]
    assert record.findings[0].code == "not-finite"
    assert any("without 1 whose change has no norm" in f.text for f in record.findings)
    assert not any("norm" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_layers_that_only_the_tuned_model_has_are_named(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1])})
    new = "model.layers.1.self_attn.q_proj"
    tensors = load_file(after / "model.safetensors")
    write_checkpoint(after, tensors | {f"{new}.weight": tensors[f"{Q}.weight"], "model.x.inv_freq": np.ones(4)})
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert [(n.module, "tuned checkpoint alone" in n.reason) for n in record.left_out] == [(new, True)]


def test_a_layer_that_only_the_base_has_is_no_target(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1])})
    tensors = load_file(before / "model.safetensors")
    write_checkpoint(before, tensors | {"model.layers.1.self_attn.q_proj.weight": tensors[f"{Q}.weight"]})
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert record.target_modules == (Q,)  # `q_proj` would give layer 1 random factors


def test_an_error_asked_for_and_lost_by_the_cast_is_told(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    """Two factors of 8 bits leave some 2^-9 each: more than 1e-3, less than 1e-2."""
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), 0.5 ** np.arange(16))})
    for wanted, told in ((1e-3, True), (3e-2, False)):
        record = rankwise.extract(
            before, after, tmp_path / "out", relative_error=wanted, dtype="bfloat16", force=True, device="cpu"
        )
        assert record.modules[0].relative_error_uncast <= wanted * 1.0005
        assert ("goal-missed" in [f.code for f in record.findings]) == told
        assert (record.modules[0].relative_error > 1.01 * wanted) == told


def test_a_cast_that_loses_all_is_not_blamed_on_the_rank(
    make: Make, tmp_path: Path, base: dict[str, Array], rng: np.random.Generator
) -> None:
    base[f"{Q}.weight"] *= 0
    before, after = make({f"{Q}.weight": 1e-18 * planted(rng, (16, 16), [2, 1])})
    record = rankwise.extract(before, after, tmp_path / "out", rank=2, dtype="float16", device="cpu")
    assert record.modules[0].relative_error == pytest.approx(1.0)
    assert [(f.level, f.code) for f in record.findings] == [("warning", "cast-error")]


def test_a_difference_below_float32_is_not_called_equal(make: Make, tmp_path: Path, base: dict[str, Array]) -> None:
    base[f"{Q}.weight"] *= 0
    changes = {f"{Q}.weight": np.full((16, 16), 1e-60), f"{K}.weight": np.ones((8, 16))}
    before, after = make(changes, np.float64)
    record = rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert [n.module for n in record.left_out] == [Q]
    assert record.unchanged == 6


def test_experts_that_were_not_asked_for_are_not_counted(tmp_path: Path, rng: np.random.Generator) -> None:
    names = [f"model.layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")]
    before = {n: rng.standard_normal((3, 8, 6)).astype(np.float32) for n in names}
    pair = (
        write_checkpoint(tmp_path / "b", before),
        write_checkpoint(tmp_path / "t", {n: a + np.float32(1) for n, a in before.items()}),
    )
    record = rankwise.extract(*pair, tmp_path / "out", rank=1, modules=r"down_proj\[1\]", device="cpu")
    assert [m.module for m in record.modules] == [f"{names[1]}[1]"]
    assert record.unchanged == 0


def test_an_adapter_is_no_checkpoint(make: Make, tmp_path: Path, rng: np.random.Generator) -> None:
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1])})
    rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    with pytest.raises(WrongKindError):
        rankwise.extract(before, tmp_path / "out", tmp_path / "again", rank=1, device="cpu")
    with pytest.raises(OutputExistsError):
        rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")


def test_a_full_disk_is_one_message_and_nothing_whole(
    make: Make, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1]), f"{K}.weight": planted(rng, (8, 16), [1])})

    there = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"out cannot be written: No space left.* Nothing was written\.$"):
        rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert sorted(p.name for p in tmp_path.iterdir()) == there  # no place beside OUT either


@pytest.mark.parametrize("parts", [1, 2])
def test_a_disk_that_fills_up_keeps_what_was_done_and_says_where(
    make: Make, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """While the parts are made, and while they are joined."""
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [1]), f"{K}.weight": planted(rng, (8, 16), [1])})
    synced = os.fsync

    def fills(handle: int) -> None:
        if len(list((tmp_path / ".out.partial" / "parts").glob("*.part"))) == parts:
            raise OSError(28, "No space left on device")
        synced(handle)

    monkeypatch.setattr(os, "fsync", fills)
    with pytest.raises(OutputError, match=r"No space left.*kept in .*\.out\.partial: the same command goes on"):
        rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert len(rankwise.extract(before, after, tmp_path / "out", rank=1, device="cpu").modules) == 2
    assert not (tmp_path / ".out.partial").exists()


def _files(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter; of the record without its date."""
    held = {p.name: p.read_bytes() for p in folder.iterdir()}
    record = json.loads(held["extraction.json"])
    held["extraction.json"] = json.dumps({k: v for k, v in record.items() if k not in ("created", "command")}).encode()
    return held


def test_an_interrupted_run_goes_on_and_ends_the_same(
    make: Make, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {f"{n}.weight": planted(rng, s, [2, 1]) for n, s in ((Q, (16, 16)), (K, (8, 16)), (DOWN, (16, 24)))}
    before, after = make(changes | {"model.norm.weight": np.ones(16)})
    out = tmp_path / "out"
    options: dict[str, Any] = {"rank": 2, "save_whole": True, "device": "cpu"}
    rankwise.extract(before, after, out, **options)
    whole = _files(out)
    for p in out.iterdir():
        p.unlink()
    out.rmdir()
    put = Staging.put
    kept: list[str] = []

    def stop(self: Staging, key: str, *rest: Any) -> None:
        if len(kept) == 2:
            raise KeyboardInterrupt
        put(self, key, *rest)
        kept.append(key)

    monkeypatch.setattr(Staging, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        rankwise.extract(before, after, out, **options)
    assert not out.exists()
    monkeypatch.setattr(Staging, "put", lambda self, key, *rest: (kept.append(key), put(self, key, *rest))[1])
    rankwise.extract(before, after, out, **options)
    assert len(kept) == len(set(kept)) == 4  # nothing was done twice
    assert _files(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_another_job_does_not_go_on_with_these_parts(
    make: Make, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank, or another file under the same name, starts anew."""
    before, after = make({f"{Q}.weight": planted(rng, (16, 16), [2, 1])})
    monkeypatch.setattr(Staging, "join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rankwise.extract(before, after, tmp_path / "out", rank=2, device="cpu")
    monkeypatch.undo()
    make({f"{Q}.weight": planted(rng, (16, 16), [5, 4])})
    record = rankwise.extract(before, after, tmp_path / "out", rank=2, device="cpu")
    assert np.linalg.norm(_delta(tmp_path / "out", Q)) == pytest.approx(41**0.5, rel=1e-4)
    assert record.modules[0].relative_error < 1e-5


KILLED = """
import sys, time
from rankwise.adapters.staging import Staging
import rankwise
put = Staging.put
def slow(self, key, *rest):
    put(self, key, *rest)
    print(key, flush=True)
    time.sleep(60 if self._known and len(self._known) == 2 else 0)
Staging.put = slow
rankwise.extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=2, device="cpu")
"""


def test_kill_leaves_nothing_that_loads_and_the_next_run_is_byte_identical(
    make: Make, tmp_path: Path, rng: np.random.Generator, root: Path
) -> None:
    changes = {f"{n}.weight": planted(rng, s, [2, 1]) for n, s in ((Q, (16, 16)), (K, (8, 16)), (DOWN, (16, 24)))}
    before, after = make(changes)
    rankwise.extract(before, after, tmp_path / "whole", rank=2, device="cpu")
    out = tmp_path / "out"
    words = [sys.executable, "-c", KILLED, str(before), str(after), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(2)]
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert all(lines)
    assert not out.exists()
    record = rankwise.extract(before, after, out, rank=2, device="cpu")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(record.modules) == 3
    assert not (tmp_path / ".out.partial").exists()
