"""`convert` against readers that know nothing of rankwise: the same update, or the error that the record states."""

import math
import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
from adapter_making import PREFIX, SHAPES, peft_adapter
from adapter_reading import bare, config_of, delta, gap, peft, peft_scale, tensors

import rankwise
from rankwise import convert
from rankwise.errors import (
    OutputError,
    OutputExistsError,
    RankwiseError,
    TensorError,
    UnsupportedAdapterError,
    UsageError,
)
from rankwise.records import ConversionRecord, PlannedModule, PlanRecord, from_json

Q0, UP, Q1 = SHAPES
MIXED = {Q0: 4, UP: 16}
RUNTIMES = ("peft", "vllm", "sglang", "llama.cpp", "ollama")


def same_bits(old, new):
    """Tell whether two triples are one update in float32: factors equal, and scales equal in float32."""
    (a, b, s), (a2, b2, s2) = old, bare(new)
    return np.array_equal(a, a2) and np.array_equal(b, b2) and np.float32(s) == np.float32(s2)


def check_stated(record, before, after):
    """The record's errors are the errors, measured on dense products."""
    for module in record.modules:
        measured = gap(before[module.module], after[module.module])
        # dense products of rank <= 24 in float64 carry 1e-15; exact ones only differ by the order of their sums
        assert module.relative_error == pytest.approx(measured, rel=1e-6, abs=3e-15)
        if module.exact:
            assert measured <= 1e-15
        assert module.norm == pytest.approx(np.linalg.norm(delta(before[module.module])), rel=1e-9)


def test_a_plain_copy_has_the_same_tensors_and_config(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks=MIXED, lora_dropout=0.1)
    record = convert(source, tmp_path / "b")
    old, new = tensors(source / "adapter_model.safetensors"), tensors(tmp_path / "b" / "adapter_model.safetensors")
    assert list(old) == list(new)
    assert all(np.array_equal(old[name], new[name]) for name in old)
    assert record.exact
    assert record.relative_error == 0
    changed = {k: v for k, v in config_of(tmp_path / "b").items() if config_of(source).get(k) != v}
    own = {"init_lora_weights", "inference_mode", "bias"}  # what LoraConfig has as its defaults, or means for loading
    assert changed.keys() <= own | {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}
    assert peft(source).keys() == peft(tmp_path / "b").keys()
    assert all(
        same_bits(old, new) for old, new in zip(peft(source).values(), peft(tmp_path / "b").values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("rules", [("lora", "rslora"), ("rslora", "lora"), ("lora", "lora")])
@pytest.mark.parametrize("ranks", [None, MIXED])
def test_another_rule_is_the_same_function_with_untouched_factors(tmp_path, rng, dtype, rules, ranks) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks=ranks, dtype=dtype, use_rslora=rules[0] == "rslora", lora_alpha=11)
    record = convert(source, tmp_path / "b", scaling=rules[1])
    before, after = peft(source), peft(tmp_path / "b")
    assert record.exact
    assert config_of(tmp_path / "b")["use_rslora"] == (rules[1] == "rslora")
    assert all(same_bits(before[m], after[m]) for m in SHAPES)
    stored = tensors(tmp_path / "b" / "adapter_model.safetensors")
    assert all(t.dtype == dtype for t in stored.values())


@pytest.mark.parametrize("alpha", [16, 22.5, 11])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [None, MIXED, {Q0: 3, UP: 24}])
def test_a_baked_adapter_is_right_in_every_runtime(tmp_path, rng, alpha, rslora, ranks) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks=ranks, lora_alpha=alpha, use_rslora=rslora)
    record = convert(source, tmp_path / "b", bake=True)
    config = config_of(tmp_path / "b")
    assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] in (8, 16, 32)  # what vLLM's cap can be set to
    before = peft(source)
    for runtime in RUNTIMES:
        after = peft(tmp_path / "b", runtime)
        for module in record.modules:
            assert after[module.module][0].shape[0] == config["r"]
            assert gap(before[module.module], after[module.module]) <= module.relative_error + 3e-15
    check_stated(record, before, peft(tmp_path / "b"))
    powers = all(math.frexp(m.before.scaling)[0] == 0.5 for m in record.modules)
    assert record.exact == powers  # 2 and 4 fold to the bit, 22.5 / 8 does not
    assert record.relative_error < 1e-7  # one rounding to float32
    assert all(served.right for served in record.runtimes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_folding_costs_in_16_bits_is_stated_and_float32_avoids_it(tmp_path, rng, dtype) -> None:
    source = peft_adapter(tmp_path / "a", rng, dtype=dtype, lora_alpha=11)
    before = peft(source)
    short = convert(source, tmp_path / "b", bake=True)
    check_stated(short, before, peft(tmp_path / "b"))
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert eps / 10 < short.relative_error < eps  # rounding to nearest: about 0.3 of a step
    assert any("--dtype float32" in note for note in short.notes)
    wide = convert(source, tmp_path / "c", bake=True, dtype="float32")
    check_stated(wide, before, peft(tmp_path / "c"))
    assert wide.relative_error < 1e-7


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_cut_is_optimal_before_the_cast_and_stated_after_it(tmp_path, rng, dtype, rank, rslora) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks=MIXED, dtype=dtype, use_rslora=rslora)
    record = convert(source, tmp_path / "b", rank=rank)
    before, after = peft(source), peft(tmp_path / "b")
    check_stated(record, before, after)
    for module in record.modules:
        sigma = np.linalg.svd(delta(before[module.module]), compute_uv=False)
        best = np.linalg.norm(sigma[rank:]) / np.linalg.norm(sigma)
        assert module.error_before_cast == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert module.relative_error <= best * (1 + 1e-4) + float(ml_dtypes.finfo(dtype).eps)
        assert module.after.r == after[module.module][0].shape[0] == rank
        assert module.exact == (rank >= module.before.r)
        assert module.after.scaling == pytest.approx(module.before.scaling, rel=1e-15)


