"""Layouts: what is written in each, read back by readers of the test's own, there and back again."""

import json

import ml_dtypes
import numpy as np
import pytest
from adapter_making import PREFIX, peft_adapter
from adapter_reading import config_of, diffusers, gap, header, kohya, mlx, peft, tensors
from safetensors.numpy import save_file

from checkpoints.making import MAKERS
from rankwise import convert, inspect
from rankwise.adapters.formats import WRITERS
from rankwise.adapters.formats.names import component_of, spelled_out, underscored
from rankwise.errors import UnsupportedAdapterError, UsageError

UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (20, 16),
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (24, 16),
    "up_blocks.1.attentions.2.proj_in": (16, 16),
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0": (16, 18),
}
IMAGE = {f"unet.{m}": s for m, s in UNET.items()} | {
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": (12, 12)
}
LANGUAGE = {"model.layers.0.self_attn.q_proj": (20, 16), "model.layers.3.mlp.down_proj": (16, 24)}
KOHYA = [
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
    "lora_unet_up_blocks_1_attentions_2_proj_in",
    "lora_unet_up_blocks_1_attentions_1_transformer_blocks_0_attn2_to_out_0",
]


def write_kohya(file, rng, names=KOHYA, alphas=(4.0, 1.0, 11.0, None), r=6):
    held = {}
    for name, alpha in zip(names, alphas, strict=False):
        held[f"{name}.lora_down.weight"] = rng.standard_normal((r, 16)).astype(np.float16)
        held[f"{name}.lora_up.weight"] = rng.standard_normal((20, r)).astype(np.float16)
        if alpha is not None:
            held[f"{name}.alpha"] = np.array(alpha, np.float16)
    held["lora_unet_up_blocks_0_resnets_0_conv1.lora_down.weight"] = rng.standard_normal((r, 4, 3, 3)).astype(
        np.float16
    )
    held["lora_unet_up_blocks_0_resnets_0_conv1.lora_up.weight"] = rng.standard_normal((8, r, 1, 1)).astype(np.float16)
    save_file(held, file, metadata={"ss_network_dim": str(r), "ss_network_alpha": "4", "ss_sd_model_name": "x"})
    return file


def close(old, new, error=0.0):
    assert set(old) == set(new)
    for module in old:
        # alphas in float32 and exact factors: one unit in the last place of float32 at most
        assert gap(old[module], new[module]) <= error + 1.2e-7


@pytest.mark.parametrize("way", [{}, {"rank": 3}, {"bake": True}, {"lora_alpha": 2.0}, {"rank": 9}])
def test_kohya_to_kohya_keeps_names_header_and_function(tmp_path, rng, way) -> None:
    source = write_kohya(tmp_path / "a.safetensors", rng)
    record = convert(source, tmp_path / "b.safetensors", **way)
    old, new = kohya(source), kohya(tmp_path / "b.safetensors")
    assert set(old) == set(new)
    for module in record.modules:
        assert module.relative_error == pytest.approx(gap(old[module.module], new[module.module]), rel=1e-4, abs=2e-7)
    if not way or ("rank" in way and way["rank"] == 9):
        assert record.exact
    assert header(tmp_path / "b.safetensors")["ss_sd_model_name"] == "x"
    held = tensors(tmp_path / "b.safetensors")
    assert all(f"{name}.alpha" in held for name in old)  # where there is none, programs take 1
    assert held["lora_unet_up_blocks_0_resnets_0_conv1.lora_down.weight"].shape[1:] == (4, 3, 3)


def test_kohya_to_diffusers_and_back_by_the_words_that_are_known(tmp_path, rng) -> None:
    source = write_kohya(tmp_path / "a.safetensors", rng)
    convert(source, tmp_path / "d", format="diffusers")
    made = diffusers(tmp_path / "d" / "pytorch_lora_weights.safetensors")
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in made
    assert "unet.up_blocks.0.resnets.0.conv1" in made
    old = kohya(source)
    for name, triple in old.items():
        assert gap(triple, made[spelled_out(name)]) <= 1.2e-7
    back = convert(tmp_path / "d", tmp_path / "k.safetensors", format="kohya")
    assert back.exact
    close(old, kohya(tmp_path / "k.safetensors"))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ranks", [None, {"unet.up_blocks.1.attentions.2.proj_in": 3}])
