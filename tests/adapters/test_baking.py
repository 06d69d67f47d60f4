"""Scales written as alphas or folded into B: exact where they can be, and right where it is claimed."""

import math

import ml_dtypes
import numpy as np
import pytest

from rankwise.adapters import baking
from rankwise.adapters.baking import Need, Written
from rankwise.checkpoints.model import as_float32
from rankwise.runtimes import RUNTIMES
from rankwise.scaling import scaling

RULES = ("lora", "rslora", "unscaled")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("wanted", [1.0, 2.0, 0.7, 1 / 3, math.sqrt(2), 1e-4, 45.25])
def test_the_alpha_found_gives_the_scale_in_float32(rule, wanted) -> None:
    for r in (1, 3, 8, 64, 100, 2048):
        got = scaling(rule, baking.exact_alpha(rule, wanted, r), r)
        assert baking.same_float32(got, wanted)
        assert got == pytest.approx(wanted, rel=3e-16)  # at most one unit in the last place of float64


@pytest.mark.parametrize("r", [4, 16, 64, 256])
def test_whole_alphas_are_preferred(r) -> None:
    assert baking.exact_alpha("rslora", 32 / math.sqrt(r), r) == 32.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("power", [-6, -1, 0, 1, 5])
def test_powers_of_two_fold_without_a_bit_lost(rng, dtype, power) -> None:
    b = rng.standard_normal((20, 6)).astype(dtype)
    made = baking.folded(as_float32(b), 2.0**power).astype(dtype)
    assert np.array_equal(made.astype(np.float64), b.astype(np.float64) * 2.0**power)


def test_a_power_of_two_that_underflows_is_taken_in_float64() -> None:
    b = np.array([[1e-40]], np.float32)
    assert baking.folded(b, 2.0**-20)[0, 0] == float(b[0, 0]) * 2.0**-20


def test_other_factors_are_rounded_once(rng) -> None:
    b = rng.standard_normal((20, 6)).astype(np.float32)
    made = baking.folded(b, 0.3).astype(np.float32)
    assert np.array_equal(made, (b.astype(np.float64) * 0.3).astype(np.float32))


def needs(*pairs, before=None):
    return [Need(r, s, before) for r, s in pairs]


MIXED = {
    "uniform lora": needs((8, 2.0), (8, 2.0), before=("lora", 16.0, 8)),
    "rslora": needs((16, 8.0), (16, 8.0), before=("rslora", 32.0, 16)),
    "mixed ranks, one scale": needs((8, 2.0), (64, 2.0)),
    "mixed ranks, one alpha": needs((8, 4.0), (64, 0.5)),
    "mixed scales": needs((16, 1.0), (16, 3.0)),
    "mixed all": needs((4, 1.0), (64, 3.0), (17, 0.3)),
    "odd alpha": needs((8, 22.627 / 8), (8, 22.627 / 8)),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_what_is_made_for_a_runtime_is_right_in_it(name, case) -> None:
    """Property over the whole table: the factor applied times what is folded is the factor meant."""
    row = RUNTIMES[name]
    rule = MIXED[case][0].before[0] if MIXED[case][0].before else "lora"
    way, written = baking.for_runtime(row, MIXED[case], 64, rule)
    stored = not row.reads_config
    if stored and way != "baked":
        pytest.skip("files that carry their alphas are not written this way")
    assert baking.right_in(row, written)
    assert all(n.r <= w.r for n, w in zip(MIXED[case], written, strict=True))


@pytest.mark.parametrize(
    ("name", "case", "way"),
    [
        ("peft", "mixed all", "kept"),
        ("vllm", "uniform lora", "kept"),
        ("vllm", "rslora", "kept"),
        ("sglang", "rslora", "lora"),
        ("llama.cpp", "rslora", "lora"),
        ("vllm", "mixed ranks, one scale", "padded"),
        ("llama.cpp", "mixed ranks, one scale", "padded"),
        ("llama.cpp", "mixed ranks, one alpha", "kept"),
        ("vllm", "mixed ranks, one alpha", "baked"),
        ("sglang", "mixed scales", "baked"),
        ("ollama", "odd alpha", "baked"),
        ("ollama", "uniform lora", "kept"),
    ],
)
def test_the_least_change_is_taken(name, case, way) -> None:
    rule = MIXED[case][0].before[0] if MIXED[case][0].before else "lora"
    assert baking.for_runtime(RUNTIMES[name], MIXED[case], 64, rule)[0] == way


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_a_baked_adapter_is_right_everywhere(name, case) -> None:
    row = RUNTIMES[name]
    written = baking.baked(MIXED[case], 64)
    assert all(w == Written(64, 64.0, 1.0, "lora") for w in written)
    assert baking.right_in(row, written, alpha_stored=not row.reads_config)


def test_mixed_ranks_are_never_right_in_vllm_and_llama_cpp_unless_filled() -> None:
    """The claim of the notes: no alphas for ranks 8 and 64 at one scale suit both."""
    for alphas in ((16.0, 128.0), (16.0, 16.0), (128.0, 128.0)):
        written = [Written.by_alpha("lora", a, r) for a, r in zip(alphas, (8, 64), strict=True)]
        wanted = [Written(w.r, w.lora_alpha, 2.0, "lora") for w in written]
        assert not (baking.right_in(RUNTIMES["vllm"], wanted) and baking.right_in(RUNTIMES["llama.cpp"], wanted))


def test_one_scale_keeps_the_most_frequent() -> None:
    written = baking.one_scale(needs((8, 2.0), (4, 2.0), (8, 3.0)), 8, "unscaled")
    assert {(w.r, w.scaling) for w in written} == {(8, 2.0)}


def test_served_names_the_factor_that_goes_wrong() -> None:
    written = [Written.by_alpha("rslora", 16.0, 16), Written.by_alpha("rslora", 32.0, 64)]
    (sglang,) = baking.served(written, {"sglang": False})
    assert not sglang.right
    assert sglang.lowest == pytest.approx(1 / 4)
    assert sglang.wrong == 2
