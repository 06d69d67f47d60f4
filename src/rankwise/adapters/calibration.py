"""Factors that minimise the error of a layer's outputs on real inputs, and what that brings.

In: a delta and the second moment C of the layer's inputs. Out: the factors of a rank that minimise the mean of
norm((dW - B A) x)^2 = norm((dW - B A) C^(1/2))^2, which is the truncated SVD of dW C^(1/2) with A turned back by
C^(-1/2). C is regularised: a direction that the texts never use would else cost nothing.

The inputs are measured by `rankwise.tuning.moments`; only this module of the room reaches it, when it is called.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.adapters.truncation import Truncation, residual_energy, truncate
from rankwise.errors import RankwiseError
from rankwise.files import write_text
from rankwise.grids import row_blocks
from rankwise.linalg import energy_of
from rankwise.records import Calibration, ExtractionRecord, to_json

if TYPE_CHECKING:
    from rankwise.adapters.extraction import Job, Progress
    from rankwise.tuning.moments import Measured, Texts

Array = NDArray[Any]

DAMPING: Final = 1e-2
"""Share of the mean eigenvalue of C that is added to each: what an unused direction of the input still counts."""


def truncate_outputs(delta: Array, moment: Array, rank: int, *, seed: int = 0, device: str = "cpu") -> Truncation:
    """Return the factors of a rank that minimise the output error under a regularised moment.

    Args:
        delta: shape (out_features, in_features).
        moment: shape (in_features, in_features), symmetric, the mean of x x'.
        rank: 1 or more.
        seed: of the randomised route.
        device: "cpu" or a torch device.

    Returns:
        Balanced factors; `residual` is that of the weights, and `least` is not known: 0.
    """
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, 0.0)
    mean = float(values.mean())
    roots = np.sqrt(values + DAMPING * mean) if mean > 0 else np.ones_like(values)
    inward = (vectors * roots).astype(np.float32)  # (in, in): a root of C, up to a rotation
    weighted = np.asarray(delta @ inward, np.float32)
    found = truncate(weighted, rank, seed=seed, device=device)
    a, b = _rebalance((found.a.astype(np.float64) / roots) @ vectors.T, found.b.astype(np.float64))
    a, b = a.astype(np.float32), b.astype(np.float32)
    residual = residual_energy(delta, a, b)
    return Truncation(a, b, found.sigma, energy_of(delta), residual, 0.0, found.route)


def _rebalance(a: Array, b: Array) -> tuple[Array, Array]:
    """Return factors of the same product whose columns and rows share the root of each singular value."""
    left, core_b = np.linalg.qr(b)
    right, core_a = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(core_b @ core_a.T)
    roots = np.sqrt(s)
    return (roots[:, None] * v) @ right.T, (left @ u) * roots


def output_energy(
    delta: Array, moment: Array, a: Array | None = None, b: Array | None = None, scale: float = 1
) -> float:
    """Return the mean of norm((delta - scale * B @ A) x)^2 over the inputs of a moment; without factors, of delta x."""
    total = 0.0
    wide = None if a is None else a.astype(np.float32)
    for rows in row_blocks(delta.shape):
        rest = np.asarray(delta[rows], np.float32)
        if wide is not None and b is not None:
            rest = rest - np.float32(scale) * (b[rows].astype(np.float32) @ wide)
        block = rest.astype(np.float64)
        total += float(np.sum((block @ moment) * block))
    return max(total, 0.0)


def calibrated(job: Job, base: str, tuned: str, data: str, *, samples: int) -> ExtractionRecord:
    """Extract with calibration, and compare with an adapter of equal ranks without it.

    Args:
        job: the extraction.
        base: source of the base, a model that transformers loads.
        tuned: source of the tuned model, whose inputs are measured where it can be run; else those of the base are.
        data: texts.
        samples: texts to measure inputs on.

    Raises:
        RankwiseError: the base cannot be loaded as a model, the texts cannot be read.
    """
    from rankwise.tuning import moments
    from rankwise.tuning.models import load_model

    device = str(job.options["device"])
    loaded = load_model(base, device=device)
    texts = moments.read_texts(data, loaded, samples=samples)
    base_losses = moments.losses_of(loaded.model, texts)
    del loaded  # one model in memory at a time
    found_inputs = _inputs_of_tuned(tuned, texts, device=device, progress=job.progress)
    loaded = load_model(base, device=device)
    if found_inputs is None:
        measured, tuned_losses = moments.measure(loaded.model, texts, progress=job.progress), None
    else:
        measured, tuned_losses = found_inputs
    inputs: Literal["base", "tuned"] = "base" if found_inputs is None else "tuned"
    identity = {"data": texts.name, "texts": len(texts.fit), "digest": texts.digest, "inputs": inputs}
    record = job.run(measured, identity)
    adapter_losses = moments.losses_with(loaded.model, str(job.out), texts)
    with tempfile.TemporaryDirectory() as beside:
        plain = job.elsewhere(Path(beside) / "plain")
        plain.run(None, None)
        plain_losses = moments.losses_with(loaded.model, str(plain.out), texts)
    errors = [(m.output_error, m.output_error_plain) for m in record.modules]
    known = [(a, b) for a, b in errors if a is not None and b is not None]
    found = Calibration(
        data=texts.name,
        samples=len(texts.fit),
        tokens=texts.tokens,
        held_out=len(texts.held_out),
        inputs=inputs,
        modules=len(known),
        output_error=_root_mean_square([a for a, _ in known]),
        output_error_plain=_root_mean_square([b for _, b in known]),
        base_loss=_mean(base_losses),
        tuned_loss=None if tuned_losses is None else _mean(tuned_losses),
        adapter_loss=_mean(adapter_losses),
        plain_loss=_mean(plain_losses),
        loss_difference=None if tuned_losses is None else _mean(np.abs(adapter_losses - tuned_losses)),
        loss_difference_plain=None if tuned_losses is None else _mean(np.abs(plain_losses - tuned_losses)),
    )
    from rankwise.adapters.extraction import RECORD, with_calibration

    record = with_calibration(record, found)
    write_text(job.out / RECORD, to_json(record), force=True)
    return record


def _inputs_of_tuned(
    tuned: str, texts: Texts, *, device: str, progress: Progress | None
) -> tuple[Measured, Array] | None:
    """Return the moments of the tuned model's inputs, and its losses; None where it cannot be run.

    The adapter is to stand in for the tuned model, so that its layers will see about the tuned model's inputs; those of
    the base are further off, most of all where embeddings were tuned too.
    """
    from rankwise.tuning import moments
    from rankwise.tuning.models import load_model

    try:
        model = load_model(tuned, device=device).model
    except RankwiseError:  # weights without a config or a tokenizer: there is no model to run
        return None
    if int(model.get_input_embeddings().weight.shape[0]) <= texts.largest:  # its vocabulary was cut
        return None
    return moments.measure(model, texts, progress=progress), moments.losses_of(model, texts)


def _root_mean_square(values: list[float]) -> float | None:
    return math.sqrt(statistics.fmean(v * v for v in values)) if values else None


def _mean(losses: Array) -> float | None:
    """Return a mean that is a number, or None: of no token, or of a model that overflows."""
    value = float(losses.mean()) if losses.size else math.nan
    return value if math.isfinite(value) else None
