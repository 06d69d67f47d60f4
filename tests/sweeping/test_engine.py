"""Ray under the sweep: what a lost worker, driver or node costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import stand_ins

from rankwise.errors import ClusterError, UsageError
from rankwise.joining import LOST
from rankwise.records import SweepRecord, read_record
from rankwise.sweeping.collecting import collect, list_cells
from rankwise.sweeping.engine import Engine, Needs, given_up

pytest.importorskip("ray", reason="ray comes with the cluster extra")

HERE = Path(__file__).parent


def square(value: int) -> int:
    return value * value


def refuse(value: int) -> int:
    raise KeyError(f"layer.{value}")


def test_every_call_comes_to_its_value(ray_local: Any) -> None:
    with Engine() as engine:
        found = {outcome.key: outcome.value for outcome in engine.map(square, {str(n): n for n in range(5)})}
    assert found == {str(n): n * n for n in range(5)}
    assert ray_local.is_initialized(), "a Ray that was there before is not stopped"


def test_a_call_that_raises_says_why_and_the_others_go_on(ray_local: Any) -> None:
    with Engine() as engine:
        (bad,) = engine.map(refuse, {"bad": 7})
        assert bad.error == "KeyError: 'layer.7'"
        assert engine.call(square, 3) == 9
        with pytest.raises(ClusterError, match=r"layer\.7"):
            engine.call(refuse, 7)


def test_a_worker_that_always_dies_is_given_up(ray_local: Any) -> None:
    with Engine() as engine:
        (lost,) = engine.map(stand_ins.always_dies, {"lost": None})
    assert lost.error is not None
    assert f"lost {LOST + 1} times" in lost.error


def test_only_a_worker_that_is_no_more_is_called_lost(ray_local: Any) -> None:
    kinds = ray_local.exceptions
    for gone in (
        kinds.WorkerCrashedError(),
        kinds.NodeDiedError("n"),
        kinds.OutOfMemoryError("o"),
        kinds.RayActorError(),
    ):
        assert f"its worker was lost {LOST + 1} times ({type(gone).__name__}); memory is" in given_up(gone)
    other = given_up(kinds.RuntimeEnvSetupError("pip https://ann:pwplanted@host/simple gave up"))
    assert other.startswith("RuntimeEnvSetupError: ")
    assert "lost" not in other
    assert "memory" not in other
    assert "planted" not in other


def test_no_more_calls_at_once_than_jobs(ray_local: Any) -> None:
    with Engine(jobs=1, needs=Needs(cpus=0.5)) as engine:
        assert engine.capacity() == 1
        spans = [outcome.value for outcome in engine.map(span, {str(n): 0.1 for n in range(3)})]
    spans.sort()
    assert all(one[1] <= other[0] for one, other in pairwise(spans))


def span(seconds: float) -> tuple[float, float]:
    begun = time.time()
    time.sleep(seconds)
    return begun, time.time()


@pytest.mark.parametrize(("needs", "at_once"), [(Needs(1.0), 2), (Needs(2.0), 1), (Needs(0.5), 4)])
def test_as_many_at_once_as_fit(ray_local: Any, needs: Needs, at_once: int) -> None:
    with Engine(needs=needs) as engine:
        assert engine.capacity() == at_once


def test_memory_counts_too_but_never_asks_for_more_than_a_node_has(ray_local: Any) -> None:
    with Engine(needs=Needs(0.1)) as engine:
        memory = int(engine.total("memory"))
        engine.with_memory(memory // 3)
        assert engine.capacity() == 3
        engine.with_memory(memory * 10)
        assert engine.capacity() == 1
        assert engine.call(square, 2) == 4


@pytest.mark.parametrize("needs", [Needs(cpus=64.0), Needs(gpus=1.0), Needs(memory=2**60)])
def test_what_no_node_has_is_refused_and_not_waited_for(ray_local: Any, needs: Needs) -> None:
    with pytest.raises(UsageError, match="no node has that"), Engine(needs=needs):
        pass


def test_gpus_are_not_asked_for_where_there_are_none(ray_local: Any) -> None:
    with Engine(needs=Needs(gpus=None)) as engine:
        assert engine.needs.gpus == 0.0


def test_another_cluster_than_the_one_joined_is_refused(ray_local: Any) -> None:
    with pytest.raises(ClusterError, match=r"has joined the Ray at .* already, not the one at 127\.0\.0\.1:1"):
        Engine(cluster="127.0.0.1:1").__enter__()
    with Engine(cluster=ray_local.get_runtime_context().gcs_address) as engine:
        assert engine.call(square, 2) == 4


def environment(token: str) -> dict[str, str]:
    paths = [str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RANKWISE_TEST": token}


def processes_with(token: str) -> list[int]:
    """Return the processes whose environment holds a word: what a driver started, and what that started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_killed_driver_costs_the_cells_under_way_and_leaves_no_process(tmp_path: Path) -> None:
    data, out, token = tmp_path / "data", tmp_path / "out", uuid.uuid4().hex
    data.mkdir()
    (data / "seconds").write_text("0.5")
    words = [sys.executable, str(HERE / "stand_ins.py"), str(data), str(out), "6"]
    driver = subprocess.Popen(words, env=environment(token))
    try:
        until(lambda: len(list_cells(out)) >= 2 or driver.poll() is not None)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = set(list_cells(out))
    assert 2 <= len(before) < 6
    assert not (out / "sweep.json").exists()
    assert all(cell.status == "done" for cell in collect(out)), "what is there is whole"
    (data / "seconds").write_text("0")
    subprocess.run(words, env=environment(token), check=True, timeout=200)
    record = read_record(out / "sweep.json", SweepRecord)
    assert [cell.status for cell in record.cells] == ["done"] * 6
    counted = stand_ins.starts(data)
    assert all(counted[name] == 1 for name in before), "cells that were over are not run again"
    assert sum(counted.values()) <= 6 + 2, "two ran at a time"
    # Ray's agents try for a minute to tell a head that was killed
    until(lambda: not processes_with(token), 90.0)
    assert sorted(path.name for path in (out / ".sweep").iterdir()) == ["lock"]


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """DATA and OUT of a sweep on a real cluster of two nodes on this machine, one taken away while it worked."""
    data, out, token = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("sweeps") / "out", uuid.uuid4().hex
    (data / "seconds").write_text("0.5")
    words = [sys.executable, str(HERE / "stand_ins.py"), str(data), str(out)]
    subprocess.run(words, env=environment(token), check=True, timeout=280)
    return data, out, token


