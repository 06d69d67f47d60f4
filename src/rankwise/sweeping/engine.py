"""Ray: many calls of one function, on this machine or on a cluster. The only file that knows Ray.

In: a function, its tasks, and what one of them needs. Out: what each came to, in the order in which they end; a worker
or a node that is lost costs the calls it was at, and these are made again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from rankwise.errors import ClusterError, MissingDependencyError, UsageError

RETRIES: Final = 2
"""Times that a call is made again when its worker or its node is lost."""

OBJECT_STORE: Final = 256 * 2**20
"""Bytes of shared memory on a local start; what is handed back is small, or goes to disk."""

AT_ONCE: Final = 2000
"""Calls handed to Ray at a time; a cluster that grows by itself sees what is waiting."""

PATIENCE: Final = 60.0
"""Seconds that a cluster may have no node that fits before that is an error; none on a local start."""

ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # local nodes use 127.0.0.1, not the machine's own address
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": str(RETRIES),  # the default is to try for ever
}


@dataclass(frozen=True, slots=True)
class Needs:
    """What one call takes.

    Attributes:
        cpus: CPU cores, or a share of one.
        gpus: GPUs, or a share of one; None for one where there are any.
        memory: bytes, or None to leave it out.
    """

    cpus: float = 1.0
    gpus: float | None = 0.0
    memory: int | None = None

    @property
    def threads(self) -> int:
        """Threads that fit into its CPUs."""
        return max(1, math.floor(self.cpus))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call came to: its value, or why it was given up."""

    key: str
    value: Any = None
    error: str | None = None


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep Ray's notes on how it starts off our stderr; its errors are raised."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _knock(address: str) -> None:
    """Open and close a connection to a cluster's head: Ray itself tries for minutes, and writes on stderr meanwhile.

    Raises:
        OSError: nothing answers.
    """
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if separator and port.isdigit():  # not "auto"
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()


