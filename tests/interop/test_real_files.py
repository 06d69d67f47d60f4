"""`inspect` on real files, against a dense float64 SVD of what another reader found in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches the safetensors library bfloat16
import numpy as np
import pytest
from safetensors.numpy import load_file

import rankwise

PEFT_ADAPTERS = (
    "deltacompression-poc",
    "fmi-chatbot",
    "gemma-medical",
    "gpt2-domain-legal",
    "gpt2-domain-medical",
    "gpt2-domain-sports",
    "gpt2-tigrinya-v1",
    "gradience-tiny-lora",
    "law-llm",
)


def dense_deltas(folder: Path) -> dict[str, np.ndarray]:
    """Form alpha / r * B @ A in float64 from the files alone: none of these adapters has patterns or rsLoRA."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("use_rslora")
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = re.sub(r"^(base_model\.model\.)+", "", name.split(".lora_A.")[0])
            deltas[module] = config["lora_alpha"] / config["r"] * (b.astype(np.float64) @ a.astype(np.float64))
    return deltas


def assert_same_spectrum(found: rankwise.ModuleSpectrum, delta: np.ndarray) -> None:
    """Hold one module to the accuracy that the contract states."""
    truth = np.linalg.svd(delta, compute_uv=False)
    energy = float(np.sum(delta * delta))
    assert found.energy == pytest.approx(energy, rel=1e-6)
    if energy == 0:
        return
    values = np.zeros(len(truth))
    values[: len(found.singular_values)] = found.singular_values
    matters = truth > 1e-3 * truth[0]
    np.testing.assert_allclose(values[matters], truth[matters], rtol=1e-4)
    # what is below 1e-3 of the largest carries no promise of its own, but is not above it either
    assert values[~matters].max(initial=0.0) < 1.1e-3 * truth[0]
    assert found.stable_rank == pytest.approx(energy / truth[0] ** 2, rel=1e-6)
    assert found.rank_90 == int(np.searchsorted(np.cumsum(truth**2) / energy, 0.9) + 1)


@pytest.mark.interop
@pytest.mark.parametrize("name", PEFT_ADAPTERS)
def test_real_adapter_agrees_with_a_dense_svd(samples: Path, name: str) -> None:
    folder = samples / "adapters" / name
    record = rankwise.inspect(folder)
    deltas = dense_deltas(folder)
    assert [m.module for m in record.modules] == list(deltas)
    # a dense float64 SVD takes seconds a module: three, spread over the depth, stand for the rest
    chosen = sorted({0, len(deltas) // 2, len(deltas) - 1})
    for index in chosen:
        module = record.modules[index]
        assert module.shape == deltas[module.module].shape
        assert_same_spectrum(module, deltas[module.module])


@pytest.mark.interop
def test_real_diffusion_adapter_agrees_with_a_dense_svd(samples: Path) -> None:
    path = samples / "adapters" / "cloneofsimo-lora_disney" / "lora_disney.safetensors"
    record = rankwise.inspect(path)
    tensors = load_file(path)
    assert len(record.modules) == sum(name.endswith(":up") for name in tensors)
    checked = 0
    for module in record.modules[:: len(record.modules) // 12]:
        spellings = (module.module, module.module.replace(".", ":"))
        name = next(n for n in tensors if n.endswith(":up") and n.removesuffix(":up") in spellings)
        up, down = (tensors[name.removesuffix(":up") + end].astype(np.float64) for end in (":up", ":down"))
        delta = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        assert module.scaling is not None
        assert_same_spectrum(module, module.scaling * delta)
        checked += 1
    assert checked >= 12


@pytest.mark.interop
def test_real_pair_agrees_with_a_dense_svd(samples: Path) -> None:
    """2-layer GPT-2, 200 GRPO steps: Conv1D weights are stored transposed, the head is tied in one file alone."""
    folder = samples / "pairs" / "tree-gpt2-grpo-v1"
    record = rankwise.inspect(folder / "finetuned_200.safetensors", base=folder / "base.safetensors")
    base, tuned = (load_file(folder / name) for name in ("base.safetensors", "finetuned_200.safetensors"))
    measured = {m.module: m for m in record.modules}
    assert measured["transformer.h.0.attn.c_attn"].shape == (192, 64)
    checked = 0
    for name, after in tuned.items():
        module = name.removesuffix(".weight")
        if module not in measured:
            continue
        delta = (after.astype(np.float32) - base[name].astype(np.float32)).astype(np.float64)
        assert_same_spectrum(measured[module], delta)
        norm = np.linalg.norm(base[name].astype(np.float64))
        assert measured[module].relative_norm == pytest.approx(np.linalg.norm(delta) / norm, rel=1e-6)
        checked += 1
    assert checked == len(record.modules) >= 8
    assert {f.code for f in record.summary.findings} >= {"tied-embeddings"}
