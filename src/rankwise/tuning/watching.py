"""The trainer's callback that watches for divergence and reports progress.

In: what transformers' Trainer logs. Out: a stop, where the run has diverged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rankwise.tuning.divergence import DivergenceWatch


class WatchCallback:
    """Hands every logged loss to a `DivergenceWatch` and every step to a progress line.

    transformers asks its callbacks for methods, not for a base class.

    Attributes:
        started_at: step at which this life of the run began; above 0 where it was resumed.
    """

    def __init__(self, watch: DivergenceWatch, progress: Callable[[str, int, int], None] | None) -> None:
        """Take what is to be told."""
        self._watch = watch
        self._progress = progress
        self.started_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Go on with what a resumed run has seen before."""
        self.started_at = state.global_step
        if state.global_step > 0:
            points = [(row["step"], float(row["loss"])) for row in state.log_history if "loss" in row]
            self._watch.resume(state.global_step, points, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Report a step."""
        if self._progress is not None:
            self._progress("training", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Look at a loss; stop the run where it has left."""
        loss = (logs or {}).get("loss")
        if loss is not None and self._watch.see(state.global_step, float(loss), logs.get("grad_norm"), model):
            control.should_training_stop = True

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Answer the events that are none of ours."""
        if name.startswith("on_"):
            return _ignore
        raise AttributeError(name)


def _ignore(*_: Any, **__: Any) -> None:
    """Do nothing."""
