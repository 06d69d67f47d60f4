"""Study of the noise edge: planted updates and pairs that differ by rounding alone.

Every case plants an update P of known rank on weights that stand on the dtype's grid, rounds, and compares the
reading with the truth: sigma_1(tuned - base - P) in float64. A case qualifies where the smallest planted value
is 1.3 times that or more. Run: OMP_NUM_THREADS=1 python lab/noise_edge.py --help
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rankwise.noise import read_noise

Array = NDArray[Any]
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
WEIGHTS = ("gauss", "laplace", "t4", "t3", "scaled")
SPECTRA = ("flat", "linear", "power")


def weights(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Draw float32 weights; `scaled` has log-normal row and column scales (0.7 each)."""
    if kind == "laplace":
        drawn = rng.laplace(size=shape)
    elif kind.startswith("t"):
        drawn = rng.standard_t(int(kind[1:]), size=shape)
    else:
        drawn = rng.standard_normal(shape)
    if kind == "scaled":
        rows, columns = rng.standard_normal((shape[0], 1)), rng.standard_normal((1, shape[1]))
        drawn = drawn * np.exp(0.7 * rows) * np.exp(0.7 * columns)
    return (0.02 * drawn).astype(np.float32)


def planted(shape: tuple[int, int], rank: int, kind: str, norm: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return an update of exact rank and Frobenius norm `norm`, and its singular values."""
    number = np.arange(rank)
    values = {"flat": np.ones(rank), "linear": np.linspace(5, 0.5, rank), "power": (1.0 + number) ** -0.7}[kind]
    values = values * (norm / np.linalg.norm(values))
    left = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    right = np.linalg.qr(rng.standard_normal((shape[1], rank)))[0]
    return (left * values) @ right.T, values


def singular_values(matrix: Array) -> Array:
    """Return the singular values through the smaller Gram matrix in float64."""
    wide = matrix.astype(np.float64)
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return np.sqrt(np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0))


def study_planted(options: argparse.Namespace) -> None:
    """Run the grid and print the cases that missed, or all of them, and the summary."""
    qualifying = exact = within = 0
    ratios, seconds = [], 0.0
    print(f"{'case':<46} true edge   est. edge  ratio  planted  read  s_k/edge")
    grid = itertools.product(
        options.shapes.split(","),
        options.weights.split(","),
        options.dtypes.split(","),
        SPECTRA,
        (4, 8, 16, 32),
        (0.001, 0.002, 0.005, 0.01, 0.03),
        range(options.first, options.first + options.seeds),
    )
    for size, kind, dtype, spectrum, rank, rho, seed in grid:
        shape = (int(size.split("x")[0]), int(size.split("x")[1]))
        rng = np.random.default_rng(seed)
        base = weights(kind, shape, rng).astype(DTYPES[dtype])
        exact_base = base.astype(np.float64)
        update, values = planted(shape, rank, spectrum, rho * float(np.linalg.norm(exact_base)), rng)
        tuned = (exact_base + update).astype(np.float32).astype(DTYPES[dtype])
        truth = float(singular_values(tuned.astype(np.float64) - exact_base - update)[0])
        if values[-1] < 1.3 * truth:
            continue
        delta = tuned.astype(np.float32) - base.astype(np.float32)
        found = singular_values(delta)
        started = time.perf_counter()
        reading = read_noise(base, tuned, delta, found, seed=seed)
        seconds += time.perf_counter() - started
        if reading.noise_edge is None or reading.signal_rank is None:
            raise SystemExit(f"no reading for {size} {kind} {dtype}")
        miss = abs(reading.signal_rank - rank)
        qualifying, exact, within = qualifying + 1, exact + (miss == 0), within + (miss <= (rho < 0.0015))
        ratios.append(reading.noise_edge / truth)
        if miss or options.all:
            case = f"{kind} {size} {dtype} {spectrum} rho {rho} seed {seed}"
            numbers = (
                f"{truth:10.3e}  {reading.noise_edge:10.3e}  {ratios[-1]:5.2f}  {rank:7d}  {reading.signal_rank:4d}"
            )
            print(f"{case:<46} {numbers}  {values[-1] / truth:8.2f}", flush=True)
    spread = np.quantile(ratios, [0, 0.05, 0.5, 0.95, 1])
    print(f"qualifying {qualifying}: exact {exact}, as demanded {within}")
    print(f"edge / truth: min, 5 %, median, 95 %, max = {np.round(spread, 3)}; reading took {seconds:.0f} s")


def rounding_pairs(kind: str, shape: tuple[int, int], dtype: str, seed: int) -> Iterator[tuple[str, Array, Array]]:
    """Yield pairs that differ by rounding alone, one way after the other."""
    rng, to = np.random.default_rng(seed), DTYPES[dtype]
    drawn = weights(kind, shape, rng)
    base = drawn.astype(to)
    exact_base = base.astype(np.float32)
    if dtype == "bf16":
        yield "through fp16", base, drawn.astype(np.float16).astype(to)
    bits = base.view(np.uint16).copy()
    bits[np.abs(exact_base) > np.abs(drawn)] -= 1
    yield "truncated", base, bits.view(to)
    for size in (1e-5, 1e-4):
        noise = (size * 0.02 * rng.standard_normal(shape)).astype(np.float32)
        yield f"iid {size}, both rounded", base, (drawn + noise).astype(to)
        yield f"iid {size}, base exact", base, (exact_base + noise).astype(to)
    update = planted(shape, min(8, *shape), "flat", 0.02 * float(np.linalg.norm(drawn)), rng)[0].astype(np.float32)
    merged = (exact_base + update).astype(to).astype(np.float32)
    yield "merged and unmerged", base, (merged - update).astype(to)
    yield "the same in fp32", base, ((exact_base + 30 * update) - 30 * update).astype(to)
    for count in (1, 3, 20, 200):
        bits = base.view(np.uint16).copy()
        bits.ravel()[rng.choice(base.size, count, replace=False)] += 1
        yield f"{count} flips", base, bits.view(to)
    bits = base.view(np.uint16).copy()
    bits.ravel()[np.argsort(-np.abs(drawn).ravel())[:4]] += 1
    yield "flips of the 4 largest", base, bits.view(to)


def study_rounding(options: argparse.Namespace) -> None:
    """Read every rounding-only pair; print those that do not read 0."""
    total = wrong = 0
    closest = 0.0
    for size, kind, dtype in itertools.product(options.shapes.split(","), options.weights.split(","), ("bf16", "fp16")):
        shape = (int(size.split("x")[0]), int(size.split("x")[1]))
        for seed in range(options.first, options.first + options.seeds):
            for name, base, tuned in rounding_pairs(kind, shape, dtype, seed):
                delta = tuned.astype(np.float32) - base.astype(np.float32)
                found = singular_values(delta)
                reading = read_noise(base, tuned, delta, found, seed=seed)
                total += 1
                closest = max(closest, found[0] / reading.noise_edge if reading.noise_edge else 0.0)
                if reading.signal_rank != 0:
                    wrong += 1
                    print(f"{name} {kind} {size} {dtype} seed {seed}: {reading}", flush=True)
    print(f"rounding only: {total} pairs, {wrong} read above 0; sigma_1 / edge at most {closest:.3f}")


def main() -> None:
    """Read the options and run one of the two studies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=("planted", "rounding"))
    parser.add_argument("--shapes", default="256x512,512x256")
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--dtypes", default="bf16,fp16", help="of the planted study")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--all", action="store_true", help="print every qualifying case, not only the misses")
    options = parser.parse_args()
    (study_planted if options.study == "planted" else study_rounding)(options)


if __name__ == "__main__":
    main()
