"""Pairing two checkpoints and subtracting them, on checkpoints held in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from rankwise.checkpoints.model import Checkpoint, TensorInfo
from rankwise.deltas import (
    Delta,
    Pairing,
    align_names,
    module_of,
    modules_in,
    pair_checkpoints,
    read_deltas,
    selection,
)
from rankwise.errors import ShapeMismatchError, TensorError, UsageError
from rankwise.records import Finding

Array = NDArray[Any]

SPELLINGS = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "int64": "I64",
    "bool": "BOOL",
}

BF16 = ml_dtypes.bfloat16


class Held(Checkpoint):
    """A checkpoint of arrays in memory that counts what is read."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.source, self.config = "held", None
        self.findings: Sequence[Finding] = ()
        self.reads: list[str] = []
        self._arrays = dict(arrays)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: self.info(name) for name in self._arrays}

    def names(self) -> list[str]:
        return list(self._arrays)

    def info(self, name: str) -> TensorInfo:
        array = self._arrays[name]
        return TensorInfo(name, tuple(array.shape), SPELLINGS[str(array.dtype)], "held.safetensors")

    def read(self, name: str) -> Array:
        self.reads.append(name)
        return self._arrays[name]

    def close(self) -> None:
        pass


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape, dtype=dtype)


def pair(
    base: Mapping[str, Array],
    tuned: Mapping[str, Array],
    include: str | None = None,
    exclude: str | None = None,
) -> Pairing:
    return pair_checkpoints(Held(base), Held(tuned), selection(include, exclude))


def only_delta(base: Array, tuned: Array, name: str = "q.weight") -> Delta:
    before, after = Held({name: base}), Held({name: tuned})
    (found,) = pair_checkpoints(before, after, selection(None, None)).pairs
    (delta,) = read_deltas(before, after, found, selection(None, None))
    return delta


# --- names --------------------------------------------------------------------------------------------------