@pytest.mark.slow
def test_a_lost_node_costs_the_cells_it_was_at(two_nodes: tuple[Path, Path, str]) -> None:
    data, out, token = two_nodes
    record = read_record(out / "sweep.json", SweepRecord)
    assert [cell.status for cell in record.cells] == ["done"] * 6
    lost = (data / "lost").read_text()
    lines = [line.split() for line in (data / "starts").read_text().splitlines()]
    on_lost = [name for name, node, _ in lines if node == lost]
    assert on_lost, "the lost node was at work"
    counted = stand_ins.starts(data)
    again = [name for name, times in counted.items() if times > 1]
    assert set(again) <= set(on_lost), "no other cell was run twice"
    assert len(again) <= 2, "a node of one CPU has one cell under way, and perhaps one that had just ended"
    until(lambda: not processes_with(token), 60.0)


@pytest.mark.slow
def test_shares_of_a_gpu_are_handed_out(two_nodes: tuple[Path, Path, str]) -> None:
    """Ray is told of two GPUs that are not there: what is tested is who gets which, not that it computes."""
    told = json.loads((two_nodes[0] / "shares").read_text())
    assert told["at once"] == 4, "a quarter each, and one CPU"
    assert set(told["devices"]) <= {"0", "1"}
    assert told["whole"] == [1.0, 2], "where there are GPUs, a run takes one"
    assert told["device"] in ("0", "1")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer(address: str, tmp_path: Path) -> None:
    code = (
        "from rankwise.sweeping.engine import Engine\n"
        "from rankwise.errors import ClusterError\n"
        f"try:\n    Engine(cluster={address!r}).__enter__()\n"
        "except ClusterError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment("none"), capture_output=True, text=True, timeout=100
    )
    assert f"no Ray cluster answers at {address!r}: " in done.stdout, done.stderr
    assert done.stderr == ""