def test_diffusers_to_diffusers_with_its_header(tmp_path, rng, rslora, ranks) -> None:
    flat = {}
    held = {}
    for name, (out, inner) in IMAGE.items():
        r = (ranks or {}).get(name, 4)
        held[f"{name}.lora_A.weight"] = rng.standard_normal((r, inner)).astype(ml_dtypes.bfloat16)
        held[f"{name}.lora_B.weight"] = rng.standard_normal((out, r)).astype(ml_dtypes.bfloat16)
    for component, alpha in (("unet", 7), ("text_encoder", 32)):
        flat |= {f"{component}.r": 4, f"{component}.lora_alpha": alpha, f"{component}.use_rslora": rslora}
        flat[f"{component}.rank_pattern"] = {k.partition(".")[2]: v for k, v in (ranks or {}).items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(held, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(flat), "author": "me"})
    record = convert(file, tmp_path / "b.safetensors")
    close(diffusers(file), diffusers(tmp_path / "b.safetensors"))
    assert record.exact
    assert header(tmp_path / "b.safetensors")["author"] == "me"
    assert any("since 0.34" in note for note in record.notes)
    baked = convert(file, tmp_path / "c.safetensors", bake=True, dtype="float32")
    close(diffusers(file), diffusers(tmp_path / "c.safetensors"))
    plain = {k: (a, b, 1.0) for k, (a, b, _) in diffusers(tmp_path / "c.safetensors").items()}
    close(diffusers(file), plain)  # also for programs that read tensors alone
    assert not any("since 0.34" in note for note in baked.notes)


