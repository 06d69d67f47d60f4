"""Read adapters without rankwise: what loaders do, followed from their source in a few lines each.

Every function returns module -> (A, B, scale) in float64, A of shape (r, in), B of shape (out, r); the update is
scale * B @ A. Runtimes' scales:

- vLLM: vllm/lora/peft_helper.py @02143692 (one factor from r and lora_alpha of the config, rsLoRA known, no patterns);
  `LoRALayerWeights.optimize` of vllm/lora/lora.py @0531c222 multiplies B by it when it is not 1, in B's dtype.
- SGLang: python/sglang/srt/lora/lora.py @db2a4cc1 (lora_alpha / r of the config, nothing else).
- llama.cpp: convert_lora_to_gguf.py @0b03adaa stores float(lora_alpha); src/llama-adapter.h @215841fc divides it by
  b->ne[0], the rank of each tensor.
- ComfyUI: comfy/weight_adapter/lora.py: alpha / rank by the `.alpha` beside the factors, 1 where there is none.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from safetensors import safe_open

Triple = tuple[np.ndarray, np.ndarray, float]


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Read a file with the safetensors library; bfloat16 through torch, as numpy has none."""
    import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy

    with safe_open(file, framework="np") as opened:
        return {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="np") as opened:
        return opened.metadata() or {}


def double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64).reshape(array.shape[0], -1)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def pattern_value(patterns: dict, name: str, default):
    """PEFT's get_pattern_key: the first key that matches the end of the name from a dot on."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def peft_scale(config: dict, name: str, r: int) -> float:
    rank = pattern_value(config.get("rank_pattern") or {}, name, config["r"])
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    assert rank == r, f"{name}: PEFT builds rank {rank}, the tensors have {r}, and it refuses the file"
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def vllm_scale(config: dict, name: str, r: int) -> float:
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    assert not config.get("modules_to_save"), "vLLM only supports modules_to_save being None"
    assert not config.get("use_dora"), "vLLM does not yet support DoRA"
    return config["lora_alpha"] / root


def sglang_scale(config: dict, name: str, r: int) -> float:
    return config["lora_alpha"] / config["r"]


def llama_cpp_scale(config: dict, name: str, r: int) -> float:
    alpha = float(config["lora_alpha"])
    return alpha / r if alpha else 1.0


def ollama_scale(config: dict, name: str, r: int) -> float:
    assert isinstance(config["lora_alpha"], int), "Ollama parses a whole number"
    return llama_cpp_scale(config, name, r)


SCALES = {
    "peft": peft_scale,
    "vllm": vllm_scale,
    "sglang": sglang_scale,
    "llama.cpp": llama_cpp_scale,
    "ollama": ollama_scale,
}


def peft(folder: Path, runtime: str = "peft") -> dict[str, Triple]:
    """Read linear layers, convolutions and embedding tables of a PEFT folder as a runtime scales them."""
    held, config = tensors(folder / "adapter_model.safetensors"), config_of(folder)
    found = {}
    for name, a in held.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_embedding_A)", name)
        if match is None:
            continue
        module = match[1]
        if match[2] == "lora_embedding_A":
            b = held[f"base_model.model.{module}.lora_embedding_B"]
            first, second = double(b).T, double(a).T  # the table's delta is (B @ A).T
        else:
            first, second = double(a), double(held[f"base_model.model.{module}.lora_B.weight"])
        found[module] = (first, second, SCALES[runtime](config, module, first.shape[0]))
    return found


def kohya(file: Path) -> dict[str, Triple]:
    held = tensors(file)
    found = {}
    for name, down in held.items():
        if name.endswith(".lora_down.weight"):
            module = name.removesuffix(".lora_down.weight")
            alpha = held.get(f"{module}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            found[module] = (double(down), double(held[f"{module}.lora_up.weight"]), scale)
    return found


def diffusers(file: Path) -> dict[str, Triple]:
    """The state dict and the LoraConfig of each component out of the header, as diffusers does since 0.34."""
    held = tensors(file)
    flat = json.loads(header(file).get("lora_adapter_metadata", "{}"))
    found = {}
    for name, a in held.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            component, _, path = module.partition(".")
            config = {k.removeprefix(f"{component}."): v for k, v in flat.items() if k.startswith(f"{component}.")}
            scale = peft_scale(config, path, a.shape[0]) if config else 1.0
            found[module] = (double(a), double(held[f"{module}.lora_B.weight"]), scale)
    return found


def mlx(folder: Path) -> dict[str, Triple]:
    """mlx_lm/tuner/lora.py: y + scale * ((x @ lora_a) @ lora_b), one rank and one scale for all."""
    held, config = tensors(folder / "adapters.safetensors"), config_of(folder)
    parameters = config["lora_parameters"]
    found = {}
    for name, a in held.items():
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            assert a.shape[-1] == parameters["rank"]
            assert module in parameters["keys"]
            found[module] = (double(a).T, double(held[f"{module}.lora_b"]).T, float(parameters["scale"]))
    return found


def delta(triple: Triple) -> np.ndarray:
    a, b, scale = triple
    return scale * (b @ a)


def gap(old: Triple, new: Triple) -> float:
    """Return norm(new - old) / norm(old) of two updates, multiplied out in float64."""
    before, after = delta(old), delta(new)
    whole = np.linalg.norm(before)
    return float(np.linalg.norm(after - before) / whole) if whole else float(np.linalg.norm(after))


def bare(triple: Triple) -> Triple:
    """Drop directions that are zero in both factors."""
    a, b, scale = triple
    used = a.any(axis=1) | b.any(axis=0)
    return a[used], b[:, used], scale
