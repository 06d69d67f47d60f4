"""Small models for the tests: random weights, the shipped tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from rankwise.tuning.tiny import folder


def pico_config(**more: object) -> object:
    from transformers import LlamaConfig

    sizes: dict[str, object] = {
        "vocab_size": 3388,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "initializer_range": 0.2,  # logits far enough apart that a few steps show
    }
    return LlamaConfig(**(sizes | more))


def make_pico(path: Path, *, seed: int = 0) -> Path:
    """Write a Llama of two layers, width 32, with the shipped tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(pico_config()).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (folder() / name).exists():
            shutil.copy(folder() / name, path / name)
    return path


def pack_to_4_bit(model: object) -> None:
    """Put stand-ins for bitsandbytes' `Linear4bit` in place of the linear layers but the head, as its loader does.

    What they share with it is what code trips over: a `Linear` with its sizes, whose `weight` is one column of bytes,
    two numbers in each, and which is unpacked in every forward pass. The grid is a plain one of 16 steps a row.
    """
    import torch
    from torch import nn
    from torch.nn.functional import linear

    class Linear4bit(nn.Linear):
        """Named as that of bitsandbytes."""

        def __init__(self, layer: nn.Linear) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = layer.in_features, layer.out_features
            weight = layer.weight.detach().float()
            self.register_buffer("step", weight.abs().amax(dim=1, keepdim=True) / 7)
            codes = (weight / self.step).round().to(torch.int8).add(8).to(torch.uint8).reshape(-1, 2)
            self.weight = nn.Parameter((16 * codes[:, :1] + codes[:, 1:]).contiguous(), requires_grad=False)
            self.register_parameter("bias", None)

        def unpacked(self) -> torch.Tensor:
            codes = torch.cat([self.weight // 16, self.weight % 16], dim=1).reshape(self.out_features, -1)
            return (codes.float() - 8) * self.step

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, self.unpacked().to(x.dtype))

    assert isinstance(model, nn.Module)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Linear4bit(module))


def unpack_to_floats(model: object) -> None:
    """Put plain layers with the same values in place of what `pack_to_4_bit` made."""
    from torch import nn

    assert isinstance(model, nn.Module)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.unpacked(), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
