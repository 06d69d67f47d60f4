"""Train a small LoRA adapter with numpy alone, and save it the way PEFT does.

    python docs/examples/make_adapter.py FOLDER

Every linear layer of an 8-layer Llama-shaped model gets a target update, and the factors B and A learn it from
noisy examples, by Adam and through the scaling, from PEFT's start (A random, B zero). The attention targets
are style-like (a few directions), the MLP targets fact-like (many directions of falling strength). That
difference is put in by hand. What the adapter makes of it at r = 16 is learnt, and is what `rankwise inspect`
measures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

# on matrices this small, more threads only wait for each other; numpy reads this when it is imported
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[np.float32]

LAYERS, WIDTH, HEADS_WIDTH, MLP_WIDTH = 8, 128, 64, 344
R, LORA_ALPHA = 16, 32.0
STEPS, BATCH, LEARNING_RATE = 200, 32, 2e-3
NOISE = 0.05
"""Standard deviation of the noise on every output of an example."""

STYLE = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (HEADS_WIDTH, WIDTH)} | {
    "self_attn.v_proj": (HEADS_WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
}
FACTS = {"mlp.gate_proj": (MLP_WIDTH, WIDTH), "mlp.up_proj": (MLP_WIDTH, WIDTH), "mlp.down_proj": (WIDTH, MLP_WIDTH)}
"""Module -> (out_features, in_features)."""


def target(rng: np.random.Generator, shape: tuple[int, int], sigma: NDArray[Any]) -> Array:
    """Return an update of norm 1 with singular values in these proportions, in random directions."""
    left = np.linalg.qr(rng.standard_normal((shape[0], sigma.size)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], sigma.size)))[0]
    update = (left * (sigma / np.linalg.norm(sigma))) @ right.T
    return np.asarray(update, np.float32)


def fit(rng: np.random.Generator, wanted: Array) -> tuple[Array, Array]:
    """Learn B and A from examples (x, wanted @ x + noise), by Adam on the squared error."""
    scaling = LORA_ALPHA / R
    bound = 1 / np.sqrt(wanted.shape[1])  # kaiming_uniform(a=sqrt(5)), as PEFT starts A
    factors = [
        np.zeros((wanted.shape[0], R), np.float32),  # B
        rng.uniform(-bound, bound, (R, wanted.shape[1])).astype(np.float32),  # A
    ]
    first, second = [np.zeros_like(f) for f in factors], [np.zeros_like(f) for f in factors]
    for step in range(1, STEPS + 1):
        b, a = factors
        x = rng.standard_normal((wanted.shape[1], BATCH), np.float32)
        y = wanted @ x + NOISE * rng.standard_normal((wanted.shape[0], BATCH), np.float32)
        miss = (scaling * b @ (a @ x) - y) / BATCH  # (out_features, batch)
        rate = LEARNING_RATE * (1 - step / STEPS)
        for i, gradient in enumerate((scaling * miss @ (a @ x).T, scaling * (b.T @ miss) @ x.T)):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            moved = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            factors[i] = np.asarray(factors[i] - rate * moved, np.float32)
    return factors[0], factors[1]


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Train a small LoRA adapter and save it in PEFT's format.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    tensors: dict[str, Array] = {}
    for layer in range(LAYERS):
        for module, shape in (STYLE | FACTS).items():
            style = np.linspace(5.0, 0.5, 2 + layer // 2)
            facts = np.arange(1, min(shape) + 1) ** -0.5
            b, a = fit(rng, target(rng, shape, style if module in STYLE else facts))
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": R,
        "lora_alpha": LORA_ALPHA,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(module.split(".")[1] for module in STYLE | FACTS),
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (arguments.folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"trained {len(tensors) // 2} modules at r = {R}; saved {arguments.folder}")


if __name__ == "__main__":
    main()
