"""Ray: many calls of one function, on this machine or on a cluster. Of this room, `halving` alone knows Ray as well.

In: a function, its tasks, and what one of them needs. Out: what each came to, in the order in which they end; a worker
or a node that is lost costs the calls it was at, and these are made again.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from rankwise.errors import ClusterError, UsageError, foreign
from rankwise.joining import LOCAL, LOST, joined

AT_ONCE: Final = 2000
"""Calls handed to Ray at a time; a cluster that grows by itself sees what is waiting."""

PATIENCE: Final = 60.0
"""Seconds that a cluster may have no node that fits before that is an error; none on a local start."""

LOOK_EVERY: Final = 2.0
"""Seconds between two looks at the nodes."""

GONE: Final = frozenset(
    {"WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError", "OutOfMemoryError", "RayActorError"}
)
"""Ray's errors of a worker that is no more; the last is of a worker of Tune's."""


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
    _ending: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _open: dict[Any, str] = field(default_factory=dict)
    _looked: float = 0.0
    _unfit_since: float | None = None

    def __enter__(self) -> Self:
        here = self.cluster in (None, LOCAL)
        with contextlib.ExitStack() as ending:
            self._ray = ending.enter_context(joined(self.cluster or LOCAL, "sweep"))
            ending.callback(self._cancel)
            if self.needs.gpus is None:
                self.needs = Needs(self.needs.cpus, 1.0 if self.total("GPU") else 0.0, self.needs.memory)
            self._check_fits(patience=0.0 if here else PATIENCE)
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is one that was not entered: Tune pickles its callbacks, in case somebody resumes its work."""
        return Engine, (self.cluster, self.needs, self.jobs)

    def _cancel(self) -> None:
        """Stop the calls under way."""
        for reference in self._open:
            with contextlib.suppress(Exception):  # a cluster that is gone; what went wrong is under way already
                self._ray.cancel(reference, force=True)
        self._open.clear()

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
        needs = {"num_cpus": self.needs.cpus, "num_gpus": self.needs.gpus or 0.0, "max_retries": LOST}
        if self.needs.memory is not None:
            needs["memory"] = self.needs.memory
        remote = self._ray.remote(**needs)(work)
        waiting = iter(tasks.items())
        limit = min(self.jobs or AT_ONCE, AT_ONCE)
        self._unfit_since = None
        while True:
            while len(self._open) < limit and (following := next(waiting, None)) is not None:
                self._open[remote.remote(following[1])] = following[0]
            if not self._open:
                return
            ended, _ = self._ray.wait(list(self._open), num_returns=1, timeout=LOOK_EVERY)
            for reference in ended:
                key = self._open.pop(reference)
                yield self._outcome(key, reference)
            if ended:
                self._unfit_since = None
            else:
                self.check_alive(len(self._open))

    def check_alive(self, waiting: int) -> None:
        """Look whether some node could do what waits, at most every two seconds.

        Raises:
            ClusterError: for a minute there was none.
        """
        moment = time.monotonic()
        if moment - self._looked < LOOK_EVERY:
            return
        self._looked = moment
        if self.fits():
            self._unfit_since = None
            return
        self._unfit_since = self._unfit_since or moment
        if moment - self._unfit_since > PATIENCE:
            raise ClusterError(
                f"{self._too_much()}. {waiting} runs were waiting; those that ended are kept, and the same command "
                "goes on from there."
            )

    def _outcome(self, key: str, reference: Any) -> Outcome:
        try:
            return Outcome(key, value=self._ray.get(reference))
        except self._ray.exceptions.RayTaskError as error:  # the function itself raised
            return Outcome(key, error=said(getattr(error, "cause", None) or error))
        except self._ray.exceptions.RayError as error:
            return Outcome(key, error=given_up(error))


def said(error: BaseException) -> str:
    """Return the class of an error and its words, of many lines the first and the last, without secrets of URLs.

    >>> said(ValueError("no https://ann:pw@host/data.jsonl"))
    'ValueError: no https://***@host/data.jsonl'
    """
    lines = foreign(str(error)).strip().splitlines() or [""]
    told = lines[0][:300] if len(lines) == 1 else f"{lines[0][:300]} ... {lines[-1][:300]}"
    return f"{type(error).__name__}: {told}"


def given_up(error: BaseException) -> str:
    """Say why a call was given up that did not raise itself: its worker was lost, or Ray could not make it."""
    if not GONE & {kind.__name__ for kind in type(error).__mro__}:
        return said(error)
    return f"{lost(type(error).__name__)}: {foreign(' '.join(str(error).split()))[:300]}"


def lost(kind: str = "") -> str:
    """Say that a worker was lost for the last time."""
    return f"its worker was lost {LOST + 1} times{f' ({kind})' if kind else ''}; memory is a common cause"
