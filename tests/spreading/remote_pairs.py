"""A base and a tuned checkpoint of one shard a layer, and how many of their bytes one module takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

WIDTH = 192
LAYERS = 6


def write_pair(folder: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Write a base and a tuned checkpoint of one shard a layer, with an index and a config."""
    tuned_of: dict[str, np.ndarray[Any, Any]] = {}
    made = folder / "base", folder / "tuned"
    for path in made:
        path.mkdir(parents=True)
        names = {}
        for layer in range(LAYERS):
            shard = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            weight = tuned_of.get(name, rng.standard_normal((WIDTH, WIDTH)).astype(np.float32))
            update = 0.1 * rng.standard_normal((WIDTH, 2)) @ rng.standard_normal((2, WIDTH))
            tuned_of[name] = (weight + update).astype(np.float32)
            norm = f"model.layers.{layer}.input_layernorm.weight"
            tensors = {name: weight.astype(ml_dtypes.bfloat16), norm: np.ones(WIDTH, ml_dtypes.bfloat16)}
            save_file(tensors, path / shard, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, shard)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        (path / "config.json").write_text('{"model_type": "llama"}')
    return made


def header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def needed(folder: Path, layer: int) -> int:
    """Return the bytes of one checkpoint that the delta of one layer's q_proj takes: index, config, header, tensor."""
    shard = folder / f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
    texts = sum((folder / name).stat().st_size for name in ("model.safetensors.index.json", "config.json"))
    return texts + header(shard) + WIDTH * WIDTH * 2
