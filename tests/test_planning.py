"""Plans from spectra: planted truths, every choice held to a slow oracle, one factor in all modules, refusals."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import rankwise
from planting import planted, planted_factors, write_adapter
from rankwise import criteria
from rankwise.errors import (
    ConfigError,
    CriterionError,
    NothingToMeasureError,
    OutOfReachError,
    RankwiseError,
    RecordError,
    UsageError,
)
from rankwise.planning.modules import is_embedding, units_of, updates_of
from rankwise.records import ModuleSpectrum, PlanRecord, SpectraRecord, SpectraSummary, read_record
from rankwise.scaling import SCALINGS, scaling

Q, K, V, UP = (
    f"model.layers.0.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
)


def module(name: str, values: Sequence[float], shape: tuple[int, int], **more: Any) -> ModuleSpectrum:
    """Return a module with these singular values; figures that no plan reads are null."""
    sigma = tuple(sorted((float(v) for v in values), reverse=True))
    fields: dict[str, Any] = dict.fromkeys(
        ("r", "lora_alpha", "scaling", "rule", "stable_rank", "effective_rank", "rank_90", "rank_99", "relative_norm")
    )
    fields |= dict.fromkeys(("unchanged_share", "noise_edge", "signal_rank"))
    fields |= {"dtype": "F32", "complete": True, "energy": math.fsum(v * v for v in sigma), "rounding_limited": False}
    return ModuleSpectrum(module=name, shape=shape, singular_values=sigma, **(fields | more))


def spectra(*modules: ModuleSpectrum, kind: str = "delta") -> SpectraRecord:
    summary = SpectraSummary(
        modules=len(modules), params=0, energy_by_rank={}, effective_rank_mean=None, rank_90_mean=None, findings=()
    )
    return SpectraRecord(
        format=SpectraRecord.FORMAT,
        rankwise="0",
        created="2026-01-01T00:00:00+00:00",
        command=("test",),
        device="cpu",
        seed=0,
        source="tuned",
        base="base",
        kind=kind,  # type: ignore[arg-type]
        modules=modules,
        skipped=(),
        summary=summary,
    )


def ranks(record: PlanRecord) -> dict[str, int]:
    return {m.module: m.r for m in record.modules}


def random_spectra(rng: np.random.Generator, layers: int = 2) -> SpectraRecord:
    """Return a small model: q, k, v and up of each layer, k and v narrower, energies over two orders of magnitude."""
    made = []
    for layer in range(layers):
        for name, shape in (("q_proj", (6, 6)), ("k_proj", (4, 6)), ("v_proj", (4, 6)), ("mlp.up_proj", (9, 6))):
            values = np.sort(rng.exponential(size=min(shape)))[::-1] * 10 ** rng.uniform(-1, 0.5)
            made.append(module(f"model.layers.{layer}.{name}", values, shape))
    return spectra(*made)


def error_of(record: SpectraRecord, chosen: Mapping[str, int]) -> float:
    """Return the relative error of ranks straight from the singular values."""
    left = sum(math.fsum(v * v for v in m.singular_values[chosen.get(m.module, 0) :]) for m in record.modules)
    return math.sqrt(left / sum(math.fsum(v * v for v in m.singular_values) for m in record.modules))


def cost_of(record: SpectraRecord, chosen: Mapping[str, int]) -> int:
    return sum(chosen.get(m.module, 0) * sum(m.shape) for m in record.modules)


# --- what is chosen -----------------------------------------------------------------------------------------


def test_a_planted_pair_is_planned_by_hand() -> None:
    """Gains a parameter: q 9/20, 4/20, 1/20; up 16/40, 4/40. 80 parameters buy 9/20, 16/40 and 4/20."""
    record = spectra(module(Q, [3, 2, 1], (10, 10)), module(UP, [4, 2], (30, 10)))
    made = rankwise.plan(record, budget=80)
    assert ranks(made) == {Q: 2, UP: 1}
    assert (made.params, made.budget) == (80, 80)
    assert made.relative_error == pytest.approx(math.sqrt((1 + 4) / 34))
    assert [m.kept_energy_share for m in made.modules] == pytest.approx([13 / 14, 16 / 20])
    assert made.optimality is not None
    assert made.optimality.exact
    assert made.optimality.kept_share == pytest.approx(29 / 34)
    assert made.uniform is not None
    assert (made.uniform.r, made.uniform.params) == (1, 60)
    assert made.uniform.relative_error == pytest.approx(math.sqrt(9 / 34))
    assert made.uniform_same_error is not None
    assert made.uniform_same_error.r == 2


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"multiple_of": 2}, {"min_rank": 1}, {"max_rank": 3}], ids=str)
def test_no_other_ranks_leave_less_for_the_same_budget(rng: np.random.Generator, options: dict[str, Any]) -> None:
    """Every choice of ranks that the options allow, against the plan: one layer, 7 * 5 * 5 * 7 choices."""
    for _ in range(4):
        record = random_spectra(rng, layers=1)
        every = []
        for q, k, v, up in itertools.product(range(7), range(5), range(5), range(7)):
            least, most, step = options.get("min_rank", 0), options.get("max_rank", 9), options.get("multiple_of", 1)
            sides = ((q, 6), (k, 4), (v, 4), (up, 6))
            if any(r < least or r > most or (r % step and r != side) for r, side in sides):
                continue
            if options.get("fuse") and not q == k == v:
                continue
            every.append(dict(zip((m.module for m in record.modules), (q, k, v, up), strict=True)))
        costs = np.array([cost_of(record, c) for c in every])
        errors = np.array([error_of(record, c) for c in every])
        for budget in rng.integers(max(int(costs.min()), 30), int(costs.max()), 6):
            made = rankwise.plan(record, budget=int(budget), **options)
            best = float(errors[costs <= budget].min())
            # square roots of sums in another order: 1e-12 of an energy of 1 is 1e-6 of its root
            assert made.relative_error == pytest.approx(best, abs=2e-6)
            assert made.relative_error == pytest.approx(error_of(record, ranks(made)), abs=2e-6)
            assert made.params == cost_of(record, ranks(made)) <= budget
            assert ranks(made) in [{m: r for m, r in c.items() if r} for c in every]
        for share in rng.uniform(0.3, 0.95, 4):
            if 1 - errors.min() ** 2 < share:
                with pytest.raises(OutOfReachError):
                    rankwise.plan(record, energy=float(share), **options)
                continue
            made = rankwise.plan(record, energy=float(share), **options)
            assert made.params == costs[errors**2 <= 1 - share + 1e-12].min()
            assert (made.relative_error or 0) ** 2 <= 1 - share + 1e-9


def test_chosen_ranks_never_leave_more_than_a_uniform_rank_of_that_cost(rng: np.random.Generator) -> None:
    for _ in range(20):
        made = rankwise.plan(random_spectra(rng), budget="rank:2")
        assert made.curve
        for point in made.curve:
            assert point.planned_error is not None
            assert point.uniform_error is not None
            assert point.planned_error <= point.uniform_error + 1e-6
        assert made.uniform is not None
        assert made.uniform.r == 2
        assert made.budget == made.uniform.params


def test_error_and_energy_are_the_same_question() -> None:
    record = random_spectra(np.random.default_rng(3))
    assert ranks(rankwise.plan(record, energy=0.91)) == ranks(rankwise.plan(record, relative_error=0.3))
    exact = rankwise.plan(record, energy=1.0)
    assert exact.relative_error == 0
    assert ranks(exact) == ranks(rankwise.plan(record, relative_error=0.0))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99, 1.0])
def test_per_module_is_the_energy_rank_of_each_module(rng: np.random.Generator, share: float) -> None:
    record = random_spectra(rng)
    made = rankwise.plan(record, energy=share, per_module=True)
    for m in record.modules:
        spectrum = criteria.Spectrum(m.module, m.shape, m.singular_values, m.energy or 0.0)
        assert ranks(made)[m.module] == criteria.rank_for_energy(spectrum, share)
    assert made.optimality is None


@pytest.mark.parametrize("choice", [{"budget": "rank:2"}, {"energy": 0.8}, {"relative_error": 0.2}])
@pytest.mark.parametrize("factor", [1e-150, 1e-3, 7.0, 1e100])
def test_ranks_do_not_depend_on_the_unit_of_the_weights(
    rng: np.random.Generator, choice: dict[str, Any], factor: float
) -> None:
    record = random_spectra(rng)
    scaled = [
        module(m.module, [v * factor for v in m.singular_values], m.shape, energy=(m.energy or 0.0) * factor**2)
        for m in record.modules
    ]
    assert ranks(rankwise.plan(spectra(*scaled), **choice)) == ranks(rankwise.plan(record, **choice))


def test_relative_counts_every_module_alike(rng: np.random.Generator) -> None:
    record = random_spectra(rng)
    loud = [
        module(m.module, [v * 1000 for v in m.singular_values], m.shape) if place == 3 else m
        for place, m in enumerate(record.modules)
    ]
    alike = rankwise.plan(spectra(*loud), budget="rank:2", relative=True)
    assert ranks(alike) == ranks(rankwise.plan(record, budget="rank:2", relative=True))
    assert ranks(rankwise.plan(spectra(*loud), budget="rank:2"))[loud[3].module] == 6, "its energy is all there is"
    assert {round(m.weight * (m.energy or 0.0), 9) for m in alike.modules} == {1.0}


def test_weights_move_parameters_to_what_they_name(rng: np.random.Generator, tmp_path: Path) -> None:
    record = random_spectra(rng)
    plain = rankwise.plan(record, budget="rank:2")
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"mlp": 1e6}))
    heavy = rankwise.plan(record, budget="rank:2", weights=path)
    assert ranks(heavy) == ranks(rankwise.plan(record, budget="rank:2", weights={"proj": 1, "mlp": 1e6}))
    ups = [m.module for m in record.modules if "mlp" in m.module]
    assert all(ranks(heavy)[name] >= ranks(plain).get(name, 0) for name in ups)
    assert sum(ranks(heavy)[name] for name in ups) == 6 + 6 or heavy.params > 0.8 * (heavy.budget or 0)
    assert (heavy.relative_error or 0) >= (plain.relative_error or 1)


# --- limits, groups, multiples ------------------------------------------------------------------------------


def test_fused_weights_share_a_rank_and_experts_always_do() -> None:
    record = spectra(
        module(Q, [5, 1], (8, 8)),
        module(K, [4, 1], (4, 8)),
        module(V, [0.1, 0.1], (4, 8)),
        module(UP, [2, 1], (16, 8)),
        module("model.layers.0.mlp.gate_proj", [2, 1], (16, 8)),
        module("model.layers.0.mlp.experts.down_proj[0]", [3, 0.1], (8, 6)),
        module("model.layers.0.mlp.experts.down_proj[1]", [0.1], (8, 6)),
        module("model.layers.0.cross_attn.k_proj", [1], (4, 32)),
        module("model.layers.0.cross_attn.q_proj", [1], (4, 8)),
    )
    updates, _, _ = updates_of(record, rankwise_selection(), embeddings=True)
    names = [[updates[p].module.rsplit(".", 1)[-1] for p in unit.members] for unit in units_of(updates, fuse=True)]
    assert names == [
        ["q_proj", "k_proj", "v_proj"],
        ["up_proj", "gate_proj"],
        ["down_proj[0]", "down_proj[1]"],
        ["k_proj"],  # reads 32 numbers where q reads 8: no runtime joins them
        ["q_proj"],
    ]
    loose = rankwise.plan(record, budget=60)
    made = rankwise.plan(record, budget=60, fuse=True)
    assert ranks(loose).get(V, 0) == 0
    assert ranks(made)[Q] == ranks(made)[K] == ranks(made)[V] == 1
    assert {m.group for m in made.modules if m.module == Q} == {"model.layers.0.self_attn.{q_proj,k_proj,v_proj}"}
    experts = [m for m in rankwise.plan(record, budget=80).modules if "experts" in m.module]
    assert [m.r for m in experts] == [1, 1]


def rankwise_selection() -> Any:
    from rankwise.deltas import selection

    return selection(None, None)


def test_multiples_and_the_smaller_side() -> None:
    record = spectra(module(Q, range(20, 0, -1), (20, 40)), module(UP, range(5, 0, -1), (5, 40)))
    for share in (0.2, 0.6, 0.9, 1.0):
        made = rankwise.plan(record, energy=share, multiple_of=8)
        assert all(r % 8 == 0 or r == {Q: 20, UP: 5}[m] for m, r in ranks(made).items())


def test_caps_of_a_runtime() -> None:
    record = spectra(module(Q, np.linspace(2, 1, 700), (700, 900)), module(UP, [1, 0.5], (700, 900)))
    made = rankwise.plan(record, budget="rank:600", serve="vllm")
    assert ranks(made)[Q] == 512
    assert made.max_lora_rank == 512
    assert "set --max-lora-rank to 512" in next(f.text for f in made.findings if f.code == "serve-as-planned")
    assert rankwise.plan(record, rank=20, serve="vllm").max_lora_rank == 32
    with pytest.raises(UsageError, match="up to rank 512"):
        rankwise.plan(record, rank=600, serve="vllm")
    wrong = rankwise.plan(record, rank=16, serve="llama.cpp", scaling="rslora")
    assert "0.25 times the planned factor" in next(f.text for f in wrong.findings if f.code == "serve-wrong-scale")


# --- rounding -----------------------------------------------------------------------------------------------


def noisy() -> SpectraRecord:
    """Return two modules: four directions over an edge of 0.5 and a tail below, and one of rounding alone."""
    tail = [0.4] * 12
    return spectra(
        module(Q, [9, 8, 7, 6, *tail], (16, 16), noise_edge=0.5, signal_rank=4, rounding_limited=True),
        module(UP, [0.45] * 16, (16, 32), noise_edge=0.5, signal_rank=0, rounding_limited=True),
    )


def test_signal_takes_what_stands_above_the_edge_and_names_the_rest() -> None:
    made = rankwise.plan(noisy(), signal=True)
    assert ranks(made) == {Q: 4}
    assert [(item.module, item.counted) for item in made.left_out] == [(UP, True)]
    assert "noise edge" in made.left_out[0].reason


def test_energy_spends_on_noise_with_a_warning_and_within_signal_does_not() -> None:
    made = rankwise.plan(noisy(), energy=0.999)
    assert ranks(made)[Q] > 4
    assert "noise-in-plan" in {f.code for f in made.findings}
    spent = (ranks(made)[Q] - 4) * 32 + ranks(made)[UP] * 48
    assert f"{spent:,} parameters" in next(f.text for f in made.findings if f.code == "noise-in-plan")
    within = rankwise.plan(noisy(), energy=0.999, within_signal=True)
    assert ranks(within) == {Q: 4}
    assert {f.code for f in within.findings} >= {"signal-ends-first"}
    assert ranks(rankwise.plan(noisy(), energy=0.9, within_signal=True)) == ranks(rankwise.plan(noisy(), energy=0.9))


def test_a_signal_above_the_cap_is_cut_and_said() -> None:
    made = rankwise.plan(noisy(), signal=True, max_rank=3)
    assert ranks(made) == {Q: 3}
    assert "signal-cut" in {f.code for f in made.findings}


# --- cut-off spectra ----------------------------------------------------------------------------------------


def cut_off(energy: float = 60.0) -> SpectraRecord:
    """Return a module of which three values are known and more energy than they hold, beside a whole one."""
    return spectra(
        module(Q, [5, 4, 3], (10, 10), complete=False, energy=energy),
        module(UP, [2, 1, 0.5], (10, 10)),
    )


def test_a_plan_that_would_go_past_the_values_on_file_is_refused() -> None:
    with pytest.raises(CriterionError, match=r"q_proj: the 3 singular values .* --values .* --max-rank 3"):
        rankwise.plan(cut_off(), budget="rank:3")
    with pytest.raises(CriterionError, match="q_proj"):
        rankwise.plan(cut_off(), energy=0.99)
    with pytest.raises(CriterionError, match="q_proj"):
        rankwise.plan(cut_off(), energy=0.99, per_module=True)
    with pytest.raises(CriterionError, match="q_proj"):
        rankwise.plan(cut_off(), budget="rank:4", min_rank=4)
    assert ranks(rankwise.plan(cut_off(), budget=40)) == {Q: 2}
    capped = rankwise.plan(cut_off(), budget="rank:3", max_rank=3)
    assert ranks(capped) == {Q: 3, UP: 3}
    assert capped.relative_error == pytest.approx(math.sqrt(10 / 65.25)), "what is not listed counts as error"
    assert all(point.planned_error is None or point.r < 3 for point in rankwise.plan(cut_off(), budget=40).curve)


def test_a_uniform_rank_past_the_values_on_file_has_no_known_error() -> None:
    made = rankwise.plan(cut_off(), rank=5)
    assert ranks(made) == {Q: 5, UP: 5}
    assert made.relative_error is None
    assert [m.kept_energy_share for m in made.modules] == [None, 1.0]


# --- what is left out ---------------------------------------------------------------------------------------


def test_what_gets_no_rank_is_named_with_its_reason() -> None:
    record = spectra(
        module(Q, [3, 2], (8, 8)),
        module(K, [], (8, 8), energy=0.0),
        module(V, [], (8, 8), energy=None, complete=False),
        module("lm_head", [9, 9], (20, 8)),
        module(UP, [1e-3], (8, 8)),
    )
    made = rankwise.plan(record, budget=32)
    assert ranks(made) == {Q: 2}
    assert {item.module: item.reason.split(";")[0] for item in made.left_out} == {
        K: "its update is zero",
        V: "its update is not finite",
        "lm_head": "an embedding or output head",
        UP: "each of its directions saves less for a parameter than those that were taken",
    }
    assert [item.module for item in made.left_out if item.counted] == [UP]
    assert "lm_head" in ranks(rankwise.plan(record, budget=200, embeddings=True))
    assert "lm_head" in ranks(rankwise.plan(msgspec.structs.replace(record, kind="adapter"), budget=200))
    with pytest.raises(NothingToMeasureError, match="its update is zero"):
        rankwise.plan(record, budget=32, modules="k_proj")


@pytest.mark.parametrize(
    "name", ["lm_head", "model.embed_tokens", "transformer.wte", "bert.embeddings.word_embeddings"]
)
def test_embeddings_are_known_by_name(name: str) -> None:
    assert is_embedding(name)


@pytest.mark.parametrize("name", [Q, "encoder.layer.0.attention.output.dense", "h.0.attn.c_proj", "blocks.0.output"])
def test_other_modules_are_no_embeddings(name: str) -> None:
    assert not is_embedding(name)


# --- scale, alpha, learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", sorted(SCALINGS))
def test_every_module_has_the_same_factor_whatever_its_rank(rng: np.random.Generator, rule: str) -> None:
    record = random_spectra(rng)
    made = rankwise.plan(record, energy=0.7, scaling=rule, scale=0.5)
    assert len(set(ranks(made).values())) > 1
    for m in made.modules:
        assert scaling(rule, m.lora_alpha, m.r) == m.scaling == pytest.approx(0.5, rel=1e-12)
    assert (made.scale, made.reference_rank, made.rule) == (0.5, None, rule)
    assert rankwise.plan(record, energy=0.7, scaling=rule).scale == 1.0


@pytest.mark.parametrize("rule", sorted(SCALINGS))
def test_an_alpha_is_read_at_its_reference_rank(rng: np.random.Generator, rule: str) -> None:
    record = random_spectra(rng)
    by_budget = rankwise.plan(record, budget="rank:3", scaling=rule, lora_alpha=12)
    assert (by_budget.reference_rank, by_budget.scale) == (3, pytest.approx(scaling(rule, 12, 3)))
    assert len({round(m.scaling, 12) for m in by_budget.modules}) == 1
    named = rankwise.plan(record, energy=0.7, scaling=rule, lora_alpha=12, reference_rank=16)
    assert (named.reference_rank, named.scale) == (16, pytest.approx(scaling(rule, 12, 16)))
    nearest = rankwise.plan(record, energy=0.7, scaling=rule, lora_alpha=12)
    assert nearest.uniform is not None
    assert nearest.reference_rank == nearest.uniform.r
    uniform = rankwise.plan(record, rank=4, scaling=rule, lora_alpha=12)
    assert [m.lora_alpha for m in uniform.modules] == pytest.approx([12] * len(uniform.modules))


def test_a_learning_rate_is_carried_and_never_made_up(rng: np.random.Generator) -> None:
    record = random_spectra(rng)
    assert rankwise.plan(record, rank=2, learning_rate=3e-4).learning_rate == 3e-4
    without = rankwise.plan(record, rank=2)
    assert without.learning_rate is None
    assert "learning rate is null" in without.why


# --- real files, and sources --------------------------------------------------------------------------------


def test_an_adapter_is_inspected_and_its_plan_is_the_error_of_its_matrices(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    shapes = {"layers.0.q_proj": (24, 16), "layers.0.up_proj": (40, 16), "layers.1.q_proj": (24, 16)}
    factors, dense = {}, {}
    for name, shape in shapes.items():
        a, b = planted_factors(rng, shape, np.sort(rng.exponential(size=6))[::-1] + 0.01, scaling=2.0)
        factors[name] = (a.astype("f4"), b.astype("f4"))
        dense[name] = 2.0 * (b.astype("f4").astype("f8") @ a.astype("f4").astype("f8"))
    folder = write_adapter(tmp_path / "adapter", factors, lora_alpha=12)
    made = rankwise.plan(folder, budget="rank:2")
    left = total = 0.0
    for name, matrix in dense.items():
        sigma = np.linalg.svd(matrix, compute_uv=False)
        left += float((sigma[ranks(made).get(name, 0) :] ** 2).sum())
        total += float((sigma**2).sum())
    assert made.relative_error == pytest.approx(math.sqrt(left / total), rel=1e-5)  # inspect works in float32
    assert (made.kind, made.source) == ("adapter", str(folder))
    assert "--scale 2 would keep that" in made.why
    assert made.command == (f"rankwise.plan({str(folder)!r}, budget='rank:2')",)


def test_a_spectra_file_gives_the_plan_of_its_record(rng: np.random.Generator, tmp_path: Path) -> None:
    record = random_spectra(rng)
    path = tmp_path / "spectra.json"
    path.write_text(record.to_json())
    from_file, from_record = rankwise.plan(path, energy=0.9), rankwise.plan(record, energy=0.9)
    assert from_file.modules == from_record.modules
    assert PlanRecord.from_json(from_file.to_json()) == from_file
    kept = tmp_path / "plan.json"
    kept.write_text(from_file.to_json())
    assert read_record(kept, PlanRecord).curve == from_file.curve
    with pytest.raises(UsageError, match="--base"):
        rankwise.plan(path, base="base", energy=0.9)
    with pytest.raises(RecordError, match="plan/1; wanted rankwise/spectra/1"):
        rankwise.plan(kept, energy=0.9)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_spectra_may_come_through_a_pipe(rng: np.random.Generator, tmp_path: Path) -> None:
    """A pipe can be read once: what is read to tell a record from a checkpoint must not be lost."""
    record = random_spectra(rng)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(record.to_json(),))
    writer.start()
    made = rankwise.plan(pipe, energy=0.9)
    writer.join()
    assert made.modules == rankwise.plan(record, energy=0.9).modules


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"singular_values": [1.0, 2.0]}, "not finite, falling"),
        ({"singular_values": [1.0, -2.0]}, "not finite, falling"),
        ({"shape": [1, 8]}, "2 singular values"),
        ({"shape": [0, 8]}, "0 at most"),
        ({"signal_rank": -1}, "signal rank of -1"),
    ],
)
def test_spectra_that_no_inspection_writes_are_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    body = json.loads(spectra(module(Q, [2, 1], (8, 8))).to_json())
    body["modules"][0] |= fields
    path = tmp_path / "spectra.json"
    path.write_text(json.dumps(body))
    with pytest.raises(RecordError, match=said):
        rankwise.plan(path, energy=0.9)


def test_train_takes_the_plan(rng: np.random.Generator, tmp_path: Path) -> None:
    from rankwise.tuning.options import Options, settle

    path = tmp_path / "plan.json"
    path.write_text(rankwise.plan(random_spectra(rng), rank=2, scaling="rslora", learning_rate=1e-3).to_json())
    settled = settle(Options(plan=str(path)), "some/model")
    assert (settled.rank, settled.scaling, settled.learning_rate) == (2, "rslora", 1e-3)


REAL = ("gpt2-domain-legal", "gemma-medical", "law-llm")


@pytest.mark.parametrize("name", REAL)
def test_plans_of_real_adapters_beat_a_uniform_rank(samples: Path, name: str) -> None:
    record = rankwise.inspect(samples / "adapters" / name)
    made = rankwise.plan(record, budget="rank:2")
    assert made.uniform is not None
    assert made.uniform.relative_error == pytest.approx(
        error_of(record, {m.module: 2 for m in record.modules}), rel=1e-9
    )
    assert made.relative_error == pytest.approx(error_of(record, ranks(made)), rel=1e-9)
    assert made.relative_error < 0.999 * (made.uniform.relative_error or 0.0)
    assert made.params <= (made.budget or 0)
    assert made.optimality is not None
    assert made.optimality.exact


# --- every sentence is true ---------------------------------------------------------------------------------


def test_a_rank_past_every_side_is_said_and_read_as_a_whole_number(rng: np.random.Generator) -> None:
    made = rankwise.plan(random_spectra(rng), rank=1_000_000, lora_alpha=16.0)
    assert "rank 1000000 in every module, or the whole smaller side" in made.why
    assert made.reference_rank == 1_000_000
    assert made.scale == pytest.approx(16e-6)


def test_a_rank_that_all_have_has_no_remark(rng: np.random.Generator) -> None:
    assert "Asked for: rank 2 in every module." in rankwise.plan(random_spectra(rng), rank=2).why


def test_spaces_around_a_budget_do_not_change_what_an_alpha_means(rng: np.random.Generator) -> None:
    record = random_spectra(rng)
    plain, spaced = (rankwise.plan(record, budget=b, lora_alpha=16.0) for b in ("rank:3", " rank:3 "))
    assert (spaced.reference_rank, spaced.why) == (3, plain.why)


def test_a_share_near_one_is_not_written_as_one(rng: np.random.Generator) -> None:
    assert "Asked for: 0.99999999 of the energy" in rankwise.plan(random_spectra(rng), energy=0.99999999).why


def test_every_point_of_the_curve_is_a_rank_that_the_options_allow() -> None:
    record = spectra(module(Q, range(1, 15), (20, 20)), module(UP, range(1, 21), (20, 40)))
    made = rankwise.plan(record, budget="rank:6", multiple_of=4, max_rank=10)
    assert {point.r for point in made.curve} == {4, 8}
    free = rankwise.plan(record, budget="rank:6", multiple_of=8)
    assert {point.r for point in free.curve} <= {8, 16, 20}


def test_an_error_that_is_not_known_is_said_in_a_sentence() -> None:
    why = rankwise.plan(cut_off(), rank=6).why
    assert "a relative error that the values on file do not say." in why


def test_experts_that_share_a_rank_are_said_to() -> None:
    record = spectra(*(module(f"mlp.experts.down_proj[{i}]", [3 + i, 2, 1], (8, 8)) for i in range(3)))
    why = rankwise.plan(record, budget="rank:2").why
    assert "Ranks: one rank for all experts of a weight." in why
    assert "Every step between two ranks is an item" in why


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "spectra.json").touch()
    with pytest.raises(RecordError, match="is empty"):
        rankwise.plan(tmp_path / "spectra.json", rank=2)


def test_signal_with_multiples_says_that_more_is_taken() -> None:
    assert "and no other" in rankwise.plan(noisy(), signal=True).why
    more = rankwise.plan(noisy(), signal=True, multiple_of=3)
    assert any(m.r > (m.signal_rank or 0) for m in more.modules)
    assert "and those that the ranks allowed, or shared, add" in more.why


def test_every_module_within_its_signal_says_where_that_falls_short() -> None:
    """Of sigma^2 = 9, 4, 1 the edge leaves 13 of 14 of the energy: less than the 0.99 asked of every module."""
    record = spectra(
        module(Q, [3, 2, 1], (8, 8), signal_rank=2, noise_edge=1.5),
        module(UP, [3, 0.1], (8, 8), signal_rank=2, noise_edge=0.01),
    )
    made = rankwise.plan(record, energy=0.99, per_module=True, within_signal=True)
    said = next(f for f in made.findings if f.code == "signal-ends-first")
    assert said.level == "warning"
    assert f"In 1 module ({Q})" in said.text
    enough = rankwise.plan(record, energy=0.9, per_module=True, within_signal=True)
    assert "signal-ends-first" not in {f.code for f in enough.findings}


def test_unequal_ranks_of_a_full_fine_tune_come_with_a_word_on_what_they_minimise() -> None:
    full = spectra(module(Q, [3, 2, 1], (8, 8)), module(UP, [1.5, 0.1], (8, 8)))
    unequal = rankwise.plan(full, energy=0.9)
    assert len({m.r for m in unequal.modules}) == 2
    assert "error-is-not-loss" in {f.code for f in unequal.findings}
    assert "error-is-not-loss" not in {f.code for f in rankwise.plan(full, rank=2).findings}
    adapter = spectra(module(Q, [3, 2, 1], (8, 8)), module(UP, [1.5, 0.1], (8, 8)), kind="adapter")
    assert "error-is-not-loss" not in {f.code for f in rankwise.plan(adapter, energy=0.9).findings}


@pytest.mark.parametrize("options", [{"relative": True}, {"weights": {"q_proj": 1e-6}}], ids=str)
def test_an_error_that_was_not_minimised_is_no_sign_against_a_plan(
    rng: np.random.Generator, options: dict[str, Any]
) -> None:
    record = random_spectra(rng)
    made = rankwise.plan(record, budget="rank:2", **options)
    assert "uniform-as-good" not in {f.code for f in made.findings}
    assert "without the weights w" in made.why
    assert "without the weights w" not in rankwise.plan(record, budget="rank:2").why


def test_an_update_too_small_for_squares_is_left_out_by_name() -> None:
    record = spectra(module(Q, [3, 2], (8, 8)), module(UP, [1e-170], (8, 8)))
    made = rankwise.plan(record, budget="rank:1", relative=True)
    assert [(item.module, item.reason[:25]) for item in made.left_out] == [(UP, "beside the largest update")]


def test_a_module_that_stands_twice_is_refused() -> None:
    with pytest.raises(RecordError, match="names a module twice"):
        rankwise.plan(spectra(module(Q, [3, 2], (8, 8)), module(Q, [1], (8, 8))), rank=1)


# --- refusals -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], type[RankwiseError], str]] = {
    "no choice": ({}, UsageError, "got none of them"),
    "two choices": ({"rank": 4, "energy": 0.9}, UsageError, "got --energy and --rank"),
    "share": ({"energy": 1.5}, UsageError, r"--energy is a share in \(0, 1\]"),
    "not a number": ({"energy": math.nan}, UsageError, "--energy"),
    "error": ({"relative_error": 1.0}, UsageError, "--relative-error"),
    "rank": ({"rank": 0}, UsageError, "--rank must be 1 or more"),
    "budget words": ({"budget": "lots"}, UsageError, "or rank:16; got 'lots'"),
    "budget of nothing": ({"budget": 0}, UsageError, "--budget"),
    "budget of a share": ({"budget": "1.0000001k"}, UsageError, "--budget"),
    "budget too small": ({"budget": 5}, OutOfReachError, "buys no rank .* the cheapest step costs 10"),
    "least ranks": ({"budget": 30, "min_rank": 2}, OutOfReachError, "more than the budget of 30"),
    "cap": ({"energy": 0.999, "max_rank": 1}, OutOfReachError, "0.999 of the energy cannot be reached .* --max-rank 1"),
    "cap of each": ({"energy": 0.999, "max_rank": 1, "per_module": True}, OutOfReachError, "ends at 1"),
    "cap below least": ({"budget": 99, "min_rank": 4, "max_rank": 2}, UsageError, "--max-rank 2 is below --min-rank 4"),
    "cap below step": ({"budget": 99, "multiple_of": 8, "max_rank": 2}, UsageError, "below --multiple-of 8"),
    "no multiple between": (
        {"budget": 99, "multiple_of": 8, "min_rank": 9, "max_rank": 10},
        UsageError,
        "no multiple of 8 lies between --min-rank 9 and --max-rank 10",
    ),
    "budget too small for a group": (
        {"budget": 5, "fuse": True, "modules": "[qkv]_proj"},
        OutOfReachError,
        "the cheapest step costs 32",
    ),
    "error of everything": ({"relative_error": 0.9999999999}, OutOfReachError, "is reached without a rank"),
    "nothing to do": ({"rank": 2, "fuse": True}, UsageError, "--fuse would change nothing under --rank"),
    "weights alone": ({"signal": True, "relative": True}, UsageError, "--relative would change nothing under --signal"),
    "per module budget": ({"budget": 99, "per_module": True}, UsageError, "--per-module would change nothing"),
    "no noise edge": ({"signal": True}, UsageError, "--signal needs the noise edge"),
    "no noise edge within": (
        {"energy": 0.5, "within_signal": True},
        UsageError,
        "--within-signal needs the noise edge",
    ),
    "runtime": ({"rank": 2, "serve": "nothing"}, UsageError, "no runtime is called 'nothing'"),
    "rule": ({"rank": 2, "scaling": "rs"}, UsageError, "--scaling: there is no 'rs'"),
    "scale": ({"rank": 2, "scale": 0.0}, UsageError, "--scale must be a finite number above 0"),
    "two scales": ({"rank": 2, "scale": 1.0, "lora_alpha": 2.0}, UsageError, "give one"),
    "reference": ({"rank": 2, "reference_rank": 8}, UsageError, "--reference-rank is the rank at which"),
    "learning rate": ({"rank": 2, "learning_rate": math.inf}, UsageError, "--learning-rate"),
    "pattern": ({"budget": 99, "weights": {"[": 1.0}}, UsageError, "no regular expression"),
    "pattern of nothing": ({"budget": 99, "weights": {"none": 1.0}}, UsageError, "'none' is found in none"),
    "weight": ({"budget": 99, "weights": {"proj": -1.0}}, UsageError, "a number from 1e-12 to 1e"),
    "weight past float64": ({"budget": 99, "weights": {"q_proj": 1e308}}, UsageError, "a number from 1e-12 to 1e"),
    "weight of nothing": ({"budget": 99, "weights": {"q_proj": 1e-300}}, UsageError, "a number from 1e-12 to 1e"),
    "weight of words": ({"budget": 99, "weights": {"proj": "2"}}, UsageError, "a number from 1e-12 to 1e"),
    "weights file": ({"budget": 99, "weights": "none.json"}, ConfigError, "cannot be read"),
    "modules": ({"rank": 2, "modules": "("}, UsageError, "--modules"),
    "no modules": ({"rank": 2, "modules": "none"}, NothingToMeasureError, "no module is left to plan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_words(rng: np.random.Generator, name: str) -> None:
    options, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        rankwise.plan(random_spectra(rng), **options)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [("96", 96), (96, 96), ("1k", 1000), ("0.5K", 500), ("1_000", 1000), ("1,000", 1000), ("1.005M", 1_005_000)],
)
def test_budgets_are_read_as_they_are_written(rng: np.random.Generator, budget: str | int, expected: int) -> None:
    assert rankwise.plan(random_spectra(rng), budget=budget).budget == expected


def test_a_plan_of_dense_weights_is_the_error_of_truncated_matrices(rng: np.random.Generator) -> None:
    """Planted matrices, truncated by numpy at the planned ranks: the plan's error is theirs."""
    dense = {Q: planted(rng, (12, 12), [5, 3, 1, 0.5]), UP: planted(rng, (30, 12), [4, 3, 2, 1, 0.2])}
    record = spectra(*(module(n, np.linalg.svd(m, compute_uv=False), m.shape) for n, m in dense.items()))
    made = rankwise.plan(record, relative_error=0.3)
    left = 0.0
    for name, matrix in dense.items():
        u, s, v = np.linalg.svd(matrix)
        r = ranks(made)[name]
        left += float(np.sum((matrix - (u[:, :r] * s[:r]) @ v[:r]) ** 2))
    total = sum(float(np.sum(m**2)) for m in dense.values())
    assert made.relative_error == pytest.approx(math.sqrt(left / total), rel=1e-9)
    assert made.relative_error <= 0.3
