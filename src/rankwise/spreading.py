"""One function over many modules, in order: in this process, or on the workers of a Ray cluster.

In: a function, what it needs open, and its tasks. Out: its results in the order of the tasks, as they are asked for.
On a cluster a bounded number of calls is under way, and a result stays where it was computed until its turn comes:
the memory of this process does not grow with the number of modules. A worker opens what the function needs by itself,
once, and reads its own bytes; it computes with as many BLAS threads as this process would, which is what the last
digits of a sum depend on.

A worker that is lost costs the call it was at; a node also the results that lay there and were not asked for yet. Ray
makes these again. There is no scheduler here.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Generic, Protocol, TypeVar, final

from rankwise import errors
from rankwise._version import __version__
from rankwise.errors import ClusterError, DeviceError, RankwiseError, UsageError
from rankwise.joining import LOCAL, LOST, joined

log = logging.getLogger(__name__)

H = TypeVar("H")
T = TypeVar("T")
R = TypeVar("R")

AHEAD: Final = 4
"""Calls under way for every one that runs: while the first of them is slow the others go on."""

FEWEST: Final = 16
"""Calls under way at least: a cluster that grows by itself has to see what is waiting."""

NO_NODE: Final = 60.0
"""Seconds that a cluster may have no node that could run a call, before that is an error; none on a local start."""

POLL: Final = 2.0
"""Seconds between two looks at the nodes while the next result is not there."""

WORKER: Final = (
    "Every node needs the same version of rankwise with what it reads from (pip install 'rankwise[cluster,s3]"
    f"=={__version__}') in the Python that its `ray start` was run with"
)


@dataclass(frozen=True, slots=True)
class Work(Generic[H, T, R]):
    """A function of one task, and what it needs.

    Attributes:
        do: from what is open and a task to its results, in order.
        here: what is open in this process.
        send: called here before the work is sent away: returns what opens the same in another process, on another
            machine. That can be pickled, and so can `do`.
        one_thread: whether BLAS has one thread in a worker; else as many as in this process.
        gpu: whether a worker needs a GPU.
    """

    do: Callable[[H, T], Iterable[R]]
    here: H
    send: Callable[[], Callable[[], H]]
    one_thread: bool = False
    gpu: bool = False


class Workers(Protocol):
    """Where work is done."""

    def flat_map(
        self,
        work: Work[H, T, R],
        tasks: Sequence[T],
        *,
        name: Callable[[T], str],
        memory: Callable[[T], int] | None = None,
        together: int = 1,
    ) -> Iterator[R]:
        """Yield the results of all tasks, in the order of the tasks.

        Args:
            work: what is done.
            tasks: can be pickled.
            name: of a task, for messages.
            memory: bytes that a task takes at its peak, so that a node is given no more tasks than it can hold.
            together: tasks in one call, where a task is much shorter than the millisecond that a call costs.

        Raises:
            RankwiseError: what the function raised, with the worker where it did; ClusterError for lost workers.
        """


@final
class Here:
    """This process: one task after another, when its result is asked for."""

    def flat_map(
        self,
        work: Work[H, T, R],
        tasks: Sequence[T],
        *,
        name: Callable[[T], str],  # noqa: ARG002 - errors are raised as they are
        memory: Callable[[T], int] | None = None,  # noqa: ARG002 - there is one task at a time
        together: int = 1,  # noqa: ARG002
    ) -> Iterator[R]:
        """Yield the results of all tasks."""
        for task in tasks:
            yield from work.do(work.here, task)


@contextlib.contextmanager
def spread(cluster: str | None, why: str) -> Iterator[Workers]:
    """Yield where the work is done: here, or on a cluster that is joined for the time of the `with`.

    Args:
        cluster: address of a Ray cluster as `joining.joined` takes it; None for this process.
        why: what is to be done there, for messages.
    """
    if cluster is None:
        yield Here()
        return
    with joined(cluster, why) as ray:
        yield OnRay(ray, fixed=cluster == LOCAL)


def device_of_workers(device: str | None) -> str:
    """Return the device of workers: the one asked for, which this machine cannot look for, else the CPU.

    A GPU of this machine says nothing about those of a cluster, so none is asked for by default.

    Raises:
        DeviceError: it is the number of a GPU: a worker sees those alone that Ray gives it.
    """
    if device is None:
        return "cpu"
    if device not in ("cpu", "cuda"):
        raise DeviceError(f"--device {device}: with --cluster it is cpu or cuda; Ray gives each module its own GPU")
    return device


def told(results: Iterator[R], names: Sequence[str], progress: Callable[[str, int, int], None] | None) -> Iterator[R]:
    """Yield the results, and call `progress` with the name of each before it is there."""
    for done, name in enumerate(names):
        if progress is not None:
            progress(name, done, len(names))
        yield next(results)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What a worker is told of a piece of work, once."""

    token: str
    version: str
    threads: int
    do: Callable[[Any, Any], Iterable[Any]]
    there: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class _Done:
    """What came of one call."""

    results: list[Any]
    kernels: str


