"""Modules of a model in groups: what they do, and how deep they sit.

In: dotted module paths. Out: a kind for each ("attention", "mlp", "embedding", "other"), its layer, and the groups
over which figures are averaged. Names only: no torch, no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

KINDS: Final = ("attention", "mlp", "embedding", "other")
THIRDS: Final = ("early", "middle", "late")

EMBEDDINGS: Final = re.compile(
    r"(tok_|word_|token_|position_)?embeddings?|embed_(tokens|positions|in|out)|wte|wpe|lm_head|shared"
)
"""Last names of input and output embeddings."""

LEAVES: Final[tuple[tuple[re.Pattern[str], str], ...]] = (
    (
        re.compile(
            r"[qkvo]_proj|[qkv]_lin|out_lin|w?qkv|qkv_proj|query|key|value|query_key_value|c_attn|w[qkvo]|to_(q|k|v|out)"
            r"|(q|kv)_[ab]_proj(_with_mqa)?"
        ),
        "attention",
    ),
    (
        re.compile(
            r"(gate|up|down|gate_up)_proj|fc[12]|fc_(in|out)|c_fc|w[123]|wi(_[01])?|lin[12]|dense_h_to_4h|dense_4h_to_h"
        ),
        "mlp",
    ),
)
"""Last name -> kind, asked where no parent settles it. `dense`, `c_proj` and `out_proj` alone say nothing."""

PARENTS: Final[tuple[tuple[str, str], ...]] = (
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "mlp"),
    ("ffn", "mlp"),
    ("feed_forward", "mlp"),
    ("feedforward", "mlp"),
    ("densereludense", "mlp"),
    ("expert", "mlp"),
    ("moe", "mlp"),
    ("intermediate", "mlp"),
)
"""Part of a parent's name -> kind; the parent nearest to the weight decides."""


def group_of(module: str) -> str:
    """Return what a module does, by the names the field uses: one of `KINDS`.

    Args:
        module: dotted path of a weight, such as "model.layers.0.self_attn.q_proj".

    >>> [group_of(name) for name in ("h.0.attn.c_proj", "h.0.mlp.c_proj", "layer.0.output.dense", "lm_head")]
    ['attention', 'mlp', 'mlp', 'embedding']
    """
    *parents, leaf = module.lower().split(".")
    if EMBEDDINGS.fullmatch(leaf) or (leaf == "output" and not parents):  # the head of Meta's own Llama code
        return "embedding"
    if "norm" in leaf:  # post_attention_layernorm is no attention
        return "other"
    for parent in reversed(parents):
        for part, kind in PARENTS:
            if part in parent:
                return kind
    if leaf == "dense" and parents and parents[-1] == "output":  # BERT's second MLP matrix
        return "mlp"
    return next((kind for names, kind in LEAVES if names.fullmatch(leaf)), "other")


def layer_of(module: str) -> int | None:
    """Return the index of the layer a module belongs to, or None: the first number of the path that is no expert's.

    >>> layer_of("model.layers.11.mlp.experts.3.w1"), layer_of("lm_head")
    (11, None)
    """
    split = _split_at_layer(module)
    return None if split is None else split[1]


def _split_at_layer(module: str) -> tuple[str, int] | None:
    """Return (path of the stack of layers, index in it)."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isascii() and part.isdigit() and not (place and "expert" in parts[place - 1].lower()):
            return ".".join(parts[:place]), int(part)
    return None


def group_modules(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the modules by group: "attention/early", "mlp/late", "embedding", ...

    The depth is the third of the stack in which a layer lies, counted over the layer indices that occur. Two stacks,
    such as the towers of a vision-language model or an encoder and a decoder, are counted apart. Two layers are early
    and late. A module without a layer, or of a stack of one layer, is in the group of its kind alone.

    Args:
        modules: dotted paths; a path given twice counts once.

    Returns:
        Group -> its modules in the order given; the groups in the order of `KINDS`, then of depth.

    >>> group_modules(["layers.0.attn.qkv", "layers.1.attn.qkv", "lm_head"])
    {'attention/early': ('layers.0.attn.qkv',), 'attention/late': ('layers.1.attn.qkv',), 'embedding': ('lm_head',)}
    """
    names = tuple(dict.fromkeys(modules))
    places = {name: _split_at_layer(name) for name in names}
    stacks: dict[str, set[int]] = {}
    for place in places.values():
        if place is not None:
            stacks.setdefault(place[0], set()).add(place[1])
    order = {stack: {index: i for i, index in enumerate(sorted(found))} for stack, found in stacks.items()}
    groups: dict[str, list[str]] = {
        name: [] for kind in KINDS for name in (kind, *(f"{kind}/{third}" for third in THIRDS))
    }
    for name, place in places.items():
        kind = group_of(name)
        if place is not None and kind != "embedding" and len(order[place[0]]) > 1:
            indices = order[place[0]]
            # the middle of a layer decides, so that 2, 4, 5, 7, ... layers fall evenly about the middle
            kind = f"{kind}/{THIRDS[3 * (2 * indices[place[1]] + 1) // (2 * len(indices))]}"
        groups[kind].append(name)
    return {group: tuple(members) for group, members in groups.items() if members}
