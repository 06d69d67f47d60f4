"""Cutting an adapter's rank: `rankwise convert` beside PEFT's `save_as_lora` and kohya's resize script.

    python benchmarks/resize_speed.py [--hidden 2048 --layers 2 --rank 128 --to 32 --repeats 2] [--toy]
                                      [--kohya PYTHON SCRIPT]

One adapter for a Llama-shaped model with random weights, all linear layers, bf16. Each program is a process of its
own, run in turns: CPU seconds, wall seconds and peak memory are those of the whole process, imports and loading of the
base (which PEFT needs) included. Afterwards all results are read the same way, and the error of each is printed beside
the optimum of this rank, so that nothing is fast by being wrong. kohya's script (networks/resize_lora.py of sd-scripts)
is run where its Python and path are given. `--toy` is for seeing that it works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import rankwise
from rankwise.checkpoints import open_source

PEFT = """
import sys, torch
from peft import PeftModel, save_as_lora
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
save_as_lora(sys.argv[3], PeftModel.from_pretrained(base, sys.argv[2]), rank=int(sys.argv[4]), progressbar=False)
"""

MODULES = {
    "self_attn.q_proj": (1.0, 1.0),
    "self_attn.k_proj": (0.5, 1.0),
    "self_attn.v_proj": (0.5, 1.0),
    "self_attn.o_proj": (1.0, 1.0),
    "mlp.gate_proj": (2.75, 1.0),
    "mlp.up_proj": (2.75, 1.0),
    "mlp.down_proj": (1.0, 2.75),
}
"""Module -> (out, in) in units of the hidden size, as TinyLlama has them."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run of a program took: seconds of CPU, seconds of the clock, bytes at the peak."""

    cpu: float
    wall: float
    peak: int


def run(words: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a program to its end and return what it took.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    import time

    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, env=os.environ | (environment or {}), stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{words[:3]} ended with {process.returncode}: {said.read()[-2000:].decode()}")
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, usage.ru_maxrss * 1024)


def write_pair(folder: Path, hidden: int, layers: int, rank: int) -> None:
    """Write a base and an adapter whose singular values fall slowly, so that every direction counts."""
    rng = np.random.default_rng(0)
    bf16 = ml_dtypes.bfloat16
    base: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": rng.standard_normal((64, hidden)).astype(bf16),
        "model.norm.weight": np.ones(hidden, bf16),
        "lm_head.weight": rng.standard_normal((64, hidden)).astype(bf16),
    }
    adapter: dict[str, np.ndarray] = {}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, bf16)
        for name, (out, inner) in MODULES.items():
            shape = (int(out * hidden), int(inner * hidden))
            path = f"model.layers.{layer}.{name}"
            base[f"{path}.weight"] = rng.standard_normal(shape, dtype=np.float32).astype(bf16)
            fall = np.float32(1.0 / np.sqrt(1 + np.arange(rank)))
            a = rng.standard_normal((rank, shape[1]), dtype=np.float32) / math.sqrt(shape[1])
            b = rng.standard_normal((shape[0], rank), dtype=np.float32) * fall
            adapter[f"base_model.model.{path}.lora_A.weight"] = a.astype(bf16)
            adapter[f"base_model.model.{path}.lora_B.weight"] = b.astype(bf16)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file(base, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    heads = max(1, hidden // 64)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(2.75 * hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "vocab_size": 64,
        "tie_word_embeddings": False,
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder / "base"),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in MODULES),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))


def errors(folder: Path, made: Path) -> list[float]:
    """Return norm(result - source) / norm(source) of every module, multiplied out in float64."""
    kohya = made.is_file()
    found = []
    with open_source(folder / "adapter", want="adapter") as before, open_source(made, want="adapter") as after:
        results = {m.module: m for m in after.modules}
        for module in before.modules:
            name = "lora_" + module.module.replace(".", "_") if kohya else module.module
            a, b = before.read_factors(module)
            a2, b2 = after.read_factors(results[name])
            whole = module.scaling * (b.astype(np.float64) @ a)
            left = whole - results[name].scaling * (b2.astype(np.float64) @ a2)
            found.append(float(np.linalg.norm(left) / np.linalg.norm(whole)))
    return found


def best(folder: Path, rank: int) -> list[float]:
    """Return the least error of the rank in every module, from the singular values of the factors."""
    record = rankwise.inspect(folder / "adapter")
    sigma = [np.array(m.singular_values) for m in record.modules]
    return [float(np.linalg.norm(s[rank:]) / np.linalg.norm(s)) for s in sigma]


def programs(folder: Path, to: int, kohya: Sequence[str] | None) -> dict[str, tuple[Callable[[int], list[str]], str]]:
    """Return name -> (the command of a repeat, where its result lies)."""
    ours = [sys.executable, "-m", "rankwise", "convert", str(folder / "adapter")]
    theirs = [sys.executable, "-c", PEFT, str(folder / "base"), str(folder / "adapter")]
    found: dict[str, tuple[Callable[[int], list[str]], str]] = {
        "rankwise convert": (lambda i: [*ours, str(folder / f"ours{i}"), "--rank", str(to), "--json"], "ours0"),
        "PEFT save_as_lora": (lambda i: [*theirs, str(folder / f"peft{i}"), str(to)], "peft0"),
    }
    if kohya is not None:
        python, script = kohya
        rankwise.convert(folder / "adapter", folder / "kohya.safetensors", format="kohya")
        same = ["--model", str(folder / "kohya.safetensors"), "--new_rank", str(to), "--save_precision", "bf16"]
        found["kohya resize_lora"] = (
            lambda i: [python, script, *same, "--save_to", str(folder / f"kohya{i}.safetensors")],
            "kohya0.safetensors",
        )
    return found


def main() -> None:
    """Run the programs in turns and print the table."""
    parser = argparse.ArgumentParser(description="Time cutting an adapter's rank against PEFT and kohya.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--to", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--kohya", nargs=2, metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--toy", action="store_true", help="a small model, once: only to see that it works")
    args = parser.parse_args()
    if args.toy:
        args.hidden, args.layers, args.rank, args.to, args.repeats = 128, 1, 16, 4, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, args.hidden, args.layers, args.rank)
        jobs = programs(folder, args.to, args.kohya)
        costs: dict[str, list[Cost]] = {job: [] for job in jobs}
        for repeat in range(args.repeats):
            for job, (command, _) in jobs.items():
                costs[job].append(run(command(repeat)))
        least = best(folder, args.to)
        print(f"{platform.platform()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
        print(
            f"{len(least)} modules, hidden {args.hidden}, rank {args.rank} -> {args.to}, bf16; {args.repeats} repeats"
        )
        print("| program | CPU s | wall s | peak MiB | mean error (best) | CPU against rankwise |")
        print("| --- | --- | --- | --- | --- | --- |")
        ours = statistics.median(c.cpu for c in costs["rankwise convert"])
        for job, (_, made) in jobs.items():
            cpu = statistics.median(c.cpu for c in costs[job])
            wall = statistics.median(c.wall for c in costs[job])
            peak = max(c.peak for c in costs[job]) / 2**20
            error = statistics.fmean(errors(folder, folder / made))
            row = (
                f"{cpu:.2f} | {wall:.2f} | {peak:.0f} | {error:.5f} ({statistics.fmean(least):.5f}) | {cpu / ours:.1f}"
            )
            print(f"| {job} | {row} |")
        with safe_open(folder / "ours0" / "adapter_model.safetensors", framework="np") as made_file:
            print(f"{len(made_file.keys())} tensors written, {rankwise.__version__}")


if __name__ == "__main__":
    main()
