"""The table of runtimes: each row against the lines of source that it stands for, written out by hand."""

from __future__ import annotations

import math

import pytest

from rankwise.errors import UsageError
from rankwise.runtimes import RUNTIMES, padded_rank, runtime

ASKED = {"global_r": 8, "global_alpha": 16.0}

# (name, use_rslora) -> the factor on a module of rank 32 whose alpha is 24, as the source computes it
BY_HAND = {
    ("peft", False): 24 / 32,  # layer.py: lora_alpha / r of the module
    ("peft", True): 24 / math.sqrt(32),
    ("vllm", False): 16 / 8,  # peft_helper.py: self.lora_alpha / self.r of the config
    ("vllm", True): 16 / math.sqrt(8),
    ("sglang", False): 16 / 8,  # lora.py: config.lora_alpha / config.r
    ("sglang", True): 16 / 8,
    ("llama.cpp", False): 16 / 32,  # llama-adapter.h: alpha / b->ne[0]
    ("llama.cpp", True): 16 / 32,
    ("ollama", False): 16 / 32,
    ("ollama", True): 16 / 32,
    ("tensorrt-llm", False): 16 / 32,  # lora_manager.py: hf_config["lora_alpha"] / effective_rank
    ("tensorrt-llm", True): 16 / math.sqrt(32),
    ("comfyui", False): 1.0,  # weight_adapter/lora.py: alpha = 1.0 where there is no .alpha
    ("comfyui", True): 1.0,
    ("diffusers", False): 1.0,  # peft_utils.py: lora_alpha = r
    ("diffusers", True): 1.0,
}


def test_every_runtime_is_written_out() -> None:
    assert {name for name, _ in BY_HAND} == set(RUNTIMES)


@pytest.mark.parametrize(("name", "use_rslora"), sorted(BY_HAND))
def test_applied(name: str, use_rslora: bool) -> None:
    assert RUNTIMES[name].applied(32, 24.0, use_rslora=use_rslora, **ASKED) == BY_HAND[name, use_rslora]


@pytest.mark.parametrize("name", ["comfyui", "diffusers"])
def test_alpha_in_the_weights_is_used(name: str) -> None:
    assert RUNTIMES[name].applied(32, 24.0, use_rslora=False, alpha_stored=True, **ASKED) == 24 / 32


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_a_baked_adapter_is_right_everywhere(name: str) -> None:
    """One rank, alpha = r, no patterns, no rsLoRA: the scale is 1 in every runtime."""
    for r in (1, 8, 64):
        assert RUNTIMES[name].applied(r, float(r), global_r=r, global_alpha=float(r), use_rslora=False) == 1.0


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_rows_are_told_where_they_come_from(name: str) -> None:
    row = RUNTIMES[name]
    assert row.name == name
    assert row.verified is (name != "sglang")  # its lora.py was read in an older copy only
    assert row.version
    assert row.source
    assert all(thread.startswith("https://github.com/") for thread in row.threads)
    assert row.threads
    assert all(fact.endswith(".") for fact in row.facts)


def test_padded_rank() -> None:
    assert [padded_rank("vllm", r) for r in (1, 2, 8, 9, 257, 321, 512)] == [1, 8, 8, 16, 320, 512, 512]
    assert padded_rank("sglang", 77) == 77
    with pytest.raises(UsageError, match=r"vllm takes adapters up to rank 512 .* this one has rank 513"):
        padded_rank("vllm", 513)
    with pytest.raises(UsageError, match="no runtime is called 'tgi'; known are: comfyui"):
        padded_rank("tgi", 8)
    assert runtime("VLLM") is RUNTIMES["vllm"]
