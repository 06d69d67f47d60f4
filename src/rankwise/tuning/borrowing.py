"""What a run borrows, and gives back as it was: a live model, the random numbers, the messages of other libraries.

In: what belongs to the caller. Out: the same, to be changed for the time of a `with`.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

from rankwise.errors import MissingDependencyError


@contextlib.contextmanager
def borrowed(model: Any) -> Iterator[Any]:
    """Lend a model to be adapted, and put back what peft, trl and the trainer change on it."""
    config, forward = model.config, model.__dict__.get("forward")
    kept = {name: getattr(config, name, None) for name in ("use_cache", "pad_token_id")}
    training, wanted = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    embeddings = model.get_input_embeddings()
    hooks = set(embeddings._forward_hooks)
    with quiet():
        checkpointed = bool(model.is_gradient_checkpointing)
    try:
        yield model
    finally:
        unload(model)
        with quiet():
            if not checkpointed and model.is_gradient_checkpointing:
                model.gradient_checkpointing_disable()
        for key in set(embeddings._forward_hooks) - hooks:  # those that make inputs require gradients
            del embeddings._forward_hooks[key]
        for name, p in model.named_parameters():
            p.requires_grad_(wanted.get(name, p.requires_grad))
        for name, value in kept.items():
            setattr(config, name, value)
        if forward is None:
            model.__dict__.pop("forward", None)
        model.train(training)


def unload(model: Any) -> None:
    """Take every adapter layer out of a model, whether PEFT had finished putting them in or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and random for the run and put their states back: a library must not leave them changed."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "train", "training") from error
    import numpy as np

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        transformers.set_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers, datasets and trl from writing on our terminal; errors still come."""
    import datasets
    import transformers

    level = transformers.logging.get_verbosity()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # the words of transformers 5.0 to 5.x; some have another name in 6
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
