"""Stacked experts: one parameter in `target_parameters`, the same rank and scale for each expert, as PEFT has it."""

from __future__ import annotations

import json

import pytest
import yaml
from trainer_plans import planned

from rankwise.errors import CannotCarryError, ReadBackError, UsageError
from rankwise.trainers import TRAINERS, export
from rankwise.trainers.as_adapter import write_untrained
from rankwise.trainers.text import read_call, to_call

# PEFT 0.21.2 compares the keys of patterns with target modules alone when it warns of keys that match nothing; it
# applies them to parameters all the same, which is what is tested here
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

EXPERTS = 4
UP, DOWN = (128, 32), (32, 64)  # (out, in) of each expert of the small Mixtral
CARRY = ["peft", "axolotl", "unsloth", "trl"]


def stack(name, shape, r, alpha, experts=EXPERTS):
    return [(f"{name}[{i}]", shape, r, alpha) for i in range(experts)]


def rows(alphas=(2.0, 4.0, 8.0, 4.0)):
    """Ranks of their own for the experts of both layers and for an attention layer; `down_proj` of layer 1 is out."""
    a, b, c, d = alphas
    return [
        ("model.layers.0.self_attn.q_proj", (32, 32), 4, a),
        *stack("model.layers.0.mlp.experts.gate_up_proj", UP, 4, b),
        *stack("model.layers.0.mlp.experts.down_proj", DOWN, 16, c),
        *stack("model.layers.1.mlp.experts.gate_up_proj", UP, 1, d),
        *stack("model.layers.1.mlp.experts.down_proj", DOWN, 0, 1.0),
    ]


def wanted(plan):
    """Return name -> (rank, scale), the experts of a parameter under its name."""
    return {m.module.partition("[")[0]: (m.r, m.scaling) for m in plan.modules if m.r}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    pytest.importorskip("torch", reason="torch is not installed; it comes with the extra train")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed; it comes with the extra train")
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
    )
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(folder)
    return folder


