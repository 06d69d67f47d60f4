"""The seam: one function over many tasks in order, here and on Ray; what is lost, refused or cannot be reached."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from threadpoolctl import threadpool_limits

from rankwise import spreading
from rankwise.errors import ClusterError, DeviceError, MissingDependencyError, ShapeMismatchError
from rankwise.joining import LOST, joined, knock, may_be_same
from rankwise.spreading import FEWEST, Here, OnRay, Work, blas_threads, device_of_workers, kernels, spread, told


def work(do: Callable[[Any, int], Any], **more: Any) -> Work[Any, int, Any]:
    """Return work that needs the word "open", wherever it is done."""
    return Work(do, "here", lambda: lambda: "there", **more)


# functions of one task are defined in functions: Ray then sends them whole, and workers need not import this file


@pytest.fixture
def on_ray(ray_here: Any) -> Iterator[OnRay]:
    with spread("auto", "a test") as workers:
        assert isinstance(workers, OnRay)
        yield workers


@pytest.mark.parametrize("together", [1, 3, 50])
def test_results_come_in_order_whatever_takes_longer(on_ray: OnRay, together: int) -> None:
    def do(opened: str, task: int) -> list[tuple[str, int]]:
        time.sleep(0.05 * (task % 3 == 0))
        return [(opened, task)] * (task % 3)  # none, one or two results

    tasks = range(20)
    expected = [t for task in tasks for t in [task] * (task % 3)]
    there = list(on_ray.flat_map(work(do), tasks, name=str, together=together))
    here = list(Here().flat_map(work(do), tasks, name=str, together=together))
    assert [t for _, t in there] == [t for _, t in here] == expected
    assert {o for o, _ in there} == {"there"}
    assert {o for o, _ in here} == {"here"}


def test_here_nothing_is_done_before_it_is_asked_for() -> None:
    begun: list[int] = []

    def do(_: str, task: int) -> list[int]:
        begun.append(task)
        return [task]

    results = Here().flat_map(work(do), range(5), name=str)
    assert begun == []
    assert next(results) == 0
    assert begun == [0]


def test_a_worker_opens_once(on_ray: OnRay, tmp_path: Path) -> None:
    def opened_in(folder: str) -> int:
        (Path(folder) / f"{os.getpid()}-{time.time_ns()}").touch()
        return os.getpid()

    job: Work[int, int, int] = Work(lambda opened, _: [opened], 0, lambda: partial(opened_in, str(tmp_path)))
    processes = set(on_ray.flat_map(job, range(30), name=str))
    assert len(list(tmp_path.iterdir())) == len(processes) <= 3, "2 CPUs, and at most one worker started anew"


def test_no_more_calls_under_way_than_allowed(on_ray: OnRay, tmp_path: Path) -> None:
    """While nobody takes the results, the calls that were begun are bounded: so is what waits in memory."""

    def do(_: str, task: int) -> list[int]:
        (tmp_path / str(task)).touch()
        return [task]

    results = on_ray.flat_map(work(do), range(200), name=str)
    assert next(results) == 0
    time.sleep(2.0)
    begun = len(list(tmp_path.iterdir()))
    assert begun <= FEWEST, "4 for each of 2 CPUs is below the least"
    assert list(results) == list(range(1, 200))


def test_calls_are_taken_back_when_nobody_waits(on_ray: OnRay, tmp_path: Path) -> None:
    def do(_: str, task: int) -> list[int]:
        (tmp_path / f"{task}-begun").touch()
        time.sleep(0.2 if task == 0 else 30.0)
        (tmp_path / f"{task}-ended").touch()
        return [task]

    results = on_ray.flat_map(work(do), range(12), name=str)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    quick: Work[Any, int, int] = work(lambda _, task: [task])
    begun = time.monotonic()
    assert list(on_ray.flat_map(quick, range(4), name=str)) == [0, 1, 2, 3]
    assert time.monotonic() - begun < 28.0, "the two CPUs are free again before a task of 30 s is over"
    assert not list(tmp_path.glob("[1-9]*-ended"))


def test_a_worker_that_dies_costs_its_call_alone(on_ray: OnRay, tmp_path: Path) -> None:
    def do(_: str, task: int) -> list[int]:
        flag = tmp_path / f"died-{task}"
        if task % 5 == 0 and not flag.exists():
            flag.touch()
            os._exit(9)
        return [task]

    assert list(on_ray.flat_map(work(do), range(12), name=str)) == list(range(12))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_worker_that_always_dies_is_given_up_with_the_module(on_ray: OnRay, tmp_path: Path) -> None:
    def do(_: str, task: int) -> list[int]:
        if task == 2:
            (tmp_path / f"{time.time_ns()}").touch()
            os._exit(9)
        return [task]

    results = on_ray.flat_map(work(do), range(4), name="layers.{}.q_proj".format)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ClusterError, match=rf"layers\.2\.q_proj: its worker was lost {LOST + 1} times"):
        next(results)
    assert len(list(tmp_path.iterdir())) == LOST + 1


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("WorkerCrashedError", rf"its worker was lost {LOST + 1} times \(WorkerCrashedError\); too little memory is"),
        ("OutOfMemoryError", rf"its worker was lost {LOST + 1} times \(OutOfMemoryError\); too little memory is"),
        ("NodeDiedError", rf"its worker was lost {LOST + 1} times \(NodeDiedError\); too little memory is"),
        ("OutOfDiskError", r"Ray ended it \(OutOfDiskError\): planted"),
        ("TaskUnschedulableError", r"Ray ended it \(TaskUnschedulableError\): .*planted"),
    ],
)
def test_what_ended_a_call_is_said_as_it_is(kind: str, told: str) -> None:
    exceptions = pytest.importorskip("ray", reason="ray comes with the cluster extra").exceptions

    def get(_: Any) -> Any:
        raise getattr(exceptions, kind)(*([] if kind == "WorkerCrashedError" else ["planted"]))

    workers = OnRay(SimpleNamespace(exceptions=exceptions, get=get), fixed=True)
    with pytest.raises(ClusterError, match=rf"^layers\.0: {told}"):
        workers._value(None, "layers.0")


def test_an_error_of_ours_comes_back_as_itself(on_ray: OnRay) -> None:
    def do(_: str, task: int) -> list[int]:
        raise ShapeMismatchError("q_proj", (2, 3), (3, 2))

    place = socket.gethostname()
    with pytest.raises(ShapeMismatchError, match=rf"q_proj has shape \(2, 3\).* at {place} did layers\.0 and 1 more"):
        list(on_ray.flat_map(work(do), range(2), name="layers.{}".format, together=2))


def test_an_error_in_opening_and_memory_that_ends(on_ray: OnRay) -> None:
    def fail() -> str:
        raise DeviceError("no such device")

    job: Work[str, int, int] = Work(lambda *_: [1], "here", lambda: fail)
    with pytest.raises(DeviceError, match="no such device"):
        list(on_ray.flat_map(job, [0], name=str))

    def greedy(_: str, task: int) -> list[int]:
        raise MemoryError("100 GiB")

    with pytest.raises(MemoryError, match=r"100 GiB .* did 7"):
        list(on_ray.flat_map(work(greedy), [7], name=str))


def test_a_defect_is_not_dressed_up(on_ray: OnRay) -> None:
    def do(_: str, task: int) -> list[int]:
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        list(on_ray.flat_map(work(do), [0], name=str))


def test_blas_has_as_many_threads_as_here(on_ray: OnRay) -> None:
    def do(_: str, task: int) -> list[int]:
        return [blas_threads()]

    with threadpool_limits(limits=2, user_api="blas"):
        assert set(on_ray.flat_map(work(do), range(4), name=str)) == {2}
        assert set(on_ray.flat_map(work(do, one_thread=True), range(4), name=str)) == {1}
    with threadpool_limits(limits=1, user_api="blas"):
        assert set(on_ray.flat_map(work(do), range(4), name=str)) == {1}


def test_other_libraries_on_a_worker_are_told(
    on_ray: OnRay, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    same: Work[Any, int, int] = work(lambda _, task: [task])
    list(on_ray.flat_map(same, range(3), name=str))
    assert not caplog.messages
    monkeypatch.setattr(spreading, "kernels", lambda: "openblas 0.0 for a Z80")
    assert list(on_ray.flat_map(same, range(3), name=str)) == [0, 1, 2]
    monkeypatch.undo()
    (told_once,) = caplog.messages
    assert kernels() in told_once
    assert "Z80" in told_once


def test_another_version_on_a_worker_is_refused(on_ray: OnRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreading, "__version__", "99.0")
    with pytest.raises(ClusterError, match=r"a worker has rankwise \S+, and this is 99\.0\. Every node needs the same"):
        list(on_ray.flat_map(work(lambda _, task: [task]), [0], name=str))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rankwise_of_tomorrow", r"layers\.0: the workers' Python has no rankwise .*pip install 'rankwise\["),
        ("ghost", r"layers\.0: the workers' Python has no ghost\."),
    ],
)
def test_a_worker_without_the_package(on_ray: OnRay, monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    """A function of a module that only this process has; a worker without rankwise fails in the same way."""
    module = type(sys)(name)
    exec("def do(opened, task):\n    return [task]\n", module.__dict__)  # noqa: S102 - planted
    monkeypatch.setitem(sys.modules, name, module)
    job: Work[str, int, int] = Work(module.__dict__["do"], "here", lambda: lambda: "there")
    with pytest.raises(ClusterError, match=expected):
        list(on_ray.flat_map(job, [0], name="layers.{}".format))


def test_what_no_node_has_is_refused(ray_here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job: Work[Any, int, int] = work(lambda _, task: [task], gpu=True)
    told = r"layers\.0: it asks for 1 CPU, 1 GPU, and no node of the cluster has that.*; --device cpu asks for no GPU"
    with pytest.raises(ClusterError, match=told):
        list(OnRay(ray_here, fixed=True).flat_map(job, [0], name="layers.{}".format))
    monkeypatch.setattr(spreading, "NO_NODE", 1.0)
    with pytest.raises(ClusterError, match="no node of the cluster has that"):
        list(OnRay(ray_here, fixed=False).flat_map(job, [0], name=str))


def test_tasks_share_the_memory_of_a_node(on_ray: OnRay, ray_here: Any, tmp_path: Path) -> None:
    """Tasks that ask for two thirds of a node run one at a time, and none asks for more than there is."""
    there = max(node["Resources"]["memory"] for node in ray_here.nodes())

    def do(_: str, task: int) -> list[tuple[float, float]]:
        begun = time.time()
        time.sleep(0.3)
        return [(begun, time.time())]

    spans = sorted(on_ray.flat_map(work(do), range(3), name=str, memory=lambda _: int(there * 2 / 3)))
    assert all(one[1] <= other[0] for one, other in pairwise(spans))
    assert len(list(on_ray.flat_map(work(do), [0], name=str, memory=lambda _: 100 * int(there)))) == 1


def test_devices_of_workers() -> None:
    assert [device_of_workers(name) for name in ("cpu", "cuda")] == ["cpu", "cuda"]
    assert device_of_workers(None) == "cpu"
    with pytest.raises(DeviceError, match="cuda:1"):
        device_of_workers("cuda:1")


def test_progress_is_told_before_each_result() -> None:
    seen: list[tuple[str, int, int]] = []
    results = told(iter("ab"), ["x", "y"], lambda *words: seen.append(words))
    assert seen == []
    assert next(results) == "a"
    assert seen == [("x", 0, 2)]
    assert list(results) == ["b"]
    assert seen[1:] == [("y", 1, 2)]
    assert list(told(iter("ab"), ["x", "y"], None)) == ["a", "b"]


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now fails
    with pytest.raises(MissingDependencyError, match=r"pip install 'rankwise\[cluster\]'"), spread("auto", "--cluster"):
        pass
    with spread(None, "--cluster") as workers:
        assert isinstance(workers, Here)


def test_another_cluster_than_the_one_joined(ray_here: Any) -> None:
    with pytest.raises(ClusterError, match=r"has joined the Ray at .* already, not the one at 127\.0\.0\.1:1"):
        joined("127.0.0.1:1", "a test").__enter__()
    there = ray_here.get_runtime_context().gcs_address
    port = there.rpartition(":")[2]
    for address in (there, f"localhost:{port}", f"{socket.gethostname()}:{port}", "ray://localhost:10001"):
        with joined(address, "a test") as ray:
            assert ray is ray_here
    assert ray_here.is_initialized(), "what was joined before stays joined"


@pytest.mark.parametrize(
    ("address", "there", "same"),
    [
        ("head:6379", "192.0.2.7:6379", True),
        ("head:6380", "192.0.2.7:6379", False),
        ("other:6379", "192.0.2.7:6379", False),
        ("ray://head:10001", "192.0.2.7:6379", True),
        ("ray://192.0.2.7", "192.0.2.7:6379", True),  # without a port: only Ray knows
        ("ray://other:10001", "192.0.2.7:6379", False),
        ("both:6379", "192.0.2.7:6379", True),
        ("127.0.0.1:6379", "192.0.2.7:6379", False),
        ("[::1]:6379", "127.0.0.1:6379", True),
        ("unknown:6379", "192.0.2.7:6379", True),  # it cannot be told
        ("anyscale://cluster", "192.0.2.7:6379", True),
    ],
)
def test_one_cluster_by_two_names(address: str, there: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """192.0.2.0/24 is for documentation, so it is no address of this machine (RFC 5737)."""
    names = {"head": ["192.0.2.7"], "other": ["192.0.2.8"], "both": ["192.0.2.6", "192.0.2.7"], "unknown": []}

    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        if not (found := names.get(host, [host])):
            raise socket.gaierror
        return [(socket.AF_INET6 if ":" in at else socket.AF_INET, 0, 0, "", (at, 0)) for at in found]

    monkeypatch.setattr("rankwise.joining.socket.getaddrinfo", look_up)
    assert may_be_same(address, there) == same


class _Silent(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(params=["nobody", "mute", "web"])
def no_cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """An address where no cluster is: nobody listens, somebody who never answers, a web server."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if request.param == "mute":
        yield f"127.0.0.1:{port}"
        listening.close()
        return
    listening.close()
    if request.param == "nobody":
        yield f"127.0.0.1:{port}"
        return
    server = ThreadingHTTPServer(("127.0.0.1", port), _Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{port}"
    server.shutdown()
    server.server_close()


def test_no_cluster_there(no_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries such addresses for minutes, so it must not be asked: `init` would fail this test."""
    ray = pytest.importorskip("ray", reason="ray comes with the cluster extra")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr("rankwise.joining.PATIENCE", 1.0)
    for address in (no_cluster, f"ray://{no_cluster}"):
        with pytest.raises(ClusterError, match=rf"no Ray cluster answers at '{address}'"):
            joined(address, "a test").__enter__()


@pytest.mark.parametrize("left", ["file", "environment"])
def test_a_cluster_that_died_is_not_waited_for(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is what the last `ray start` wrote down; a head that was killed leaves it behind."""
    ray = pytest.importorskip("ray", reason="ray comes with the cluster extra")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    if left == "file":
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    else:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match="no Ray cluster answers at 'auto'"):
        joined("auto", "a test").__enter__()


def test_the_head_of_a_cluster_answers_the_knock(ray_here: Any) -> None:
    knock(ray_here.get_runtime_context().gcs_address)
    knock("auto")  # only Ray knows where
