"""What a pair of 405 B checkpoints costs on 1, 8 and 64 workers: measured per-module costs, a law, a simulation.

    OMP_NUM_THREADS=1 python lab/cluster_cost.py measure costs.json [--shapes 1024x1024,2048x4096] [--op inspect]
    python lab/cluster_cost.py fit costs.json [--check 4096x8192,5120x5120]
    python lab/cluster_cost.py simulate costs.json

`measure` plants a pair of one module (bf16 weights, an update of rank 32 and full-rank noise below it), writes it, and
does to it what a worker does, in a process of its own: CPU seconds, bytes read a second, peak memory. `fit` finds the
law by non-negative least squares on relative errors, and predicts the shapes of `--check`, which it leaves out.
`simulate` schedules the modules of Llama 3.1 405 B in order on workers, as `rankwise.spreading` does.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

RANK: Final = 64
"""Of the adapter that `extract` makes."""

PLANTED: Final = 32
"""Rank of the planted update."""

SHAPES: Final = "512x512,1024x1024,2048x2048,3072x3072,4096x4096,1024x4096,2048x4096,3072x6144,1024x8192,256x4096"


@dataclass(frozen=True, slots=True)
class Assumed:
    """What is not measured. Printed before any result."""

    cores: int = 8
    """Of a worker; all work on one module."""
    efficiency: float = 0.7
    """Of these cores in matrix products, over one core of the machine measured on."""
    bandwidth: float = 1.0e9
    """Bytes a second from the store to one worker."""
    latency: float = 0.05
    """Seconds of one request to the store."""
    price: float = 0.60
    """Dollars an hour of one worker: 8 cores and 64 GiB; nothing else is counted (traffic, requests, the driver)."""
    start: float = 60.0
    """Seconds until workers have imported what they need and opened both checkpoints."""
    shard: float = 4.9e9
    """Bytes of one file."""


def plant(shape: tuple[int, int], folder: Path) -> None:
    """Write base.safetensors and tuned.safetensors of one module."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    weight = 0.02 * rng.standard_normal(shape, dtype=np.float32)
    left = rng.standard_normal((shape[0], PLANTED), dtype=np.float32)
    right = rng.standard_normal((PLANTED, shape[1]), dtype=np.float32)
    update = left * (2e-4 * 0.9 ** np.arange(PLANTED, dtype=np.float32)) @ right
    update += 3e-5 * rng.standard_normal(shape, dtype=np.float32)
    for name, tensor in (("base", weight), ("tuned", weight + update)):
        save_file({"layer.proj.weight": tensor.astype(ml_dtypes.bfloat16)}, folder / f"{name}.safetensors")


@dataclass(frozen=True, slots=True)
class Pairs:
    """A pair that is open, and its names."""

    sources: tuple[str, str]
    wanted: Any
    compared: Any
    pair: Any


def opened(folder: Path) -> Pairs:
    """Open what `plant` wrote."""
    from rankwise.deltas import pair_checkpoints, selection
    from rankwise.inspection import _open_compared
    from rankwise.spectra import Options

    sources, wanted = (str(folder / "base.safetensors"), str(folder / "tuned.safetensors")), selection(None, None)
    compared = _open_compared(*sources, wanted, Options())
    (pair,) = pair_checkpoints(compared.before, compared.tuned, wanted).pairs
    return Pairs(sources, wanted, compared, pair)


def do(op: str, given: Pairs) -> str:
    """Do one module as a worker does, and return the route that its factors took."""
    from rankwise.adapters.choosing import choose
    from rankwise.adapters.extraction import _open_working
    from rankwise.adapters.layout import names_on_base, spot_of
    from rankwise.adapters.units import Unit
    from rankwise.inspection import _delta_spectra

    pair = given.pair
    if op == "inspect":
        list(_delta_spectra(given.compared, pair))
        return ""
    ways: dict[str, Any] = dict.fromkeys(("energy", "relative_error", "plan", "rule", "lora_alpha"))
    choice = choose(rank=RANK, signal=False, **ways)
    working = _open_working(*given.sources, given.wanted, choice, {"device": "cpu", "seed": 0, "dtype": None})
    on_base, _ = names_on_base({pair.tuned_name: pair.base_name})
    spot = spot_of(pair, on_base[pair.tuned_name], set(on_base.values()), None)
    return str(working.work(Unit(spot.name, ((pair, spot),)))[0].modules[0].route)


