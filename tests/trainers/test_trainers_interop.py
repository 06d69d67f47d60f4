"""PEFT and TRL themselves read what was written: on models of names alone, and on architectures without weights."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

pytest.importorskip("torch", reason="torch is not installed; it comes with the extra train")
pytest.importorskip("peft", reason="peft is not installed; it comes with the extra train")
pytest.importorskip("transformers", reason="transformers is not installed; it comes with the extra train")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from trainer_plans import mixed, names, peft_gives, planned, uniform, wanted
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rankwise.errors import CannotCarryError, ReadBackError, UsageError
from rankwise.trainers import TRAINERS, export
from rankwise.trainers.as_adapter import write_untrained
from rankwise.trainers.real_peft import skeleton

pytestmark = pytest.mark.interop

PER_MODULE = [name for name, trainer in TRAINERS.items() if trainer.per_module]


def llama_config(**more):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaConfig(**sizes | more)


def gpt2_config():
    return GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of two layers: config and weights, so that it can be trained from too."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    torch.manual_seed(0)
    GPT2LMHeadModel(gpt2_config()).save_pretrained(folder)
    return folder


GPT2 = {"attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (128, 32), "mlp.c_proj": (32, 128)}


def gpt2_plan(stem="transformer.h"):
    rows = [(f"{stem}.{i}.{kind}", shape, 2 + 2 * i, 4.0 + 4 * i) for i in range(2) for kind, shape in GPT2.items()]
    return planned(rows)


def without_base(made):
    """Return adapter_config.json for a model that was made in memory: PEFT warns where the base is named otherwise."""
    return json.loads(made.files["adapter_config.json"]) | {"base_model_name_or_path": None}


def attached(model):
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
@pytest.mark.parametrize("trainer", PER_MODULE)
def test_peft_itself_agrees_on_a_model_of_names(trainer, rule):
    made = export(mixed(rule), trainer)
    assert any("Checked with PEFT itself on an empty model of names and shapes: 14 modules." in n for n in made.notes)


@pytest.mark.parametrize("trainer", ["peft", "axolotl", "llamafactory", "unsloth", "trl"])
def test_peft_itself_agrees_on_a_real_architecture(trainer, llama):
    """The model shows that last parts of names select the planned layers alone, so these are written."""
    made = export(uniform(), trainer, model=str(llama))
    assert any(f"on an empty model of {llama}: 14 modules." in note for note in made.notes)
    assert all("layers.0" not in text for text in made.files.values())
    if trainer == "llamafactory":
        y = yaml.safe_load(made.files["llamafactory.yaml"])
        assert y["lora_target"] == "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
        assert y["model_name_or_path"] == str(llama)


def test_full_names_stay_where_a_last_part_would_select_more(llama):
    plan = planned((n, s, 8, 16.0) for n, s in names().items() if "layers.0" in n)
    made = export(plan, "peft", model=str(llama))
    config = without_base(made)
    assert config["target_modules"] == [m.module for m in plan.modules]
    found = attached(get_peft_model(LlamaForCausalLM(llama_config()), LoraConfig(**config)))
    assert found == wanted(plan)


@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
def test_a_saved_and_loaded_config_is_still_the_plan(rule, llama, tmp_path):
    """PEFT sorts the keys of a config when it saves it, and takes the first that matches."""
    plan = mixed(rule)
    export_folder, saved = tmp_path / "export", tmp_path / "saved"
    export_folder.mkdir()
    (export_folder / "adapter_config.json").write_text(export(plan, "peft").files["adapter_config.json"])
    model = get_peft_model(LlamaForCausalLM(llama_config()), LoraConfig.from_pretrained(export_folder))
    assert attached(model) == wanted(plan)
    model.save_pretrained(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert list(config["rank_pattern"]) == sorted(config["rank_pattern"])
    assert {name: peft_gives(config, name) for name in wanted(plan)} == wanted(plan)
    again = PeftModel.from_pretrained(LlamaForCausalLM(llama_config()), saved, is_trainable=True)
    assert attached(again) == wanted(plan)


def test_names_without_their_first_part_are_completed_from_the_model(gpt2):
    """GPT-2's published checkpoints name their tensors `h.0...`, the model its modules `transformer.h.0...`."""
    made = export(gpt2_plan("h"), "peft", model=str(gpt2))
    assert any("below transformer; their names were completed" in note for note in made.notes)
    config = without_base(made)
    assert config["fan_in_fan_out"] is True
    found = attached(get_peft_model(GPT2LMHeadModel(gpt2_config()), LoraConfig(**config)))
    assert found == wanted(gpt2_plan())