def test_modules_are_tensor_names_without_weight() -> None:
    assert module_of("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj"
    assert module_of("model.layers.0.mlp.experts.gate_up_proj") == "model.layers.0.mlp.experts.gate_up_proj"
    assert module_of("weight.weight") == "weight"


@pytest.mark.parametrize(
    ("base", "tuned", "wanted"),
    [
        (["a.w", "b.w"], ["a.w", "b.w"], {"a.w": "a.w", "b.w": "b.w"}),
        (["h.0.w", "ln.w"], ["t.h.0.w", "t.ln.w", "head.w"], {"t.h.0.w": "h.0.w", "t.ln.w": "ln.w"}),
        (["t.h.0.w", "t.ln.w", "head.w"], ["h.0.w", "ln.w"], {"h.0.w": "t.h.0.w", "ln.w": "t.ln.w"}),
        (
            ["model.l.0.w", "model.l.1.w", "head.w"],
            ["model.text.l.0.w", "model.text.l.1.w", "vision.l.0.w", "head.w"],
            {"model.text.l.0.w": "model.l.0.w", "model.text.l.1.w": "model.l.1.w", "head.w": "head.w"},
        ),
        (["a.w"], ["b.w"], {}),
        ([], ["b.w"], {}),
        ([], [], {}),
        # two of four agree as they stand: no prefix is tried
        (["m.a", "b", "c", "d"], ["m.a", "b", "m.c", "m.d"], {"m.a": "m.a", "b": "b"}),
    ],
)
def test_names_align_with_one_prefix_missing_on_either_side(
    base: list[str], tuned: list[str], wanted: dict[str, str]
) -> None:
    assert align_names(base, tuned) == wanted


def test_pairs_carry_the_tuned_name_as_module_and_read_both_names() -> None:
    before = Held({"h.0.q.weight": ones(2, 3)})
    after = Held({"model.h.0.q.weight": 2 * ones(2, 3)})
    (found,) = pair_checkpoints(before, after, selection(None, None)).pairs
    assert (found.module, found.base_name, found.tuned_name) == (
        "model.h.0.q",
        "h.0.q.weight",
        "model.h.0.q.weight",
    )
    assert (before.reads, after.reads) == ([], []), "pairing reads headers alone"
    list(read_deltas(before, after, found, selection(None, None)))
    assert (before.reads, after.reads) == (["h.0.q.weight"], ["model.h.0.q.weight"])


def test_tensors_of_one_side_alone_are_counted() -> None:
    found = pair(
        {"q.weight": ones(2, 2), "old.weight": ones(2, 2)},
        {"q.weight": ones(2, 2), "new.weight": ones(2, 2), "newer.weight": ones(2, 2)},
    ).findings
    assert [(f.code, f.level) for f in found] == [("tensors-missing", "warning")]
    assert found[0].text == (
        "1 tensors are in the base alone (old.weight); "
        "2 tensors are in the tuned checkpoint alone (new.weight, newer.weight)."
    )


@pytest.mark.parametrize("side", ["base", "tuned checkpoint"])
def test_tied_embeddings_are_no_missing_tensors(side: str) -> None:
    less = {"embed_tokens.weight": ones(4, 2), "q.weight": ones(2, 2)}
    more = less | {"lm_head.weight": ones(4, 2)}
    found = pair(more, less) if side == "base" else pair(less, more)
    assert [(f.code, f.level) for f in found.findings] == [("tied-embeddings", "info")]
    assert f"lm_head.weight is stored in the {side} alone" in found.findings[0].text
    assert [p.module for p in found.pairs] == ["embed_tokens", "q"]


# --- shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "transformer.wte", "shared"])
def test_resized_vocabularies_are_left_out_and_said(name: str) -> None:
    found = pair(
        {f"{name}.weight": ones(4, 2), "q.weight": ones(2, 2)},
        {f"{name}.weight": ones(6, 2), "q.weight": ones(2, 2)},
    )
    assert [p.module for p in found.pairs] == ["q"]
    assert [(s.module, s.reason) for s in found.skipped] == [(name, "resized from (4, 2) to (6, 2)")]
    assert [(f.code, f.level) for f in found.findings] == [("resized-embeddings", "warning")]
    assert f"{name} (4, 2) -> (6, 2)" in found.findings[0].text


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("model.embed_tokens", (4, 2), (4, 3)),  # another width is another model
        ("layers.0.q_proj", (4, 2), (6, 2)),
        ("layers.0.q_proj", (4, 2), (2, 4)),
        ("layers.0.q_proj", (4, 2), (8,)),  # flattened, as sharded optimizers store it
        ("layers.0.q_proj", (4,), (4, 2)),
        ("conv", (4, 2, 3), (4, 6)),
    ],
)
def test_other_shapes_are_refused_with_both(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatchError) as caught:
        pair({f"{name}.weight": ones(*before)}, {f"{name}.weight": ones(*after)})
    assert f"{name} has shape {before} in the base and {after} in the update" in str(caught.value)
    assert "--skip" in str(caught.value)
    assert pair({f"{name}.weight": ones(*before)}, {f"{name}.weight": ones(*after)}, exclude=name).pairs == ()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_emptied_weights_are_refused_and_not_skipped(shape: tuple[int, ...], side: str) -> None:
    """ZeRO-3 without gathering leaves shape (0,), which must not pass as a 1-D norm."""
    whole, empty = {"q.weight": ones(4, 4)}, {"q.weight": ones(*shape)}
    with pytest.raises(TensorError, match=r"which holds no entries.*ZeRO-3"):
        pair(*((empty, whole) if side == "base" else (whole, empty)))


