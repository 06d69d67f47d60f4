"""Kinds, layers and groups of module names."""

from __future__ import annotations

import pytest

from rankwise.tuning.groups import KINDS, THIRDS, group_modules, group_of, layer_of

BY_MODEL: dict[str, tuple[str, int | None]] = {
    "model.layers.0.self_attn.q_proj": ("attention", 0),
    "model.layers.31.self_attn.o_proj": ("attention", 31),
    "model.layers.7.mlp.gate_proj": ("mlp", 7),
    "model.layers.7.mlp.down_proj": ("mlp", 7),
    "model.layers.7.post_attention_layernorm": ("other", 7),
    "model.embed_tokens": ("embedding", None),
    "lm_head": ("embedding", None),
    "output": ("embedding", None),
    "transformer.wte": ("embedding", None),
    "transformer.h.3.attn.c_attn": ("attention", 3),
    "transformer.h.3.attn.c_proj": ("attention", 3),
    "transformer.h.3.mlp.c_fc": ("mlp", 3),
    "transformer.h.3.mlp.c_proj": ("mlp", 3),
    "bert.encoder.layer.2.attention.self.query": ("attention", 2),
    "bert.encoder.layer.2.attention.output.dense": ("attention", 2),
    "bert.encoder.layer.2.intermediate.dense": ("mlp", 2),
    "bert.encoder.layer.2.output.dense": ("mlp", 2),
    "gpt_neox.layers.5.attention.query_key_value": ("attention", 5),
    "gpt_neox.layers.5.attention.dense": ("attention", 5),
    "gpt_neox.layers.5.mlp.dense_h_to_4h": ("mlp", 5),
    "model.decoder.layers.1.fc1": ("mlp", 1),
    "model.decoder.layers.1.self_attn.out_proj": ("attention", 1),
    "encoder.block.4.layer.0.SelfAttention.q": ("attention", 4),
    "encoder.block.4.layer.1.DenseReluDense.wo": ("mlp", 4),
    "layers.9.attention.wo": ("attention", 9),
    "layers.9.feed_forward.w2": ("mlp", 9),
    "model.layers.2.block_sparse_moe.experts.6.w1": ("mlp", 2),
    "model.layers.2.mlp.experts[6].gate_up_proj": ("mlp", 2),
    "backbone.layers.4.mixer.in_proj": ("other", 4),
    "model.layers.4.linear_attn.in_proj_qkvz": ("attention", 4),
    "blocks.0.attn.qkv": ("attention", 0),
    "q_proj": ("attention", None),
    "experts.3.w1": ("mlp", None),
    "score": ("other", None),
    "": ("other", None),
}


@pytest.mark.parametrize("module", BY_MODEL)
def test_names_of_the_field(module: str) -> None:
    assert (group_of(module), layer_of(module)) == BY_MODEL[module]


def test_every_module_is_in_exactly_one_group() -> None:
    groups = group_modules(BY_MODEL)
    assert sorted(name for members in groups.values() for name in members) == sorted(BY_MODEL)
    assert all(group.split("/")[0] in KINDS for group in groups)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([0], ""),
        ([5], ""),
        ([0, 1], "el"),
        ([0, 1, 2], "eml"),
        ([0, 1, 2, 3], "emml"),
        ([0, 1, 2, 3, 4], "eemll"),
        (range(6), "eemmll"),
        (range(7), "eemmmll"),
        (range(32), "e" * 11 + "m" * 10 + "l" * 11),
        ([20, 22, 31], "eml"),  # of the layers that occur, not of those between
    ],
)
def test_depth_thirds(layers: list[int], expected: str) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in layers]
    groups = group_modules(names)
    found = {name: group for group, members in groups.items() for name in members}
    depths = [found[name].partition("/")[2][:1] for name in names]
    assert "".join(depths) == expected


def test_stacks_are_counted_apart() -> None:
    names = [f"vision.layers.{i}.attn.qkv" for i in range(3)] + [f"text.layers.{i}.attn.qkv" for i in range(30)]
    assert [len(members) for members in group_modules(names).values()] == [1 + 10, 1 + 10, 1 + 10]


def test_the_order_of_groups_does_not_hang_on_the_order_of_modules() -> None:
    names = [f"layers.{i}.{leaf}" for i in range(6) for leaf in ("mlp.fc1", "attn.qkv", "mixer.in_proj")] + ["lm_head"]
    forward, backward = group_modules(names), group_modules(reversed(names))
    assert list(forward) == list(backward)
    assert list(forward)[:4] == [*(f"attention/{third}" for third in THIRDS), "mlp/early"]
    assert {group: set(members) for group, members in forward.items()} == {
        group: set(members) for group, members in backward.items()
    }


def test_nothing_gives_nothing_and_doubles_count_once() -> None:
    assert group_modules([]) == {}
    assert group_modules(["lm_head", "lm_head"]) == {"embedding": ("lm_head",)}
