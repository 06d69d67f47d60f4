"""Two places where PEFT gives a module another scale than the one it was meant to have, under rsLoRA.

Run: python lab/peft_scaling_defects.py

Everything is done by PEFT's own functions on models of a few thousand weights, without a network: the adapter is
attached, started or loaded, and the factor on B @ A is read back from the layers, and for the mixture of
experts from the merged weights too. `expected` is what the rule gives when it is kept; `got` is what PEFT made.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Case:
    """One figure: what it is, what was expected and what came out."""

    name: str
    expected: float
    got: float

    @property
    def off_by(self) -> float:
        """Got over expected; 1 where PEFT keeps the scale."""
        return self.got / self.expected


def _llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))


def eva(*, use_rslora: bool) -> Iterator[Case]:
    """Start an adapter by EVA on data, where it moves ranks between modules, and read the scales back.

    `adjust_scaling_factors` promises that a module whose rank EVA changes keeps its scale.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    eva_config = EvaConfig(rho=4.0, adjust_scaling_factors=True)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"], "use_rslora": use_rslora}
    config = LoraConfig(**options, init_lora_weights="eva", eva_config=eva_config)
    model = get_peft_model(_llama(), config, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(1)
    words = [torch.randint(0, 40, (8, 24), generator=generator) for _ in range(6)]
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in words]
    initialize_lora_eva_weights(model, dataloader=rows, show_progress_bar=False)
    expected = 8 / math.sqrt(4) if use_rslora else 8 / 4
    for name, layer in _layers(model):
        r = layer.r["default"]
        if r != 4:
            yield Case(f"EVA, {_word(use_rslora)}: {name}, r 4 -> {r}", expected, layer.scaling["default"])


def eva_anchored_key(*, use_rslora: bool) -> Iterator[Case]:
    """Start by EVA a module that `rank_pattern` gives rank 16 under an anchored key, with EVA asking for the same 16.

    Nothing changes its rank, so that its scale has to stay.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    for key in ("model.layers.0.self_attn.q_proj", "^model.layers.0.self_attn.q_proj"):
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj"],
            rank_pattern={key: 16},
            use_rslora=use_rslora,
            init_lora_weights="eva",
            eva_config=EvaConfig(adjust_scaling_factors=True),
        )
        model = get_peft_model(_llama(), config)
        layers = dict(_layers(model))
        before = layers["model.layers.0.self_attn.q_proj"].scaling["default"]
        ranks = {"model.layers.0.self_attn.q_proj": 16, "model.layers.1.self_attn.q_proj": 4}
        started = {f"base_model.model.{name}": torch.randn(r, 64) for name, r in ranks.items()}
        initialize_lora_eva_weights(model, eva_state_dict=started)
        after = layers["model.layers.0.self_attn.q_proj"].scaling["default"]
        yield Case(f"EVA, {_word(use_rslora)}: key {key!r}, r stays 16", before, after)


def moe(*, use_rslora: bool) -> Iterator[Case]:
    """Load adapters with two separate projections an expert into today's fused gate_up_proj, and merge them."""
    yield from _moe("Mixtral", "block_sparse_moe", ("w1", "w3", "w2"), use_rslora=use_rslora)
    yield from _moe("Qwen3 MoE", "mlp", ("gate_proj", "up_proj", "down_proj"), use_rslora=use_rslora)


def _moe(family: str, block: str, names: tuple[str, str, str], *, use_rslora: bool) -> Iterator[Case]:
    """Compare the factor on B @ A in the merged weights with the rule.

    Args:
        family: Mixtral or Qwen3 MoE.
        block: what the block of experts was called when they were separate.
        names: of the three projections then; the first two are one weight now.
        use_rslora: the rule of the adapter.
    """
    from peft import LoraConfig, PeftModel
    from safetensors.torch import save_file
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    gate, up, down = names
    r, alpha, experts, hidden, inner = 4, 8, 2, 16, 24
    scale = alpha / math.sqrt(r) if use_rslora else alpha / r

    def base() -> torch.nn.Module:
        torch.manual_seed(0)
        shape = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
        if family == "Mixtral":
            config = MixtralConfig(**shape, num_key_value_heads=2, intermediate_size=inner, num_local_experts=experts)
            return MixtralForCausalLM(config)
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, num_key_value_heads=2, moe_intermediate_size=inner, num_experts=experts, head_dim=8)
        )

    generator = torch.Generator().manual_seed(2)
    tensors, deltas = {}, {}
    for expert in range(experts):
        for name, (out, into) in {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}.items():
            a = torch.randn(r, into, generator=generator)
            b = torch.randn(out, r, generator=generator)
            path = f"base_model.model.model.layers.0.{block}.experts.{expert}.{name}"
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, b
            deltas[expert, name] = b @ a
    with tempfile.TemporaryDirectory() as folder:
        config = LoraConfig(
            r=r, lora_alpha=alpha, target_modules=list(names), use_rslora=use_rslora, task_type="CAUSAL_LM"
        )
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        model = PeftModel.from_pretrained(base(), folder)
        merged = model.merge_and_unload()
    before = base().model.layers[0].mlp.experts
    after = merged.model.layers[0].mlp.experts
    for parameter, parts in {"gate_up_proj": (gate, up), "down_proj": (down,)}.items():
        moved = (getattr(after, parameter) - getattr(before, parameter)).detach()
        for index, name in enumerate(parts):
            rows = slice(None) if len(parts) == 1 else slice(index * inner, (index + 1) * inner)
            mine = moved[0][rows].flatten().double()
            plain = deltas[0, name].flatten().double()
            got = float(mine @ plain / (plain @ plain))  # the factor on B @ A that fits best
            rest = float((mine - got * plain).norm() / mine.norm())
            if rest > 1e-4:  # float32 sums of 4 products; a larger rest would mean another matrix, not another scale
                raise RuntimeError(f"{parameter}: {name} is no multiple of B @ A, {rest:.2g} of it is left over")
            yield Case(f"{family}, {_word(use_rslora)}: {name} in {parameter}", scale, got)


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _word(use_rslora: bool) -> str:
    return "alpha / sqrt(r)" if use_rslora else "alpha / r"


def every_case() -> list[Case]:
    """Return all cases, those of alpha / r as the check on the method: there PEFT is meant to be right."""
    return [
        case
        for job in (eva, eva_anchored_key, moe)
        for use_rslora in (False, True)
        for case in job(use_rslora=use_rslora)
    ]


def main() -> None:
    """Print the table."""
    import peft
    import transformers

    warnings.simplefilter("ignore")
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'case':78}  expected       got   got/expected")
    for case in every_case():
        print(f"{case.name:78}  {case.expected:8.4f}  {case.got:8.4f}   {case.off_by:8.4f}")


if __name__ == "__main__":
    main()
