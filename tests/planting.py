"""Matrices and files with a known truth: what the tests plant, they must find again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - teaches numpy and safetensors bfloat16
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    """Return `columns` orthonormal columns of length `rows`, uniformly distributed."""
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def planted(rng: np.random.Generator, shape: tuple[int, int], singular_values: Sequence[float]) -> Array:
    """Return a float64 matrix with exactly these non-zero singular values."""
    sigma = np.asarray(singular_values, dtype=np.float64)
    if sigma.size > min(shape):
        raise ValueError(f"{sigma.size} singular values do not fit into {shape}")
    left, right = orthonormal(rng, shape[0], sigma.size), orthonormal(rng, shape[1], sigma.size)
    return (left * sigma) @ right.T


def planted_factors(
    rng: np.random.Generator, shape: tuple[int, int], singular_values: Sequence[float], scaling: float = 1.0
) -> tuple[Array, Array]:
    """Return (A, B) so that scaling * B @ A has exactly these non-zero singular values.

    A has the shape (r, in_features), B (out_features, r), r = len(singular_values). The factors are turned by
    a random rotation, so neither is orthogonal by itself.
    """
    sigma = np.asarray(singular_values, dtype=np.float64) / scaling
    mixing = rng.standard_normal((sigma.size, sigma.size)) + 3 * np.eye(sigma.size)
    b = orthonormal(rng, shape[0], sigma.size) * sigma @ mixing
    a = np.linalg.solve(mixing, orthonormal(rng, shape[1], sigma.size).T)
    return a, b


def write_adapter(folder: Path, factors: Mapping[str, tuple[Array, Array]], **config: Any) -> Path:
    """Write a PEFT LoRA adapter: module path -> (A, B); `config` overrides adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    first = next(iter(factors.values()))[0].shape[0]
    settings = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": first,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in factors}),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings | config, indent=2), encoding="utf-8")
    return folder


def write_checkpoint(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    """Write a checkpoint of one safetensors file and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config), encoding="utf-8")
    return folder
