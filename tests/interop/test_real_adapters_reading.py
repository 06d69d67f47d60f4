"""Adapters and checkpoints that people published: read whole, and held to the safetensors library."""

import json

import numpy as np
import pytest

safetensors = pytest.importorskip("safetensors")

import ml_dtypes  # noqa: F401 - teaches the safetensors library bfloat16
from safetensors.numpy import load_file

from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter
from rankwise.checkpoints.patterns import read_settings
from rankwise.errors import UnknownFormatError, UnsupportedAdapterError

pytestmark = pytest.mark.interop

PEFT = {
    # folder -> (modules, r, scaling, dtype)
    "deltacompression-poc": (24, 1, 32.0, "F16"),
    "fmi-chatbot": (12, 8, 4.0, "F32"),
    "gemma-medical": (72, 8, 4.0, "BF16"),
    "gpt2-domain-legal": (36, 8, 2.0, "F32"),
    "gpt2-domain-medical": (36, 8, 2.0, "F32"),
    "gpt2-domain-sports": (36, 8, 2.0, "F32"),
    "gpt2-tigrinya-v1": (36, 8, 4.0, "F32"),
    "gradience-tiny-lora": (12, 8, 2.0, "F32"),
    "law-llm": (72, 4, 2.0, "F32"),
}


@pytest.mark.parametrize("name", sorted(PEFT))
def test_published_peft_adapters(samples, name):
    """Every pair of factors in the file comes out once, bit for bit, with alpha / r of its config."""
    folder = samples / "adapters" / name
    raw = load_file(folder / "adapter_model.safetensors")
    count, r, scaling, dtype = PEFT[name]
    with open_source(folder) as adapter:
        assert isinstance(adapter, Adapter)
        assert (adapter.format, len(adapter.modules), adapter.findings, adapter.skipped) == ("peft", count, (), ())
        left = dict(raw)
        for module in adapter.modules:
            assert (module.r, module.scaling, module.dtype, module.rule) == (r, scaling, dtype, "lora")
            assert "base_model" not in module.module
            keys = [k for k in raw if f"model.{module.module}.lora_" in k]
            a, b = adapter.read_factors(module)
            np.testing.assert_array_equal(a, left.pop(keys[0]).astype(np.float32))
            np.testing.assert_array_equal(b, left.pop(keys[1]).astype(np.float32))
        assert not left


def test_a_published_adapter_that_was_wrapped_twice(samples):
    with open_source(samples / "adapters" / "gemma-medical") as adapter:
        assert adapter.modules[0].module == "model.layers.0.self_attn.k_proj"


def test_published_cloneofsimo_file(samples):
    with open_source(samples / "adapters" / "cloneofsimo-lora_disney") as adapter:
        assert (adapter.format, len(adapter.modules)) == ("cloneofsimo", 192)
        assert {m.scaling for m in adapter.modules} == {1.0}
        assert {m.r for m in adapter.modules} == {1}
        assert sorted(s.module for s in adapter.skipped) == ["<s1>", "<s2>"]
        assert not adapter.findings
        raw = load_file(samples / "adapters" / "cloneofsimo-lora_disney" / "lora_disney.safetensors")
        for module in adapter.modules:
            a, b = adapter.read_factors(module)
            np.testing.assert_array_equal(a, raw[f"{module.module}:down"])
            np.testing.assert_array_equal(b, raw[f"{module.module}:up"])


def test_published_mlx_adapter(samples):
    folder = samples / "other" / "mlx-dpo-adapters"
    raw = load_file(folder / "adapters.safetensors")
    with open_source(folder) as adapter:
        assert (adapter.format, len(adapter.modules)) == ("mlx", 4)
        for module in adapter.modules:
            assert (module.scaling, module.rule, module.lora_alpha) == (20.0, "unscaled", 20.0)
            a, b = adapter.read_factors(module)
            # (in, r) and (r, out) as stored: y = x @ lora_a @ lora_b
            stored = raw[f"{module.module}.lora_a"] @ raw[f"{module.module}.lora_b"]
            np.testing.assert_allclose(b @ a, stored.T, rtol=1e-5, atol=1e-7)


def test_published_lokr_is_refused_by_name(samples):
    with pytest.raises(UnsupportedAdapterError, match="LoKr"):
        open_source(samples / "other" / "lycoris-lokr-4")


@pytest.mark.parametrize(
    "path", ["pairs/tree-gpt2-grpo-v1/base.safetensors", "pairs/tree-gpt2-grpo-v1/finetuned_200.safetensors",
             "lm/stories260K"],
)  # fmt: skip
def test_published_checkpoints(samples, path):
    file = samples / path
    raw = load_file(file if file.is_file() else file / "model.safetensors")
    with open_source(file) as opened:
        assert opened.config is not None
        assert set(opened.names()) == set(raw)
        for name, array in raw.items():
            assert opened.read(name).tobytes() == array.tobytes()
            assert opened.info(name).shape == array.shape


def test_a_folder_with_two_checkpoints_wants_a_choice(samples):
    with pytest.raises(UnknownFormatError, match="give the path"):
        open_source(samples / "pairs" / "tree-gpt2-grpo-v1")


def test_every_published_config_is_read(samples):
    """Real rank patterns, rsLoRA, DoRA and minimal configs pass the checks of the config."""
    files = sorted((samples / "configs").glob("**/*adapter_config.json"))
    assert files
    rules = set()
    for file in files:
        config = json.loads(file.read_text())
        if config.get("peft_type", "LORA") == "LORA":
            rules.add(read_settings(config, file.name).rule)
    assert rules == {"lora", "rslora"}


def test_a_published_rank_pattern_gives_each_module_its_own_rank(samples):
    config = json.loads((samples / "configs/gradience-rank-pattern/per_layer_adapter_config.json").read_text())
    settings = read_settings(config, "per_layer")
    for name, r in config["rank_pattern"].items():
        assert settings.rank_of(name) == r
        assert settings.alpha_of(name) == config["alpha_pattern"][name]
        assert settings.ranks.every(name) == [r]
        assert settings.alphas.every(name) == [config["alpha_pattern"][name]]
