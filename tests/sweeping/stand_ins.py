"""Short functions in the place of training, and records with made-up figures: what tests of the engine run.

DATA of such a sweep is a folder: `starts` in it counts how often each cell was begun, other files in it tell a cell
what to do. Workers import this file by name, so it holds no test.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from rankwise.records import (
    DryRunRecord,
    GroupScale,
    LossPoint,
    Memory,
    Recall,
    RecallScore,
    RunConfig,
    RunRecord,
    Status,
    SweepRun,
    to_json,
)
from rankwise.sweeping.cells import METRICS, Ended, Refused, Task, metrics_of
from rankwise.sweeping.grid import Cell

HEAD: dict[str, Any] = {
    "rankwise": "0",
    "created": "2026-01-01T00:00:00+00:00",
    "command": ("rankwise", "sweep"),
    "device": "cpu",
}
PARAMS_A_RANK = 100


def config(cell: Cell, data: str = "data", digest: str = "0" * 16) -> RunConfig:
    return RunConfig(
        model="model",
        data=data,
        data_digest=digest,
        preset=None,
        rank=cell.rank,
        lora_alpha=16.0,
        scaling=cell.scaling,
        plan=None,
        target_modules=("q",),
        init="default",
        lora_dropout=0.0,
        optimizer="adamw_torch",
        learning_rate=cell.learning_rate,
        schedule="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        steps=2,
        batch_size=4,
        gradient_accumulation=1,
        max_length=16,
        packing=False,
        bf16=False,
        gradient_checkpointing=False,
        groups=(
            GroupScale(
                group="attention/early", modules=1, r=cell.rank, lora_alpha=16.0, scaling=1.0,
                params=PARAMS_A_RANK * cell.rank,
            ),
        ),
    )  # fmt: skip


def run_record(cell: Cell, *, status: Status = "done", bits: float | None = 1.0, digest: str = "0" * 16) -> RunRecord:
    """Return the record of a run that recalled so many bits."""
    score = None
    if bits is not None:
        recall = RecallScore(
            facts=10, bits=bits, bits_possible=100.0, base_bits=0.0, exact_share=0.5, base_exact_share=0.0
        )
        parts = {name: getattr(recall, name) for name in RecallScore.__struct_fields__}
        score = Recall(
            kind="pools", people=2, asked_share=1.0, bits_per_param=bits / (PARAMS_A_RANK * cell.rank),
            paraphrases=recall, held_out=None, **parts,
        )  # fmt: skip
    return RunRecord(
        **HEAD,
        format=RunRecord.FORMAT,
        seed=cell.seed,
        config=config(cell, digest=digest),
        status=status,
        params=PARAMS_A_RANK * cell.rank,
        steps=2,
        tokens=64,
        loss=2.5,
        recall=score,
        forgetting=0.1,
        forgetting_detail=None,
        seconds=1.5,
        peak_memory_bytes=1000,
        tokens_per_second=32.0,
        losses=(LossPoint(step=1, loss=3.0, learning_rate=1e-3), LossPoint(step=2, loss=2.5, learning_rate=5e-4)),
        health=(),
        findings=(),
        error=None,
    )


def row(rank: int, scaling: str, rate: float, seed: int, bits: float | None, **more: Any) -> SweepRun:
    """Return a row of a sweep."""
    figures: dict[str, Any] = {
        "path": f"{Cell(seed, rank, scaling, rate).name}/run.json",
        "rank": rank,
        "scaling": scaling,
        "lora_alpha": 16.0,
        "learning_rate": rate,
        "seed": seed,
        "status": "done",
        "params": PARAMS_A_RANK * rank,
        "steps": 2,
        "tokens": 64,
        "loss": 2.0,
        "bits": bits,
        "bits_possible": 100.0,
        "bits_per_param": None if bits is None else bits / (PARAMS_A_RANK * rank),
        "exact_share": 0.5,
        "paraphrased_exact_share": None,
        "forgetting": 0.1,
        "seconds": 1.0,
        "peak_memory_bytes": None,
        "tokens_per_second": None,
        "error": None,
    }
    return SweepRun(**(figures | more))


def files_of(record: RunRecord) -> dict[str, bytes]:
    return {"run.json": to_json(record).encode(), METRICS: metrics_of(record)}


def look(task: Task) -> bytes | Refused:
    """Stand in for `look_ahead`."""
    folder = Path(task.request.data)
    if (folder / "refuse").exists():
        return Refused("NoDataError", f"{folder} holds no data")
    digest = (folder / "digest").read_text() if (folder / "digest").exists() else "0" * 16
    record = DryRunRecord(
        **HEAD,
        format=DryRunRecord.FORMAT,
        seed=task.cell.seed,
        config=config(task.cell, digest=digest),
        params=PARAMS_A_RANK * task.cell.rank,
        base_params=1000,
        memory=Memory(weights=1, adapter=1, gradients=1, optimizer=1, activations=1, total=5),
        examples=10,
        tokens=100,
        target_tokens=50,
        epochs=2.0,
        findings=(),
    )
    return to_json(record).encode()


def begin(task: Task) -> Path:
    """Note that a cell has begun, and where."""
    import ray

    folder = Path(task.request.data)
    node = ray.get_runtime_context().get_node_id()
    with (folder / "starts").open("a") as file:
        file.write(f"{task.cell.name} {node} {os.getpid()}\n")
    return folder


def starts(folder: Path) -> Counter[str]:
    """Return how often each cell has begun."""
    path = folder / "starts"
    return Counter(line.split()[0] for line in path.read_text().splitlines()) if path.exists() else Counter()


def quick(task: Task) -> Ended:
    """A cell over at once; `fail-`, `raise-`, `diverge-`, `die-` and `crash-SEED` (once) in the data change that."""
    folder = begin(task)
    seed = task.cell.seed
    crash = folder / f"crash-{seed}"
    if crash.exists():
        crash.unlink()
        os._exit(9)
    if (folder / f"die-{seed}").exists():
        os._exit(9)
    if (folder / f"raise-{seed}").exists():
        raise RuntimeError("planted")
    if (folder / f"fail-{seed}").exists():
        return Ended({}, "ValueError: planted", "Traceback: planted")
    status: Status = "diverged" if (folder / f"diverge-{seed}").exists() else "done"
    return Ended(files_of(run_record(task.cell, status=status, bits=task.cell.rank + 0.1 * seed)))


def peaked(task: Task) -> Ended:
    """A cell whose recall falls with the distance of its rate from 1e-3, or from what `peak` in the data says.

    It knows `quick`'s mishaps, but for `fail`.
    """
    ended = quick(task)
    record = msgspec.json.decode(ended.files["run.json"], type=RunRecord)
    if record.status != "done":
        return ended
    told = Path(task.request.data) / "peak"
    peak = float(told.read_text()) if told.exists() else 1e-3
    bits = 50.0 - 10 * abs(math.log10(task.cell.learning_rate / peak)) + 0.1 * task.cell.seed
    return Ended(files_of(run_record(task.cell, bits=bits)))


def slow(task: Task) -> Ended:
    """A cell that takes a while."""
    begin(task)
    time.sleep(float((Path(task.request.data) / "seconds").read_text()))
    return Ended(files_of(run_record(task.cell)))


def always_dies(task: Any) -> None:
    os._exit(9)


def main() -> None:
    """Run a sweep of stand-ins in a process of its own: DATA OUT SEEDS."""
    from rankwise.sweeping.asking import settle_sweep
    from rankwise.sweeping.running import _Sweep, run_sweep

    data, out, seeds = sys.argv[1:4]
    lists = {"ranks": (4,), "scaling": ("lora",), "learning_rates": (1e-3,), "seeds": int(seeds), "device": "cpu"}
    asked = settle_sweep("model", data, lists | {"jobs": 2, "cpus_per_run": 0.5})
    run_sweep(_Sweep(asked, Path(out), work=slow, look=look))


def shares(address: str) -> dict[str, Any]:
    """Say which of the GPUs that Ray was told of are seen by calls that take a share of one, and a whole one."""
    from rankwise.sweeping.engine import Engine, Needs

    def seen(_: Any) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    with Engine(address, Needs(cpus=0.25, gpus=0.25)) as engine:
        devices = [outcome.value for outcome in engine.map(seen, {str(k): None for k in range(4)})]
        told = {"at once": engine.capacity(), "devices": devices}
    with Engine(address, Needs(cpus=0.25, gpus=None)) as engine:
        return told | {"whole": [engine.needs.gpus, engine.capacity()], "device": engine.call(seen, None)}


def lose_a_node() -> None:
    """Run a sweep on two nodes and take one away while it works; before, see who gets which GPU: DATA OUT."""
    import threading

    from ray.cluster_utils import Cluster

    from rankwise.sweeping.asking import settle_sweep
    from rankwise.sweeping.running import _Sweep, run_sweep

    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    small = {"num_cpus": 1, "num_gpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        cluster.wait_for_nodes()
        (data / "shares").write_text(json.dumps(shares(cluster.address)))

        def take_away() -> None:
            while second.node_id not in ((data / "starts").read_text() if (data / "starts").exists() else ""):
                time.sleep(0.05)
            cluster.remove_node(second, allow_graceful=False)
            (data / "lost").write_text(second.node_id)

        thread = threading.Thread(target=take_away)
        thread.start()
        lists = {"ranks": (4,), "scaling": ("lora",), "learning_rates": (1e-3,), "seeds": 6, "device": "cpu"}
        asked = settle_sweep("model", str(data), lists | {"cluster": cluster.address})
        run_sweep(_Sweep(asked, out, work=slow, look=look))
        thread.join()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    lose_a_node() if len(sys.argv) == 3 else main()
