"""Extraction at one rank: `rankwise extract` beside mergekit and PEFT's own conversion, on the same pair in one run.

    python benchmarks/extract_speed.py [--hidden 2048 --layers 2 --vocab 4096 --rank 64 --repeats 2] [--toy]
                                       [--mergekit PYTHON] [--peft PYTHON]

A Llama-shaped bf16 pair: the delta of each linear layer is a part of the rank given, singular values from 1.5 to
0.15, and a Gaussian tail of 3 % of its norm, rounded to bf16 with the weights. Each program is a process of its own,
run in turns: CPU seconds, wall seconds and peak resident memory are those of the whole process, imports included. All
results are then read the same way, and the error of each stands beside the optimum (float64 spectrum), so that nothing
is fast by being wrong. `--mergekit` names a Python that has mergekit, in an environment of its
own; without it, or where it cannot be imported, it is left out with a line. PEFT converts adapters, not checkpoints:
it is given the pair as a LoRA of full rank, whose making is not timed, and loads base and adapter with transformers as
its documentation says. `--toy` is for seeing that it works; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter
from resize_speed import MODULES, PEFT, Cost

LAUNCH = """
import json, os, sys, time
start = time.perf_counter()
child = os.fork()
if child == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime,
                  time.perf_counter() - start, usage.ru_maxrss * 1024]), file=sys.stderr)
"""
"""Starts a program from a small process: the peak that a kernel reports begins with that of the process forked from."""

TAIL = 0.03
BF16 = ml_dtypes.bfloat16


def write_pair(folder: Path, hidden: int, layers: int, vocab: int, rank: int) -> None:
    """Write base and tuned, and the same delta as a LoRA of full rank for PEFT."""
    rng = np.random.default_rng(0)
    base: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": rng.standard_normal((vocab, hidden), dtype=np.float32).astype(BF16),
        "model.norm.weight": np.ones(hidden, BF16),
        "lm_head.weight": rng.standard_normal((vocab, hidden), dtype=np.float32).astype(BF16),
    }
    tuned: dict[str, np.ndarray] = {}
    full: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, BF16)
        for name, (out, inner) in MODULES.items():
            shape = (int(out * hidden), int(inner * hidden))
            path = f"model.layers.{layer}.{name}"
            weight = (rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)).astype(BF16)
            left = np.linalg.qr(rng.standard_normal((shape[0], rank), dtype=np.float32))[0]
            right = np.linalg.qr(rng.standard_normal((shape[1], rank), dtype=np.float32))[0]
            delta = (left * np.linspace(1.5, 0.15, rank, dtype=np.float32)) @ right.T
            tail = rng.standard_normal(shape, dtype=np.float32)
            delta += tail * np.float32(TAIL * np.linalg.norm(delta) / np.linalg.norm(tail))
            base[f"{path}.weight"] = weight
            tuned[f"{path}.weight"] = (weight.astype(np.float32) + delta).astype(BF16)
            exact = tuned[f"{path}.weight"].astype(np.float32) - weight.astype(np.float32)
            r = min(shape)
            a, b = (np.eye(r, dtype=np.float32), exact) if shape[1] == r else (exact, np.eye(r, dtype=np.float32))
            full[f"base_model.model.{path}.lora_A.weight"] = a
            full[f"base_model.model.{path}.lora_B.weight"] = b
            ranks[f"^{path}".replace(".", r"\.")] = r
    heads = max(1, hidden // 64)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(2.75 * hidden),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    for kind, tensors in (("base", base), ("tuned", base | tuned)):
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
        (folder / kind / "config.json").write_text(json.dumps(config))
    (folder / "full").mkdir()
    save_file(full, folder / "full" / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(folder / "base"),
        "r": hidden,
        "lora_alpha": hidden,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(name.rpartition(".")[2] for name in MODULES),
    }
    (folder / "full" / "adapter_config.json").write_text(json.dumps(lora))


def deltas(folder: Path) -> dict[str, np.ndarray]:
    """Return the exact difference of each linear layer."""
    base, tuned = (load_file(folder / kind / "model.safetensors") for kind in ("base", "tuned"))
    names = [n for n in base if any(n.endswith(f"{m}.weight") for m in MODULES)]
    return {n.removesuffix(".weight"): tuned[n].astype(np.float32) - base[n].astype(np.float32) for n in names}


def errors(wanted: dict[str, np.ndarray], made: Path) -> dict[str, float]:
    """Return norm(D - s B A) / norm(D) of each module of an adapter."""
    found = {}
    with open_source(made, want="adapter") as opened:
        if not isinstance(opened, Adapter):
            raise TypeError(f"{made} is no adapter")
        for module in opened.modules:
            if module.module in wanted:
                a, b = opened.read_factors(module)
                delta = wanted[module.module].astype(np.float64)
                left = delta - (module.scaling or 1.0) * (b.astype(np.float64) @ a)
                found[module.module] = float(np.linalg.norm(left) / np.linalg.norm(delta))
    return found


def best(delta: np.ndarray, rank: int) -> float:
    """Return the error of the truncated SVD, from the eigenvalues of the Gram matrix in float64."""
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    squares = np.linalg.eigvalsh(tall.T.astype(np.float64) @ tall.astype(np.float64))[::-1]
    return float(np.sqrt(squares[rank:].clip(0).sum() / squares.sum()))


def run(words: Sequence[str]) -> Cost:
    """Run a program to its end and return what it took.

    Raises:
        RuntimeError: it failed; its last words are in the message.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-S", "-c", LAUNCH, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    code, cpu, wall, peak = json.loads(done.stderr.strip().splitlines()[-1])
    if code:
        raise RuntimeError(f"{words[:3]} ended with {code}: {done.stderr[-2000:]}")
    return Cost(cpu, wall, peak)