def test_whole_errors_are_the_root_of_summed_squares(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks=MIXED)
    record = convert(source, tmp_path / "b", rank=2)
    before, after = peft(source), peft(tmp_path / "b")
    wrong = sum(np.linalg.norm(delta(before[m]) - delta(after[m])) ** 2 for m in before)
    whole = sum(np.linalg.norm(delta(t)) ** 2 for t in before.values())
    assert record.relative_error == pytest.approx(math.sqrt(wrong / whole), rel=1e-6)
    assert record.params == sum(2 * (out + inner) for out, inner in SHAPES.values())


@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize(("criterion", "value"), [("energy", 0.9), ("relative_error", 0.2), ("energy", 1.0)])
def test_ranks_by_energy_hold_what_was_asked_for(tmp_path, rng, criterion, value, bake) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks=MIXED)
    record = convert(source, tmp_path / "b", bake=bake, **{criterion: value})
    wanted = math.sqrt(1 - value) if criterion == "energy" else value
    for module in record.modules:
        assert module.error_before_cast <= wanted + 1e-9
        sigma = np.linalg.svd(delta(peft(source)[module.module]), compute_uv=False)[: module.before.r]
        one_less = np.linalg.norm(sigma[module.rank - 1 :]) / np.linalg.norm(sigma)
        assert one_less > wanted or value == 1.0  # no smaller rank would do
    check_stated(record, peft(source), peft(tmp_path / "b"))
    assert len({m.after.r for m in record.modules}) == 1 or not bake


def plan_file(path, ranks, left_out=()):
    modules = tuple(
        PlannedModule(module=m, shape=SHAPES.get(m, (1, 1)), r=r, lora_alpha=99.0, scaling=99.0, kept_energy_share=None)
        for m, r in ranks.items()
    )
    record = PlanRecord(
        format=PlanRecord.FORMAT,
        rankwise="0",
        created="",
        command=(),
        device="cpu",
        seed=None,
        rule="lora",
        modules=modules,
        params=0,
        budget=None,
        relative_error=None,
        learning_rate=None,
        why="",
    )
    path.write_text(record.to_json())
    return path