def attached(config, folder):
    """Return what real PEFT puts on a Mixtral with weights: parameter or module -> (rank, scale), and the experts."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig.from_pretrained(folder))
    made = get_peft_model(model, config if isinstance(config, LoraConfig) else LoraConfig(**config))
    found, factors = {}, {}
    for name, layer in made.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            parameter = getattr(layer, "parameter_name", None)
            name = name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"
            assert name not in found
            found[name] = (layer.r["default"], layer.scaling["default"])
            factors[name] = (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape)
    return made, found, factors


@pytest.mark.interop
@pytest.mark.parametrize("given", [True, False], ids=["with the model", "of names alone"])
@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
def test_peft_gives_every_expert_the_planned_rank_and_scale(rule, given, mixtral):
    plan = planned(rows(), rule)
    made = export(plan, "peft", model=str(mixtral) if given else None)
    assert any("Checked with PEFT itself" in note and "4 modules" in note for note in made.notes)
    config = json.loads(made.files["adapter_config.json"]) | {"base_model_name_or_path": None}
    _, found, factors = attached(config, mixtral)
    assert found.keys() == wanted(plan).keys()
    for name, (r, scale) in wanted(plan).items():
        assert found[name] == (r, pytest.approx(scale, rel=1e-12))  # alpha / r or alpha / sqrt(r), rounded twice
    a, b = factors["model.layers.0.mlp.experts.down_proj"]
    assert (tuple(a), tuple(b)) == ((16 * EXPERTS, 64), (32, 16 * EXPERTS))
    assert {m.module: (m.r, pytest.approx(m.scaling)) for m in made.modules} == wanted(plan)


@pytest.mark.interop
@pytest.mark.parametrize("rule", ["lora", "rslora"])
def test_the_delta_of_an_expert_is_the_planned_scale_times_b_a(rule, mixtral):
    """The scale is read off what PEFT adds to the weight of one expert, not off its own field."""
    import torch

    from rankwise.checkpoints.experts import split

    plan = planned(rows(), rule)
    config = json.loads(export(plan, "peft", ask_peft=False).files["adapter_config.json"])
    made, _, _ = attached(config | {"base_model_name_or_path": None}, mixtral)
    outer = made.base_model.model.model.layers[0].mlp.experts
    for layer in (outer, outer.base_layer):
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        r, scale = wanted(plan)[f"model.layers.0.mlp.experts.{layer.parameter_name}"]
        delta = layer.get_delta_weight("default").detach()
        a, b = (getattr(layer, k)["default"].weight.detach().numpy() for k in ("lora_A", "lora_B"))
        for i in range(EXPERTS):
            first, second = split(a, b, index=i, count=EXPERTS)
            assert first.shape[0] == r
            own = torch.from_numpy(scale * (second @ first))
            assert torch.allclose(delta[i], own, rtol=1e-4, atol=1e-5)  # float32 sums of at most 16 products


@pytest.mark.interop
@pytest.mark.parametrize("rule", ["lora", "rslora"])
def test_trls_python_carries_experts(rule, mixtral):
    plan = planned(rows(), rule)
    made = export(plan, "trl", model=str(mixtral))
    assert list(made.files) == ["trl_lora.py"]
    _, found, _ = attached(read_call("trl_lora.py", made.files["trl_lora.py"], "PEFT_CONFIG"), mixtral)
    assert found == {name: (r, pytest.approx(scale)) for name, (r, scale) in wanted(plan).items()}


@pytest.mark.interop
@pytest.mark.parametrize("with_layer", [True, False], ids=["experts and layers", "experts alone"])
def test_trls_own_parser_reads_the_parameters(with_layer, mixtral, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed; it comes with the extra train")
    from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config

    some = stack("model.layers.1.mlp.experts.down_proj", DOWN, 4, 8.0)
    if with_layer:
        some += [("model.layers.0.self_attn.q_proj", (32, 32), 4, 8.0)]
        some += [("model.layers.0.self_attn.o_proj", (32, 32), 4, 8.0)]
    plan = planned(some)
    made = export(plan, "trl", model=str(mixtral))
    path = tmp_path / "trl_sft.yaml"
    path.write_text(made.files["trl_sft.yaml"])
    parser = trl.TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    words = ["--config", str(path), "--output_dir", str(tmp_path / "out"), "--dataset_name", "x", "--bf16", "false"]
    _, _, model = parser.parse_args_and_config(words)
    config = get_peft_config(model)
    assert config.lora_dropout == 0.0
    assert attached(config, mixtral)[1] == wanted(plan)


def test_axolotl_and_unsloth_name_the_parameters():
    plan = planned(rows(), "rslora")
    y = yaml.safe_load(export(plan, "axolotl", ask_peft=False).files["axolotl.yaml"])
    stacks = [name for name in wanted(plan) if "experts" in name]
    assert y["lora_target_parameters"] == stacks
    assert y["lora_target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert y["lora_dropout"] == 0
    assert y["lora_rank_pattern"][r"^model\.layers\.0\.mlp\.experts\.down_proj"] == 16
    assert y["lora_alpha_pattern"][r"^model\.layers\.0\.mlp\.experts\.down_proj"] == 8
    text = export(plan, "unsloth", ask_peft=False).files["unsloth_lora.py"]
    call = read_call("unsloth_lora.py", text, "LORA")
    assert call["target_parameters"] == stacks
    assert call["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert call["lora_dropout"] == 0
    assert call["rank_pattern"][r"^model\.layers\.0\.mlp\.experts\.down_proj"] == 16


def test_plans_without_experts_have_no_such_key():
    plan = planned([("a.q", (8, 8), 4, 8.0)])
    for trainer in CARRY:
        assert not any("target_parameters" in text for text in export(plan, trainer, ask_peft=False).files.values())


@pytest.mark.parametrize("trainer", CARRY)
def test_unequal_experts_are_refused(trainer):
    one = "model.layers.0.mlp.experts.down_proj"
    equal = stack(one, DOWN, 4, 8.0)
    cases = {
        "has rank 2 at scale": [*equal[:3], (f"{one}[3]", DOWN, 2, 4.0)],
        "at scale 4 for": [*equal[:3], (f"{one}[3]", DOWN, 4, 16.0)],
        r"leaves .*down_proj\[3\] without": [*equal[:3], (f"{one}[3]", DOWN, 0, 1.0)],
        r"leaves .*down_proj\[1\] without": [equal[0], *equal[2:]],
    }
    for words, some in cases.items():
        with pytest.raises(CannotCarryError, match=words):
            export(planned(some), trainer, ask_peft=False)
    with pytest.raises(UsageError, match="both as a module and as experts"):
        export(planned([*equal, (one, DOWN, 4, 8.0)]), trainer, ask_peft=False)


def test_a_uniform_plan_makes_unequal_experts_equal():
    one = "model.layers.0.mlp.experts.down_proj"
    plan = planned([(f"{one}[{i}]", DOWN, r, 2.0 * r) for i, r in enumerate((2, 6, 2, 6))])
    made = export(plan, "peft", uniform=True, ask_peft=False)
    assert [(m.module, m.r, m.scaling) for m in made.modules] == [(one, 4, 2.0)]


@pytest.mark.interop
def test_experts_that_the_model_has_otherwise_are_refused(mixtral):
    one = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(CannotCarryError, match="leaves 1 of the 4 experts"):
        export(planned(stack(one, DOWN, 4, 8.0, 3)), "peft", model=str(mixtral))
    with pytest.raises(UsageError, match="5 experts in the plan and 4 in the model"):
        export(planned(stack(one, DOWN, 4, 8.0, 5)), "peft", model=str(mixtral))
    with pytest.raises(UsageError, match=r"\(32, 60\) in the plan and \(32, 64\)"):
        export(planned(stack(one, (32, 60), 4, 8.0)), "peft", model=str(mixtral))
    with pytest.raises(UsageError, match="no parameter of three dimensions"):
        export(planned(stack("model.layers.0.mlp.gate", DOWN, 4, 8.0)), "peft", model=str(mixtral))


def test_a_name_that_may_be_a_layer_needs_the_model():
    with pytest.raises(CannotCarryError, match=r"may be a parameter or a layer.*--model"):
        export(planned(stack("block_sparse_moe.input_linear", UP, 4, 8.0)), "peft")


@pytest.mark.parametrize("trainer", [name for name in TRAINERS if name not in CARRY])
def test_trainers_without_parameters_refuse_experts(trainer):
    plan = planned(stack("model.layers.0.mlp.experts.down_proj", DOWN, 4, 8.0))
    with pytest.raises(CannotCarryError, match=r"takes no stacked parameters of experts.*peft, axolotl"):
        export(plan, trainer, uniform=True)


def test_an_untrained_adapter_of_experts_needs_the_model(tmp_path):
    """How PEFT nests and turns their tensors depends on it."""
    plan = planned(stack("model.layers.0.mlp.experts.down_proj", DOWN, 4, 8.0))
    for model in (None, str(tmp_path)):  # no config.json
        with pytest.raises(CannotCarryError, match=r"experts\.down_proj is a stack of experts.* Give --model"):
            write_untrained(plan, tmp_path / "start", model=model)
    assert not (tmp_path / "start").exists()


def test_an_untrained_adapter_has_no_conv1d_beside_experts(tmp_path):
    plan = planned([("h.0.attn.c_attn", (96, 32), 4, 8.0), *stack("h.0.moe.down_proj", DOWN, 4, 8.0)])
    with pytest.raises(CannotCarryError, match=r"Conv1D, h\.0\.attn\.c_attn"):
        write_untrained(plan, tmp_path / "start")


def started(model, folder):
    """Put the folder on a model as trainers do; a tensor that is missing, or one too many, fails."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made = PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    assert not [w for w in heard if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    return made


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
@pytest.mark.parametrize("alone", [False, True], ids=["with a layer", "experts alone"])
def test_peft_trains_experts_from_an_untrained_adapter(alone, rule, mixtral, tmp_path):
    import torch
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    plan = planned(rows()[alone:], rule)
    write_untrained(plan, tmp_path / "start", model=str(mixtral))
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig.from_pretrained(mixtral)).eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = base(ids).logits
    model = started(base, tmp_path / "start")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)  # B = 0: the base exactly
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            parameter = getattr(layer, "parameter_name", None)
            name = name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"
            found[name] = (layer.r["default"], pytest.approx(layer.scaling["default"], rel=1e-12))
    assert found == wanted(plan)
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    tensors = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert trained.keys() == tensors.keys()
    for name, parameter in trained.items():
        assert torch.equal(parameter.detach(), tensors[name])
        if "lora_A" in name:  # as PEFT starts it: uniform within 1 / sqrt(in), and not all alike
            bound = tensors[name].shape[1] ** -0.5
            assert 0.8 * bound < float(tensors[name].abs().max()) <= bound
    model(ids, labels=ids).loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for n, p in trained.items() if "lora_B" in n)


