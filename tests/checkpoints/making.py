"""Write small checkpoints and adapters of every format, together with what must be read out of them."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

R = 3


@dataclass
class Planted:
    """A source and the truth about it.

    Attributes:
        source: what to open.
        tensors: of a checkpoint: name -> array.
        deltas: of an adapter: module -> delta, scaling included.
        scalings: of an adapter: module -> scaling.
        alphas: of an adapter: module -> alpha.
        weights: the file that holds the data.
    """

    source: Path
    weights: Path
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    deltas: dict[str, np.ndarray] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    alphas: dict[str, float | None] = field(default_factory=dict)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def write_shards(folder: Path, shards: list[dict[str, np.ndarray]], name: str = "model") -> Path:
    """Write shards and their index; returns the index."""
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        file = f"{name}-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    index = folder / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def checkpoint(folder: Path, rng) -> Planted:
    tensors = {
        "model.embed.weight": normal(rng, 7, 4),
        "model.layers.0.q.weight": normal(rng, 4, 4, dtype=ml_dtypes.bfloat16),
        "model.layers.0.q.bias": normal(rng, 4, dtype=np.float16),
        "model.layers.0.experts.w": normal(rng, 2, 3, 4, dtype=np.float64),
        "model.scalar": np.array(2.5, dtype=np.float32),
        "model.mask": np.array([True, False]),
        "model.ids": np.arange(5, dtype=np.int64),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    return Planted(folder, folder / "model.safetensors", tensors=tensors)


def peft(folder: Path, rng, **config) -> Planted:
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "use_rslora": False, **config}
    made = Planted(folder, folder / "adapter_model.safetensors")
    tensors = {}
    for module, out, inner in (("model.layers.0.q_proj", 5, 4), ("model.layers.0.mlp.up", 8, 4)):
        a, b = normal(rng, R, inner), normal(rng, out, R)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        made.deltas[module], made.scalings[module], made.alphas[module] = 2.0 * b @ a, 2.0, 6.0
    save_file(tensors, made.weights, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return made


def kohya(folder: Path, rng) -> Planted:
    made = Planted(folder / "style.safetensors", folder / "style.safetensors")
    tensors = {}
    for module, alpha in (("lora_unet_mid_0", 1.5), ("lora_te_text_1", None)):
        a, b = normal(rng, R, 4), normal(rng, 5, R)
        tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = a, b
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.array(alpha, dtype=np.float16)
        scale = 1.0 if alpha is None else alpha / R
        made.deltas[module], made.scalings[module], made.alphas[module] = scale * b @ a, scale, alpha
    a, b = normal(rng, R, 4, 3, 3), normal(rng, 5, R, 1, 1)
    tensors["lora_unet_conv.lora_down.weight"], tensors["lora_unet_conv.lora_up.weight"] = a, b
    made.deltas["lora_unet_conv"] = b.reshape(5, R) @ a.reshape(R, -1)
    made.scalings["lora_unet_conv"], made.alphas["lora_unet_conv"] = 1.0, None
    save_file(tensors, made.weights, metadata={"ss_network_dim": "3"})
    return made


def diffusers(folder: Path, rng) -> Planted:
    made = Planted(folder, folder / "pytorch_lora_weights.safetensors")
    tensors = {}
    names = (
        ("unet.down.attn1.to_q", "unet.down.attn1.to_q.lora_A.weight", "unet.down.attn1.to_q.lora_B.weight"),
        ("unet.down.attn1.to_k", "unet.down.attn1.processor.to_k_lora.down.weight", "…up.weight"),
        ("unet.down.attn1.to_out.0", "unet.down.attn1.processor.to_out_lora.down.weight", "…up.weight"),
        ("text_encoder.q_proj", "text_encoder.q_proj.lora_linear_layer.down.weight", "…up.weight"),
        ("unet.up.attn2.to_v", "unet.up.attn2.to_v.lora.down.weight", "…up.weight"),
    )
    for module, first, second in names:
        a, b = normal(rng, R, 4), normal(rng, 5, R)
        tensors[first] = a
        tensors[second.replace("…", first.removesuffix("down.weight"))] = b
        made.deltas[module], made.scalings[module], made.alphas[module] = b @ a, 1.0, None
    save_file(tensors, made.weights)
    return made


def cloneofsimo(folder: Path, rng) -> Planted:
    made = Planted(folder, folder / "lora.safetensors")
    tensors = {"<s1>": normal(rng, 4)}
    metadata = {"<s1>": "<embed>"}
    for module in ("unet:0", "text_encoder:11"):
        a, b = normal(rng, R, 4), normal(rng, 5, R)
        tensors[f"{module}:down"], tensors[f"{module}:up"] = a, b
        metadata[f"{module}:rank"] = str(R)
        made.deltas[module], made.scalings[module], made.alphas[module] = b @ a, 1.0, None
    save_file(tensors, made.weights, metadata=metadata)
    return made


def mlx(folder: Path, rng) -> Planted:
    made = Planted(folder, folder / "adapters.safetensors")
    a, b = normal(rng, 4, R), normal(rng, R, 5)
    rows, columns = normal(rng, 7, R), normal(rng, R, 4)
    many_a, many_b = normal(rng, 2, R, 4), normal(rng, 2, 5, R)
    tensors = {
        "model.q_proj.lora_a": a,
        "model.q_proj.lora_b": b,
        "model.embed_tokens.lora_a": rows,
        "model.embed_tokens.lora_b": columns,
        "model.switch.lora_a": many_a,
        "model.switch.lora_b": many_b,
    }
    made.deltas = {
        "model.q_proj": 20.0 * (a @ b).T,
        "model.embed_tokens": 20.0 * rows @ columns,
        "model.switch[0]": 20.0 * many_b[0] @ many_a[0],
        "model.switch[1]": 20.0 * many_b[1] @ many_a[1],
    }
    made.scalings, made.alphas = dict.fromkeys(made.deltas, 20.0), dict.fromkeys(made.deltas, 20.0)
    save_file(tensors, made.weights)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": R, "scale": 20.0}}))
    return made


MAKERS = {
    "checkpoint": checkpoint,
    "peft": peft,
    "kohya": kohya,
    "diffusers": diffusers,
    "cloneofsimo": cloneofsimo,
    "mlx": mlx,
}
"""Format -> function of (folder, rng) that writes one and returns the truth."""


def raw_file(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
