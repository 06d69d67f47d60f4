"""`dry_run`: what a training run would be and need, without running it.

In: what `train` takes. Out: a dry-run/1 record: parameters, memory, steps, the scale of every group, traps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from rankwise.records import DryRunRecord, Memory
from rankwise.tuning import attach
from rankwise.tuning.borrowing import borrowed, quiet
from rankwise.tuning.preparing import Job, head_of, options_of, prepare

log = logging.getLogger(__name__)

STATE_BYTES: Final[dict[str, float]] = {"sgd": 0.0, "adafactor": 0.1}
"""Optimizer -> bytes of state per byte of trainable weights. Everything else is counted as Adam: two moments."""

ADAM_STATE: Final = 2.0


def dry_run(
    model: Any,
    data: Any,
    *,
    preset: str | None = None,
    rank: int | None = None,
    lora_alpha: float | None = None,
    scaling: str | None = None,
    plan: str | None = None,
    target_modules: str | Sequence[str] | None = None,
    init: str = "default",
    lora_dropout: float = 0.0,
    optimizer: str = "adamw",
    learning_rate: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    gradient_accumulation: int = 1,
    max_length: int | None = None,
    packing: bool = False,
    bf16: bool | None = None,
    gradient_checkpointing: bool = False,
    tokenizer: Any = None,
    device: str | None = None,
    seed: int = 0,
    command: Sequence[str] | None = None,
) -> DryRunRecord:
    """Say what `train` would do with the same arguments: parameters, memory, steps and traps. Nothing is written.

    Raises:
        RankwiseError: as `train`.
    """
    job = prepare(model, data, options_of(locals()), tokenizer=tokenizer, device=device)
    c = job.config
    lengths = [len(ids) for ids in job.columns["input_ids"]]
    targets = sum(sum(label != -100 for label in labels) for labels in job.columns["labels"])
    return DryRunRecord(
        **head_of(command, model, job, seed),
        format=DryRunRecord.FORMAT,
        config=c,
        params=sum(lora.params for lora in job.laid.values()),
        base_params=sum(p.numel() for p in job.loaded.model.parameters()),
        memory=memory_of(job),
        examples=len(lengths),
        tokens=sum(lengths),
        target_tokens=targets,
        epochs=c.steps * c.batch_size * (c.max_length / sum(lengths) if c.packing else 1 / len(lengths)),
        findings=job.findings,
    )


def memory_of(job: Job) -> Memory:
    """Return the bytes that a run needs, from shapes and dtypes."""
    c = job.config
    weights = sum(p.numel() * p.element_size() for p in job.loaded.model.parameters())
    adapter = 4 * sum(lora.params for lora in job.laid.values())  # PEFT keeps A and B in float32
    optimizer = round(adapter * STATE_BYTES.get(c.optimizer, ADAM_STATE))
    rows = c.batch_size // c.gradient_accumulation
    longest = c.max_length if c.packing else max(map(len, job.columns["input_ids"]))
    kept = activation_bytes(job, rows, longest)
    return Memory(
        weights=weights,
        adapter=adapter,
        gradients=adapter,
        optimizer=optimizer,
        activations=kept,
        total=weights + 2 * adapter + optimizer + (kept or 0),
    )


def activation_bytes(job: Job, rows: int, tokens: int) -> int | None:
    """Return the bytes that a forward pass of `rows` rows keeps for its backward pass.

    Measured on passes of one row and of two, and carried on: every tensor that autograd saves is counted once, weights
    left out. None where two rows do not fit.
    """
    import torch
    from peft import get_peft_model

    with borrowed(job.loaded.model) as model:
        try:
            with quiet():
                tuned = get_peft_model(model, attach.lora_config(job.settings, job.laid))
                tuned.train()
                if job.config.gradient_checkpointing:
                    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                    tuned.enable_input_require_grads()
            one = _kept(tuned, 1, tokens, bf16=job.config.bf16)
            return one if rows == 1 else one + (rows - 1) * (_kept(tuned, 2, tokens, bf16=job.config.bf16) - one)
        except (torch.OutOfMemoryError, MemoryError) as error:
            log.info("activations cannot be measured for %s: %s", type(model).__name__, error)
            return None


def _kept(model: Any, rows: int, tokens: int, *, bf16: bool) -> int:
    """Return the bytes of what one forward pass saves, the loss included."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Any] = {}  # the storages are held, or their addresses would be used again

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage
        return tensor

    device = next(model.parameters()).device
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16),
    ):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(storage.nbytes() for storage in seen.values())