@pytest.mark.interop
def test_experts_that_a_model_stores_turned_start_in_its_shape(tmp_path):
    """gpt-oss keeps (experts, in, out): the shapes of the factors are PEFT's own, and the folder loads."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed; it comes with the extra train")
    import torch

    if not hasattr(transformers, "GptOssConfig"):
        pytest.skip("this transformers has no gpt-oss")
    config = transformers.GptOssConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_untrained(planned(stack(name, (128, 32), 4, 8.0)), tmp_path / "start", model=str(tmp_path / "base"))
    torch.manual_seed(0)
    base = transformers.GptOssForCausalLM(config).eval()
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        before = base(ids).logits
        assert torch.equal(started(base, tmp_path / "start")(ids).logits, before)


@pytest.mark.interop
@pytest.mark.parametrize("trainer", ["peft", "axolotl", "unsloth", "trl", "llamafactory"])
def test_trainers_start_from_an_adapter_of_experts(trainer, mixtral, tmp_path):
    plan = planned(rows())
    start = tmp_path / "start"
    write_untrained(plan, start, model=str(mixtral))
    made = export(plan, trainer, model=str(mixtral), adapter=str(start))
    assert any(f"{start} was compared with the plan: 4 modules" in note for note in made.notes)
    assert all("target_parameters" not in text for text in made.files.values())  # the folder's own config says it
    config = json.loads((start / "adapter_config.json").read_text())
    config["lora_alpha"] *= 2
    (start / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ReadBackError, match="is not the plan"):
        export(plan, trainer, model=str(mixtral), adapter=str(start))


def test_conv1d_and_experts_do_not_go_together():
    plan = planned([("h.0.attn.c_attn", (96, 32), 4, 8.0), *stack("h.0.moe.down_proj", DOWN, 4, 8.0)])
    with pytest.raises(CannotCarryError, match=r"Conv1D, h\.0\.attn\.c_attn"):
        export(plan, "peft")


@pytest.mark.parametrize("change", ["rank", "left out", "one too many"])
def test_a_writer_that_errs_about_experts_is_found_out(change, monkeypatch):
    from dataclasses import replace

    from rankwise.trainers import exporting
    from rankwise.trainers.model import Written

    real = TRAINERS["unsloth"]

    def write(job):
        call = read_call("f", real.write(job).files["unsloth_lora.py"], "LORA")
        if change == "rank":
            call["rank_pattern"] = dict.fromkeys(call["rank_pattern"], 2)
        elif change == "left out":
            call["target_parameters"] = call["target_parameters"][1:]
        else:
            call["target_parameters"] = ["experts.down_proj", *call["target_parameters"]]
        return Written({"unsloth_lora.py": to_call("LORA", "dict", call)})

    monkeypatch.setitem(exporting.TRAINERS, "unsloth", replace(real, write=write))
    words = {"rank": "gets rank 2", "left out": "gets no adapter", "one too many": "gives an adapter to"}[change]
    with pytest.raises(ReadBackError, match=words):
        export(planned(rows()), "unsloth", ask_peft=False)