@dataclass(frozen=True, slots=True)
class _Failed:
    """An error that is the user's to mend. It travels as words: its cause may hold a URL as it was given."""

    kind: str
    text: str
    node: str


_opened: dict[str, Any] = {}
"""In a worker: the token of the work -> what `there` opened. One at a time."""


def _run(sent: _Sent, tasks: Sequence[Any]) -> _Done | _Failed:
    """Do some tasks, in a worker."""
    try:
        if sent.version != __version__:
            raise ClusterError(f"a worker has rankwise {__version__}, and this is {sent.version}. {WORKER}")
        own = kernels()  # before the limit: it loads every BLAS
        with _limited(sent.threads):
            if sent.token not in _opened:
                _opened.clear()
                _opened[sent.token] = sent.there()
            return _Done([result for task in tasks for result in sent.do(_opened[sent.token], task)], own)
    except RankwiseError as error:
        return _Failed(type(error).__name__, str(error), socket.gethostname())
    except MemoryError as error:
        return _Failed("MemoryError", str(error), socket.gethostname())


def _limited(threads: int) -> Any:
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=threads, user_api="blas")


def kernels() -> str:
    """Return what the last digits of a result depend on beside the number of threads: libraries, and what they use."""
    import numpy as np
    import scipy.linalg  # brings a BLAS of its own
    from threadpoolctl import threadpool_info

    found = {
        f"{i['internal_api']} {i['version']} for {i.get('architecture')}"
        for i in threadpool_info()
        if i["user_api"] == "blas"
    }
    return ", ".join([f"numpy {np.__version__}", f"scipy {scipy.__version__}", *sorted(found)])


def blas_threads() -> int:
    """Return how many threads BLAS has in this process."""
    import numpy as np  # noqa: F401 - its BLAS is the one that is asked
    from threadpoolctl import threadpool_info

    return max((int(i["num_threads"]) for i in threadpool_info() if i["user_api"] == "blas"), default=1)