def test_a_plan_of_another_model_is_refused(llama, gpt2):
    with pytest.raises(UsageError, match=r"the model has no module transformer\.h\.0\.attn\.c_attn.*\(8 of 8"):
        export(gpt2_plan(), "peft", model=str(llama))
    rows = [("model.layers.0.self_attn.q_proj", (64, 64), 4, 8.0)]
    with pytest.raises(UsageError, match=r"has shape \(64, 64\) in the plan and \(32, 32\) in the model"):
        export(planned(rows), "peft", model=str(llama))


def test_a_model_that_is_not_here_is_named_and_not_compared():
    made = export(uniform(), "axolotl", model="org/base", ask_peft=False)
    assert yaml.safe_load(made.files["axolotl.yaml"])["base_model"] == "org/base"
    assert any("org/base is no folder with a config.json" in note for note in made.notes)


def test_a_vision_language_model_keeps_its_two_towers_apart(tmp_path):
    """The same layers in both towers: only full names tell them apart, and PEFT agrees on the real architecture."""
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(text_config=llama_config().to_dict(), vision_config=vision.to_dict(), image_token_index=39)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    rows = [
        (f"model.language_model.layers.{i}.self_attn.{kind}", shape, 4 * (i + 1), 8.0 * (i + 1))
        for i in range(2)
        for kind, shape in (("q_proj", (32, 32)), ("v_proj", (16, 32)))
    ]
    made = export(planned(rows), "peft", model=str(tmp_path))
    assert any("Checked with PEFT itself" in note for note in made.notes)
    targets = json.loads(made.files["adapter_config.json"])["target_modules"]
    assert targets == [name for name, *_ in rows]  # q_proj alone would reach the vision tower too
    with pytest.raises(UsageError, match=r"the model has no module model\.layers\.0"):
        export(mixed(), "peft", model=str(tmp_path))


def test_a_name_that_selects_a_module_outside_the_plan_is_an_error(tmp_path, monkeypatch):
    """`fc` in a list means every module whose name ends in it; only the model knows that there is another."""
    from rankwise.trainers import fitting
    from rankwise.trainers.real_peft import Architecture

    tree = nn.Module()
    tree.fc, tree.tower = nn.Linear(8, 8, device="meta"), nn.Module()
    tree.tower.fc = nn.Linear(8, 8, device="meta")
    (tmp_path / "config.json").write_text("{}")
    known = Architecture(tree, ("fc", "tower", "tower.fc"), {"fc": (8, 8), "tower.fc": (8, 8)}, frozenset(), {})
    monkeypatch.setattr(fitting, "load_architecture", lambda folder: known)
    with pytest.raises(ReadBackError, match=r"gives an adapter to tower\.fc, which is not planned"):
        export(planned([("fc", (8, 8), 4, 8.0)]), "peft", model=str(tmp_path), ask_peft=False)


def test_peft_is_really_asked(monkeypatch):
    """What PEFT would do otherwise is seen, also where our own reading of the file agrees with the plan."""
    from rankwise.trainers import readback

    real = readback.ask_peft
    for change, words in (
        (lambda got: {**got, "model.layers.0.mlp": (8, 2.0)}, r"gives an adapter to model\.layers\.0\.mlp"),
        (lambda got: {k: (r, 2 * s) for k, (r, s) in got.items()}, r"as PEFT reads it, is not the plan in 14 of 14"),
        (lambda got: dict(list(got.items())[1:]), r"in 1 of 14 .* gets no adapter"),
    ):
        monkeypatch.setattr(readback, "ask_peft", lambda *args, change=change: change(real(*args)))
        with pytest.raises(ReadBackError, match=words):
            export(uniform(), "peft")


def test_without_peft_the_export_is_compared_by_its_rules_alone(monkeypatch):
    from rankwise.trainers import exporting

    monkeypatch.setattr(exporting, "installed", lambda *packages: False)
    made = export(mixed(), "peft")
    assert not any("PEFT itself" in note for note in made.notes)
    assert {m.module: (m.r, m.scaling) for m in made.modules} == wanted(mixed())


