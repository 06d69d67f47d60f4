"""Extracted adapters in real PEFT: base + adapter gives the logits of the tuned model, for every family of layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rankwise
from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
peft = pytest.importorskip("peft", reason="peft comes with the train extra")
transformers = pytest.importorskip("transformers", reason="transformers comes with the train extra")

pytestmark = pytest.mark.interop

RANK = 3
CLOSE = 2e-4
"""Of the largest change of a logit: float32 rounding of the factors and of sums in another order, some 1e-5."""


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2))


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            initializer_range=0.2,
        )
    )  # fmt: skip


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=61, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, initializer_range=0.2,
        )
    )  # fmt: skip


def _qwen2_moe() -> Any:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=2,
            shared_expert_intermediate_size=20, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
            num_experts_per_tok=2, initializer_range=0.2,
        )
    )  # fmt: skip


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (_llama, {}, {}),
    "qwen2": (_qwen2, {}, {}),
    "gpt2": (_gpt2, {}, {}),
    "bert": (_bert, {}, {}),
    "mixtral-stacked": (_mixtral, {"save_original_format": False}, {}),
    "mixtral-one-by-one": (_mixtral, {}, {}),
    "qwen2-moe-stacked": (_qwen2_moe, {"save_original_format": False}, {}),
}
"""Family -> how it is built, how it is saved, and further options of extract."""


def _plant(model: Any, generator: Any) -> None:
    """Add a delta of rank 3 to every matrix that is no table and no head; every expert gets its own."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                continue
            flat = parameter.shape if "experts" in name else (1, parameter.shape[0], parameter[0].numel())
            r = min(RANK, *flat[1:])
            left = torch.randn(flat[0], flat[1], r, generator=generator)
            right = torch.randn(flat[0], r, flat[2], generator=generator)
            parameter += (0.1 * left @ right).reshape(parameter.shape)


