"""What all adapter formats share: pairs of factors found by name, checked, and read one module at a time.

In: a weight set and, for each module, the names of its two factors and how they are laid out. Out: an
`Adapter`. Each format's file decides names, layouts and scalings; nothing here knows a format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from rankwise.checkpoints.model import Adapter, Array, LoraModule, ModuleKind, TensorInfo, as_float32
from rankwise.checkpoints.sharded import WeightSet
from rankwise.errors import TensorError
from rankwise.records import Finding, Level, Skipped
from rankwise.scaling import scaling as scaling_by_rule

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Storage dtypes that a factor may have."""

Layout = Callable[[Array, Array], tuple[Array, Array]]
"""From (A, B) as stored to A of (r, in_features) and B of (out_features, r)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How a module is scaled. All None where nothing tells.

    Attributes:
        lora_alpha: as the format gives it.
        scaling: the factor on B @ A.
        rule: the rule that leads from one to the other.
    """

    lora_alpha: float | None = None
    scaling: float | None = None
    rule: str | None = None

    @classmethod
    def by_rule(cls, rule: str, lora_alpha: float, r: int) -> Scale:
        """Return the scale that a rule gives."""
        return cls(lora_alpha, scaling_by_rule(rule, lora_alpha, r), rule)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one module as stored."""

    module: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class Factors:
    """How to read one module.

    Attributes:
        shape: (out_features, in_features).
        r: rank.
        kind: what the delta is added to.
        layout: from the stored factors to (A, B).
    """

    shape: tuple[int, int]
    r: int
    kind: ModuleKind
    layout: Layout


def check_factor(info: TensorInfo, module: str) -> None:
    """Refuse a tensor that can be no factor.

    Raises:
        TensorError: its dtype is no float, it is empty, or has fewer than 2 or more than 4 dimensions.
    """
    where = f"{module}: the factor {info.name} in {info.file}"
    if info.dtype not in FLOATS:
        raise TensorError(
            f"{where} is stored as {info.dtype}; factors are floats ({', '.join(sorted(FLOATS))}). "
            "A quantised adapter must be turned back into floats first."
        )
    if not 2 <= len(info.shape) <= 4 or 0 in info.shape:
        raise TensorError(
            f"{where} has the shape {info.shape}; wanted 2 dimensions (3 or 4 for convolutions and experts), none of "
            "them 0. Shards of ZeRO-3 or FSDP saved without gathering look like this: save the adapter again."
        )


def _misfit(pair: Pair, what: str) -> TensorError:
    return TensorError(
        f"{pair.module}: the factors {pair.a.name} of shape {pair.a.shape} and {pair.b.name} of shape {pair.b.shape} "
        f"do not fit each other: {what}."
    )


def linear(pair: Pair) -> Factors:
    """A (r, in) and B (out, r); also convolutions, A (r, in, *kernel) and B (out, r, 1, ...).

    For a grouped convolution PEFT keeps A whole and groups B alone, (out, r / groups, 1, ...): group g uses its
    own rows of A, which is a block diagonal B of shape (out, r). The delta then reaches all input channels,
    (out, in * kernel), while the stored weight is (out, in / groups, *kernel): PEFT cannot merge it either.
    """
    a, b = pair.a.shape, pair.b.shape
    r, inner, out = a[0], b[1], b[0]
    shape = (out, math.prod(a[1:]))
    if math.prod(b[2:]) != 1:
        raise _misfit(pair, "the kernel belongs in A, and that of B must be 1")
    if r == inner:
        return Factors(shape, r, "linear" if len(a) == 2 else "conv", flat)
    groups, rest = divmod(r, inner)
    if len(a) > 2 and rest == 0 and out % groups == 0:
        return Factors(shape, r, "conv", partial(grouped, groups=groups))
    raise _misfit(pair, f"A is of rank {r}, B of rank {inner}")


def flat(a: Array, b: Array) -> tuple[Array, Array]:
    """Flatten kernels; matrices stay as they are."""
    return a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)


def grouped(a: Array, b: Array, *, groups: int) -> tuple[Array, Array]:
    """Lay the B of a grouped convolution out as a block diagonal."""
    a, b = flat(a, b)  # (r, in * kernel), (out, r / groups)
    out, per_group = b.shape
    whole = np.zeros((out, a.shape[0]), dtype=b.dtype)
    rows = out // groups
    for g in range(groups):
        whole[g * rows : (g + 1) * rows, g * per_group : (g + 1) * per_group] = b[g * rows : (g + 1) * rows]
    return a, whole


def transposed(pair: Pair) -> Factors:
    """A (in, r) and B (r, out): MLX's linear layers, y = x @ a @ b."""
    a, b = pair.a.shape, pair.b.shape
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise _misfit(pair, "wanted (in_features, r) and (r, out_features)")
    return Factors((b[1], a[0]), a[1], "linear", lambda first, second: (first.T, second.T))


def table(pair: Pair) -> Factors:
    """A (rows, r) and B (r, columns) of an embedding table: the delta of the stored weight is A @ B."""
    a, b = pair.a.shape, pair.b.shape
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        raise _misfit(pair, "wanted (num_embeddings, r) and (r, embedding_dim)")
    return Factors((a[0], b[1]), a[1], "embedding", lambda first, second: (second, first))


