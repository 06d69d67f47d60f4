"""Rank, scaling and delta of every module, held to PEFT itself: what it attaches, and what it saves."""

import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from rankwise.checkpoints import open_source
from rankwise.checkpoints.patterns import DEFAULTS

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

# float32 products of rank <= 64: PEFT multiplies in torch, we in numpy
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=12,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, ["query", "key", "dense"]),
}

KEYS = {
    "llama": [
        "q_proj",
        "proj",  # covers no end from a dot on: matches nothing
        "layers.0",
        "self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "^model.layers.0.mlp.up_proj",
        "^layers.0.mlp.up_proj",
        r"layers\.\d\.self_attn\.(q_proj|v_proj)",
        r"layers.1.mlp.down_proj",  # the unescaped dots match any character, but layer 11 has one more
        "(up|down)_proj",
        "v_proj|o_proj",
        r".*mlp.*",
        r"model\.layers\.(1[01]|[02468])\.self_attn\.o_proj",
        "_proj",
        r"\w+_proj",
    ],
    "gpt2": ["c_attn", "attn.c_proj", "mlp.c_proj", "^transformer.h.0.*", r"h\.1\.mlp\..*", "c_proj|c_fc", "h.0"],
    "bert": ["query", "attention.self.key", "output.dense", "^bert.encoder.layer.0.*", "dense", r"layer\.1\..*dense"],
}