def test_a_plan_gives_ranks_and_never_more_than_there_are(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    record = convert(source, tmp_path / "b", plan=plan_file(tmp_path / "plan.json", {Q0: 2, UP: 64}))
    assert {m.module: m.after.r for m in record.modules} == {Q0: 2, UP: 8, Q1: 8}
    assert any("64 above 8" in note for note in record.notes)
    assert any("not in the plan" in note for note in record.notes)
    check_stated(record, peft(source), peft(tmp_path / "b"))


def test_a_plan_that_leaves_a_module_out_costs_what_it_held(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    record = convert(source, tmp_path / "b", plan=plan_file(tmp_path / "plan.json", {Q0: 0}))
    assert [left.module for left in record.left_out] == [Q0]
    before = peft(source)
    share = np.linalg.norm(delta(before[Q0])) / math.sqrt(sum(np.linalg.norm(delta(t)) ** 2 for t in before.values()))
    assert record.relative_error == pytest.approx(share, rel=1e-9)
    assert not record.exact
    config = config_of(tmp_path / "b")
    assert sorted(config["target_modules"]) == sorted([UP, Q1])  # `q_proj` would bring the module back


def test_a_plan_for_another_model_is_refused(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    with pytest.raises(UsageError, match="another model"):
        convert(source, tmp_path / "b", plan=plan_file(tmp_path / "plan.json", {"h.0.attn": 2}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "plan.json"]


@pytest.mark.parametrize("way", [{"lora_alpha": 4.0}, {"lora_alpha": 3.0}, {"alpha_equals_r": True}])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_an_alpha_of_ones_own_is_made_up_for_in_b(tmp_path, rng, way, scaling) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks={Q0: 4})
    record = convert(source, tmp_path / "b", scaling=scaling, **way)
    for module in record.modules:
        assert module.after.lora_alpha == way.get("lora_alpha", module.after.r)
    check_stated(record, peft(source), peft(tmp_path / "b"))
    for module in record.modules:
        ratio = module.before.scaling / module.after.scaling
        assert module.exact == (math.frexp(ratio)[0] == 0.5)


CASES = {
    "rslora": {"use_rslora": True},
    "mixed": {"ranks": MIXED},
    "mixed and alphas": {"ranks": MIXED, "alpha_pattern": {"up_proj": 48}},
    "odd alpha": {"lora_alpha": 11.5},
    "plain": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llama.cpp", "ollama", "peft"])
def test_what_is_made_for_a_runtime_is_read_right_by_it(tmp_path, rng, runtime, case) -> None:
    source = peft_adapter(tmp_path / "a", rng, **CASES[case])
    record = convert(source, tmp_path / "b", runtime=runtime)
    before, after = peft(source), peft(tmp_path / "b", runtime)
    for module in record.modules:
        assert (
            gap(before[module.module], after[module.module])
            <= module.relative_error + 1e-7 * (not module.exact) + 3e-15
        )
        assert module.relative_error < 1e-7
    check_stated(record, before, peft(tmp_path / "b"))  # and PEFT reads the same
    assert any(note.startswith(f"For {runtime}") for note in record.notes)
    if case == "plain":
        assert record.exact
        assert "nothing had to change" in " ".join(record.notes)


def test_a_runtime_that_needs_a_change_is_told_why_with_a_thread(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, use_rslora=True)
    record = convert(source, tmp_path / "b", runtime="sglang")
    (note,) = [n for n in record.notes if n.startswith("For sglang")]
    assert "ignores use_rslora" in note
    assert "https://github.com/sgl-project/sglang/issues/40835" in note
    assert record.exact  # alphas alone had to change


def test_mixed_ranks_without_padding_are_named_where_they_go_wrong(tmp_path, rng) -> None:
    record = convert(peft_adapter(tmp_path / "a", rng, ranks=MIXED), tmp_path / "b")
    wrong = {s.runtime: s for s in record.runtimes if not s.right}
    for runtime in ("vllm", "sglang"):
        applied = peft(tmp_path / "b", runtime)
        ratios = [applied[m][2] / t[2] for m, t in peft(tmp_path / "b").items()]
        assert (wrong[runtime].lowest, wrong[runtime].highest) == pytest.approx((min(ratios), max(ratios)))
    assert "llama.cpp" not in wrong  # one alpha over each rank is what it does
    assert any("--bake" in note for note in record.notes)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0), (1.0, -0.3), (0.7, 0.3)])
def test_a_sum_of_adapters_is_the_sum_of_their_updates(tmp_path, rng, weights) -> None:
    first = peft_adapter(tmp_path / "a", rng, ranks=MIXED)
    only = dict(SHAPES) | {"model.layers.9.mlp.down_proj": (6, 7)}
    second = peft_adapter(tmp_path / "b", rng, r=5, lora_alpha=7, use_rslora=True, shapes=only)
    record = convert(first, tmp_path / "c", weight=weights[0], add=[(second, weights[1])])
    made, one, two = peft(tmp_path / "c"), peft(first), peft(second)
    assert set(made) == set(only)
    for module, triple in made.items():
        wanted = weights[1] * delta(two[module])
        if module in one:
            wanted = wanted + weights[0] * delta(one[module])
        stated = next(m for m in record.modules if m.module == module)
        assert np.linalg.norm(delta(triple) - wanted) <= (stated.relative_error + 1e-14) * np.linalg.norm(wanted) * 1.01
        assert stated.relative_error < 2e-7
    assert [(a.weight) for a in record.adapters] == list(weights)


def test_a_sum_is_cut_as_well_as_its_svd(tmp_path, rng) -> None:
    first, second = peft_adapter(tmp_path / "a", rng), peft_adapter(tmp_path / "b", rng, lora_alpha=4)
    record = convert(first, tmp_path / "c", add=[(second, 0.5)], rank=6)
    for module in record.modules:
        whole = delta(peft(first)[module.module]) + 0.5 * delta(peft(second)[module.module])
        sigma = np.linalg.svd(whole, compute_uv=False)
        assert module.error_before_cast == pytest.approx(np.linalg.norm(sigma[6:]) / np.linalg.norm(sigma), rel=1e-9)
        got = np.linalg.norm(delta(peft(tmp_path / "c")[module.module]) - whole) / np.linalg.norm(whole)
        assert module.relative_error == pytest.approx(got, rel=1e-6)


def test_adapters_of_different_bases_are_summed_with_a_warning_and_of_different_shapes_not(tmp_path, rng) -> None:
    first = peft_adapter(tmp_path / "a", rng)
    second = peft_adapter(tmp_path / "b", rng, base_model_name_or_path="other/base")
    assert any("different base models" in n for n in convert(first, tmp_path / "c", add=[(second, 1.0)]).notes)
    third = peft_adapter(tmp_path / "d", rng, shapes={Q0: (24, 21)})
    with pytest.raises(UsageError, match="not for one base"):
        convert(first, tmp_path / "e", add=[(third, 1.0)])
    assert not (tmp_path / "e").exists()


def dora(rng):
    return {f"{PREFIX}{m}.lora_magnitude_vector": rng.random(out).astype(np.float32) for m, (out, _) in SHAPES.items()}


@pytest.mark.parametrize("way", [{"scaling": "rslora"}, {"bake": True}, {"rank": 12}, {"lora_alpha": 2.0}])
def test_dora_is_carried_where_the_function_stays(tmp_path, rng, way) -> None:
    extra = dora(rng)
    source = peft_adapter(tmp_path / "a", rng, use_dora=True, extra=extra)
    record = convert(source, tmp_path / "b", **way)
    assert record.exact
    made = tensors(tmp_path / "b" / "adapter_model.safetensors")
    assert all(np.array_equal(made[name], value) for name, value in extra.items())
    assert config_of(tmp_path / "b")["use_dora"] is True
    assert any(n.startswith("DoRA") for n in record.notes)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ({"rank": 4}, "cannot be told without the base"),
        ({"energy": 0.5}, "cannot be told without the base"),
        ({"format": "kohya"}, "another shape and meaning"),
        ({"runtime": "vllm"}, "vllm does not load DoRA"),
        ({"runtime": "llama.cpp", "drop_others": True}, "llama.cpp does not load DoRA"),
    ],
)
def test_dora_is_refused_in_words_where_it_would_not_stay(tmp_path, rng, way, words) -> None:
    source = peft_adapter(tmp_path / "a", rng, use_dora=True, extra=dora(rng))
    with pytest.raises(UnsupportedAdapterError, match=words):
        convert(source, tmp_path / "b", **way)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def whole(rng):
    return {
        f"{PREFIX}lm_head.weight": rng.random((7, 5)).astype(np.float32),
        f"{PREFIX}model.norm.weight": rng.random(5).astype(ml_dtypes.bfloat16),
    }


