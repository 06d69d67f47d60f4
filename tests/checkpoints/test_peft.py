"""PEFT adapters as they lie on disk, without PEFT: keys, contradictions, what is skipped and what is told."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints.making import R, normal, peft
from rankwise.checkpoints import open_source
from rankwise.errors import ConfigError, TensorError, UnknownFormatError, UnsupportedAdapterError

A, B = "lora_A.weight", "lora_B.weight"


def write(folder, tensors, **config):
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6, **config}))
    return folder


def factors(rng, module, r=R, out=5, inner=4, dtype=np.float32):
    return {f"{module}.{A}": normal(rng, r, inner, dtype=dtype), f"{module}.{B}": normal(rng, out, r, dtype=dtype)}


def codes(adapter):
    return [(f.code, f.level) for f in adapter.findings]


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model." * 2, "base_model.model." * 3])
def test_prefixes_are_stripped_however_often_repeated(prefix, tmp_path, rng):
    with open_source(write(tmp_path, factors(rng, f"{prefix}model.q"))) as adapter:
        assert [m.module for m in adapter.modules] == ["model.q"]
        assert adapter.modules[0].scaling == 2.0
        assert not adapter.findings


def test_adapter_names_in_keys(tmp_path, rng):
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in factors(rng, "base_model.model.q").items()}
    with open_source(write(tmp_path, tensors)) as adapter:
        assert [m.module for m in adapter.modules] == ["q"]
    tensors |= {k.replace(".default.", ".other."): v for k, v in tensors.items()}
    with pytest.raises(UnsupportedAdapterError, match="several adapters"):
        open_source(write(tmp_path, tensors))


def test_bare_file_takes_the_config_beside_it_and_says_where_there_is_none(tmp_path, rng):
    made = peft(tmp_path, rng)
    with open_source(made.weights) as adapter:
        assert adapter.modules[0].scaling == 2.0
    (tmp_path / "adapter_config.json").unlink()
    with open_source(made.weights) as adapter:
        assert codes(adapter) == [("no-config", "warning")]
        for module in adapter.modules:
            assert (module.r, module.lora_alpha, module.scaling, module.rule) == (R, None, None, None)
            adapter.read_factors(module)


def test_gpt2_without_prefix_and_config_is_not_taken_for_an_image_model(tmp_path, rng):
    save_file(factors(rng, "transformer.h.0.attn.c_attn"), tmp_path / "adapter_model.safetensors")
    with open_source(tmp_path) as adapter:
        assert (adapter.format, adapter.modules[0].scaling) == ("peft", None)


def test_config_that_is_silent_takes_pefts_defaults_and_says_so(tmp_path, rng):
    save_file(factors(rng, "q", r=8), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with open_source(tmp_path) as adapter:
        assert adapter.modules[0].scaling == 1.0
        assert codes(adapter) == [("config-defaults", "warning")]


def test_rank_that_contradicts_the_config(tmp_path, rng):
    """r is the tensors', the scaling the config's, and the finding says that neither can be relied on."""
    tensors = factors(rng, "base_model.model.a.q", r=5) | factors(rng, "base_model.model.a.v")
    with open_source(write(tmp_path, tensors)) as adapter:
        assert codes(adapter) == [("rank-contradicts-config", "error")]
        assert "a.q: the config gives rank 3, the tensors have 5" in adapter.findings[0].text
        q, v = adapter.modules
        assert (q.r, q.scaling, q.warnings) == (5, 2.0, ("rank-contradicts-config",))
        assert (v.r, v.scaling, v.warnings) == (3, 2.0, ())


def test_patterns_that_match_nothing_are_told(tmp_path, rng):
    with open_source(write(tmp_path, factors(rng, "m.q_proj"), rank_pattern={"proj": 7})) as adapter:
        assert codes(adapter) == [("pattern-unmatched", "warning")]
        assert "rank_pattern['proj']" in adapter.findings[0].text


def test_one_factor_without_the_other(tmp_path, rng):
    tensors = (
        factors(rng, "base_model.model.a") | factors(rng, "base_model.model.b") | factors(rng, "base_model.model.c")
    )
    del tensors[f"base_model.model.a.{B}"], tensors[f"base_model.model.b.{A}"]
    with open_source(write(tmp_path, tensors)) as adapter:
        assert codes(adapter) == [("a-only", "error"), ("b-only", "error")]
        assert [s.module for s in adapter.skipped] == ["a", "b"]
        assert [m.module for m in adapter.modules] == ["c"]


def test_an_adapter_without_any_pair_still_opens(tmp_path, rng):
    with open_source(write(tmp_path, {f"a.{A}": normal(rng, 3, 4)})) as adapter:
        assert not adapter.modules
        assert codes(adapter) == [("a-only", "error")]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (
            (3, 4),
            (5, 2),
            r"a\.lora_A\.weight of shape \(3, 4\) and a\.lora_B\.weight of shape \(5, 2\).*rank 3, B of rank 2",
        ),
        ((4, 4), (6, 2), "do not fit"),  # would be a grouped convolution, if it were one
        ((0, 4), (5, 0), "none of them 0"),
        ((3,), (5, 3), "wanted 2 dimensions"),
        ((3, 4, 1, 1, 1), (5, 3, 1, 1, 1), "wanted 2 dimensions"),
        ((3, 4, 1, 1), (5, 3, 3, 3), "that of B must be 1"),
    ],
)
def test_factors_that_do_not_fit(a, b, words, tmp_path, rng):
    write(tmp_path, {f"a.{A}": normal(rng, *a), f"a.{B}": normal(rng, *b)})
    with pytest.raises(TensorError, match=words):
        open_source(tmp_path)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.bool_, np.complex64])
def test_factors_that_are_no_floats(dtype, tmp_path, rng):
    tensors = {k: np.ones(v.shape, dtype) for k, v in factors(rng, "a").items()}
    with pytest.raises(TensorError, match=r"factors are floats"):
        open_source(write(tmp_path, tensors))


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "float64"])
def test_every_float_dtype_is_widened_exactly(name, tmp_path, rng):
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    tensors = factors(rng, "a", dtype=dtype)
    with open_source(write(tmp_path, tensors)) as adapter:
        a, b = adapter.read_factors(adapter.modules[0])
        wide = np.float64 if name == "float64" else np.float32
        assert a.dtype == b.dtype == wide
        np.testing.assert_array_equal(a, tensors[f"a.{A}"].astype(wide))
        np.testing.assert_array_equal(b, tensors[f"a.{B}"].astype(wide))


def test_what_is_stored_whole_is_skipped_with_its_reason(tmp_path, rng):
    extra = {
        "base_model.model.classifier.weight": normal(rng, 2, 4),
        "base_model.model.score.modules_to_save.default.weight": normal(rng, 2, 4),
        "base_model.model.a.bias": normal(rng, 4),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": normal(rng, 2, 4),
    }
    with open_source(write(tmp_path, factors(rng, "base_model.model.a") | extra)) as adapter:
        assert codes(adapter) == [("modules-to-save", "info")]
        reasons = {s.module: s.reason for s in adapter.skipped}
        assert "modules_to_save" in reasons["classifier"]
        assert "modules_to_save" in reasons["score"]
        assert "bias" in reasons["a"]
        assert "trainable_token_indices" in reasons["embed.token_adapter.trainable_tokens_delta"]


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora(key, tmp_path, rng):
    tensors = factors(rng, "base_model.model.a") | {f"base_model.model.a.{key}": normal(rng, 5)}
    with open_source(write(tmp_path, tensors, use_dora=True)) as adapter:
        assert codes(adapter) == [("dora", "info")]
        assert adapter.modules[0].warnings == ("dora",)


@pytest.mark.parametrize(
    ("init", "told"),
    [("pissa", 1), ("pissa_niter_16", 1), ("olora", 1), ("corda", 1), ("loftq", 1), ("lora_ga", 1), ("new", 1),
     ("gaussian", 0), ("eva", 0), ("orthogonal", 0), (True, 0), (False, 0), (None, 0)],
)  # fmt: skip
def test_starts_that_change_the_base(init, told, tmp_path, rng):
    with open_source(write(tmp_path, factors(rng, "a"), init_lora_weights=init)) as adapter:
        assert codes(adapter) == [("init-changes-base", "warning")] * told


def test_embeddings_come_as_the_stored_table(tmp_path, rng):
    a, b = normal(rng, R, 7), normal(rng, 4, R)  # (r, num_embeddings), (embedding_dim, r)
    tensors = {"base_model.model.emb.lora_embedding_A": a, "base_model.model.emb.lora_embedding_B": b}
    with open_source(write(tmp_path, tensors)) as adapter:
        (module,) = adapter.modules
        assert (module.module, module.shape, module.kind) == ("emb", (7, 4), "embedding")
        first, second = adapter.read_factors(module)
        np.testing.assert_allclose(second @ first, (b @ a).T, rtol=1e-5)


def test_experts_of_several_parameters_whose_order_is_not_known(tmp_path, rng):
    tensors = factors(rng, "m.experts", r=6) | factors(rng, "m.experts.base_layer", r=6)
    config = {"target_parameters": ["experts.first_odd_name", "experts.second_odd_name"]}
    with open_source(write(tmp_path, tensors, **config)) as adapter:
        assert {m.module for m in adapter.modules} == {
            f"m.experts{inner}[{i}]" for inner in ("", ".base_layer") for i in (0, 1)
        }
        assert codes(adapter) == [("expert-names", "warning")]


def test_experts_whose_number_cannot_be_told(tmp_path, rng):
    tensors = factors(rng, "m.experts", r=7) | factors(rng, "m.q")
    with open_source(write(tmp_path, tensors, target_parameters=["experts.down_proj"])) as adapter:
        assert codes(adapter) == [("rank-contradicts-config", "error")]
        assert [m.module for m in adapter.modules] == ["m.q"]
        assert "no multiple" in adapter.skipped[0].reason


def test_two_pairs_for_one_module(tmp_path, rng):
    tensors = factors(rng, "base_model.model.a") | factors(rng, "base_model.model.base_model.model.a")
    with pytest.raises(TensorError, match="two pairs of factors for a"):
        open_source(write(tmp_path, tensors))


@pytest.mark.parametrize(
    ("config", "name"),
    [({"peft_type": t}, t) for t in ("LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "ADALORA", "PROMPT_TUNING", "HRA")]
    + [
        ({"lora_bias": True}, "bias on B"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    ],
)
def test_other_kinds_are_refused_by_the_config(config, name, tmp_path, rng):
    with pytest.raises(UnsupportedAdapterError, match=name):
        open_source(write(tmp_path, factors(rng, "a"), **config))


def test_config_of_another_kind_whose_tensors_are_unknown(tmp_path, rng):
    with pytest.raises(UnsupportedAdapterError, match="SHIRA"):
        open_source(write(tmp_path, {"base_model.model.a.shira_weight": normal(rng, 3)}, peft_type="SHIRA"))
    with pytest.raises(UnknownFormatError, match="none is a LoRA factor"):
        open_source(write(tmp_path, {"base_model.model.a.strange": normal(rng, 3)}))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "\xff\xfe", "{" * 100_000, '{"r": NaN}', '{"target_parameters": "x"}']
)
def test_configs_that_are_none(text, tmp_path, rng):
    made = peft(tmp_path, rng)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        open_source(made.source)


def test_order_of_the_file(tmp_path, rng):
    made = peft(tmp_path, rng)
    with open_source(made.source) as adapter:
        by_file = list(
            dict.fromkeys(k.split(".lora_")[0].removeprefix("base_model.model.") for k in load_file(made.weights))
        )
        assert [m.module for m in adapter.modules] == by_file