def test_older_spellings_of_diffusers_are_written_in_the_new_one(tmp_path, rng) -> None:
    made = MAKERS["diffusers"](tmp_path, rng)
    convert(made.source, tmp_path / "out", bake=True)
    found = diffusers(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert set(found) == set(made.deltas)
    for module, (a, b, scale) in found.items():
        assert scale * (b @ a) == pytest.approx(made.deltas[module], rel=1e-5, abs=1e-6)


def test_peft_to_kohya_and_back_by_the_header(tmp_path, rng) -> None:
    """Underscored names of language models lead back through the header alone."""
    source = peft_adapter(
        tmp_path / "a", rng, shapes=LANGUAGE, ranks={"model.layers.3.mlp.down_proj": 3}, lora_alpha=11
    )
    record = convert(source, tmp_path / "k.safetensors", format="kohya")
    assert any("language models" in note for note in record.notes)
    found = kohya(tmp_path / "k.safetensors")
    assert set(found) == {"lora_model_layers_0_self_attn_q_proj", "lora_model_layers_3_mlp_down_proj"}
    for name, triple in peft(source).items():
        assert gap(triple, found["lora_" + name.replace(".", "_")]) <= 1.2e-7
    convert(tmp_path / "k.safetensors", tmp_path / "p", format="peft")
    close(peft(source), peft(tmp_path / "p"))
    assert config_of(tmp_path / "p")["base_model_name_or_path"] is None


def test_peft_of_a_unet_gets_the_prefixes_of_kohya_and_diffusers(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, shapes=UNET, target_modules=list(UNET), task_type=None)
    convert(source, tmp_path / "k.safetensors", format="kohya")
    assert set(kohya(tmp_path / "k.safetensors")) == set(KOHYA)
    convert(source, tmp_path / "d", format="diffusers")
    assert set(diffusers(tmp_path / "d" / "pytorch_lora_weights.safetensors")) == {f"unet.{m}" for m in UNET}
    convert(tmp_path / "k.safetensors", tmp_path / "back", format="peft")
    close(peft(source), peft(tmp_path / "back"))


def test_a_file_of_two_models_has_no_place_in_one_peft_folder(tmp_path, rng) -> None:
    held = {}
    for name in ("unet.mid_block.attentions.0.proj_in", "text_encoder.text_model.encoder.layers.0.mlp.fc1"):
        held[f"{name}.lora_A.weight"] = rng.standard_normal((4, 8)).astype(np.float32)
        held[f"{name}.lora_B.weight"] = rng.standard_normal((8, 4)).astype(np.float32)
    save_file(held, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UsageError, match=r"several models \(text_encoder, unet\)"):
        convert(tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "p", format="peft")


@pytest.mark.parametrize("ranks", [None, {"model.layers.3.mlp.down_proj": 3}])
@pytest.mark.parametrize("alphas", [{}, {"alpha_pattern": {"down_proj": 5}}])
def test_peft_to_mlx_and_back(tmp_path, rng, ranks, alphas) -> None:
    source = peft_adapter(tmp_path / "a", rng, shapes=LANGUAGE, ranks=ranks, **alphas)
    record = convert(source, tmp_path / "m", format="mlx")
    close(peft(source), mlx(tmp_path / "m"))
    config = config_of(tmp_path / "m")
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 4
    if not alphas and not ranks:
        assert record.exact
    convert(tmp_path / "m", tmp_path / "p", format="peft")
    close(peft(source), peft(tmp_path / "p"))


@pytest.mark.parametrize("way", [{}, {"rank": 2}, {"bake": True}])
def test_mlx_to_mlx_with_experts_and_embeddings(tmp_path, rng, way) -> None:
    made = MAKERS["mlx"](tmp_path, rng)
    record = convert(made.source, tmp_path / "out", **way)
    again = inspect(tmp_path / "out")
    before = inspect(made.source)
    assert [m.module for m in again.modules] == [m.module for m in before.modules]
    if not way.get("rank"):
        for old, new in zip(before.modules, again.modules, strict=True):
            kept = len(old.singular_values)  # zeros follow where it was filled
            assert new.singular_values[:kept] == pytest.approx(old.singular_values, rel=1e-6)
    parameters = config_of(tmp_path / "out")["lora_parameters"]
    assert parameters["scale"] == (1.0 if way.get("bake") else 20.0)
    assert {m.after.r for m in record.modules} == {parameters["rank"]}


@pytest.mark.parametrize("form", sorted(MAKERS.keys() - {"checkpoint", "cloneofsimo"}))
def test_every_format_converts_to_itself_exactly(tmp_path, rng, form) -> None:
    """Property over the whole table, held to the truth that the test of the readers plants."""
    made = MAKERS[form](tmp_path, rng)
    out = tmp_path / ("out.safetensors" if not WRITERS[form].folder else "out")
    record = convert(made.source, out, bake=form == "diffusers")
    assert record.exact
    assert record.relative_error == 0
    assert {m.module for m in record.modules} == set(made.deltas)
    again = {m.module: m for m in inspect(out).modules}
    for module, wanted in made.deltas.items():
        assert again[module].energy == pytest.approx(float(np.sum(wanted.astype(np.float64) ** 2)), rel=1e-5)


@pytest.mark.parametrize("form", sorted(WRITERS))
def test_cloneofsimo_is_refused_in_words(tmp_path, rng, form) -> None:
    made = MAKERS["cloneofsimo"](tmp_path, rng)
    with pytest.raises((UsageError, UnsupportedAdapterError), match=r"holds no names|stored whole|beside the factors"):
        convert(made.source, tmp_path / "out", format=form)
    with pytest.raises(UsageError, match="holds no names: it cannot be written as another format"):
        convert(made.source, tmp_path / "out")  # no advice to try the formats one by one


@pytest.mark.parametrize(
    ("shapes", "form", "words"),
    [
        (LANGUAGE, "diffusers", "no layer of an image or video model"),
        (UNET, "mlx", "cannot be written as mlx"),
    ],
)
def test_modules_that_a_format_has_no_name_for_are_refused(tmp_path, rng, shapes, form, words) -> None:
    with pytest.raises(UsageError, match=words):
        convert(peft_adapter(tmp_path / "a", rng, shapes=shapes), tmp_path / "b", format=form)


def test_names_of_kohya_that_lead_nowhere_are_refused(tmp_path, rng) -> None:
    names = ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"]
    source = write_kohya(tmp_path / "a.safetensors", rng, names=names, alphas=(1.0,))
    with pytest.raises(UsageError, match="does not lead back"):
        convert(source, tmp_path / "p", format="peft")
    assert convert(source, tmp_path / "k.safetensors").exact


@pytest.mark.parametrize("path", [*IMAGE, *(f"transformer.{m}" for m in (
    "single_transformer_blocks.7.attn.to_q", "transformer_blocks.0.ff_context.net.2", "x_embedder"))])  # fmt: skip
def test_known_words_lead_there_and_back(path) -> None:
    (name,) = underscored({"m": path}).values()
    assert spelled_out(name) == path
    assert name.startswith(("lora_unet_", "lora_te_", "lora_transformer_"))


def test_both_text_encoders_of_sdxl_are_numbered() -> None:
    made = underscored({"a": "text_encoder.text_model.final", "b": "text_encoder_2.text_model.final"})
    assert list(made.values()) == ["lora_te1_text_model_final", "lora_te2_text_model_final"]


def test_two_paths_that_would_share_a_name_are_refused() -> None:
    with pytest.raises(UsageError, match="both be called"):
        underscored({"a": "model.up_proj", "b": "model.up.proj"})


def test_language_models_are_no_component() -> None:
    for name in ("model.layers.0.mlp.up_proj", "transformer.h.0.attn.c_attn", "bert.encoder.layer.0.output.dense"):
        assert component_of(name) is None


def test_a_comfyui_file_holds_every_alpha(tmp_path, rng) -> None:
    source = peft_adapter(
        tmp_path / "a", rng, shapes=UNET, ranks={"up_blocks.1.attentions.2.proj_in": 3}, use_rslora=True, task_type=None
    )
    record = convert(source, tmp_path / "out.safetensors", runtime="comfyui")
    assert record.out_format == "kohya"
    found = kohya(tmp_path / "out.safetensors")
    assert any(note.startswith("For comfyui") for note in record.notes)
    assert all(served.right for served in record.runtimes)
    for name, triple in peft(source).items():
        assert gap(triple, found["lora_unet_" + name.replace(".", "_")]) <= 1.2e-7


def test_a_folder_format_takes_no_file_name(tmp_path, rng) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        convert(peft_adapter(tmp_path / "a", rng), tmp_path / "b.safetensors")


def test_nothing_stored_beside_is_lost_between_kohya_files(tmp_path, rng) -> None:
    source = write_kohya(tmp_path / "a.safetensors", rng)
    held = tensors(source) | {"emb_params": np.ones((2, 3), np.float32)}
    save_file(held, source)
    record = convert(source, tmp_path / "b.safetensors")
    assert record.carried == ("emb_params",)
    assert np.array_equal(tensors(tmp_path / "b.safetensors")["emb_params"], held["emb_params"])
    with pytest.raises(UnsupportedAdapterError, match="emb_params"):
        convert(source, tmp_path / "d", format="diffusers")


def test_paths_of_a_model_wrapped_twice_are_kept(tmp_path, rng) -> None:
    shapes = {f"{PREFIX}{m}": s for m, s in LANGUAGE.items()}
    source = peft_adapter(tmp_path / "a", rng, shapes=shapes)
    convert(source, tmp_path / "b", rank=4)
    assert list(tensors(tmp_path / "b" / "adapter_model.safetensors")) == list(
        tensors(source / "adapter_model.safetensors")
    )