def attached(model, adapter="default"):
    """Module path relative to the base model -> PEFT's layer."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }


def product(adapter, module):
    a, b = adapter.read_factors(module)
    assert a.shape == (module.r, module.shape[1])
    assert b.shape == (module.shape[0], module.r)
    return module.scaling * b @ a


def save(model, folder):
    """Save with the patterns in the order in which they were trained: PEFT itself sorts them."""
    model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text())
    for field in ("rank_pattern", "alpha_pattern"):
        written[field] = getattr(model.peft_config["default"], field)
    file.write_text(json.dumps(written))


def compare(model, folder):
    """Every module that PEFT attached is read with PEFT's r, scaling and delta; nothing else is."""
    layers = attached(model)
    with open_source(folder) as adapter:
        assert {m.module for m in adapter.modules} == set(layers)
        for module in adapter.modules:
            layer = layers[module.module]
            assert module.r == layer.r["default"], module.module
            assert module.scaling == layer.scaling["default"], module.module  # the same float, not nearly
            assert module.lora_alpha == layer.lora_alpha["default"]
            wanted = layer.get_delta_weight("default").detach().numpy()
            if getattr(layer, "fan_in_fan_out", False) and module.kind == "linear":
                wanted = wanted.T
            np.testing.assert_allclose(product(adapter, module), wanted.reshape(module.shape), **CLOSE)
        return list(adapter.findings)


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("seed", range(6))
def test_random_configs_give_pefts_ranks_scalings_and_deltas(family, seed, tmp_path):
    """Random patterns: regular expressions, ^, alternation, shadowing, rank without alpha, rslora."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    build, targets = MODELS[family]
    keys = KEYS[family]

    def pattern(values):
        chosen = rng.permutation(len(keys))[: rng.integers(0, 5)]
        return {keys[i]: values() for i in chosen}

    config = LoraConfig(
        r=int(rng.integers(1, 9)),
        lora_alpha=[8, 16, 2.5][seed % 3],
        use_rslora=bool(rng.integers(2)),
        target_modules=list(targets),
        rank_pattern=pattern(lambda: int(rng.integers(1, 12))),
        alpha_pattern=pattern(lambda: float(rng.integers(1, 40))) if seed % 2 else {},
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,  # random A and B
    )
    model = get_peft_model(build(), config)
    save(model, tmp_path)
    found = compare(model, tmp_path)
    assert not [f for f in found if f.level == "error"]
    findings = {f.code: f.text for f in found}
    names = list(attached(model))
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            idle = not any(re.match(rf"(.*\.)?({key})$", name) for name in names)
            text = findings.get("pattern-unmatched", "")
            if idle and " more" not in text:
                assert f"{field}[{key!r}]" in text
            if not idle:
                assert f"{field}[{key!r}]" not in text


def test_shadowed_key_is_reported_and_the_first_match_wins(tmp_path):
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
        rank_pattern={"q_proj": 3, "model.layers.0.self_attn.q_proj": 7},
    )
    model = get_peft_model(llama(), config)
    save(model, tmp_path)
    findings = compare(model, tmp_path)
    assert [f.code for f in findings] == ["pattern-shadowed"]
    with open_source(tmp_path) as adapter:
        assert {m.r for m in adapter.modules} == {3}


def test_ranks_whose_keys_peft_sorted_on_saving_are_the_tensors(tmp_path):
    """PEFT writes adapter_config.json with sorted keys, and then refuses its own file."""
    config = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        init_lora_weights=False,
        rank_pattern={"q_proj": 3, "model.layers.0.self_attn.q_proj": 7},
    )
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), tmp_path)
    assert [(f.code, f.level) for f in compare(model, tmp_path)] == [("pattern-order", "warning")]


def test_alphas_whose_keys_peft_sorted_on_saving_are_those_that_peft_loads(tmp_path):
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        alpha_pattern={"q_proj": 3, "model.layers.0.self_attn.q_proj": 7},
    )
    trained = get_peft_model(llama(), config)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    assert attached(trained)[name].scaling != attached(loaded)[name].scaling  # PEFT's own change of meaning
    findings = compare(loaded, tmp_path)
    assert [(f.code, f.level) for f in findings] == [("pattern-order", "warning")]
    assert name in findings[0].text


def test_embeddings_have_the_orientation_of_the_stored_table(tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    compare(model, tmp_path)
    with open_source(tmp_path) as adapter:
        (table,) = [m for m in adapter.modules if m.kind == "embedding"]
        assert (table.module, table.shape) == ("model.embed_tokens", (40, 16))


def test_saved_embedding_and_modules_to_save_are_skipped_with_a_reason(tmp_path):
    config = LoraConfig(
        r=3, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert [f.code for f in compare(model, tmp_path)] == ["modules-to-save"]
    with open_source(tmp_path) as adapter:
        assert {s.module for s in adapter.skipped} == {"lm_head", "model.embed_tokens"}


def test_biases_are_skipped(tmp_path):
    model = get_peft_model(bert(), LoraConfig(r=3, target_modules=["query"], bias="all", init_lora_weights=False))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    with open_source(tmp_path) as adapter:
        assert adapter.skipped
        assert all("bias" in s.reason for s in adapter.skipped)


def test_dora_factors_are_read_and_the_magnitudes_named(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    findings = compare(model, tmp_path)
    assert [(f.code, f.level) for f in findings] == [("dora", "info")]
    with open_source(tmp_path) as adapter:
        assert all(m.warnings == ("dora",) for m in adapter.modules)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", "orthogonal"])
def test_starts_that_change_the_base_are_told(init, tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    model.save_pretrained(tmp_path)
    codes = [f.code for f in compare(model, tmp_path)]
    assert codes == (["init-changes-base"] if init in ("pissa", "olora") else [])


def test_another_adapter_name_and_bin_files(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config, adapter_name="mine")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    layers = attached(model, "mine")
    from safetensors.torch import load_file, save_file

    raw = {
        k.replace("lora_A.", "lora_A.mine."): v
        for k, v in load_file(tmp_path / "mine/adapter_model.safetensors").items()
    }
    raw = {k.replace("lora_B.", "lora_B.mine."): v for k, v in raw.items()}
    save_file(raw, tmp_path / "named.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((tmp_path / "mine/adapter_config.json").read_bytes())
    for source in (tmp_path / "mine", tmp_path / "bin/mine", tmp_path / "named.safetensors"):
        with open_source(source) as adapter:
            assert {m.module for m in adapter.modules} == set(layers)
            for module in adapter.modules:
                wanted = layers[module.module].get_delta_weight("mine").detach().numpy()
                np.testing.assert_allclose(product(adapter, module), wanted, **CLOSE)


def test_doubly_wrapped_models_match_patterns_as_peft_does(tmp_path):
    """PEFT strips one prefix before it matches, so `^model` misses a model that was wrapped twice."""
    inner = get_peft_model(llama(), LoraConfig(r=2, target_modules=["k_proj"]))
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        rank_pattern={"^model.layers.0.*": 5, "layers.1.self_attn.q_proj": 3},
    )
    model = get_peft_model(inner, config)
    model.save_pretrained(tmp_path)
    layers = {n: layer for n, layer in attached(model).items() if n.endswith("q_proj")}
    with open_source(tmp_path) as adapter:
        read = {m.module: m for m in adapter.modules if m.module.endswith("q_proj")}
        assert "model.layers.0.self_attn.q_proj" in read
        for name, layer in layers.items():
            module = read[name.removeprefix("base_model.model.")]
            assert (module.r, module.scaling) == (layer.r["default"], layer.scaling["default"])


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.line = nn.Conv1d(12, 5, 3)

    def forward(self, x):
        return self.line(self.grouped(self.point(self.plain(x))).flatten(2))


def test_convolutions(tmp_path):
    """(out, in * kh * kw); a grouped one is held to its forward, for which PEFT has no delta weight."""
    torch.manual_seed(0)
    base = Convolutions()
    targets = ["plain", "point", "grouped", "line"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    layers = attached(model)
    with open_source(tmp_path) as adapter:
        read = {m.module: m for m in adapter.modules}
        assert set(read) == set(targets)
        for name in ("plain", "point", "line"):
            wanted = layers[name].get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(product(adapter, read[name]), wanted.reshape(read[name].shape), **CLOSE)
            assert read[name].kind == "conv"
        layer = layers["grouped"]
        delta = torch.from_numpy(product(adapter, read["grouped"])).reshape(12, 8, 3, 3)  # A is not grouped
        x = torch.randn(1, 8, 5, 5)
        with torch.no_grad():
            wanted = layer(x) - layer.get_base_layer()(x)
            found = nn.functional.conv2d(x, delta, padding=1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "targets",
    [["mlp.experts.down_proj"], ["mlp.experts.gate_up_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]],
)
def test_experts_are_read_one_by_one(targets, rslora, tmp_path):
    """`target_parameters`: PEFT's stacked A and interleaved B, each expert against its slice of the delta."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"experts.down_proj": 2, "layers.1.mlp.experts.gate_up_proj": 3},
        alpha_pattern={"layers.1.mlp.experts.down_proj": 5},
        init_lora_weights=False,
    )
    model = get_peft_model(mixtral(), config)
    model.save_pretrained(tmp_path)
    checked = 0
    with open_source(tmp_path) as adapter:
        read = {m.module: m for m in adapter.modules}
        for path, layer in attached(model).items():
            if type(layer).__name__ != "ParamWrapper":
                continue
            name = path.replace(".base_layer", "") + "." + layer.parameter_name
            wanted = layer.get_delta_weight("default").detach().numpy()  # (experts, out, in)
            assert wanted.shape == tuple(layer.get_param().shape)
            for i in range(3):
                module = read.pop(f"{name}[{i}]")
                assert module.kind == "expert"
                assert (module.r, module.scaling) == (layer.r["default"], layer.scaling["default"])
                np.testing.assert_allclose(product(adapter, module), wanted[i], **CLOSE)
                checked += 1
        assert checked == 2 * 3 * len(targets)
        assert all(name.endswith("q_proj") for name in read)


def test_a_matrix_targeted_as_a_parameter_is_one_module(tmp_path):
    config = LoraConfig(r=4, target_modules=[], target_parameters=["self_attn.q_proj.weight"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)


def test_alpha_of_rslora_is_over_the_square_root(tmp_path):
    """The closed form, in case PEFT itself changes."""
    model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    with open_source(tmp_path) as adapter:
        assert {(m.scaling, m.rule) for m in adapter.modules} == {(6 / math.sqrt(4), "rslora")}


def test_the_defaults_are_those_of_lora_config():
    default = LoraConfig()
    assert {"r": default.r, "lora_alpha": default.lora_alpha} == DEFAULTS
    assert default.use_rslora is False
