"""Write a base checkpoint and a fine-tune of it in bfloat16, with a known update between them.

    python docs/examples/make_pair.py BASE TUNED

The update of every weight has rank 8 and 0.2 % of the weight's norm, a usual size for a fine-tune. Saving the
sum in bfloat16 rounds it, and the rounding is of the update's own size: the stored difference has full rank.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

LAYERS, WIDTH = 2, 512
RANK, RELATIVE_NORM = 8, 0.002
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def main() -> None:
    """Draw, round and save."""
    parser = argparse.ArgumentParser(description="Write a bfloat16 base and a fine-tune with a planted update.")
    parser.add_argument("base", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    base: dict[str, NDArray[Any]] = {}
    tuned: dict[str, NDArray[Any]] = {}
    for layer in range(LAYERS):
        for module in MODULES:
            weight = (0.02 * rng.standard_normal((WIDTH, WIDTH))).astype(ml_dtypes.bfloat16)
            update = rng.standard_normal((WIDTH, RANK)) @ rng.standard_normal((RANK, WIDTH))
            update *= RELATIVE_NORM * np.linalg.norm(weight.astype(np.float64)) / np.linalg.norm(update)
            name = f"model.layers.{layer}.{module}.weight"
            base[name] = weight
            tuned[name] = (weight.astype(np.float64) + update).astype(ml_dtypes.bfloat16)
    for folder, tensors in ((arguments.base, base), (arguments.tuned, tuned)):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}) + "\n", encoding="utf-8")
    print(f"saved {arguments.base} and {arguments.tuned}: {len(base)} weights of {WIDTH} x {WIDTH}")


if __name__ == "__main__":
    main()