@dataclass(slots=True)
class Engine:
    """Ray, for the time of a `with`: started and stopped here, or only joined.

    Attributes:
        cluster: address of a running cluster; None starts Ray on this machine, or uses what this process has joined.
        needs: what one call takes.
        jobs: calls at once; None for as many as fit.
    """

    cluster: str | None = None
    needs: Needs = field(default_factory=Needs)
    jobs: int | None = None
    _ray: Any = None
    _mine: bool = False
    _open: dict[Any, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("ray", "cluster", "sweep") from error
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            with _hushed():
                self._start()
        elif self.cluster is not None:
            self._check_joined()
        try:
            if self.needs.gpus is None:
                self.needs = Needs(self.needs.cpus, 1.0 if self.total("GPU") else 0.0, self.needs.memory)
            self._check_fits(patience=0.0 if self.cluster is None else PATIENCE)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if self.cluster is not None:
            try:
                _knock(self.cluster)
                self._ray.init(address=self.cluster, **quiet)
            except Exception as error:  # ConnectionError, ValueError, RuntimeError, by the way it is out of reach
                raise ClusterError(
                    f"no Ray cluster answers at {self.cluster!r}: {' '.join(str(error).split())[:300]}. "
                    "`ray status` on its head node shows whether it runs; leave out --cluster to use this machine"
                ) from error
            return
        # without address="local" the left-over of a killed run would be joined instead
        self._ray.init(
            address="local",
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=OBJECT_STORE,
            **quiet,
        )

    def _check_joined(self) -> None:
        """Refuse another cluster than the one that this process has joined before."""
        joined = self._ray.get_runtime_context().gcs_address
        if self.cluster not in ("auto", joined):
            raise ClusterError(
                f"this process has joined the Ray at {joined} already, not the one at {self.cluster}; leave the "
                "address out to use that one, or call ray.shutdown() first"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reference in self._open:
            self._ray.cancel(reference, force=True)
        self._open.clear()
        if self._mine:
            self._ray.shutdown()

    def total(self, what: str) -> float:
        """Return how much of a resource all nodes have together."""
        return float(self._ray.cluster_resources().get(what, 0.0))

    def _resources(self) -> dict[str, float]:
        needs = {"CPU": self.needs.cpus, "GPU": self.needs.gpus or 0.0, "memory": float(self.needs.memory or 0)}
        return {name: amount for name, amount in needs.items() if amount}

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def fits(self) -> bool:
        """Return whether some node can run one call when it is idle."""
        needs = self._resources().items()
        return any(all(node.get(name, 0.0) >= amount for name, amount in needs) for node in self._nodes())

    def _check_fits(self, patience: float) -> None:
        """Refuse what no node can run, before Ray waits for one for ever."""
        until = time.monotonic() + patience
        while not self.fits():
            if time.monotonic() >= until:
                raise UsageError(self._too_much())
            time.sleep(1.0)

    def _too_much(self) -> str:
        asked = ", ".join(f"{amount:,g} {name}" for name, amount in self._resources().items())
        names = tuple(self._resources())
        there = "; ".join(", ".join(f"{node.get(name, 0.0):,g} {name}" for name in names) for node in self._nodes()[:4])
        return (
            f"a run asks for {asked}, and no node has that ({there or 'there is none'}); ask for less with "
            "--cpus-per-run, --gpus-per-run or --memory-per-run"
        )

    def capacity(self) -> int:
        """Return how many calls run at once on the nodes there are now."""
        needs = self._resources().items()
        rooms = [min((int(node.get(name, 0.0) / amount + 1e-9) for name, amount in needs), default=1)
                 for node in self._nodes()]  # fmt: skip
        return max(1, min(sum(rooms), self.jobs or AT_ONCE))

    def with_memory(self, memory: int) -> None:
        """Ask for so many bytes a call from now on, as far as the largest node has them."""
        largest = max((node.get("memory", 0.0) for node in self._nodes()), default=0.0)
        self.needs = Needs(self.needs.cpus, self.needs.gpus, min(memory, int(largest)) or None)

    def call(self, work: Callable[[Any], Any], task: Any) -> Any:
        """Make one call and return its value.

        Raises:
            ClusterError: the worker was lost too often, or the call raised.
        """
        outcome = next(iter(self.map(work, {"": task})))
        if outcome.error is not None:
            raise ClusterError(f"a worker could not do its work: {outcome.error}")
        return outcome.value

    def map(self, work: Callable[[Any], Any], tasks: Mapping[str, Any]) -> Iterator[Outcome]:
        """Make all calls; give what each came to as it ends.

        Raises:
            ClusterError: no node is left that could run what is still to do.
        """
        needs = {"num_cpus": self.needs.cpus, "num_gpus": self.needs.gpus or 0.0, "max_retries": RETRIES}
        if self.needs.memory is not None:
            needs["memory"] = self.needs.memory
        remote = self._ray.remote(**needs)(work)
        waiting = iter(tasks.items())
        limit = min(self.jobs or AT_ONCE, AT_ONCE)
        unfit_since = None
        while True:
            while len(self._open) < limit and (following := next(waiting, None)) is not None:
                self._open[remote.remote(following[1])] = following[0]
            if not self._open:
                return
            ended, _ = self._ray.wait(list(self._open), num_returns=1, timeout=2.0)
            for reference in ended:
                key = self._open.pop(reference)
                yield self._outcome(key, reference)
            if ended or self.fits():
                unfit_since = None
                continue
            unfit_since = unfit_since or time.monotonic()
            if time.monotonic() - unfit_since > PATIENCE:
                raise ClusterError(
                    f"{self._too_much()}. {len(self._open)} runs were waiting; those that ended are kept, and the same "
                    "command goes on from there."
                )

    def _outcome(self, key: str, reference: Any) -> Outcome:
        try:
            return Outcome(key, value=self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:  # the function itself raised
            cause = getattr(error, "cause", None) or error
            lines = str(cause).strip().splitlines() or [""]
            told = lines[0][:300] if len(lines) == 1 else f"{lines[0][:300]} ... {lines[-1][:300]}"
            return Outcome(key, error=f"{type(cause).__name__}: {told}")
        except self._ray.exceptions.RayError as error:
            words = " ".join(str(error).split())[:300]
            what = f"its worker was lost {RETRIES + 1} times ({type(error).__name__})"
            return Outcome(key, error=f"{what}; memory is a common cause: {words}")