def test_more_than_four_dimensions_are_refused() -> None:
    with pytest.raises(TensorError, match=r"q\.weight in held\.safetensors has 5 dimensions"):
        pair({"q.weight": ones(1, 1, 1, 1, 2)}, {"q.weight": ones(1, 1, 1, 1, 2)})
    assert pair({"q.weight": ones(1, 1, 1, 1, 2)}, {"q.weight": ones(1, 1, 1, 1, 2)}, exclude="q").pairs == ()


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("norm.weight", ones(4), "1-D (norm, bias or scalar)"),
        ("scale", np.ones((), np.float32), "0-D (norm, bias or scalar)"),
        ("q.bias", ones(4), "1-D (norm, bias or scalar)"),
        ("h.0.attn.bias", ones(1, 1, 8, 8), "a bias or a mask"),  # GPT-2's causal mask, as float
        ("h.0.attn.bias", np.ones((1, 1, 8, 8), np.bool_), "BOOL is no floating-point dtype"),
        ("h.0.attn.masked_bias", np.ones((), np.float32), "0-D"),
        ("embeddings.position_ids", np.ones((1, 8), np.int64), "I64 is no floating-point dtype"),
        ("q.weight", np.ones((4, 4), np.uint8), "U8 is no floating-point dtype"),
    ],
)
def test_what_has_no_delta_is_skipped_with_its_reason(name: str, array: Array, words: str) -> None:
    found = pair({name: array, "k.weight": ones(2, 2)}, {name: array, "k.weight": ones(2, 2)})
    assert [p.module for p in found.pairs] == ["k"]
    ((module, reason),) = ((s.module, s.reason) for s in found.skipped)
    assert module == module_of(name)
    assert words in reason


def test_a_quantised_side_is_skipped_whichever_it_is() -> None:
    quantised, whole = {"q.weight": np.ones((4, 4), np.int8)}, {"q.weight": ones(4, 4)}
    for found in (pair(quantised, whole), pair(whole, quantised)):
        assert found.pairs == ()
        assert "I8 is no floating-point dtype" in found.skipped[0].reason


# --- what is wanted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        (None, None, ["l.0.q", "l.0.v", "l.10.q"]),
        ("q", None, ["l.0.q", "l.10.q"]),
        (r"l\.0\.", None, ["l.0.q", "l.0.v"]),
        (None, "q$", ["l.0.v"]),
        ("l", "l", []),
        ("^q", None, []),
    ],
)
def test_modules_and_skip_are_searched_in_the_path(include: str | None, exclude: str | None, wanted: list[str]) -> None:
    arrays = {f"{name}.weight": ones(2, 2) for name in ("l.0.q", "l.0.v", "l.10.q")}
    found = pair(arrays, arrays, include, exclude)
    assert [p.module for p in found.pairs] == wanted
    assert found.skipped == (), "what was not asked for is no finding"


def test_what_is_not_wanted_is_not_checked() -> None:
    arrays, other = (
        {"q.weight": ones(2, 2), "x.weight": ones(2, 2)},
        {"q.weight": ones(2, 2), "x.weight": ones(3, 3)},
    )
    assert [p.module for p in pair(arrays, other, include="q").pairs] == ["q"]


@pytest.mark.parametrize("text", ["(", "[a", "*", "(?P<n", "a{2,1}"])
def test_bad_expressions_are_refused_with_their_flag(text: str) -> None:
    with pytest.raises(UsageError, match=r"--modules .* is no regular expression: "):
        selection(text, None)
    with pytest.raises(UsageError, match=r"--skip .* is no regular expression: "):
        selection(None, text)


# --- turning into matrices ----------------------------------------------------------------------------------