def has(python: str, module: str) -> bool:
    """Return whether a Python can import a module."""
    try:
        done = subprocess.run([python, "-c", f"import {module}"], capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def programs(
    folder: Path, rank: int, mergekit: str | None, peft: str
) -> dict[str, tuple[Callable[[int], Sequence[str]], str]]:
    """Return name -> (the command of a repeat, where its result lies); says what is left out."""
    pair = [str(folder / "base"), str(folder / "tuned")]
    ours = [sys.executable, "-m", "rankwise", "extract", *pair]
    found: dict[str, tuple[Callable[[int], Sequence[str]], str]] = {
        "rankwise extract": (
            lambda i: [*ours, str(folder / f"ours{i}"), "--rank", str(rank), "--device", "cpu", "--json"],
            "ours0",
        )
    }
    if mergekit is None or not has(mergekit, "mergekit.scripts.extract_lora"):
        print("mergekit: left out" + (": no --mergekit PYTHON" if mergekit is None else f": not in {mergekit}"))
    else:
        script = "from mergekit.scripts.extract_lora import main; main()"
        theirs = ["--model", pair[1], "--base-model", pair[0], "--max-rank", str(rank), "--skip-undecomposable"]
        theirs += ["-e", "embed_tokens", "-e", "lm_head"]
        found["mergekit"] = (
            lambda i: [mergekit, "-c", script, *theirs, "--out-path", str(folder / f"mergekit{i}")],
            "mergekit0",
        )
    if not has(peft, "peft, transformers"):
        print(f"PEFT: left out: not in {peft}")
    else:
        words = [peft, "-c", PEFT, pair[0], str(folder / "full")]
        found["PEFT save_as_lora"] = (lambda i: [*words, str(folder / f"peft{i}"), str(rank)], "peft0")
    return found


def main() -> None:
    """Run the programs in turns and print the table."""
    parser = argparse.ArgumentParser(description="Time extraction against mergekit and PEFT.")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--peft", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--toy", action="store_true", help="a small pair, once: only to see that it works")
    args = parser.parse_args()
    if args.toy:
        args.hidden, args.layers, args.vocab, args.rank, args.repeats = 128, 1, 64, 8, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pair(folder, args.hidden, args.layers, args.vocab, args.rank)
        jobs = programs(folder, args.rank, args.mergekit, args.peft)
        costs: dict[str, list[Cost]] = {job: [] for job in jobs}
        for repeat in range(args.repeats):
            for job, (command, _) in jobs.items():
                costs[job].append(run(command(repeat)))
        wanted = deltas(folder)
        least = {module: best(delta, args.rank) for module, delta in wanted.items()}
        print(f"{platform.platform()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
        print(f"{len(wanted)} modules, hidden {args.hidden}, rank {args.rank}, best mean error {_mean(least):.5f}")
        print("| program | CPU s | wall s | peak MiB | mean error | worst over best | CPU over ours |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        own = statistics.median(c.cpu for c in costs["rankwise extract"])
        for job, (_, result) in jobs.items():
            found = errors(wanted, folder / result)
            cpu, wall = (statistics.median(getattr(c, what) for c in costs[job]) for what in ("cpu", "wall"))
            peak = max(c.peak for c in costs[job]) / 2**20
            worst = max(found[module] / least[module] - 1 for module in wanted)
            print(
                f"| {job} | {cpu:.2f} | {wall:.2f} | {peak:.0f} | {_mean(found):.5f} | {worst:+.2%} | {cpu / own:.1f} |"
            )


def _mean(values: dict[str, float]) -> float:
    return statistics.fmean(values.values())


if __name__ == "__main__":
    main()
