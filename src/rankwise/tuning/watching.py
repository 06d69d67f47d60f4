"""The trainer's callback that watches for divergence and reports progress.

In: what transformers' Trainer logs. Out: a stop, where the run has diverged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rankwise.tuning.divergence import DivergenceWatch


def WatchCallback(watch: DivergenceWatch, progress: Callable[[str, int, int], None] | None) -> Any:  # noqa: N802
    """Return a callback of transformers, whose base class is only there once transformers is loaded."""
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if progress is not None:
                progress("training", state.global_step, state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:  # noqa: ARG002
            if (
                logs
                and "loss" in logs
                and watch.see(state.global_step, float(logs["loss"]), logs.get("grad_norm"), rest["model"])
            ):
                control.should_training_stop = True

    return Watching()