def test_whole_weights_are_carried(tmp_path, rng) -> None:
    extra = whole(rng)
    source = peft_adapter(tmp_path / "a", rng, extra=extra, modules_to_save=["lm_head", "norm"])
    record = convert(source, tmp_path / "b", rank=4, bake=True)
    made = tensors(tmp_path / "b" / "adapter_model.safetensors")
    assert all(np.array_equal(made[name], value) for name, value in extra.items())
    assert config_of(tmp_path / "b")["modules_to_save"] == ["lm_head", "norm"]
    assert set(record.carried) == set(extra)


@pytest.mark.parametrize("way", [{"runtime": "vllm"}, {"runtime": "llama.cpp"}, {"format": "mlx"}, {"add": True}])
def test_whole_weights_are_refused_by_name_or_dropped_knowingly(tmp_path, rng, way) -> None:
    source = peft_adapter(tmp_path / "a", rng, extra=whole(rng), modules_to_save=["lm_head", "norm"])
    if "add" in way:
        way = {"add": [(peft_adapter(tmp_path / "second", rng), 1.0)]}
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head.*--drop-others"):
        convert(source, tmp_path / "b", **way)
    assert not (tmp_path / "b").exists()
    record = convert(source, tmp_path / "b", drop_others=True, **way)
    assert {left.module for left in record.left_out} == set(whole(rng))
    assert not config_of(tmp_path / "b").get("modules_to_save")


