"""`convert` at the edges of numbers: updates of zero, alphas past every float, factors that a dtype loses."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from adapter_making import PREFIX, SHAPES, factors, peft_adapter
from adapter_reading import config_of, delta, gap, peft, tensors

from rankwise import convert
from rankwise.adapters.resizing import decompose, norm_of
from rankwise.adapters.rewriting import _same
from rankwise.errors import TensorError, UnsupportedAdapterError, UsageError


def untrained(folder, rng):
    """An adapter before its training: B = 0."""
    extra = {}
    for module, (out, inner) in SHAPES.items():
        a, b = factors(rng, out, inner, 8)
        extra |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": 0 * b}
    return peft_adapter(folder, rng, extra=extra)


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("r", [1, 8, 32])
def test_an_update_minus_itself_has_no_singular_values(rng, r, weight) -> None:
    a, b = factors(rng, 60, 50, r)
    a2, b2 = np.concatenate([a, a]), np.concatenate([weight * b.astype(float), -weight * b.astype(float)], axis=1)
    assert not decompose(a2, b2).sigma.any()
    assert norm_of(a2, b2) == 0


def test_what_is_small_but_no_rounding_keeps_its_values(rng) -> None:
    """1e-10 of the larger: five orders above the rounding of float64."""
    left, right = (np.linalg.qr(rng.standard_normal((n, 2)))[0] for n in (30, 20))
    core = decompose(right.T, left * [1.0, 1e-10])
    np.testing.assert_allclose(core.sigma, [1.0, 1e-10], rtol=1e-5)


@pytest.mark.parametrize("way", [{}, {"rank": 4}, {"bake": True}, {"dtype": "bfloat16"}])
def test_an_adapter_minus_itself_is_zero_and_said_to_be(tmp_path, rng, way) -> None:
    source = peft_adapter(tmp_path / "a", rng)
    record = convert(source, tmp_path / "b", add=[(source, -1.0)], **way)
    assert record.exact
    assert record.relative_error == 0
    assert all(m.norm == 0 for m in record.modules)
    assert any("3 of 3 modules is zero" in note for note in record.notes)
    assert all(np.abs(delta(t)).max() < 1e-12 for t in peft(tmp_path / "b").values())  # sums of order 1 to 100


@pytest.mark.parametrize("choice", [{"energy": 0.9}, {"relative_error": 0.1}])
@pytest.mark.parametrize("way", [{}, {"format": "mlx"}, {"runtime": "vllm"}, {"bake": True}])
def test_ranks_by_the_spectrum_of_nothing_are_refused(tmp_path, rng, choice, way) -> None:
    source = untrained(tmp_path / "a", rng)
    with pytest.raises(UsageError, match="every module got rank 0"):
        convert(source, tmp_path / "b", **choice, **way)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_a_start_stays_one_that_can_be_trained(tmp_path, rng) -> None:
    """With A = 0 and B = 0 no gradient ever comes; the rows of A that are kept are the source's own."""
    source = untrained(tmp_path / "a", rng)
    record = convert(source, tmp_path / "b", rank=4)
    assert record.exact
    before, after = peft(source), peft(tmp_path / "b")
    for module in SHAPES:
        np.testing.assert_array_equal(after[module][0], before[module][0][:4])


@pytest.mark.parametrize("way", [{}, {"rank": 4}, {"scaling": "rslora"}, {"bake": True, "dtype": "float64"}])
def test_an_alpha_past_the_square_root_of_the_largest_float(tmp_path, rng, way) -> None:
    """Squared norms would be infinite, norms are not."""
    record = convert(peft_adapter(tmp_path / "a", rng, lora_alpha=1e300), tmp_path / "b", **way)
    assert 1e299 < max(m.norm for m in record.modules) < 1e303
    assert 0.1 < record.relative_error < 1 if "rank" in way else record.relative_error < 1e-15


@pytest.mark.parametrize("way", [{}, {"rank": 4}])
def test_an_update_past_the_largest_float_is_refused_without_a_warning(tmp_path, rng, way) -> None:
    source = peft_adapter(tmp_path / "a", rng, lora_alpha=1.7e308)  # a scale of 2e307, times a norm of 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TensorError, match="too large for the largest float"):
            convert(source, tmp_path / "b", **way)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("alpha", [1e39, 1e-60])
def test_an_alpha_that_kohya_cannot_keep_is_named(tmp_path, rng, alpha) -> None:
    source = peft_adapter(tmp_path / "a", rng, lora_alpha=alpha)
    with pytest.raises(UsageError, match=r"q_proj|up_proj.*alpha of .* does not fit into float32"):
        convert(source, tmp_path / "b", format="kohya")


