"""Ratios against peers, measured side by side in one run: `python benchmarks/run.py [PART...]`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rankwise import linalg
from rankwise.checkpoints import open_source
from side_by_side import HEAD, Ratio, compare

RANKWISE = [sys.executable, "-m", "rankwise"]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def quiet(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_adapter(folder: Path, *, layers: int = 4, width: int = 2048, r: int = 16) -> Path:
    """Write a PEFT adapter of random factors; speed does not depend on what was learnt."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for name, out in (("q_proj", width), ("k_proj", width // 4), ("v_proj", width // 4), ("o_proj", width)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((r, width)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((out, r)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def bf16_pair(folder: Path, *, size: int, modules: int, rank: int = 16, norm: float = 0.01) -> tuple[Path, Path]:
    """Write a base and a tuned checkpoint in bf16: a planted update of the given rank and relative norm."""
    rng = np.random.default_rng(1)
    base, tuned = {}, {}
    for index in range(modules):
        weight = (0.02 * rng.standard_normal((size, size), dtype=np.float32)).astype(ml_dtypes.bfloat16)
        update = rng.standard_normal((size, rank), dtype=np.float32) @ rng.standard_normal(
            (rank, size), dtype=np.float32
        )
        wide = weight.astype(np.float32)
        wide += update * np.float32(norm * 0.02 * size / np.linalg.norm(update))
        name = f"model.layers.{index}.mlp.up_proj.weight"
        base[name], tuned[name] = weight, wide.astype(ml_dtypes.bfloat16)
    paths = folder / f"base-{modules}.safetensors", folder / f"tuned-{modules}.safetensors"
    save_file(base, paths[0])
    save_file(tuned, paths[1])
    return paths


def adapters(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    yield "made adapter (16 modules, 2048, r 16)", make_adapter(folder / "adapter")
    if options.samples is not None:
        for config in sorted(options.samples.rglob("adapter_config.json")):
            if (config.parent / "adapter_model.safetensors").exists():
                yield config.parent.name, config.parent


def part_startup(options: argparse.Namespace, folder: Path) -> Iterator[Ratio]:
    torch = quiet([sys.executable, "-c", "import torch"])
    n = options.repeats
    yield compare("`rankwise --help`", quiet([*RANKWISE, "--help"]), "`import torch` alone", torch, n)
    for name, path in adapters(options, folder):
        ours = quiet([*RANKWISE, "inspect", str(path), "--json"])
        yield compare(f"`inspect`, {name}", ours, "`import torch` alone", torch, n)
        gradience = Path(sys.executable).with_name("gradience")
        if gradience.exists():
            theirs = quiet([str(gradience), "audit", "--peft-dir", str(path), "--json"])
            yield compare(f"`inspect`, {name}", ours, f"`gradience audit` {metadata.version('gradience')}", theirs, n)


def part_adapter(options: argparse.Namespace, folder: Path) -> Iterator[Ratio]:
    import torch

    for name, path in adapters(options, folder):
        with open_source(path) as adapter:
            factors = [(m.scaling or 1.0, *adapter.read_factors(m)) for m in adapter.modules]

        def ours(factors: list[tuple[float, np.ndarray, np.ndarray]] = factors) -> None:
            for scaling, a, b in factors:
                linalg.factored_values(a, b, scaling)

        def dense(values_only: bool, factors: list[tuple[float, np.ndarray, np.ndarray]] = factors) -> None:
            for scaling, a, b in factors:
                delta = scaling * (torch.from_numpy(b) @ torch.from_numpy(a))
                (torch.linalg.svdvals if values_only else torch.linalg.svd)(delta)

        repeats = 1 if options.quick else min(options.repeats, 3)
        modules = f"{len(factors)} modules"
        yield compare(f"spectra, {name}, {modules}", ours, "B @ A, torch svdvals", lambda: dense(True), repeats)
        if name.startswith("made"):
            yield compare(f"spectra, {name}, {modules}", ours, "B @ A, torch svd", lambda: dense(False), repeats)


def part_delta(options: argparse.Namespace, folder: Path) -> Iterator[Ratio]:
    import torch

    base, tuned = bf16_pair(folder, size=options.size, modules=1)
    with open_source(base) as before, open_source(tuned) as after:
        name = before.names()[0]
        delta = after.read(name).astype(np.float32) - before.read(name).astype(np.float32)
    matrix = torch.from_numpy(delta)
    exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
    seen = exact > 1e-3 * exact[0]
    for label, values in (
        ("rankwise", linalg.matrix_values(delta).sigma),
        ("torch svdvals, float32", torch.linalg.svdvals(matrix).numpy()),
    ):
        error = np.abs(values[seen] / exact[seen] - 1).max()
        print(f"largest relative error above 1e-3 sigma_1, {label}: {error:.1e} (float64 SVD as the truth)")
    repeats = 1 if options.quick else min(options.repeats, 3)
    what = f"full spectrum, {options.size} x {options.size} of bf16"
    for peer, job in (("torch.linalg.svdvals", torch.linalg.svdvals), ("torch.linalg.svd", torch.linalg.svd)):
        yield compare(what, lambda: linalg.matrix_values(delta), peer, lambda job=job: job(matrix), repeats)
    what = f"16 largest values, {options.size} x {options.size} of bf16"
    lowrank = lambda: torch.svd_lowrank(matrix, q=80, niter=4)  # noqa: E731
    yield compare(what, lambda: linalg.leading_values(delta, 16), "torch.svd_lowrank(q=80, niter=4)", lowrank, repeats)


_PEAK = """
import sys
import numpy, scipy.linalg, ml_dtypes, rankwise.inspection, rankwise.checkpoints, rankwise.noise
def peak():  # VmHWM begins anew at exec; ru_maxrss of a child begins at its parent's peak
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
if len(sys.argv) > 2:
    rankwise.inspection.inspect(sys.argv[1], base=sys.argv[2])
print(peak() - before)
"""


def part_memory(options: argparse.Namespace, folder: Path) -> Iterator[Ratio]:
    half = options.size // 2
    cases = [(1, half)] if options.quick else [(1, options.size), (1, half), (40, half)]
    for modules, size in cases:
        base, tuned = bf16_pair(folder, size=size, modules=modules)
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tuned), str(base)], check=True, capture_output=True, text=True
        )
        largest = 4 * size * size / 1024
        print(
            f"peak memory above the imports, {modules} modules of {size} x {size} bf16 "
            f"({2 * base.stat().st_size / 2**20:.0f} MiB of files): {int(done.stdout) / 1024:.0f} MiB = "
            f"{int(done.stdout) / largest:.1f} x the float32 size of the largest tensor"
        )
        base.unlink()
        tuned.unlink()
    return iter(())


PARTS = {"startup": part_startup, "adapter": part_adapter, "delta": part_delta, "memory": part_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--samples", type=Path, help="a folder with real adapters below it")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the delta (default 4096)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one repeat, one module: to see that it runs")
    options = parser.parse_args()
    unknown = [p for p in options.parts if p not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    missing = [p for p in ("torch", "gradience") if not has(p)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__}")
    for package in ("scipy", "torch", "gradience"):
        if has(package):
            print(f"{package} {metadata.version(package)}")
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install -r benchmarks/requirements.txt)")
    for name in options.parts or PARTS:
        if "torch" in missing and name != "memory":
            continue
        folder = Path(tempfile.mkdtemp(prefix="rankwise-bench-"))
        try:
            print(f"\n## {name}\n")
            rows = [ratio.row() for ratio in PARTS[name](options, folder)]
            if rows:
                print("\n" + "\n".join([HEAD, *rows]), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\npeak memory of this run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
