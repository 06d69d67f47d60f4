"""What every weight of a checkpoint is in an adapter, and under which name.

In: pairs of weights, and the names of all tensors. Out: kinds, names on the base, target modules that select exactly
what is adapted. All from names, shapes and config.json: no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.adapters.peft_folder import Placed
from rankwise.checkpoints.model import ModuleKind
from rankwise.deltas import Pair, module_of

_HEAD: Final = re.compile(r"(^|\.)(lm_head|embed_out|output_embeddings)$")
_EMBEDDING: Final = re.compile(
    r"(^|\.)(embed_tokens|embed_positions|embed_in|embed|wte|wpe|shared|relative_attention_bias|\w*embeddings?)$"
)
_INPUT_TABLE: Final = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|tok_embeddings|word_embeddings|shared)$")
_ROUTER: Final = re.compile(r"\.(gate|router)$")
_OLD_EXPERT: Final = re.compile(r"\.experts\.\d+\.")

MOE_LEAVES: Final = ("gate_proj", "up_proj", "down_proj")
"""Names that PEFT 0.21 takes for experts in a model with experts, also on layers that are none."""

TRANSPOSED_EXPERTS: Final = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
"""Models whose experts are stored (in, out) and say so to PEFT (`is_transposed`); it swaps the factors there."""

TIED_BY_DEFAULT: Final = frozenset({"gpt2", "gpt_neo", "opt", "bloom", "gemma", "gemma2", "gemma3_text", "starcoder2"})
"""Models whose config.json need not say that the head is the input table."""

TIED_HEAD: Final = "lm_head"
"""What transformers calls the head of every model of `TIED_BY_DEFAULT`, and of those that say so."""

LONGEST_KERNEL: Final = 64
"""Last side of a 3-D weight above which it is no 1-D convolution."""

CAUSAL: Final = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, slots=True)
class Spot:
    """Where the delta of one pair goes.

    Attributes:
        name: dotted path on the base without `.weight`; of experts, of the parameter.
        kind: what the delta is added to.
        parameter: whether PEFT has to be told the parameter (`target_parameters`) and not the layer.
        turned: whether the two sides of an expert are swapped.
        kernel: sides of a convolution's kernel.
        unfit: why low rank cannot carry it, or empty.
        embedding: whether it is a table that `--embeddings` turns on.
        head: whether it is a head that `--lm-head` turns on.
        tied: name of the head that is the same table, or empty: PEFT gives it no part of the table's adapter.
    """

    name: str
    kind: ModuleKind
    parameter: bool = False
    turned: bool = False
    kernel: tuple[int, ...] = ()
    unfit: str = ""
    embedding: bool = False
    head: bool = False
    tied: str = ""


def names_on_base(pairs: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """Return tuned tensor -> name for the adapter, and whether the two checkpoints differ in names.

    An adapter goes onto the base, so the base's names count; but a base that was saved without its head lacks the
    prefix that the model with a head gives to every module ("h.0..." against "transformer.h.0..."): where one name is
    the other with a prefix before it, the longer is taken.

    >>> names_on_base({"transformer.h.0.w": "h.0.w"})
    ({'transformer.h.0.w': 'transformer.h.0.w'}, True)
    >>> names_on_base({"model.text.l.w": "model.l.w"})
    ({'model.text.l.w': 'model.l.w'}, True)
    """
    chosen = {
        tuned: max(tuned, base, key=len) if tuned.endswith(f".{base}") or base.endswith(f".{tuned}") else base
        for tuned, base in pairs.items()
    }
    return chosen, any(tuned != base for tuned, base in pairs.items())


def spot_of(pair: Pair, name: str, held: Collection[str], config: Mapping[str, Any] | None) -> Spot:
    """Return where the delta of a pair goes.

    Args:
        pair: one weight.
        name: its tensor name for the adapter.
        held: names of all tensors, for what stands beside it.
        config: of the model, or None.
    """
    module = module_of(name)
    if pair.experts:
        turned = str((config or {}).get("model_type")) in TRANSPOSED_EXPERTS
        unfit = "experts under a name that ends in .weight: PEFT has no layout for them" if module != name else ""
        return Spot(module, "expert", parameter=True, turned=turned, unfit=unfit)
    if len(pair.shape) > 2:
        return Spot(module, "conv", kernel=pair.shape[2:], unfit=_unfit_kernel(pair))
    if module == name:
        return Spot(module, "linear", unfit="a bare parameter: PEFT adapts layers and experts")
    if _EMBEDDING.search(module) and not _HEAD.search(module):
        tied = TIED_HEAD if _INPUT_TABLE.search(module) and _ties(config) and f"{TIED_HEAD}.weight" not in held else ""
        return Spot(module, "embedding", embedding=True, tied=tied)
    if _HEAD.search(module):
        return Spot(module, "linear", head=True)
    return Spot(module, "linear", parameter=_beside_experts(module, held))


def _ties(config: Mapping[str, Any] | None) -> bool:
    """Whether the output head of a causal language model is its input table."""
    if task_type(config) is None or config is None:
        return False
    return bool(config.get("tie_word_embeddings", config.get("model_type") in TIED_BY_DEFAULT))


def _unfit_kernel(pair: Pair) -> str:
    if len(pair.shape) == 3 and pair.shape[2] > LONGEST_KERNEL:
        return f"3-D {pair.shape}, and neither experts nor a convolution by name and shape"
    if pair.shape[1] == 1 and pair.shape[0] > 1:
        return "a convolution of one channel each (depthwise): PEFT's factors join all channels"
    return ""


def _beside_experts(module: str, held: Collection[str]) -> bool:
    """Whether PEFT 0.21 would take a layer's name for experts, or cannot wrap the layer: routers and shared experts.

    Transformers 5 holds experts as stacked parameters and routers as modules of its own; PEFT then rewrites names of
    the old layout, also those of dense layers beside. Naming the parameter keeps clear of both. Checkpoints of the old
    layout, one tensor an expert, are rewritten as PEFT wants.
    """
    parent, _, leaf = module.rpartition(".")
    if _OLD_EXPERT.search(module):
        return False
    stacked = any(f"{parent}.experts.{p}" in held for p in ("gate_up_proj", "down_proj", "w1", "w2"))
    if stacked and _ROUTER.search(module):
        return True
    return leaf in MOE_LEAVES and any(".experts." in name for name in held)


def is_old_expert(name: str) -> bool:
    """Whether a weight is that of one expert, stored by itself."""
    return _OLD_EXPERT.search(name) is not None


def shortest_targets(placed: Sequence[Placed], modules: Iterable[str]) -> list[str]:
    """Return `target_modules`: last parts of the names where these select exactly what is adapted, else full names.

    PEFT takes every module whose path is a target or ends in a dot and a target, so all paths of the base count,
    those of containers and norms too.

    Args:
        placed: what is adapted; experts are no modules and are left out.
        modules: paths of all tensors of the base, without `.weight`.
    """
    wanted = [p.module for p in placed if p.kind != "expert"]
    paths = {".".join(parts[:n]) for m in modules for parts in [m.split(".")] for n in range(1, len(parts) + 1)}
    ends = sorted({m.rpartition(".")[2] for m in wanted})
    selected = {path for path in paths if path.rpartition(".")[2] in ends}
    return ends if selected == set(wanted) else wanted


def selects_only(path: str, modules: Iterable[str]) -> bool:
    """Whether `modules_to_save` with this path picks no other module: PEFT compares the ends of the paths."""
    return not any(m != path and m.endswith(path) for m in modules)


def task_type(config: Mapping[str, Any] | None) -> str | None:
    """Return PEFT's task type where config.json names a causal language model."""
    names = (config or {}).get("architectures")
    known = isinstance(names, list) and any(isinstance(n, str) and n.endswith(CAUSAL) for n in names)
    return "CAUSAL_LM" if known else None