def test_experts_are_split_and_numbered(rng: np.random.Generator) -> None:
    base = rng.standard_normal((3, 4, 5)).astype(np.float32)
    step = rng.standard_normal((3, 4, 5)).astype(np.float32)
    step[1] = 0
    before, after = Held({"mlp.experts.up": base}), Held({"mlp.experts.up": base + step})
    (found,) = pair_checkpoints(before, after, selection(None, None)).pairs
    assert modules_in(found, selection(None, None)) == [f"mlp.experts.up[{i}]" for i in range(3)]
    made = list(read_deltas(before, after, found, selection(None, None)))
    assert [d.module for d in made] == ["mlp.experts.up[0]", "mlp.experts.up[1]", "mlp.experts.up[2]"]
    assert [d.unchanged for d in made] == [False, True, False]
    for index, delta in enumerate(made):
        np.testing.assert_array_equal(delta.subtract(), (base + step)[index] - base[index])


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [(r"\[1\]", None, [1]), (None, r"\[1\]", [0, 2]), ("experts", None, [0, 1, 2]), ("q_proj", None, [])],
)
def test_single_experts_can_be_chosen(include: str | None, exclude: str | None, left: list[int]) -> None:
    """The path of an expert ends in its index, for checkpoints as for adapters."""
    arrays = {"mlp.experts.up": np.ones((3, 4, 5), np.float32)}
    before, after, wanted = Held(arrays), Held(arrays), selection(include, exclude)
    made = [
        d.module for p in pair_checkpoints(before, after, wanted).pairs for d in read_deltas(before, after, p, wanted)
    ]
    assert made == [f"mlp.experts.up[{i}]" for i in left]


def test_block_quantised_weights_are_left_out_with_their_scales() -> None:
    """An F8 weight is a weight only after its scale has been multiplied in."""
    arrays = {
        "q.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn),
        "q.weight_scale_inv": np.ones((2, 2), np.float32),
        "v.weight": np.ones((4, 4), np.float32),
    }
    found = pair(arrays, arrays)
    assert [p.module for p in found.pairs] == ["v"]
    assert {s.module: "scale" in s.reason for s in found.skipped} == {"q": True, "q.weight_scale_inv": True}


def test_a_quantised_base_of_a_plain_checkpoint_is_skipped_too() -> None:
    """The scale is in the base alone: without it the difference is of no meaning."""
    plain = {"q.weight": np.ones((4, 4), np.float32)}
    base = {
        "q.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn),
        "q.weight_scale_inv": np.ones((1, 1), np.float32),
    }
    for before, after in ((base, plain), (plain, base)):
        found = pair(before, after)
        assert found.pairs == ()
        assert ["block-quantised" in s.reason for s in found.skipped] == [True]


