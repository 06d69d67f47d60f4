"""What is particular to kohya, diffusers, cloneofsimo and MLX files, and the kinds that are refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.making import R, kohya, mlx, normal
from rankwise.checkpoints import open_source
from rankwise.errors import ConfigError, TensorError, UnsupportedAdapterError


def one(rng, down, up, inner=4, out=5):
    return {down: normal(rng, R, inner), up: normal(rng, out, R)}


def codes(adapter):
    return [(f.code, f.level) for f in adapter.findings]


@pytest.mark.parametrize(
    ("alpha", "scaling"),
    [(np.float16(1.5), 0.5), (np.array([6.0], np.float32), 2.0), (np.int64(3), 1.0), (np.array([[9.0]]), 3.0)],
)
def test_kohya_alpha_in_any_number_dtype(alpha, scaling, tmp_path, rng):
    tensors = one(rng, "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight")
    save_file(tensors | {"lora_unet_a.alpha": np.asarray(alpha)}, tmp_path / "x.safetensors")
    with open_source(tmp_path) as adapter:
        assert (adapter.modules[0].scaling, adapter.modules[0].rule) == (scaling, "lora")


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
def test_kohya_alpha_that_is_no_scale(alpha, tmp_path, rng):
    tensors = one(rng, "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight")
    save_file(tensors | {"lora_unet_a.alpha": np.array(alpha)}, tmp_path / "x.safetensors")
    with open_source(tmp_path) as adapter:
        module = adapter.modules[0]
        assert (module.scaling, module.lora_alpha, module.warnings) == (None, None, ("bad-alpha",))
        assert codes(adapter) == [("bad-alpha", "error")]


def test_kohya_alpha_that_is_no_number(tmp_path, rng):
    tensors = one(rng, "lora_unet_a.lora_down.weight", "lora_unet_a.lora_up.weight")
    save_file(tensors | {"lora_unet_a.alpha": np.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(TensorError, match="alpha is a single number"):
        open_source(tmp_path)


def test_kohya_dora_and_whole_tensors(tmp_path, rng):
    made = kohya(tmp_path, rng)
    tensors = load_file(made.weights)
    tensors |= {"lora_unet_mid_0.dora_scale": normal(rng, 5, 1), "lora_unet_norm.w_norm": normal(rng, 4)}
    save_file(tensors, made.weights)
    with open_source(made.source) as adapter:
        assert set(codes(adapter)) == {("dora", "info"), ("modules-to-save", "info")}
        assert [s.module for s in adapter.skipped] == ["lora_unet_norm.w_norm"]


def test_kohya_with_an_alpha_for_a_module_that_is_not_there(tmp_path, rng):
    tensors = one(rng, "a.lora_down.weight", "a.lora_up.weight") | {"b.alpha": np.array(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    with open_source(tmp_path) as adapter:
        assert adapter.modules[0].scaling == 1.0


DIFFUSERS = one(np.random.default_rng(0), "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                "transformer.transformer_blocks.0.attn.to_q.lora_B.weight")  # fmt: skip


@pytest.mark.parametrize("key", ["lora_alpha", "network_alpha", "alpha"])
def test_diffusers_alpha_in_the_header(key, tmp_path):
    save_file(DIFFUSERS, tmp_path / "x.safetensors", metadata={key: "12"})
    with open_source(tmp_path) as adapter:
        assert (adapter.format, adapter.modules[0].scaling) == ("diffusers", 4.0)
        assert codes(adapter) == [("alpha-in-header", "warning")]


def test_diffusers_alphas_in_the_header_that_disagree(tmp_path):
    save_file(DIFFUSERS, tmp_path / "x.safetensors", metadata={"lora_alpha": "12", "alpha": "3"})
    with open_source(tmp_path) as adapter:
        assert adapter.modules[0].scaling is None
        assert codes(adapter) == [("alpha-conflict", "error")]


@pytest.mark.parametrize("alpha", ["", "x", "nan", "-1", "inf"])
def test_diffusers_header_without_a_usable_alpha(alpha, tmp_path):
    save_file(DIFFUSERS, tmp_path / "x.safetensors", metadata={"alpha": alpha})
    with open_source(tmp_path) as adapter:
        assert adapter.modules[0].scaling == 1.0


def test_diffusers_own_metadata_is_a_peft_config(tmp_path):
    stated = {
        "transformer.r": R,
        "transformer.lora_alpha": 6,
        "transformer.use_rslora": True,
        "transformer.alpha_pattern": {"to_q": 9},
        "text_encoder.lora_alpha": 1,
    }
    save_file(DIFFUSERS, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(stated)})
    with open_source(tmp_path) as adapter:
        module = adapter.modules[0]
        assert (module.rule, module.lora_alpha) == ("rslora", 9.0)
        assert module.scaling == 9 / R**0.5


def test_diffusers_alpha_tensors_win(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q.alpha"
    save_file(DIFFUSERS | {name: np.array(1.5)}, tmp_path / "x.safetensors", metadata={"alpha": "12"})
    with open_source(tmp_path) as adapter:
        assert adapter.modules[0].scaling == 0.5


def test_an_adapter_config_beside_makes_it_peft(tmp_path):
    save_file(DIFFUSERS, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6}))
    with open_source(tmp_path) as adapter:
        assert (adapter.format, adapter.modules[0].scaling) == ("peft", 2.0)


def test_cloneofsimo_header_that_contradicts_its_tensors(tmp_path, rng):
    save_file(one(rng, "unet:0:down", "unet:0:up"), tmp_path / "x.safetensors", metadata={"unet:0:rank": "9"})
    with open_source(tmp_path) as adapter:
        assert codes(adapter) == [("rank-contradicts-config", "error")]


def test_mlx_without_a_scale(tmp_path, rng):
    made = mlx(tmp_path, rng)
    for text in (None, "{}", '{"lora_parameters": {"rank": 3}}'):
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "adapter_config.json").write_text(text)
        with open_source(made.source) as adapter:
            assert {m.scaling for m in adapter.modules} == {None}
            assert codes(adapter) == [("no-config", "warning")]


@pytest.mark.parametrize("scale", ['"20"', "true", "0", "-1", "NaN", "Infinity", "[]", "1" + "0" * 400])
def test_mlx_scale_that_is_none(scale, tmp_path, rng):
    made = mlx(tmp_path, rng)
    (tmp_path / "adapter_config.json").write_text(f'{{"lora_parameters": {{"scale": {scale}}}}}')
    with pytest.raises(ConfigError, match=r"lora_parameters\.scale"):
        open_source(made.source)


def test_mlx_parameters_of_the_wrong_type(tmp_path, rng):
    made = mlx(tmp_path, rng)
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": [1]}')
    with pytest.raises(ConfigError, match="wanted an object"):
        open_source(made.source)


def test_mlx_old_alpha_and_dora(tmp_path, rng):
    made = mlx(tmp_path, rng)
    save_file(load_file(made.weights) | {"model.q_proj.m": normal(rng, 5)}, made.weights)
    (tmp_path / "adapter_config.json").write_text('{"lora_parameters": {"scale": 2.0, "alpha": 16}}')
    with open_source(made.source) as adapter:
        assert codes(adapter) == [("mlx-alpha", "warning"), ("dora", "info")]
        assert {m.scaling for m in adapter.modules} == {2.0}


@pytest.mark.parametrize(
    ("a", "b"), [((4, 3), (2, 5)), ((2, 3, 4), (2, 5, 2)), ((2, 3, 4), (3, 5)), ((2, 3, 4), (1, 5, 3))]
)
def test_mlx_factors_that_do_not_fit(a, b, tmp_path, rng):
    save_file({"q.lora_a": normal(rng, *a), "q.lora_b": normal(rng, *b)}, tmp_path / "adapters.safetensors")
    with pytest.raises(TensorError, match="do not fit"):
        open_source(tmp_path)


REFUSED = {
    "LoHa": ["lora_unet_a.hada_w1_a", "lora_unet_a.hada_w1_b", "lora_unet_a.hada_w2_a", "lora_unet_a.hada_w2_b"],
    "LoKr": ["lora_unet_a.lokr_w1", "lora_unet_a.lokr_w2_a"],
    "IA3": ["base_model.model.a.ia3_l"],
    "OFT": ["lora_unet_a.oft_blocks"],
    "BOFT": ["base_model.model.a.boft_R"],
    "VeRA": ["base_model.model.a.vera_lambda_b"],
    "RandLoRA": ["base_model.model.a.randlora_lambda"],
    "FourierFT": ["base_model.model.a.fourierft_spectrum"],
    "AdaLoRA": ["base_model.model.a.lora_A", "base_model.model.a.lora_B", "base_model.model.a.lora_E"],
    "KaSA": ["base_model.model.a.lora_A.weight", "base_model.model.a.lora_diag"],
    "Tucker": ["a.lora_down.weight", "a.lora_up.weight", "a.lora_mid.weight"],
    "GLoRA": ["a.a1.weight", "a.a2.weight", "a.b1.weight", "a.b2.weight"],
    "bias on B": ["a.lora_A.weight", "a.lora_B.weight", "a.lora_B.bias"],
    "prompt tuning": ["prompt_embeddings"],
}


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "x.safetensors"])
def test_other_kinds_are_refused_by_name(name, file, tmp_path):
    save_file({key: np.ones((2, 2), np.float32) for key in REFUSED[name]}, tmp_path / file)
    with pytest.raises(UnsupportedAdapterError, match=rf"{name} .*not scaling \* B @ A"):
        open_source(tmp_path)
