"""The rank monitor in transformers.Trainer and everything built on it, TRL's trainers included.

In: the events of a trainer. Out: `rankwise/...` numbers in the trainer's reporters, every figure of every module in a
JSONL file, warnings in words, and, if asked for, a stop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from rankwise.errors import UsageError
from rankwise.files import write_texts
from rankwise.tuning.health import EVERYTHING, FIGURES, STATUSES, GroupHealth, MonitorConfig, Observation, Status
from rankwise.tuning.monitor import RankMonitor

logger: Final = logging.getLogger(__name__)

GROUP_FIGURES: Final = ("branch_ratio", "update_ratio", "effective_rank")
"""Figures of a group that go to the reporters; of all modules together all of them go, the rest is in the JSONL."""


class RankMonitorCallback:
    """Watches the LoRA modules of a training under transformers.Trainer.

    Reporters such as TensorBoard and W&B have run when a user's callback is called, so what it changes in `logs` never
    reaches them: numbers go through the trainer, which has to be known here. Either

    >>> callback = RankMonitorCallback(jsonl="run/rank.jsonl")  # doctest: +SKIP
    >>> callback.attach(trainer)  # doctest: +SKIP

    or `trainer.add_callback(RankMonitorCallback(trainer))`. Without a trainer there is the JSONL file and the warnings.

    transformers asks its callbacks for methods, not for a base class; this class has none, so that it can be imported
    where transformers is not installed.

    Attributes:
        observations: the rows of groups seen so far, as plain dicts, those before a resume included where there is a
            JSONL file.
    """

    def __init__(
        self,
        trainer: Any = None,
        *,
        config: MonitorConfig | None = None,
        jsonl: str | Path | None = None,
        stop_after: int | None = None,
    ) -> None:
        """Set up; nothing is read or written before the training begins.

        Args:
            trainer: to log through.
            config: intervals and bounds.
            jsonl: a file for one observation a line. A training from the start begins it anew; one that resumes at
                step k keeps the lines up to k.
            stop_after: stop the training after so many observations in a row that are "unstable"; None for never.

        Raises:
            UsageError: `stop_after` is no whole number of 1 or more.
        """
        if stop_after is not None and (
            isinstance(stop_after, bool) or not isinstance(stop_after, int) or stop_after < 1
        ):
            raise UsageError(f"stop_after must be a whole number of 1 or more, or None, got {stop_after!r}")
        self.monitor: RankMonitor | None = None
        self.observations: list[dict[str, Any]] = []
        self._trainer = trainer
        self._config = config
        self._jsonl = None if jsonl is None else Path(jsonl)
        self._writes = False
        self._stop_after = stop_after
        self._unstable_in_a_row = 0
        self._status: Status | None = "ok"
        self._loss: float | None = None
        self._said_no_trainer = False

    def attach(self, trainer: Any) -> RankMonitorCallback:
        """Log through this trainer, and be one of its callbacks; return self."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Make the monitor, arm it, and put the files in order.

        Raises:
            NothingToMeasureError: the model has no LoRA layer of the adapter.
            OutputError: the JSONL file cannot be written.
            UsageError: `stop_after` with several processes, of which one alone must not stop.
        """
        if self.monitor is not None:
            self.monitor.close()
        self.monitor, self._loss, self._status, self._unstable_in_a_row = None, None, "ok", 0
        if self._stop_after is not None and getattr(args, "world_size", 1) > 1:
            raise UsageError(
                f"stop_after={self._stop_after} works in one process only, and there are {args.world_size}: each sees "
                "its own batches, and if one stopped alone the others would wait for ever. Leave stop_after out."
            )
        if not state.is_world_process_zero:
            return
        self.monitor = RankMonitor(model, self._config)
        self.observations = self._resume_jsonl(state.global_step)
        self.monitor.observe(state.global_step)
        if self._trainer is None and not self._said_no_trainer:
            self._said_no_trainer = True
            where = f"{self._jsonl} alone" if self._jsonl is not None else "no reporter and no file"
            logger.warning(
                "RankMonitorCallback knows no trainer, so its numbers go to %s; callback.attach(trainer) mends that",
                where,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Note the gradients while they are there: the trainer zeroes them before the step ends."""
        if self.monitor is not None:
            self.monitor.capture_gradients()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the training loss from what the trainer logs: a mean over its logging steps."""
        loss = (logs or {}).get("loss")
        if isinstance(loss, int | float):
            self._loss = float(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Observe; if the step was due, write, log, warn and perhaps stop."""
        if self.monitor is None:
            return control
        loss, self._loss = self._loss, None
        seen = self.monitor.observe(state.global_step, loss)
        if seen is None:
            return control
        rows = [group.to_dict() for group in seen.groups]
        self.observations.extend(rows)
        self._write(seen)
        if not seen.supported:
            self.monitor.close()  # its reason is logged and on file; there will never be more to say
            return control
        self._log(numbers_of(seen), control)
        self._warn(seen)
        self._unstable_in_a_row = self._unstable_in_a_row + 1 if seen.status == "unstable" else 0
        if self._stop_after is not None and self._unstable_in_a_row >= self._stop_after:
            logger.warning("rankwise stops the training at step %d: %s", seen.step, seen.reason)
            control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the hooks off the model."""
        if self.monitor is not None:
            self.monitor.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Answer the events that are none of ours, those of later versions of transformers among them."""
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _log(self, numbers: dict[str, float], control: Any) -> None:
        """Send numbers to the reporters, and leave all else in the trainer as it was."""
        if self._trainer is None:
            return
        # on_log clears should_log, and with it the loss that the trainer was about to log at this step
        wanted, others = control.should_log, getattr(self._trainer, "control", control)
        others_wanted = others.should_log
        _plain_log(self._trainer)(numbers)
        control.should_log, others.should_log = wanted, others_wanted

    def _warn(self, seen: Observation) -> None:
        """Say a change of status, once."""
        if seen.status != self._status:
            level = logging.INFO if seen.status == "ok" else logging.WARNING
            logger.log(level, "rankwise, step %d: %s. %s", seen.step, seen.status, seen.reason)
            self._status = seen.status

    def _write(self, seen: Observation) -> None:
        if self._jsonl is None or not self._writes:
            return
        try:
            with self._jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps(seen.to_dict(), allow_nan=False) + "\n")
        except OSError as error:  # a full disk must not end the training; it would end at the next checkpoint anyway
            self._writes = False
            logger.warning("%s cannot be written (%s); no more observations go there", self._jsonl, error.strerror)

    def _resume_jsonl(self, step: int) -> list[dict[str, Any]]:
        """Cut the file to the observations up to this step, in one move; return their rows of groups."""
        if self._jsonl is None:
            return []
        self._jsonl.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step > 0 and self._jsonl.exists():
            for line in self._jsonl.read_text(encoding="utf-8", errors="replace").splitlines():
                seen = _parsed(line)
                if seen is not None and seen["step"] <= step:
                    kept.append((line, seen))
        write_texts({self._jsonl: "".join(f"{line}\n" for line, _ in kept)}, force=True)
        self._writes = True
        return [row for _, seen in kept for row in seen["groups"]]