@pytest.mark.parametrize(("alpha", "dtype", "words", "wider"), [
    (1e300, "float32", "does not fit into F32", r"\(--dtype float64\)"),
    (1e-30, "float16", "no entry is large enough for F16", "--dtype bfloat16 or --dtype float32"),
])  # fmt: skip
def test_a_dtype_that_loses_a_factor_is_refused_with_one_that_does_not(tmp_path, rng, alpha, dtype, words, wider):
    source = peft_adapter(tmp_path / "a", rng, lora_alpha=alpha)
    with pytest.raises(TensorError, match=f"{words}.*{wider}"):
        convert(source, tmp_path / "b", bake=True, dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_exact_means_the_same_bits_in_float32(rng) -> None:
    """Three folded into B gives the same numbers s * B, and other roundings of B @ A."""
    a, b = (f.astype(ml_dtypes.bfloat16).astype(np.float32) for f in factors(rng, 64, 48, 8))
    folded = (3 * b).astype(np.float32)
    assert np.array_equal(3.0 * b.astype(float), folded.astype(float))
    assert not np.array_equal(np.float32(3) * (b @ a), folded @ a)
    assert not _same(a, b, a, folded, 3.0, 1.0)
    assert np.array_equal(np.float32(4) * (b @ a), (4 * b) @ a)
    assert _same(a, b, a, 4 * b, 4.0, 1.0)


def test_scales_on_two_sides_of_a_rounding_are_not_the_same() -> None:
    """Their ratio rounds to 1 in float32, and they do not round to one number."""
    low, high = 1.5 + 2.0**-24 - 2.0**-26, 1.5 + 2.0**-24 + 2.0**-26
    assert np.float32(low / high) == 1
    assert np.float32(low) != np.float32(high)
    one = np.ones((1, 1), np.float32)
    assert not _same(one, one, one, one, low, high)


@pytest.mark.parametrize(("dtype", "way", "said", "unsaid"), [
    (np.float32, {"dtype": "bfloat16"}, "cannot hold what the factors were stored in", "power of two"),
    (np.float16, {"dtype": "bfloat16"}, "cannot hold what the factors were stored in", "power of two"),
    (ml_dtypes.bfloat16, {"bake": True}, "power of two cannot be folded without. --dtype float32", "asked for"),
    (np.float32, {"bake": True}, "power of two cannot be folded without.", "--dtype float32"),
])  # fmt: skip
def test_the_cause_of_a_rounding_is_the_one_that_is_named(tmp_path, rng, dtype, way, said, unsaid) -> None:
    source = peft_adapter(tmp_path / "a", rng, dtype=dtype, lora_alpha=11)
    (note,) = [n for n in convert(source, tmp_path / "b", **way).notes if "but for rounding" in n]
    assert said in note
    assert unsaid not in note


def test_a_cut_for_a_runtime_does_not_say_that_the_factors_stay(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, ranks={next(iter(SHAPES)): 4})
    record = convert(source, tmp_path / "b", runtime="vllm", energy=0.9)
    assert record.relative_error > 0.01
    assert not any("factors are as they were" in note for note in record.notes)


def test_a_rank_that_vllm_never_takes_is_said(tmp_path, rng) -> None:
    notes = convert(peft_adapter(tmp_path / "a", rng), tmp_path / "b", rank=600).notes
    assert any("vllm takes no rank above 512 (--max-lora-rank); this has 600" in note for note in notes)


@pytest.mark.parametrize("field", [{"alora_invocation_tokens": [1, 2]}, {"layer_replication": [[0, 2], [0, 2]]}])
def test_what_only_the_config_can_say_is_carried_or_refused(tmp_path, rng, field) -> None:
    source = peft_adapter(tmp_path / "a", rng, **field)
    convert(source, tmp_path / "same", rank=4)
    for way in ({"format": "kohya"}, {"format": "mlx"}, {"add": [(source, 1.0)]}):
        with pytest.raises(UnsupportedAdapterError, match=next(iter(field))):
            convert(source, tmp_path / "b", **way)


def test_what_a_runtime_does_not_load_is_said_with_the_source_that_was_read(tmp_path, rng) -> None:
    """A thread about scales is no evidence for it."""
    whole = {f"{PREFIX}lm_head.weight": np.ones((4, 20), np.float32)}
    source = peft_adapter(tmp_path / "a", rng, extra=whole, modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedAdapterError, match=r"vllm does not load them \(vllm/lora/peft_helper.py at"):
        convert(source, tmp_path / "b", runtime="vllm")
    record = convert(source, tmp_path / "c")
    assert any("copied as they are: 1 (" in note for note in record.notes)
    assert f"{PREFIX}lm_head.weight" in tensors(tmp_path / "c" / "adapter_model.safetensors")
    assert all(gap(peft(source)[m], peft(tmp_path / "c")[m]) == 0 for m in SHAPES)


def test_a_runtime_that_refuses_the_file_is_not_right_in_it(tmp_path, rng) -> None:
    """Ollama stops at alphas with decimals; vLLM takes no rank above 512."""
    record = convert(peft_adapter(tmp_path / "a", rng, lora_alpha=22.5), tmp_path / "b", rank=600)
    right = {s.runtime: s.right for s in record.runtimes}
    assert not any(s.wrong for s in record.runtimes)
    assert right == {"vllm": False, "sglang": True, "llama.cpp": True, "ollama": False, "tensorrt-llm": True}


def test_the_base_is_named_again_after_mlx(tmp_path, rng) -> None:
    convert(peft_adapter(tmp_path / "a", rng), tmp_path / "m", format="mlx")
    convert(tmp_path / "m", tmp_path / "b", format="peft")
    assert config_of(tmp_path / "b")["base_model_name_or_path"] == "some/base"
