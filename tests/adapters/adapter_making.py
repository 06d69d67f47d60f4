"""Write PEFT adapters of every layout, with the truth about them."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."
SHAPES = {
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.mlp.up_proj": (32, 20),
    "model.layers.1.self_attn.q_proj": (24, 20),
}


def factors(rng, out, inner, r, dtype=np.float32):
    return rng.standard_normal((r, inner)).astype(dtype), rng.standard_normal((out, r)).astype(dtype)


def peft_adapter(folder: Path, rng, *, ranks=None, r=8, dtype=np.float32, extra=None, shapes=None, **config) -> Path:
    """Write a PEFT folder; `ranks` gives modules ranks of their own, `extra` holds further tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (out, inner) in (shapes or SHAPES).items():
        a, b = factors(rng, out, inner, (ranks or {}).get(module, r), dtype)
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    tensors |= extra or {}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 16,
        "use_rslora": False,
        "target_modules": ["q_proj", "up_proj"],
        "base_model_name_or_path": "some/base",
        "rank_pattern": {f"^{m}".replace(".", "\\."): k for m, k in (ranks or {}).items()},
        "alpha_pattern": {},
        "task_type": "CAUSAL_LM",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def truth(config, r):
    """The factor of PEFT for one alpha."""
    alpha = config["lora_alpha"]
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
