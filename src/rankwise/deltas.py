"""Pair two checkpoints weight by weight, and read one delta at a time.

In: an open base and an open tuned checkpoint. Out: the pairs that have a delta, what was left out and
why, and for each pair the two tensors and tuned - base as matrices of shape (out_features, in_features).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.checkpoints.model import Checkpoint, TensorInfo
from rankwise.errors import ShapeMismatchError, TensorError, UsageError
from rankwise.grids import row_blocks, widened
from rankwise.records import Finding, Skipped

Array = NDArray[Any]

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

PEAK_COPIES: Final = 3
"""Copies of a matrix in float32 that are in memory at one time."""

PEAK_GRAMS: Final = 2
"""Copies of its Gram matrix in float64."""

PEAK_REST: Final = 128 * 2**20
"""Bytes of the libraries and of what does not grow with the matrix."""

_VOCABULARY: Final = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings|embed_out|embed_in|shared)$")
_CONV1D: Final = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_SCALES: Final = ("_scale_inv", "_scale")
_EXPERT: Final = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Pair:
    """One weight that both checkpoints hold.

    Attributes:
        module: dotted path without `.weight`.
        base_name: the tensor's name in the base.
        tuned_name: the tensor's name in the tuned checkpoint.
        shape: as stored; more than two dimensions are flattened or split on reading.
        dtype: storage dtype in the tuned checkpoint.
        transposed: whether it is stored as (in_features, out_features), as Conv1D of GPT-2 does.
        experts: whether the first of three dimensions counts experts.
    """

    module: str
    base_name: str
    tuned_name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool
    experts: bool


@dataclass(frozen=True, slots=True)
class Pairing:
    """All pairs of two checkpoints, and what was left out."""

    pairs: tuple[Pair, ...]
    skipped: tuple[Skipped, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """One delta in memory.

    Attributes:
        module: dotted path; experts end in `[i]`.
        base: shape (out_features, in_features), storage dtype.
        tuned: shape (out_features, in_features), storage dtype.
        unchanged: whether the two are equal bit by bit, so that nothing was subtracted.
    """

    module: str
    base: Array
    tuned: Array
    unchanged: bool

    def subtract(self) -> Array:
        """Return tuned - base as float32, shape (out_features, in_features), a block of rows at a time."""
        difference = np.empty(self.base.shape, dtype=np.float32)
        wide = np.float64 if np.float64 in (self.base.dtype, self.tuned.dtype) else np.float32
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
            for rows in row_blocks(difference.shape):
                difference[rows] = widened(self.tuned[rows], wide) - widened(self.base[rows], wide)
        return difference


def module_of(tensor: str) -> str:
    """Return the dotted path of the weight that a tensor name stands for.

    >>> module_of("model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj'
    """
    return tensor.removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which modules are wanted: regular expressions, searched anywhere in the dotted path."""

    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    def wants(self, module: str) -> bool:
        """Whether the module is in, and not out."""
        if self.include is not None and not self.include.search(module):
            return False
        return self.exclude is None or not self.exclude.search(module)


def selection(include: str | None, exclude: str | None) -> Selection:
    """Compile `--modules` and `--skip`.

    Raises:
        UsageError: one of them is no regular expression.
    """
    compiled: list[re.Pattern[str] | None] = []
    for flag, text in (("--modules", include), ("--skip", exclude)):
        try:
            compiled.append(None if text is None else re.compile(text))
        except re.error as error:
            raise UsageError(f"{flag} {text!r} is no regular expression: {error}") from None
    return Selection(*compiled)


def align_names(base: Sequence[str], tuned: Sequence[str]) -> dict[str, str]:
    """Map tuned names to base names, allowing the two to differ by one prefix.

    A model saved without its head lacks the head's prefix ("h.0..." against "transformer.h.0..."), and one that
    was made part of another has a longer one ("model.layers..." against "model.language_model.layers...").

    >>> align_names(["h.0.w", "ln.w"], ["transformer.h.0.w", "transformer.ln.w", "lm_head.w"])
    {'transformer.h.0.w': 'h.0.w', 'transformer.ln.w': 'ln.w'}
    >>> align_names(["model.l.0.w", "lm_head.w"], ["model.text.l.0.w", "lm_head.w"])
    {'model.text.l.0.w': 'model.l.0.w', 'lm_head.w': 'lm_head.w'}
    """
    held = set(base)
    exact = {name: name for name in tuned if name in held}
    if 2 * len(exact) > min(len(base), len(tuned)):
        return exact
    votes = Counter(_prefixes(tuned, base))
    if not votes:
        return exact
    (old, new), _ = votes.most_common(1)[0]
    guess = {n: new + n.removeprefix(old) for n in tuned if n.startswith(old) and n not in exact}
    added = {n: b for n, b in guess.items() if b in held and b not in exact}
    return {n: exact.get(n) or added[n] for n in tuned if n in exact or n in added}


def _prefixes(tuned: Sequence[str], base: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (prefix in tuned, prefix in base) of every tuned name whose longest suffix is one base name's alone."""
    ends = Counter(end for name in base for end in _suffixes(name))
    owner = {end: name for name in base for end in _suffixes(name) if ends[end] == 1}
    for name in tuned:
        end = next((end for end in _suffixes(name) if end in owner), None)
        if end is not None and owner[end] != name:
            yield name.removesuffix(end), owner[end].removesuffix(end)


def _suffixes(name: str) -> list[str]:
    """Return the name and its dotted ends of two parts or more, longest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(max(1, len(parts) - 1))]


def _reason_to_skip(info: TensorInfo, names: Set[str]) -> str | None:
    """Return why a tensor of both checkpoints has no delta to decompose, or None."""
    if info.dtype.startswith("F8") and any(info.name + end in names for end in _SCALES):
        return f"{info.dtype} with a scale of its own: block-quantised, so dequantise both checkpoints first"
    if info.name.endswith(_SCALES) and info.name.removesuffix("_inv").removesuffix("_scale") in names:
        return "the scale of a quantised weight, not a weight"
    if info.dtype not in FLOATS:
        return f"{info.dtype} is no floating-point dtype: masks, positions and quantised weights have no delta"
    if len(info.shape) < 2:
        return f"{len(info.shape)}-D (norm, bias or scalar): no matrix to decompose"
    if info.name.endswith((".bias", "masked_bias", "_bias")):
        return "a bias or a mask, not a weight"
    return None


def _check(info: TensorInfo) -> None:
    """Refuse shapes that no weight has."""
    if 0 in info.shape:
        raise TensorError(
            f"{info.name} in {info.file} has the shape {info.shape}, which holds no entries. A checkpoint saved "
            "from ZeRO-3 without gathering its partitions looks like that: gather it and save again, "
            f"or leave it out with --skip '{re.escape(module_of(info.name))}'"
        )
    if len(info.shape) > 4:
        raise TensorError(
            f"{info.name} in {info.file} has {len(info.shape)} dimensions {info.shape}; a weight has 2, 3 "
            "(experts or a 1-D convolution) or 4 (a 2-D convolution). "
            f"Leave it out with --skip '{re.escape(module_of(info.name))}'"
        )


def _stores_conv1d(checkpoint: Checkpoint) -> bool:
    """Whether the model keeps GPT-2's transposed Conv1D weights: c_attn is then (n, 3 n)."""
    name = next((n for n in checkpoint.names() if n.endswith("attn.c_attn.weight")), None)
    shape = checkpoint.info(name).shape if name is not None else ()
    return len(shape) == 2 and shape[1] == 3 * shape[0]


def _list(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _missing(base: Sequence[str], tuned: Sequence[str], aligned: dict[str, str], wanted: Selection) -> list[Finding]:
    paired = set(aligned.values())
    only_base = [name for name in base if name not in paired and wanted.wants(module_of(name))]
    only_tuned = [name for name in tuned if name not in aligned and wanted.wants(module_of(name))]
    findings = []
    tied = [n for n in (*only_base, *only_tuned) if module_of(n).endswith(("lm_head", "embed_out"))]
    if tied:
        side = "base" if tied[0] in only_base else "tuned checkpoint"
        text = (
            f"{_list(tied)} is stored in the {side} alone: the other side ties it to its input embeddings "
            "(or has no head), so it was not compared."
        )
        findings.append(Finding(code="tied-embeddings", level="info", text=text))
    heads = set(tied)
    rest = [n for n in only_base if n not in heads], [n for n in only_tuned if n not in heads]
    if rest[0] or rest[1]:
        words = [
            f"{len(names)} tensors are in the {side} alone ({_list(names)})"
            for side, names in (("base", rest[0]), ("tuned checkpoint", rest[1]))
            if names
        ]
        few = 2 * len(aligned) < min(len(base), len(tuned))
        text = "; ".join(words) + "." + (" Most tensors have no partner: the names may belong to two models." * few)
        findings.append(Finding(code="tensors-missing", level="error" if few else "warning", text=text))
    return findings


def pair_checkpoints(base: Checkpoint, tuned: Checkpoint, wanted: Selection) -> Pairing:
    """Pair the weights of two checkpoints by name.

    Args:
        base: before fine-tuning.
        tuned: after it.
        wanted: which modules to take.

    Raises:
        ShapeMismatchError: a weight other than a vocabulary table differs in shape.
        TensorError: a weight is empty or has more than four dimensions.
    """
    base_names, tuned_names = base.names(), tuned.names()
    aligned = align_names(base_names, tuned_names)
    findings = _missing(base_names, tuned_names, aligned, wanted)
    held, held_before = set(tuned_names), set(base_names)
    pairs, skipped, resized, infos = [], [], [], []
    for tuned_name, base_name in aligned.items():
        module = module_of(tuned_name)
        if not (wanted.wants(module) or _EXPERT.search(module)):  # experts are told apart later
            continue
        info, before = tuned.info(tuned_name), base.info(base_name)
        if len(info.shape) != 3 and not wanted.wants(module):
            continue
        if min(len(info.shape), len(before.shape)) < 2 <= max(len(info.shape), len(before.shape)):
            _check(info)  # ZeRO-3 leaves weights of shape (0,)
            _check(before)
            raise ShapeMismatchError(module, before.shape, info.shape)
        reason = _reason_to_skip(info, held) or _reason_to_skip(before, held_before)
        if reason is not None:
            skipped.append(Skipped(module=module, reason=reason))
            continue
        _check(info)
        _check(before)
        if info.shape != before.shape:
            if not (_VOCABULARY.search(module) and info.shape[1:] == before.shape[1:]):
                raise ShapeMismatchError(module, before.shape, info.shape)
            resized.append(f"{module} {before.shape} -> {info.shape}")
            skipped.append(Skipped(module=module, reason=f"resized from {before.shape} to {info.shape}"))
            continue
        infos.append((module, base_name, info))
    if resized:
        text = f"The vocabulary was resized, so these were left out: {_list(resized)}."
        findings.append(Finding(code="resized-embeddings", level="warning", text=text))
    conv1d = _stores_conv1d(tuned)
    for module, base_name, info in infos:
        experts = len(info.shape) == 3 and bool(_EXPERT.search(module))
        if not experts and not wanted.wants(module):
            continue
        flipped = conv1d and len(info.shape) == 2 and bool(_CONV1D.search(module))
        pairs.append(Pair(module, base_name, info.name, info.shape, info.dtype, flipped, experts))
    return Pairing(tuple(pairs), tuple(skipped), tuple(findings))


def pair_memory(pair: Pair) -> int:
    """Return about how many bytes it takes to read one pair and take a spectrum or factors of its delta.

    Both tensors as stored; of one matrix the difference and the temporaries of the noise edge in float32, and the Gram
    matrix of its smaller side in float64 with its eigenvectors. A fifth or more above every peak that
    `lab/cluster_cost.py` measured: a worker that runs out of memory costs more than one that has some to spare.
    """
    matrix = pair.shape[1:] if pair.experts else (pair.shape[0], math.prod(pair.shape[1:]))
    stored = 2 * math.prod(pair.shape) * (int(re.sub(r"\D", "", pair.dtype.split("_")[0])) // 8)
    return stored + PEAK_COPIES * 4 * math.prod(matrix) + PEAK_GRAMS * 8 * min(matrix) ** 2 + PEAK_REST


def _bit_equal(a: Array, b: Array) -> bool:
    if a.dtype != b.dtype:
        return False
    kind = f"u{a.dtype.itemsize}"
    return bool(np.array_equal(a.view(kind), b.view(kind)))


def modules_in(pair: Pair, wanted: Selection) -> list[str]:
    """Return the module of every matrix of the pair that is wanted: one, or one an expert."""
    names = [f"{pair.module}[{i}]" for i in range(pair.shape[0])] if pair.experts else [pair.module]
    return [name for name in names if wanted.wants(name)]


def read_deltas(base: Checkpoint, tuned: Checkpoint, pair: Pair, wanted: Selection) -> Iterator[Delta]:
    """Read one pair and yield its matrices: one, or one an expert.

    A convolution kernel (out, in, kh, kw) is taken as (out, in * kh * kw). Experts keep the order of their last
    two dimensions as stored: some models store (in, out), which leaves the spectrum the same.
    """
    if not modules_in(pair, wanted):
        return
    before, after = base.read(pair.base_name), tuned.read(pair.tuned_name)
    if not pair.experts:
        before, after = before.reshape(pair.shape[0], -1), after.reshape(pair.shape[0], -1)
        same = _bit_equal(before, after)
        if pair.transposed:
            before, after = before.T, after.T
        yield Delta(pair.module, before, after, same)
        return
    for index in range(pair.shape[0]):
        if wanted.wants(f"{pair.module}[{index}]"):
            a, b = before[index], after[index]
            yield Delta(f"{pair.module}[{index}]", a, b, _bit_equal(a, b))