def peak_memory() -> int:
    """Return the most bytes that this process held. `getrusage` counts the parent in, which planted the weights."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def child(op: str, shape: tuple[int, int], folder: Path) -> dict[str, Any]:
    """Return what one module took in this process, which is not asked for anything else."""
    from rankwise.deltas import pair_memory

    do(op, opened(folder / "warm"))  # libraries are loaded before the clock starts
    given = opened(folder)
    begun = time.perf_counter()
    names = given.pair.base_name, given.pair.tuned_name
    size = given.compared.before.read(names[0]).nbytes + given.compared.tuned.read(names[1]).nbytes
    reading = time.perf_counter() - begun
    before, begun = time.process_time(), time.perf_counter()
    route = do(op, given)
    return {
        "op": op,
        "shape": list(shape),
        "route": route,
        "cpu_s": time.process_time() - before,
        "wall_s": time.perf_counter() - begun,
        "read_bytes_per_s": size / reading,
        "peak_bytes": peak_memory(),
        "estimated_bytes": pair_memory(given.pair),
    }


def measure(out: Path, shapes: Sequence[tuple[int, int]], ops: Sequence[str], repeats: int) -> None:
    """Measure every shape in a process of its own, and keep the fastest of the repeats."""
    kept: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    with tempfile.TemporaryDirectory() as name:
        kept = [k for k in kept if k["op"] != "driver"] + [driver_costs(Path(name))]
    for shape in shapes:
        with tempfile.TemporaryDirectory() as name:
            plant(shape, Path(name))
            plant((96, 96), Path(name) / "warm")
            for op in ops:
                words = [sys.executable, __file__, "child", op, f"{shape[0]}x{shape[1]}", name]
                runs = [
                    json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout) for _ in range(repeats)
                ]
                best = min(runs, key=lambda run: run["cpu_s"])
                kept = [k for k in kept if (k["op"], k["shape"]) != (op, list(shape))] + [best]
                out.write_text(json.dumps(kept, indent=1) + "\n")
                memory = f"{best['peak_bytes'] / 2**20:.0f} MiB (estimated {best['estimated_bytes'] / 2**20:.0f})"
                print(f"{op:8} {shape[0]:>6} x {shape[1]:<6} {best['cpu_s']:8.2f} CPU s, {memory}", flush=True)


def driver_costs(folder: Path) -> dict[str, Any]:
    """Return what the driver spends: on a result of a large module, and on a value of the record at the end."""
    import pickle

    import msgspec

    import rankwise
    from rankwise.adapters.parts import write_part
    from rankwise.records import to_json

    plant((64, 64), folder)
    record = rankwise.inspect(folder / "tuned.safetensors", base=folder / "base.safetensors")
    values = tuple(np.geomspace(1, 1e-3, 16384).tolist())
    large = msgspec.structs.replace(record.modules[0], singular_values=values)
    sent = pickle.dumps(large)
    begun = time.perf_counter()
    pickle.loads(sent)  # noqa: S301 - our own
    loading = time.perf_counter() - begun
    whole = msgspec.structs.replace(record, modules=(large,) * 20)
    begun = time.perf_counter()
    size = len(to_json(whole))
    writing = time.perf_counter() - begun
    factors = {"a": np.zeros((RANK, 16384), ml_dtypes.bfloat16), "b": np.zeros((53248, RANK), ml_dtypes.bfloat16)}
    begun = time.perf_counter()
    write_part(folder / "000000.part", factors, {})
    part = time.perf_counter() - begun
    count = 20 * len(values)
    return {"op": "driver", "shape": [0, 0], "inspect_s": loading, "extract_s": part, "value_s": writing / count,
            "value_bytes": size / count}  # fmt: skip


OTHER: Final = "subspace"
"""Route of `extract` that large modules with a flat tail do not take: left out of the fit."""

TURN: Final = 3072
"""Smaller side from which `rankwise.bands` reduces in two stages, and from which the Gram matrix leaves the cache."""


def features(_: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """Return what the time is made of: a constant, entries, the Gram matrix, its reduction below and above `TURN`.

    `extract` is as long as `inspect`: on an update with a flat tail the subspace cannot certify a rank, and the exact
    route takes over (`route` in the measurements).
    """
    m, n = max(shape), min(shape)
    cube = n**3 / 1e12
    return np.array([1e-3, m * n / 1e9, m * n * n / 1e12, cube if n < TURN else 0.0, cube if n >= TURN else 0.0])


def fit(measured: Sequence[dict[str, Any]], op: str) -> NDArray[np.float64]:
    """Return non-negative coefficients that minimise the relative errors."""
    from scipy.optimize import nnls

    rows = [run for run in measured if run["op"] == op and run["route"] != OTHER]
    design = np.stack([features(op, run["shape"]) / run["cpu_s"] for run in rows])
    scale = np.linalg.norm(design, axis=0)
    scale[scale == 0] = 1.0
    solution: NDArray[np.float64] = nnls(design / scale, np.ones(len(rows)))[0] / scale
    return solution


def modules() -> list[tuple[str, tuple[int, int]]]:
    """Return the matrices of Llama 3.1 405 B in the order of its layers."""
    hidden, mlp, kv, vocabulary = 16384, 53248, 8 * 128, 128256
    found = [("embed_tokens", (vocabulary, hidden))]
    for layer in range(126):
        found += [(f"{layer}.q", (hidden, hidden)), (f"{layer}.k", (kv, hidden)), (f"{layer}.v", (kv, hidden)),
                  (f"{layer}.o", (hidden, hidden)), (f"{layer}.gate", (mlp, hidden)), (f"{layer}.up", (mlp, hidden)),
                  (f"{layer}.down", (hidden, mlp))]  # fmt: skip
    return [*found, ("lm_head", (vocabulary, hidden))]


@dataclass(frozen=True, slots=True)
class Simulated:
    """One run, in seconds; `reading`, `computing` and `waiting` of all workers together."""

    wall: float
    reading: float
    computing: float
    headers: float
    last: float
    waiting: float


def simulate(op: str, law: NDArray[np.float64], workers: int, given: Assumed, costs: dict[str, Any]) -> Simulated:
    """Schedule the modules in order: a free worker takes the next one, and no more than the window are ahead.

    Args:
        op: "inspect" or "extract".
        law: coefficients of `features`.
        workers: machines, each at one module at a time: it reads, then computes.
        given: what is assumed.
        costs: of the driver, as `driver_costs` measures them.
    """
    from rankwise.spreading import AHEAD, FEWEST

    # the driver reads the 8 bytes and the header of every shard of both, one after another
    total = sum(2 * m * n for _, (m, n) in modules())
    headers = 2 * math.ceil(total / given.shard) * 2 * given.latency
    begin = headers + given.start
    handling = costs[f"{op}_s"]
    todo = modules() if op == "inspect" else [one for one in modules() if one[0] not in ("embed_tokens", "lm_head")]
    window = max(FEWEST, AHEAD * workers)
    free = [begin] * workers
    delivered: list[float] = []
    reading = computing = 0.0
    for index, (_, shape) in enumerate(todo):
        allowed = delivered[index - window] if index >= window else begin
        start = max(heapq.heappop(free), allowed)
        # at worst its shards are new to the worker: two requests for each header beside the two tensors
        read = 4 * shape[0] * shape[1] / given.bandwidth + 6 * given.latency
        compute = float(features(op, shape) @ law) / (given.cores * given.efficiency)
        reading, computing = reading + read, computing + compute
        end = start + read + compute
        heapq.heappush(free, end)
        delivered.append(max(end, delivered[-1] if delivered else 0.0) + handling)
    last = sum(min(shape) for _, shape in todo) * costs["value_s"] if op == "inspect" else len(todo) * handling
    # what is in no factors is compared at the end: two tables, in one call
    tables = 0.0 if op == "inspect" else sum(4 * m * n for _, (m, n) in modules() if m > 100_000) / given.bandwidth
    reading += tables
    wall = delivered[-1] + tables + last
    return Simulated(wall, reading, computing, headers, last, workers * wall - reading - computing)


def report(measured: Sequence[dict[str, Any]], given: Assumed) -> None:
    """Print the assumptions, then the table."""
    costs = next(run for run in measured if run["op"] == "driver")
    for name in Assumed.__slots__:
        print(f"assumed {name}: {getattr(given, name):g}")
    print("measured, driver:", ", ".join(f"{k} {v:.3g}" for k, v in costs.items() if k not in ("op", "shape")))
    total = sum(4 * m * n for _, (m, n) in modules())
    values = sum(min(shape) for _, shape in modules())
    print(f"{len(modules())} matrices, {total / 1e12:.2f} TB in the two checkpoints; {values:,} singular values, "
          f"{values * costs['value_bytes'] / 1e6:.0f} MB as a record")  # fmt: skip
    print("| module | read, s | inspect, CPU s | of a worker, s | extract, CPU s | of a worker, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    laws = {op: fit(measured, op) for op in ("inspect", "extract")}
    for name in ("0.k", "0.q", "0.gate", "embed_tokens"):
        shape = dict(modules())[name]
        took = [float(features(op, shape) @ laws[op]) for op in ("inspect", "extract")]
        words = [f"{s:,.0f} | {s / given.cores / given.efficiency:,.0f}" for s in took]
        words[1] = words[1] if name[0] != "e" else "- | -"
        size = " x ".join(f"{n:,}" for n in shape)
        print(f"| {name} {size} | {4 * shape[0] * shape[1] / given.bandwidth:.1f} | {' | '.join(words)} |")
    print("| command | workers | hours | reading | computing | waiting | headers, record | cost |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for op in ("inspect", "extract"):
        law = laws[op]
        for workers in (1, 8, 64):
            found = simulate(op, law, workers, given, costs)
            held = workers * found.wall
            parts = [f"{part / held:.1%}" for part in (found.reading, found.computing, found.waiting)]
            words = f"{found.wall / 3600:.2f} | {' | '.join(parts)} | {found.headers:.0f} s, {found.last:.0f} s"
            print(f"| {op} | {workers} | {words} | ${held / 3600 * given.price:.0f} |")


def shapes_of(text: str) -> list[tuple[int, int]]:
    pairs = [word.split("x") for word in text.split(",") if word]
    return [(int(a), int(b)) for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit", "simulate", "child"))
    parser.add_argument("rest", nargs="+")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--op", default="inspect,extract")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--check", default="")
    for name in Assumed.__slots__:
        parser.add_argument(f"--{name}", type=type(getattr(Assumed(), name)), default=getattr(Assumed(), name))
    asked = parser.parse_args()
    if asked.what == "child":
        op, shape, folder = asked.rest
        print(json.dumps(child(op, shapes_of(shape)[0], Path(folder))))
        return
    file = Path(asked.rest[0])
    if asked.what == "measure":
        measure(file, shapes_of(asked.shapes), asked.op.split(","), asked.repeats)
        return
    measured = json.loads(file.read_text())
    if asked.what == "fit":
        checked = {tuple(shape) for shape in shapes_of(asked.check)}
        for op in ("inspect", "extract"):
            seen = [run for run in measured if tuple(run["shape"]) not in checked]
            law = fit(seen, op)
            print(op, "coefficients", [f"{c:.4g}" for c in law])
            for run in sorted((r for r in measured if r["op"] == op), key=lambda r: r["cpu_s"]):
                told = float(features(op, run["shape"]) @ law)
                mark = "left out" if tuple(run["shape"]) in checked or run["route"] == OTHER else ""
                size = "x".join(map(str, run["shape"]))
                words = f"{told:8.2f} s, {told / run['cpu_s'] - 1:+.0%} {run['route']} {mark}"
                print(f"{op:8} {size:>12} {run['cpu_s']:8.2f} s, law {words}")
        return
    given = Assumed(**{name: getattr(asked, name) for name in Assumed.__slots__})
    report(measured, given)


if __name__ == "__main__":
    main()