class Draft:
    """An adapter in the making: modules, what is left out, and findings gathered over modules."""

    def __init__(self, weights: WeightSet, shown: Callable[[str], str] = str) -> None:
        self.weights = weights
        self._shown = shown  # from a module's path as stored to its name in messages
        self.modules: list[LoraModule] = []
        self.skipped: list[Skipped] = []
        self._plans: dict[str, tuple[str, str, Layout]] = {}
        self._notes: dict[tuple[str, Level, str], list[str]] = {}
        self._codes: dict[str, list[str]] = {}

    def add(self, pair: Pair, factors: Factors, scale: Scale, *, module: str | None = None) -> None:
        """Add one module; `module` names it where one pair holds several (experts)."""
        name = module if module is not None else self._shown(pair.module)
        if name in self._plans:
            raise TensorError(
                f"{self.weights.label} holds two pairs of factors for {name}: {self._plans[name][0]} and "
                f"{pair.a.name}. Save one adapter a file."
            )
        self._plans[name] = (pair.a.name, pair.b.name, factors.layout)
        codes = tuple(dict.fromkeys(self._codes.get(pair.module, [])))
        self.modules.append(
            LoraModule(
                module=name,
                shape=factors.shape,
                kind=factors.kind,
                r=factors.r,
                lora_alpha=scale.lora_alpha,
                scaling=scale.scaling,
                rule=scale.rule,
                dtype=pair.a.dtype,
                warnings=codes,
            )
        )

    def skip(self, module: str, reason: str) -> None:
        """Leave something out."""
        self.skipped.append(Skipped(module=module, reason=reason))

    def note(self, code: str, level: Level, text: str, module: str | None = None) -> None:
        """Note a finding; notes with one code and text are one finding that lists its modules.

        Notes about a module are to come before it is added. `{modules}` in the text becomes the list.
        """
        where = self._notes.setdefault((code, level, text), [])
        if module is not None:
            where.append(self._shown(module))
            self._codes.setdefault(module, []).append(code)

    def pair_up(self, found: Mapping[str, Mapping[str, TensorInfo]], a: str, b: str) -> list[Pair]:
        """Return the checked pairs of modules that have both factors; note and skip the others."""
        pairs = []
        for module, parts in found.items():
            for role, other, code in ((a, b, "a-only"), (b, a, "b-only")):
                if role in parts and other not in parts:
                    self.skip(self._shown(module), f"{parts[role].name} has no matching {other}")
                    text = f"{{modules}}: {role} without {other}, so there is no product. The file is incomplete."
                    self.note(code, "error", text, module)
            if a in parts and b in parts:
                check_factor(parts[a], self._shown(module))
                check_factor(parts[b], self._shown(module))
                pairs.append(Pair(module, parts[a], parts[b]))
        return pairs

    def finish(self, source: str, form: str, config: Mapping[str, Any] | None) -> Adapter:
        """Return the adapter."""
        findings = tuple(
            Finding(code=code, level=level, text=text.replace("{modules}", _listed(names)))
            for (code, level, text), names in self._notes.items()
        )
        return _FactoredAdapter(self, source, form, config, findings)


def _listed(names: Sequence[str], most: int = 3) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _FactoredAdapter(Adapter):
    """An adapter whose modules are pairs of tensors of one weight set."""

    def __init__(
        self, draft: Draft, source: str, form: str, config: Mapping[str, Any] | None, findings: Sequence[Finding]
    ) -> None:
        self.source, self.format, self.config = source, form, config
        self.modules = tuple(draft.modules)
        self.skipped = tuple(draft.skipped)
        self.findings = findings
        self._weights = draft.weights
        self._plans = draft._plans
        self._last: tuple[tuple[str, str], tuple[Array, Array]] | None = None

    def read_factors(self, module: LoraModule) -> tuple[Array, Array]:
        """Read (A, B) of one module as (r, in_features) and (out_features, r)."""
        if module.module not in self._plans:
            raise TensorError(f"{self._weights.label} holds no module {module.module!r}.")
        a, b, layout = self._plans[module.module]
        if self._last is None or self._last[0] != (a, b):  # experts share one pair
            self._last = None
            self._last = ((a, b), (self._weights.read(a), self._weights.read(b)))
        first, second = layout(*self._last[1])
        return as_float32(first), as_float32(second)

    def stored(self, module: LoraModule) -> tuple[TensorInfo, TensorInfo]:
        """Return what the headers say of the tensors that hold A and B."""
        a, b, _ = self._plans[module.module]
        return self._weights.info(a), self._weights.info(b)

    def others(self) -> Sequence[TensorInfo]:
        """Return the tensors that belong to no pair of factors."""
        taken = {name for a, b, _ in self._plans.values() for name in (a, b)}
        return tuple(self._weights.info(name) for name in self._weights.names() if name not in taken)

    def read_other(self, name: str) -> Array:
        """Read one tensor in its storage dtype."""
        return self._weights.read(name)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata in the header of a safetensors file, else nothing."""
        return self._weights.metadata

    def close(self) -> None:
        """Close the file and drop what was read."""
        self._last = None
        self._weights.close()
