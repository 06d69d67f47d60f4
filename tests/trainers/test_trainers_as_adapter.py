"""An untrained adapter: PEFT loads it with the planned ranks and scales, and the model is the base to the last bit."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from trainer_plans import mixed, planned, uniform, wanted

from rankwise.checkpoints import open_source
from rankwise.errors import CannotCarryError, OutputError, OutputExistsError, UsageError
from rankwise.trainers import as_adapter
from rankwise.trainers.as_adapter import write_untrained

TENSORS = "adapter_model.safetensors"


@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
def test_our_own_reader_finds_the_plan_in_the_folder(rule, tmp_path):
    write_untrained(mixed(rule), tmp_path / "start")
    with open_source(tmp_path / "start", want="adapter") as adapter:
        assert {m.module: (m.r, m.scaling) for m in adapter.modules} == wanted(mixed(rule))
        assert adapter.findings == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start"]


def test_a_starts_as_in_peft_and_b_is_zero(tmp_path):
    """Uniform within 1 / sqrt(in_features) whatever the rank: mean 0, variance bound^2 / 3."""
    write_untrained(planned([("a.q", (64, 400), 64, 8.0), ("a.v", (64, 100), 8, 8.0)]), tmp_path / "start")
    tensors = load_file(tmp_path / "start" / TENSORS)
    for name, width in (("a.q", 400), ("a.v", 100)):
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        bound = 1 / math.sqrt(width)
        assert a.dtype == b.dtype == np.float32
        assert not b.any()
        assert np.abs(a).max() <= bound * (1 + 1e-6)  # float32
        assert np.abs(a).max() > 0.98 * bound
        # four standard errors of the mean and of the variance of a uniform distribution
        assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.size)
        assert abs(a.var() / (bound**2 / 3) - 1) < 4 * math.sqrt(0.8 / a.size)


def test_the_seed_decides_a(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_untrained(uniform(), tmp_path / name, seed=seed)
    one, same, other = ((tmp_path / name / TENSORS).read_bytes() for name in ("one", "same", "other"))
    assert one == same != other


def test_modules_of_rank_zero_are_left_out(tmp_path):
    write_untrained(planned([("a.q", (8, 8), 4, 8.0), ("a.v", (8, 8), 0, 8.0)]), tmp_path / "start")
    assert all("a.q" in name for name in load_file(tmp_path / "start" / TENSORS))


def test_the_config_says_what_peft_wants_to_know(tmp_path):
    write_untrained(mixed("rslora"), tmp_path / "start", model="org/base")
    config = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, True)
    assert (config["init_lora_weights"], config["bias"], config["inference_mode"]) == (True, "none", False)
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


@pytest.mark.parametrize("name", ["model.embed_tokens", "transformer.wte", "encoder.word_embeddings"])
def test_embeddings_are_refused_by_name(name, tmp_path):
    with pytest.raises(CannotCarryError, match="is an embedding by its name"):
        write_untrained(planned([(name, (8, 8), 4, 8.0)]), tmp_path / "start")
    assert list(tmp_path.iterdir()) == []


def test_experts_without_their_model_are_refused(tmp_path):
    with pytest.raises(CannotCarryError, match=r"is a stack of experts.* Give --model"):
        write_untrained(planned([("mlp.experts.down_proj[0]", (8, 8), 4, 8.0)]), tmp_path / "start")


def test_a_folder_that_is_taken_is_kept(tmp_path):
    out = tmp_path / "start"
    write_untrained(uniform(), out)
    before = (out / TENSORS).read_bytes()
    with pytest.raises(OutputExistsError):
        write_untrained(mixed(), out)
    assert (out / TENSORS).read_bytes() == before
    write_untrained(mixed(), out, force=True)
    assert (out / TENSORS).read_bytes() != before
    (out / "optimizer.pt").write_text("mine")
    with pytest.raises(OutputError, match=r"more than an adapter \(optimizer.pt\)"):
        write_untrained(uniform(), out, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a folder was meant"):
        write_untrained(uniform(), tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="there is no folder"):
        write_untrained(uniform(), tmp_path / "no" / "where")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "start"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "start").mkdir()
    write_untrained(uniform(), tmp_path / "start")
    assert sorted(p.name for p in (tmp_path / "start").iterdir()) == ["adapter_config.json", TENSORS]


@pytest.mark.parametrize("cut", ["save_file", "compare_adapter"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_cut_short_it_leaves_what_was_there(cut, error, tmp_path, monkeypatch):
    out = tmp_path / "start"
    write_untrained(uniform(), out)
    kept = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args, **more):
        raise error

    monkeypatch.setattr(as_adapter, cut, fail)
    for target in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else OutputError):
            write_untrained(mixed(), target, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start"]


@pytest.mark.interop
@pytest.mark.parametrize("rule", ["lora", "rslora", "unscaled"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_trains_from_it_and_the_model_is_the_base_exactly(family, rule, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed; it comes with the extra train")
    pytest.importorskip("peft", reason="peft is not installed; it comes with the extra train")
    from peft import PeftModel
    from test_trainers_interop import GPT2, attached, gpt2_config, llama_config
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config()) if family == "llama" else GPT2LMHeadModel(gpt2_config())
    base.eval()
    folder = tmp_path / "base"
    base.config.save_pretrained(folder)
    kinds = {f"transformer.h.{i}.{k}": s for i in range(2) for k, s in GPT2.items()}
    rows = [(n, s, 2 + i % 3, 3.5 + i % 2) for i, (n, s) in enumerate(kinds.items())]
    plan = mixed(rule) if family == "llama" else planned(rows, rule)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = base(ids).logits
    for model in (None, str(folder)):
        out = tmp_path / ("with" if model else "without")
        write_untrained(plan, out, model=model)
        started = PeftModel.from_pretrained(base, out, is_trainable=True)
        got = attached(started)
        assert {name: r for name, (r, _) in got.items()} == {name: r for name, (r, _) in wanted(plan).items()}
        for name, (_, scale) in got.items():
            assert scale == pytest.approx(wanted(plan)[name][1], rel=1e-12)  # alpha * r / r may round
        assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is (family == "gpt2")
        with torch.no_grad():
            assert torch.equal(started.eval()(ids).logits, before)
        trained = [(n, p) for n, p in started.named_parameters() if p.requires_grad]
        assert len(trained) == 2 * len(wanted(plan))
        started(ids, labels=ids).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in trained if "lora_B" in n)
        tensors = load_file(out / TENSORS)
        for name, parameter in trained:  # every tensor of the file has arrived
            stored = tensors[name.replace(".default", "")]
            np.testing.assert_array_equal(parameter.detach().numpy(), stored)
        base = started.unload()
        shutil.rmtree(out)


@pytest.mark.interop
def test_what_the_model_knows_to_be_no_linear_layer_is_refused(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed; it comes with the extra train")
    from test_trainers_interop import llama_config

    config = llama_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(CannotCarryError, match=r"model\.embed_tokens is a Embedding in the model"):
        write_untrained(
            planned([("model.embed_tokens", (40, 32), 4, 8.0)]), tmp_path / "a", model=str(tmp_path / "base")
        )
    with pytest.raises(UsageError, match="the model has no module"):
        write_untrained(
            planned([("model.layers.9.mlp.up_proj", (64, 32), 4, 8.0)]), tmp_path / "a", model=str(tmp_path / "base")
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_seed_below_zero_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UsageError, match="--seed of an untrained adapter must be 0 or more, got -1"):
        write_untrained(mixed(), tmp_path / "start", seed=-1)
    assert not (tmp_path / "start").exists()


def test_brackets_in_a_name_make_no_expert(tmp_path):
    write_untrained(planned([("x[y]", (8, 8), 2, 2.0)]), tmp_path / "start")
    assert "base_model.model.x[y].lora_A.weight" in load_file(tmp_path / "start" / "adapter_model.safetensors")