def test_embedding_tables_are_converted_and_dropped_only_on_request(tmp_path, rng) -> None:
    extra = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": rng.standard_normal((8, 30)).astype(np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": rng.standard_normal((12, 8)).astype(np.float32),
    }
    source = peft_adapter(tmp_path / "a", rng, extra=extra, target_modules=["q_proj", "up_proj", "embed_tokens"])
    record = convert(source, tmp_path / "b", rank=5)
    assert {m.module: m.kind for m in record.modules}["model.embed_tokens"] == "embedding"
    check_stated(record, peft(source), peft(tmp_path / "b"))
    with pytest.raises(UnsupportedAdapterError, match="does not load factors of embedding tables"):
        convert(source, tmp_path / "c", runtime="tensorrt-llm")
    record = convert(source, tmp_path / "c", runtime="tensorrt-llm", drop_others=True)
    assert [left.module for left in record.left_out] == ["model.embed_tokens"]
    assert "model.embed_tokens" not in config_of(tmp_path / "c")["target_modules"]


def test_convolutions_keep_their_kernels(tmp_path, rng) -> None:
    extra = {
        f"{PREFIX}conv.lora_A.weight": rng.standard_normal((8, 3, 5, 5)).astype(np.float32),
        f"{PREFIX}conv.lora_B.weight": rng.standard_normal((6, 8, 1, 1)).astype(np.float32),
    }
    source = peft_adapter(tmp_path / "a", rng, extra=extra)
    record = convert(source, tmp_path / "b", rank=3)
    made = tensors(tmp_path / "b" / "adapter_model.safetensors")
    assert made[f"{PREFIX}conv.lora_A.weight"].shape == (3, 3, 5, 5)
    assert made[f"{PREFIX}conv.lora_B.weight"].shape == (6, 3, 1, 1)
    check_stated(record, peft(source), peft(tmp_path / "b"))


def test_grouped_convolutions_keep_their_rank(tmp_path, rng) -> None:
    extra = {
        f"{PREFIX}conv.lora_A.weight": rng.standard_normal((8, 4, 3, 3)).astype(np.float32),
        f"{PREFIX}conv.lora_B.weight": rng.standard_normal((6, 4, 1, 1)).astype(np.float32),
    }
    source = peft_adapter(tmp_path / "a", rng, extra=extra)
    convert(source, tmp_path / "b", scaling="rslora", lora_alpha=8.0)
    made = tensors(tmp_path / "b" / "adapter_model.safetensors")
    factor = 2 / (8 / math.sqrt(8))
    assert made[f"{PREFIX}conv.lora_B.weight"] == pytest.approx(extra[f"{PREFIX}conv.lora_B.weight"] * factor, rel=1e-6)
    with pytest.raises(UnsupportedAdapterError, match="in groups"):
        convert(source, tmp_path / "c", rank=4)


def experts(folder, rng, *, r=3, count=4, out=10, inner=8, **config):
    """down_proj innermost by PEFT's order of wrapping: gate_up_proj is declared first, so it is nested deepest."""
    path = f"{PREFIX}model.layers.0.mlp.experts"
    shapes = {f"{path}.base_layer": (2 * out, inner), path: (inner, out)}
    held = {}
    for name, (rows, columns) in shapes.items():
        held[f"{name}.lora_A.weight"] = rng.standard_normal((r * count, columns)).astype(np.float32)
        held[f"{name}.lora_B.weight"] = rng.standard_normal((rows, r * count)).astype(np.float32)
    return peft_adapter(
        folder,
        rng,
        r=r,
        extra=held,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        **config,
    )