def numbers_of(seen: Observation) -> dict[str, float]:
    """Return what goes to the reporters: finite numbers only, under `rankwise/`.

    `rankwise/status` is 0 for ok, 1 for starved, 2 for unstable.
    """
    numbers: dict[str, float] = {}
    for group in seen.groups:
        names = FIGURES if group.group == EVERYTHING else GROUP_FIGURES
        numbers.update(
            {f"rankwise/{group.group}/{name}": value for name in names if (value := _figure(group, name)) is not None}
        )
    if seen.status is not None:
        numbers["rankwise/status"] = float(STATUSES.index(seen.status))
    return numbers


def _figure(group: GroupHealth, name: str) -> float | None:
    value: float | None = getattr(group, name)
    return value


def _plain_log(trainer: Any) -> Callable[[dict[str, float]], None]:
    """Return `log` as transformers.Trainer itself defines it, bound to the trainer.

    Trainers built on it override `log` to add their own running means and to reset them (TRL: entropy, accuracy): an
    extra call would leave the row of the loss without them.
    """
    bases: list[Any] = list(type(trainer).__mro__)
    plain = [base for base in bases if (base.__module__, base.__name__) == ("transformers.trainer", "Trainer")]
    log: Callable[[dict[str, float]], None] = plain[0].log.__get__(trainer) if plain else trainer.log
    return log


def _parsed(line: str) -> dict[str, Any] | None:
    """Return one line of the JSONL file, None where a killed run left a part of one."""
    try:
        seen = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(seen, dict) and isinstance(seen.get("step"), int) and isinstance(seen.get("groups"), list)
    return seen if whole else None


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""