@final
@dataclass(slots=True)
class OnRay:
    """The workers of a Ray cluster that this process has joined.

    Attributes:
        ray: the module.
        fixed: whether no node will ever come: a start on this machine.
    """

    ray: Any
    fixed: bool
    _needs: dict[str, float] = field(default_factory=dict)

    def flat_map(
        self,
        work: Work[H, T, R],
        tasks: Sequence[T],
        *,
        name: Callable[[T], str],
        memory: Callable[[T], int] | None = None,
        together: int = 1,
    ) -> Iterator[R]:
        """Yield the results of all tasks, in the order of the tasks."""
        threads = 1 if work.one_thread else blas_threads()
        # one object, sent to each worker once, however many tasks there are
        sent = self.ray.put(_Sent(uuid.uuid4().hex, __version__, threads, work.do, work.send()))
        cpus = 1.0 if work.gpu else float(min(threads, int(self._largest("CPU")) or threads))
        remote = self.ray.remote(_run)
        options = {"max_retries": LOST, "num_cpus": cpus, "num_gpus": 1.0 if work.gpu else 0.0}
        open_calls: deque[tuple[Any, str, dict[str, float]]] = deque()
        rest = iter(tasks)
        own, others = kernels(), set[str]()
        try:
            while True:
                most = max(FEWEST, AHEAD * self._at_once(cpus))
                while len(open_calls) < most and (call := list(islice(rest, together))):
                    needs = {"CPU": cpus, "GPU": 1.0 if work.gpu else 0.0, "memory": self._memory(memory, call)}
                    words = name(call[0]) + (f" and {len(call) - 1} more" if len(call) > 1 else "")
                    asked = options | ({"memory": needs["memory"]} if needs["memory"] else {})
                    open_calls.append((remote.options(**asked).remote(sent, call), words, needs))
                if not open_calls:
                    break
                self._wait(*open_calls[0])
                done = self._value(*open_calls.popleft()[:2])
                others |= {done.kernels} - {own}
                yield from done.results
        finally:
            for reference, _, _ in open_calls:
                with contextlib.suppress(Exception):
                    self.ray.cancel(reference, force=True)
        for other in sorted(others):
            log.warning("a worker computes with other libraries (%s) than this machine (%s): last digits may differ",
                        other, own)  # fmt: skip

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def _largest(self, what: str) -> float:
        return max((node.get(what, 0.0) for node in self._nodes()), default=0.0)

    def _at_once(self, cpus: float) -> int:
        return sum(int(node.get("CPU", 0.0) // cpus) for node in self._nodes())

    def _memory(self, memory: Callable[[T], int] | None, call: Sequence[T]) -> float:
        """Return the bytes to ask for: those of the largest task, as far as the largest node has them."""
        if memory is None:
            return 0.0
        return float(min(max(memory(task) for task in call), int(self._largest("memory")) or 2**62))

    def _wait(self, reference: Any, words: str, needs: dict[str, float]) -> None:
        """Wait for one call.

        Raises:
            ClusterError: there is no node left that could run it.
        """
        unfit_since = None
        while not self.ray.wait([reference], num_returns=1, timeout=POLL, fetch_local=False)[0]:
            if any(all(node.get(what, 0.0) >= amount for what, amount in needs.items()) for node in self._nodes()):
                unfit_since = None
                continue
            unfit_since = unfit_since or time.monotonic()
            if self.fixed or time.monotonic() - unfit_since > NO_NODE:
                asked = ", ".join(f"{amount:,.15g} {what}" for what, amount in needs.items() if amount)
                threads = "OMP_NUM_THREADS here sets the CPUs of a module"
                raise ClusterError(
                    f"{words}: it asks for {asked}, and no node of the cluster has that. `ray status` on the head node "
                    f"shows what is there; {'--device cpu asks for no GPU' if needs['GPU'] else threads}"
                )

    def _value(self, reference: Any, words: str) -> _Done:
        exceptions = self.ray.exceptions
        try:
            found: _Done | _Failed = self.ray.get(reference)
        except exceptions.RayTaskError as error:
            lacking = re.search(r"No module named '([^']+)'", str(error))
            if lacking is None or not isinstance(error, (exceptions.RaySystemError, ModuleNotFoundError)):
                raise  # the function raised what it should not
            what = "rankwise " + __version__ if lacking[1].startswith("rankwise") else lacking[1]
            raise ClusterError(f"{words}: the workers' Python has no {what}. {WORKER}") from None
        except exceptions.RayError as error:
            kind, text = type(error).__name__, " ".join(str(error).split())[:300]
            lost = (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError)
            if not isinstance(error, lost):
                raise ClusterError(f"{words}: Ray ended it ({kind}): {text}") from error
            raise ClusterError(
                f"{words}: its worker was lost {LOST + 1} times ({kind}); too little memory is a common cause: {text}"
            ) from error
        if isinstance(found, _Failed):
            raise _as_raised(found, words)
        return found


def _as_raised(failed: _Failed, words: str) -> Exception:
    """Return the error of a worker as it would have been raised here, with the module and the place."""
    text = f"{failed.text} (while a worker at {failed.node} did {words})"
    if failed.kind == "MemoryError":
        return MemoryError(text)
    kind = getattr(errors, failed.kind, UsageError)
    error: Exception = kind.__new__(kind)
    Exception.__init__(error, errors.without_secrets(text))  # some classes make their message of other arguments
    return error