def expert_deltas(folder, count=4):
    """ParamWrapper.get_delta_weight: A (experts, r, in), B (out, r, experts)."""
    held, config = tensors(folder / "adapter_model.safetensors"), config_of(folder)
    found = {}
    for nested, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
        path = f"model.layers.0.mlp.experts{nested}"
        a = held[f"{PREFIX}{path}.lora_A.weight"].astype(np.float64)
        b = held[f"{PREFIX}{path}.lora_B.weight"].astype(np.float64)
        a, b = a.reshape(count, -1, a.shape[1]), b.reshape(b.shape[0], -1, count)
        name = f"model.layers.0.mlp.experts.{parameter}"
        scale = peft_scale(config, name, a.shape[1])
        for i in range(count):
            found[f"{name}[{i}]"] = (a[i], b[:, :, i], scale)
    return found


@pytest.mark.parametrize("way", [{}, {"rank": 2}, {"rank": 5}, {"bake": True}, {"scaling": "rslora"}, {"energy": 0.8}])
def test_experts_are_converted_in_their_stacks(tmp_path, rng, way) -> None:
    source = experts(tmp_path / "a", rng)
    record = convert(source, tmp_path / "b", **way)
    before, after = expert_deltas(source), expert_deltas(tmp_path / "b")
    stated = {m.module: m for m in record.modules if m.kind == "expert"}
    assert set(stated) == set(before)
    for name, module in stated.items():
        assert module.relative_error == pytest.approx(gap(before[name], after[name]), rel=1e-6, abs=3e-15)
    if not way:
        assert record.exact
    assert config_of(tmp_path / "b")["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_experts_have_no_place_in_other_formats(tmp_path, rng) -> None:
    for form in ("kohya", "diffusers", "mlx"):
        with pytest.raises(UsageError, match=r"experts|no layer"):
            convert(experts(tmp_path / form, rng), tmp_path / f"{form}.out", format=form)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_starts_that_change_the_base_are_refused_by_name(tmp_path, rng, init) -> None:
    source = peft_adapter(tmp_path / "a", rng, init_lora_weights=init)
    with pytest.raises(UnsupportedAdapterError, match=init):
        convert(source, tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("config", "extra", "words"),
    [
        ({"peft_type": "ADALORA"}, {}, "ADALORA"),
        ({"lora_bias": True}, {}, "bias on B"),
        ({}, {"lora_E": np.ones((8, 1), np.float32)}, "AdaLoRA"),
    ],
)
def test_kinds_that_are_not_b_a_are_refused_by_name(tmp_path, rng, config, extra, words) -> None:
    held = {f"{PREFIX}{Q0}.{name}": value for name, value in extra.items()}
    with pytest.raises(UnsupportedAdapterError, match=words):
        convert(peft_adapter(tmp_path / "a", rng, extra=held, **config), tmp_path / "b")


def test_an_adapter_without_its_config_is_refused(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    (source / "adapter_config.json").unlink()
    with pytest.raises(UnsupportedAdapterError, match="not known"):
        convert(source, tmp_path / "b")


def test_broken_numbers_are_refused(tmp_path, rng) -> None:
    bad = {f"{PREFIX}h.c.lora_A.weight": np.full((8, 3), np.nan, np.float32)}
    bad[f"{PREFIX}h.c.lora_B.weight"] = np.ones((3, 8), np.float32)
    with pytest.raises(TensorError, match="NaN"):
        convert(peft_adapter(tmp_path / "a", rng, extra=bad), tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_what_does_not_fit_a_dtype_is_refused(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, lora_alpha=4e6)
    with pytest.raises(TensorError, match=r"does not fit into F16.*--dtype"):
        convert(source, tmp_path / "b", bake=True, dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ({"rank": 4, "energy": 0.5}, "--rank and --energy"),
        ({"rank": 0}, "--rank must be"),
        ({"energy": 1.5}, "--energy must be"),
        ({"relative_error": 1.0}, "--relative-error must be"),
        ({"signal": True}, "no such noise"),
        ({"bake": True, "lora_alpha": 2.0}, "--lora-alpha and --bake"),
        ({"bake": True, "scaling": "rslora"}, "goes against --bake"),
        ({"runtime": "vllm", "alpha_equals_r": True}, "--alpha-equals-r and --for"),
        ({"scaling": "nonsense"}, "unknown scaling rule"),
        ({"scaling": "unscaled"}, "cannot say the rule unscaled"),
        ({"lora_alpha": -1.0}, "--lora-alpha must be"),
        ({"format": "gguf"}, "unknown format"),
        ({"runtime": "comfyui", "format": "mlx"}, "does not read the mlx format"),
        ({"dtype": "int4"}, "unknown dtype"),
        ({"weight": math.inf}, "finite"),
    ],
)
def test_bad_wishes_get_one_message_and_no_file(tmp_path, rng, way, words) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    with pytest.raises(RankwiseError, match=words):
        convert(source, tmp_path / "b", **way)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_the_source_is_never_overwritten(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    for out in (source, source / "." / ".." / "a"):
        with pytest.raises(UsageError, match="the adapter itself"):
            convert(source, out, force=True)


def test_out_that_is_taken_is_kept_without_force(tmp_path, rng) -> None:
    source, other = peft_adapter(tmp_path / "a", rng), peft_adapter(tmp_path / "b", rng)
    before = (other / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputExistsError):
        convert(source, other)
    assert (other / "adapter_model.safetensors").read_bytes() == before
    convert(source, other, force=True)
    assert all(same_bits(a, b) for a, b in zip(peft(source).values(), peft(other).values(), strict=True))
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="more than an adapter"):
        convert(source, other, force=True)
    assert (other / "thesis.tex").read_text() == "years of work"


def test_the_record_stands_in_the_folder_and_reads_back(tmp_path, rng) -> None:
    record = convert(peft_adapter(tmp_path / "a", rng), tmp_path / "b", rank=4)
    text = (tmp_path / "b" / "conversion.json").read_text()
    assert from_json(text, ConversionRecord) == record
    assert record.choice == "rank 4"
    assert "relative error" in repr(record)
    assert rankwise.read_record(tmp_path / "b" / "conversion.json", ConversionRecord) == record


def test_converting_back_and_forth_returns_the_same_file(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, lora_alpha=11)
    convert(source, tmp_path / "b", scaling="rslora")
    convert(tmp_path / "b", tmp_path / "c", scaling="lora")
    assert config_of(tmp_path / "c")["lora_alpha"] == 11
    assert (tmp_path / "c" / "adapter_model.safetensors").read_bytes() == (
        (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    )


KILLED = textwrap.dedent(
    """
    import os, sys
    from rankwise.adapters import staging
    count, at = 0, int(sys.argv[3])
    def kill(name):
        real = getattr(staging, name)
        def call(*arguments, **keywords):
            global count
            count += 1
            if count == at:
                os.kill(os.getpid(), 9)
            return real(*arguments, **keywords)
        setattr(staging, name, call)
    for name in ("write_part", "join_parts", "_write"):
        kill(name)
    from rankwise import convert
    convert(sys.argv[1], sys.argv[2], rank=3, bake=True)
    """
)


@pytest.mark.parametrize("at", [2, 3, 5, 6, 7])
def test_killed_anywhere_nothing_loads_as_whole_and_it_goes_on(tmp_path, rng, at) -> None:
    """Calls that write: job, three modules, the joined file, two texts."""
    source = peft_adapter(tmp_path / "a", rng)
    script = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "b"), str(at)]
    assert subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode == -9
    assert not (tmp_path / "b").exists()
    convert(source, tmp_path / "b", rank=3, bake=True)
    convert(source, tmp_path / "c", rank=3, bake=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_resumed_conversion_does_not_do_the_work_again(tmp_path, rng, monkeypatch) -> None:
    from rankwise.adapters import conversion_job

    source = peft_adapter(tmp_path / "a", rng)
    real, done = conversion_job.rewrite, []

    def stop_after_two(joined, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(joined.unit.name)
        return real(joined, *rest)

    monkeypatch.setattr(conversion_job, "rewrite", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", rank=3)
    monkeypatch.setattr(
        conversion_job, "rewrite", lambda joined, *rest: done.append(joined.unit.name) or real(joined, *rest)
    )
    record = convert(source, tmp_path / "b", rank=3)
    assert sorted(done) == sorted(SHAPES)  # each once
    check_stated(record, peft(source), peft(tmp_path / "b"))


def test_other_options_do_not_go_on_with_old_parts(tmp_path, rng, monkeypatch) -> None:
    from rankwise.adapters import conversion_job

    source = peft_adapter(tmp_path / "a", rng)
    monkeypatch.setattr(conversion_job.Job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", rank=3)
    monkeypatch.undo()
    record = convert(source, tmp_path / "b", rank=2)
    assert {m.after.r for m in record.modules} == {2}
    check_stated(record, peft(source), peft(tmp_path / "b"))


@pytest.mark.parametrize("adapter", ["deltacompression-poc", "fmi-chatbot", "gemma-medical", "gpt2-domain-legal",
                                     "gpt2-tigrinya-v1", "gradience-tiny-lora", "law-llm"])  # fmt: skip
def test_real_adapters_keep_their_function(samples, tmp_path, adapter) -> None:
    source = samples / "adapters" / adapter
    r = config_of(source)["r"]
    for name, way in {"bake": {"bake": True}, "half": {"rank": max(1, r // 2)}, "rule": {"scaling": "rslora"}}.items():
        record = convert(source, tmp_path / name, **way)
        before, after = peft(source), peft(tmp_path / name)
        assert set(before) == set(after)
        if adapter == "gemma-medical":  # saved out of a model that was wrapped twice
            before, after = ({k.removeprefix(PREFIX): v for k, v in d.items()} for d in (before, after))
        # dense products are slow for wide layers: five modules, spread over the model
        for module in list(record.modules)[:: max(1, len(record.modules) // 5)]:
            measured = gap(before[module.module], after[module.module])
            assert module.relative_error == pytest.approx(measured, rel=1e-5, abs=1e-14)
        if name == "rule":
            assert record.exact
        if name == "bake":
            assert record.relative_error < 1e-7 or any(m.dtype != "F32" for m in record.modules)


def test_another_plan_of_the_same_size_does_not_go_on_with_old_parts(tmp_path, rng, monkeypatch) -> None:
    """A plan's repr says only how many modules and parameters it has."""
    from rankwise.adapters import conversion_job

    source = peft_adapter(tmp_path / "a", rng)
    monkeypatch.setattr(conversion_job.Job, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", plan=plan_file(tmp_path / "plan.json", {Q0: 2, UP: 3, Q1: 4}))
    monkeypatch.undo()
    record = convert(source, tmp_path / "b", plan=plan_file(tmp_path / "plan.json", {Q0: 4, UP: 3, Q1: 2}))
    assert {m.module: m.after.r for m in record.modules} == {Q0: 4, UP: 3, Q1: 2}


def test_a_full_disk_says_where_the_work_is_kept(tmp_path, rng, monkeypatch) -> None:
    from rankwise.adapters import staging

    source = peft_adapter(tmp_path / "a", rng)
    real, calls = staging.write_part, []

    def full_at_two(path, held, facts):
        calls.append(path)
        if len(calls) == 2:
            raise OutputError("the folder cannot be written to: No space left on device.")
        real(path, held, facts)

    monkeypatch.setattr(staging, "write_part", full_at_two)
    with pytest.raises(OutputError, match=r"No space left.*kept in .*\.b\.partial: the same command goes on"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    monkeypatch.undo()
    assert convert(source, tmp_path / "b").exact
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_call_from_python_is_spelled_as_the_command(tmp_path, rng) -> None:
    source, other = peft_adapter(tmp_path / "a", rng), peft_adapter(tmp_path / "b", rng)
    record = convert(source, tmp_path / "c", rank=3, bake=True, add=[(other, 0.5)], dtype="float32")
    words = ("--rank", "3", "--bake", "--dtype", "float32", "--add", f"{other}=0.5")
    assert record.command == ("rankwise", "convert", str(source), str(tmp_path / "c"), *words)


def test_a_factor_of_few_bits_goes_into_wider_numbers_without_loss(tmp_path, rng) -> None:
    """11 / 8 has 4 bits and bfloat16 8: their product fits into float32's 24."""
    source = peft_adapter(tmp_path / "a", rng, lora_alpha=11, dtype=ml_dtypes.bfloat16)
    record = convert(source, tmp_path / "b", bake=True, dtype="float32")
    assert record.relative_error == 0
    assert not record.exact  # the numbers in B are 11/8 of the old, so float32 rounds their products in another way
    assert not any("rounding" in note for note in record.notes)
    before, after = peft(source), peft(tmp_path / "b")
    assert all(gap(before[m], after[m]) < 1e-15 for m in SHAPES)