def _pair(build: Callable[[], Any], folder: Path, **saving: Any) -> tuple[Any, Path, Path]:
    """Write a base and a tuned model; return the tuned one too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    model.save_pretrained(folder / "base", **saving)
    _plant(model, torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "tuned", **saving)
    return model, folder / "base", folder / "tuned"


def _logits(model: Any) -> Any:
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        return model(input_ids=ids).logits


# PEFT 0.21 warns of a pattern that it has added itself, for experts that are stored one by one
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_base_and_adapter_give_the_logits_of_the_tuned_model(family: str, scaling: str, tmp_path: Path) -> None:
    """A delta of rank 3 is carried whole by rank 3."""
    build, saving, options = FAMILIES[family]
    tuned, base, after = _pair(build, tmp_path, **saving)
    out = tmp_path / "adapter"
    if family.endswith("one-by-one") and scaling == "rslora":
        with pytest.raises(UsageError, match="sqrt"):
            rankwise.extract(base, after, out, rank=RANK, scaling=scaling, device="cpu", **options)
        return
    record = rankwise.extract(base, after, out, rank=RANK, scaling=scaling, device="cpu", **options)
    assert record.relative_error is not None
    assert record.relative_error < 1e-5  # float32
    fresh = type(tuned).from_pretrained(base).eval()
    before = _logits(fresh)
    adapted = peft.PeftModel.from_pretrained(fresh, out).eval()
    wanted, got = _logits(tuned), _logits(adapted)
    change = float((wanted - before).abs().max())
    assert change > 0.1  # or there would be nothing to see
    assert float((got - wanted).abs().max()) < CLOSE * change
    with open_source(out, want="adapter") as opened:
        assert isinstance(opened, Adapter)
        assert sorted(m.module for m in opened.modules) == sorted(m.module for m in record.modules)
        assert {m.module: m.scaling for m in opened.modules} == pytest.approx(
            {m.module: m.scaling for m in record.modules}
        )


def test_norms_stored_whole_and_embeddings_are_loaded(tmp_path: Path) -> None:
    tuned, base, after = _pair(_llama, tmp_path)
    with torch.no_grad():
        tuned.model.norm.weight += 0.3
        tuned.model.layers[0].input_layernorm.weight += 0.2
        tuned.model.embed_tokens.weight += 0.1 * torch.randn(61, 2) @ torch.randn(2, 16)
        tuned.lm_head.weight += 0.1 * torch.randn(61, 2) @ torch.randn(2, 16)
    tuned.save_pretrained(after)
    out = tmp_path / "adapter"
    record = rankwise.extract(base, after, out, rank=3, embeddings=True, lm_head=True, save_whole=True, device="cpu")
    assert [w.module for w in record.whole] == ["model.layers.0.input_layernorm", "model.norm"]
    assert record.left_out == ()
    fresh = type(tuned).from_pretrained(base).eval()
    change = float((_logits(tuned) - _logits(fresh)).abs().max())
    adapted = peft.PeftModel.from_pretrained(fresh, out).eval()
    assert float((_logits(adapted) - _logits(tuned)).abs().max()) < CLOSE * change


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_follows_the_adapter_of_its_table(tmp_path: Path) -> None:
    """PEFT would adapt the lookup alone: the head gets the factors as a layer of its own."""

    def tied() -> Any:
        model = _llama()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    tuned, base, after = _pair(tied, tmp_path)
    with torch.no_grad():
        tuned.model.embed_tokens.weight += 0.1 * torch.randn(61, 2) @ torch.randn(2, 16)
    tuned.save_pretrained(after)
    out = tmp_path / "adapter"
    record = rankwise.extract(base, after, out, rank=3, embeddings=True, device="cpu")
    assert "tied-head" in [f.code for f in record.findings]
    fresh = type(tuned).from_pretrained(base).eval()
    change = float((_logits(tuned) - _logits(fresh)).abs().max())
    adapted = peft.PeftModel.from_pretrained(fresh, out).eval()
    assert float((_logits(adapted) - _logits(tuned)).abs().max()) < CLOSE * change


def test_convolutions(tmp_path: Path) -> None:
    """1-D and 2-D kernels, loaded by PEFT onto a plain module."""
    from safetensors.torch import save_file

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 8, (3, 2), stride=2, padding=1)
            self.second = torch.nn.Conv1d(8, 6, 3)
            self.last = torch.nn.Linear(6, 5)

        def forward(self, x: Any) -> Any:
            return self.last(self.second(self.first(x).relu().flatten(2)).relu().mean(-1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    (tmp_path / "base").mkdir()
    (tmp_path / "tuned").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    fresh = Net().eval()
    fresh.load_state_dict(net.state_dict())
    _plant(net, torch.Generator().manual_seed(1))
    save_file(net.state_dict(), tmp_path / "tuned" / "model.safetensors")
    out = tmp_path / "adapter"
    record = rankwise.extract(tmp_path / "base", tmp_path / "tuned", out, rank=RANK, device="cpu")
    assert [m.kind for m in record.modules] == ["conv", "linear", "conv"]
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, wanted = fresh(x), net(x)
        got = peft.PeftModel.from_pretrained(fresh, out).eval()(x)
    assert float((got - wanted).abs().max()) < CLOSE * float((wanted - before).abs().max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stated_error_is_the_error_of_the_weights_that_peft_merges(dtype: str, tmp_path: Path) -> None:
    """With all that changed in the adapter, the merged weights miss the tuned ones by the record's figure."""
    tuned, base, after = _pair(_llama, tmp_path)
    record = rankwise.extract(base, after, tmp_path / "adapter", rank=2, dtype=dtype, device="cpu")
    fresh = type(tuned).from_pretrained(base).eval()
    start = {n: p.detach().clone() for n, p in fresh.named_parameters()}
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    made, wanted = merged.state_dict(), tuned.state_dict()
    for module in record.modules:
        name = f"{module.module}.weight"
        delta = (wanted[name] - start[name]).double()
        missed = (wanted[name] - made[name]).double()
        error = float(missed.norm() / delta.norm())
        assert error == pytest.approx(module.relative_error, rel=1e-3)  # the merge rounds to float32


def test_uneven_ranks_reach_every_module(tmp_path: Path) -> None:
    tuned, base, after = _pair(_llama, tmp_path)
    out = tmp_path / "adapter"
    record = rankwise.extract(base, after, out, energy=0.9, scaling="rslora", device="cpu")
    assert len({m.r for m in record.modules}) > 1
    adapted = peft.PeftModel.from_pretrained(type(tuned).from_pretrained(base), out)
    for module in record.modules:
        layer = adapted.base_model.model.get_submodule(module.module)
        assert layer.r["default"] == module.r
        assert layer.scaling["default"] == pytest.approx(module.scaling)
        assert np.isclose(layer.scaling["default"], module.r**0.5)
    assert json.loads((out / "adapter_config.json").read_text())["use_rslora"] is True
