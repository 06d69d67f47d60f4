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