def test_a_mixture_of_experts_whose_names_peft_takes_for_others_is_an_error(tmp_path):
    """Since transformers 5 the experts are one parameter; PEFT turns w1, w2, w3 of old checkpoints into parameters."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    rows = [("model.layers.0.block_sparse_moe.experts.0.w1", (64, 32), 4, 8.0)]
    with pytest.raises(UsageError, match="the model has no module"):
        export(planned(rows), "peft", model=str(tmp_path))
    rows = [("model.layers.0.self_attn.q_proj", (32, 32), 4, 8.0)]
    made = export(planned(rows), "peft", model=str(tmp_path))
    assert any("Checked with PEFT itself" in note for note in made.notes)


# TRL


def test_trls_own_parser_reads_the_yaml(tmp_path):
    """`trl sft --config FILE`, up to the LoraConfig that it makes of it."""
    trl = pytest.importorskip("trl", reason="trl is not installed; it comes with the extra train")
    from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config

    for plan in (
        uniform(16, 8.0, "rslora", learning_rate=3e-5),
        uniform(8, 16.0),
        planned([("net.w+q.x", (8, 8), 4, 8.0)]),
        planned([("a.q", (8, 8), 4, 2.0)], "unscaled"),
    ):
        made = export(plan, "trl", ask_peft=False)
        path = tmp_path / "trl_sft.yaml"
        path.write_text(made.files["trl_sft.yaml"])
        parser = trl.TrlParser((ScriptArguments, SFTConfig, ModelConfig))
        words = ["--config", str(path), "--output_dir", str(tmp_path / "out"), "--dataset_name", "x", "--bf16", "false"]
        _, training, model = parser.parse_args_and_config(words)
        config = get_peft_config(model)
        tree = skeleton(_asked(plan), [])
        config.task_type = None
        assert attached(get_peft_model(tree, config)) == wanted(plan)
        assert config.lora_dropout == 0.0
        if plan.learning_rate is not None:
            assert training.learning_rate == plan.learning_rate


def _asked(plan):
    from rankwise.trainers.fitting import plan_modules

    return plan_modules(plan)[0]


def run_file(made, name, folder):
    """Import a written Python file, as a user would."""
    import importlib.util

    path = folder / name
    path.write_text(made.files[name])
    spec = importlib.util.spec_from_file_location("written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_python_files_run(tmp_path, monkeypatch):
    """TRL's builds its LoraConfig; Unsloth's hands its arguments to get_peft_model (a stand-in here)."""
    written = run_file(export(mixed("rslora"), "trl", ask_peft=False), "trl_lora.py", tmp_path)
    found = attached(get_peft_model(LlamaForCausalLM(llama_config()), written.PEFT_CONFIG))
    assert found == wanted(mixed("rslora"))

    class Fast:
        @staticmethod
        def get_peft_model(model, **arguments):
            return get_peft_model(model, LoraConfig(**arguments))

    from types import ModuleType

    package = ModuleType("unsloth")
    package.FastLanguageModel = Fast
    monkeypatch.setitem(sys.modules, "unsloth", package)
    written = run_file(export(mixed("rslora"), "unsloth", ask_peft=False), "unsloth_lora.py", tmp_path)
    assert attached(written.add_lora(LlamaForCausalLM(llama_config()))) == wanted(mixed("rslora"))


def test_trls_trainer_starts_from_the_plan_and_from_the_adapter(tmp_path):
    """The function in the file makes an SFTTrainer whose model has the planned ranks and scales, both ways."""
    pytest.importorskip("trl", reason="trl is not installed; it comes with the extra train")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    sys.path.insert(0, str((__import__("pathlib").Path(__file__).parents[1] / "tuning").resolve()))
    from small_models import make_pico

    pico = make_pico(tmp_path / "pico")
    plan = mixed("rslora", learning_rate=3e-5)
    data = Dataset.from_list([{"text": "a b c"}] * 2)
    settings = {"output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True, "bf16": False}
    written = run_file(export(plan, "trl", ask_peft=False), "trl_lora.py", tmp_path)
    trainer = written.trainer(str(pico), data, **settings)
    assert attached(trainer.model) == wanted(plan)
    assert trainer.args.learning_rate == 3e-5
    write_untrained(plan, tmp_path / "start", model=str(pico))
    made = export(plan, "trl", adapter=str(tmp_path / "start"))
    assert any("was compared with the plan: 14 modules" in note for note in made.notes)
    written = run_file(made, "trl_lora.py", tmp_path)
    trainer = written.trainer(AutoModelForCausalLM.from_pretrained(pico), data, max_steps=1, **settings)
    assert attached(trainer.model) == wanted(plan)
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)


def test_the_calls_of_llamafactory_and_axolotl_load_the_untrained_adapter(tmp_path, llama):
    """With the keyword arguments that they pass (model/adapter.py, loaders/adapter.py), and train it on."""
    write_untrained(mixed("rslora"), tmp_path / "start", model=str(llama))
    for more in (
        {"subfolder": None, "offload_folder": "offload", "cache_dir": None, "revision": "main", "token": None},
        {"autocast_adapter_dtype": False},
    ):
        base = LlamaForCausalLM.from_pretrained(llama)
        model = PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True, **more)
        assert attached(model) == wanted(mixed("rslora"))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if "lora_" in n
        }


def test_an_adapter_that_is_not_the_plan_is_refused(tmp_path, llama):
    write_untrained(mixed(), tmp_path / "start")
    with pytest.raises(ReadBackError, match=r"is not the plan in \d+ of 14 modules"):
        export(uniform(), "llamafactory", adapter=str(tmp_path / "start"))
    with pytest.raises(CannotCarryError, match="cannot start from"):
        export(mixed(), "torchtune", adapter=str(tmp_path / "start"))
