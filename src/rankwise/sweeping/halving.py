"""ASHA over seeds, by Ray Tune: of each rule and rank, rates that do worse than others get no further seeds.

In: settings (a rule, a rank, a rate), each with its cells in the order of the seeds. Out: what the cells came to that
were run.

A trial of Tune is a setting, an iteration is one seed. Tune's scheduler decides after each seed; there is one for each
rule and rank, so that rates are compared with rates, and no rank is dropped before its answer is in.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankwise.errors import MissingDependencyError, UsageError
from rankwise.joining import LOST, hushed
from rankwise.sweeping.engine import Engine, Outcome, given_up, lost, said

WORST: Final = -1e30
"""Score of a setting that diverged for a seed: finite, since Tune takes percentiles."""

ENVIRONMENT: Final = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no files beside ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's own ends as if all were well
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one writes on stdout, quiet or not
}
"""Tune takes these from its environment alone; they are put back."""

SCORE: Final = "score"


@dataclass(frozen=True, slots=True)
class Setting:
    """What differs from its cells in the seed alone.

    Attributes:
        group: it is compared within this one.
        names: of its cells, in the order of the seeds.
    """

    group: Hashable
    names: tuple[str, ...]


def check_halving(factor: float | None, *, rates: int, seeds: int, cluster: str | None) -> None:
    """Refuse what ASHA cannot do.

    Raises:
        UsageError: there is nothing to choose among, or nothing to save.
    """
    if factor is None:
        return
    if not 1 < factor < float("inf"):
        raise UsageError(f"--asha must be above 1, such as 2: one in so many goes on; got {factor:g}")
    if rates < 2 or seeds < 2:
        raise UsageError(
            f"--asha ends learning rates before their last seed; that takes two rates and two seeds, and there are "
            f"{rates} and {seeds}"
        )
    if cluster is not None and cluster.startswith("ray://"):
        raise UsageError("--asha works on a node of the cluster and not through ray://; run it there, or leave it out")


@contextlib.contextmanager
def _configured() -> Iterator[None]:
    """Set what Tune reads, and put back what was there."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@_configured()
def halve(
    engine: Engine,
    work: Callable[[Any], Any],
    tasks: Mapping[str, Any],
    settings: Sequence[Setting],
    *,
    score: Callable[[str, Any], float | None],
    known: Mapping[str, float | None],
    factor: float,
    keep: Callable[[Outcome], None],
    folder: Path,
) -> None:
    """Make the calls that ASHA asks for.

    Args:
        engine: Ray, entered.
        work: makes one call.
        tasks: name -> what is given to `work`, of the cells that are to do.
        settings: in the order in which they begin.
        score: of a cell and what its call came to, higher is better; None where it came to nothing.
        known: name -> score of the cells that are over.
        factor: one in so many goes on to the next rung: after 1, factor, factor^2 ... seeds.
        keep: is given what each call came to.
        folder: for Tune's own files.

    Raises:
        MissingDependencyError: Ray is there without what Tune needs.
        ClusterError: no node is left that could do the work.
    """
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise MissingDependencyError("ray[tune]", "cluster", "sweep --asha") from error

    ledger = _ledger(known, tasks)
    seeds = max(len(setting.names) for setting in settings)

    class Trial(tune.Trainable):  # type: ignore[misc, unused-ignore]
        """A setting: each step is one seed more."""

        def setup(self, config: dict[str, Any]) -> None:
            """Begin; after a lost worker, again from the first seed: what is over is read from the ledger."""
            self._left = list(settings[config["setting"]].names)
            self._scores: list[float] = []

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            """Let the worker, which has imported everything, take another setting."""
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            """Run cells until one has a score; a failed one is a missing seed."""
            while self._left:
                name = self._left.pop(0)
                there, found, times, task = ray.get(ledger.begin.remote(name))
                if not there:
                    outcome = Outcome(name, error=lost()) if times > LOST + 1 else _call(work, name, task)
                    found = None if outcome.error is not None else score(name, outcome.value)
                    ray.get(ledger.put.remote(outcome, found))
                if found is not None:
                    self._scores.append(max(found, WORST))
                    break
            worst = not self._scores or min(self._scores) <= WORST
            mean = WORST if worst else sum(self._scores) / len(self._scores)
            return {SCORE: mean, tune.result.DONE: worst or not self._left}

    needs = {"cpu": engine.needs.cpus, "gpu": engine.needs.gpus or 0.0, "memory": engine.needs.memory or 0}
    watch = _watch(engine, ledger, settings, keep)
    tuner = tune.Tuner(
        tune.with_resources(Trial, {name: amount for name, amount in needs.items() if amount}),
        param_space={"setting": tune.grid_search(list(range(len(settings))))},
        tune_config=tune.TuneConfig(
            metric=SCORE,
            mode="max",
            scheduler=_by_group([setting.group for setting in settings], seeds, factor),
            max_concurrent_trials=engine.jobs,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="asha",
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[watch],
            # Tune counts for all seeds together; the ledger counts for each, and gives up before this is reached
            failure_config=tune.FailureConfig(max_failures=(LOST + 1) * seeds),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the ledger has what is over
        ),
    )
    try:
        with hushed():
            tuner.fit()
    except Exception:
        if watch.problem is not None:
            raise watch.problem from None
        raise
    watch.take()