def test_missing_tensors_are_named_only_where_they_were_asked_for() -> None:
    base, tuned = {"q.weight": ones(2, 2), "x.weight": ones(2, 2)}, {"q.weight": ones(2, 2)}
    found = pair_checkpoints(Held(base), Held(tuned), selection("q", None))
    assert found.findings == ()
    found = pair_checkpoints(Held(base), Held(tuned), selection(None, None))
    assert [f.code for f in found.findings] == ["tensors-missing"]


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 2, 5)])
def test_convolutions_are_flattened_to_out_by_the_rest(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    base, tuned = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    delta = only_delta(base, tuned, "conv1.weight")
    np.testing.assert_array_equal(delta.subtract(), (tuned - base).reshape(4, -1))
    found = pair({"conv1.weight": base}, {"conv1.weight": tuned}).pairs[0]
    assert modules_in(found, selection(None, None)) == ["conv1"]
    assert delta.base.shape == (4, math.prod(shape[1:]))


def test_conv1d_weights_of_gpt2_are_turned(rng: np.random.Generator) -> None:
    """(in, out) as stored; only with c_attn of shape (n, 3n) beside them, which marks GPT-2's Conv1D."""
    shapes = {"c_attn": (4, 12), "c_proj": (4, 4), "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}
    base = {f"h.0.attn.{k}.weight".replace("attn.mlp", "mlp"): rng.standard_normal(s) for k, s in shapes.items()}
    base["wte.weight"] = rng.standard_normal((9, 4))
    tuned = {name: array + rng.standard_normal(array.shape) for name, array in base.items()}
    before, after = Held(base), Held(tuned)
    found = pair_checkpoints(before, after, selection(None, None)).pairs
    assert {p.module: p.transposed for p in found} == {
        "h.0.attn.c_attn": True,
        "h.0.attn.c_proj": True,
        "h.0.mlp.c_fc": True,
        "h.0.mlp.c_proj": True,
        "wte": False,
    }
    for p in found:
        (delta,) = read_deltas(before, after, p, selection(None, None))
        step = (tuned[p.tuned_name] - base[p.base_name]).astype(np.float32)
        np.testing.assert_array_equal(delta.subtract(), step.T if p.transposed else step)
        assert modules_in(p, selection(None, None)) == [p.module]


def test_linear_weights_of_the_same_names_are_not_turned() -> None:
    """GPT-BigCode calls its Linear weights c_attn and c_proj too: (out, in) already."""
    arrays = {"h.0.attn.c_attn.weight": ones(12, 4), "h.0.attn.c_proj.weight": ones(4, 4)}
    assert [p.transposed for p in pair(arrays, arrays).pairs] == [False, False]


# --- equal bit by bit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, np.float64, ml_dtypes.float8_e4m3fn])
def test_equal_bits_are_unchanged_in_every_dtype(rng: np.random.Generator, dtype: Any) -> None:
    base = rng.standard_normal((5, 7)).astype(dtype)
    assert only_delta(base, base.copy()).unchanged
    tuned = base.copy()
    tuned[4, 6] = -tuned[4, 6]
    assert not only_delta(base, tuned).unchanged


def test_zero_and_minus_zero_differ_and_nan_equals_itself() -> None:
    zero = np.zeros((2, 2), np.float32)
    assert not only_delta(zero, -zero).unchanged
    assert not only_delta(zero, -zero).subtract().any()
    nan = np.full((2, 2), np.nan, np.float32)
    assert only_delta(nan, nan.copy()).unchanged


def test_equal_numbers_in_two_dtypes_are_not_equal_bits() -> None:
    delta = only_delta(ones(2, 2, dtype=BF16), ones(2, 2))
    assert not delta.unchanged
    assert not delta.subtract().any()


# --- subtraction --------------------------------------------------------------------------------------------

DTYPES = [np.float16, BF16, np.float32, np.float64, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("after", DTYPES)
@pytest.mark.parametrize("before", DTYPES)
def test_subtraction_against_float64(rng: np.random.Generator, before: Any, after: Any) -> None:
    base, tuned = rng.standard_normal((30, 20)).astype(before), rng.standard_normal((30, 20)).astype(after)
    delta = only_delta(base, tuned)
    assert delta.base.dtype == before
    assert delta.tuned.dtype == after
    found = delta.subtract()
    assert found.dtype == np.float32
    # one rounding to float32 of a difference of exact numbers: half a unit, 2**-24 relative
    exact = tuned.astype(np.float64) - base.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=2**-24, atol=0)


def test_small_steps_of_float64_checkpoints_survive() -> None:
    """1e-9 on 1.0 is below float32's unit: casting before subtracting would make it zero."""
    base = ones(3, 3, dtype=np.float64)
    np.testing.assert_allclose(only_delta(base, base + 1e-9).subtract(), 1e-9, rtol=1e-6)


def test_blocks_leave_no_row_out(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    from rankwise import linalg

    monkeypatch.setattr(linalg, "BLOCK_ENTRIES", 50)
    base, tuned = (rng.standard_normal((37, 11)).astype(np.float32) for _ in range(2))
    np.testing.assert_array_equal(only_delta(base, tuned).subtract(), tuned - base)


def test_what_is_not_finite_stays_so_without_a_warning() -> None:
    big = np.full((2, 2), 3e38, np.float32)
    assert np.isposinf(only_delta(-big, big).subtract()).all()
    assert np.isposinf(only_delta(ones(2, 2, dtype=np.float64), np.full((2, 2), 1e300)).subtract()).all()
    inf = np.full((2, 2), np.inf, np.float32)
    assert np.isnan(Delta("q", inf, inf, False).subtract()).all()