def _call(work: Callable[[Any], Any], name: str, task: Any) -> Outcome:
    try:
        return Outcome(name, value=work(task))
    except Exception as error:
        return Outcome(name, error=said(error))


def _ledger(known: Mapping[str, float | None], tasks: Mapping[str, Any]) -> Any:
    """Start the actor that holds what is over, on the driver's node: what it has survives a worker and its node.

    It has the tasks as well: Tune writes the class of its trials into a file, with all that it refers to, and a URL in
    a task may have secrets.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Ledger:
        """What is over, and what of it the driver has not fetched."""

        def __init__(self, known: dict[str, float | None], tasks: dict[str, Any]) -> None:
            self._known = known
            self._tasks = tasks
            self._new: list[Outcome] = []
            self._begun: dict[str, int] = {}

        def begin(self, name: str) -> tuple[bool, float | None, int, Any]:
            """Say whether a cell is over, its score, how often it was begun, this time included, and its task."""
            self._begun[name] = self._begun.get(name, 0) + 1
            return *self.look(name), self._begun[name], self._tasks.get(name)

        def look(self, name: str) -> tuple[bool, float | None]:
            """Say whether a cell is over, and its score."""
            return name in self._known, self._known.get(name)

        def put(self, outcome: Outcome, score: float | None) -> None:
            """Enter a cell that is over."""
            self._known[outcome.key] = score
            self._new.append(outcome)

        def take(self) -> list[Outcome]:
            """Return what is new, once."""
            new, self._new = self._new, []
            return new

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Ledger).options(scheduling_strategy=here).remote(dict(known), dict(tasks))


def _by_group(groups: Sequence[Hashable], seeds: int, factor: float) -> Any:
    """Return Tune's ASHA, one for each group."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    class ByGroup(FIFOScheduler):  # type: ignore[misc, unused-ignore]
        """Hands each trial to the ASHA of its group."""

        def __init__(self) -> None:
            super().__init__()
            self._of = {group: ASHAScheduler(max_t=seeds, reduction_factor=factor) for group in groups}

        def _asha(self, trial: Any) -> Any:
            return self._of[groups[trial.config["setting"]]]

        def set_search_properties(self, metric: Any, mode: Any, **spec: Any) -> bool:
            """Tell all what is compared."""
            super().set_search_properties(metric, mode, **spec)
            return all(asha.set_search_properties(metric, mode, **spec) for asha in self._of.values())

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            """Pass it on."""
            self._asha(trial).on_trial_add(tune_controller, trial)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            """Ask whether the trial goes on."""
            return str(self._asha(trial).on_trial_result(tune_controller, trial, result))

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            """Pass it on."""
            self._asha(trial).on_trial_complete(tune_controller, trial, result)

        def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
            """Pass it on."""
            self._asha(trial).on_trial_remove(tune_controller, trial)

    return ByGroup()


def _watch(engine: Engine, ledger: Any, settings: Sequence[Setting], keep: Callable[[Outcome], None]) -> Any:
    """Return a callback of Tune that fetches what is over, and gives up where no node is left."""
    import ray
    from ray import tune

    class Watch(tune.Callback):  # type: ignore[misc, unused-ignore]
        """Looks at the ledger whenever a trial has a result."""

        problem: BaseException | None = None

        def __reduce__(self) -> tuple[Any, ...]:
            """Leave nothing of ours in the file from which Tune could resume."""
            return tune.Callback, ()

        def take(self) -> None:
            """Fetch what is over; what goes wrong here ends the work, and Tune would say it in its own words."""
            try:
                for outcome in ray.get(ledger.take.remote()):
                    keep(outcome)
            except Exception as error:
                self.problem = error
                raise

        def on_trial_result(self, **_: Any) -> None:
            """Fetch."""
            self.take()

        def on_trial_error(self, **info: Any) -> None:
            """Call the cell failed that lost its worker for the last time."""
            trial = info["trial"]
            self.take()
            for name in settings[trial.config["setting"]].names:
                there, _ = ray.get(ledger.look.remote(name))
                if not there:
                    error = getattr(trial.get_error(), "cause", None) or trial.get_error()
                    told = lost() if error is None else given_up(error)
                    ray.get(ledger.put.remote(Outcome(name, error=told), None))
                    self.take()
                    return

        def on_step_end(self, **info: Any) -> None:
            """Give up where nothing can go on."""
            try:
                engine.check_alive(sum(not trial.is_finished() for trial in info["trials"]))
            except Exception as error:
                self.problem = error
                raise

    return Watch()
