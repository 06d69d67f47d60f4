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
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.adapters.truncation import Truncation, residual_energy, truncate
from rankwise.errors import RankwiseError
from rankwise.files import write_text
from rankwise.grids import row_blocks
from rankwise.linalg import energy_of
from rankwise.records import Calibration, ExtractionRecord, to_json

if TYPE_CHECKING:
    from rankwise.adapters.extraction import Job

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
        tuned: source of the tuned model.
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
    measured = moments.measure(loaded.model, texts, progress=job.progress)
    identity = {"data": texts.name, "texts": len(texts.fit), "digest": texts.digest}
    base_loss = moments.loss_of(loaded.model, texts)
    record = job.run(measured, identity)
    adapter_loss = moments.loss_with(loaded.model, str(job.out), texts)
    with tempfile.TemporaryDirectory() as beside:
        plain = job.elsewhere(Path(beside) / "plain")
        plain.run(None, None)
        plain_loss = moments.loss_with(loaded.model, str(plain.out), texts)
    del loaded
    try:
        tuned_loss: float | None = moments.loss_of(load_model(tuned, device=device).model, texts)
    except RankwiseError:  # weights without a config or a tokenizer: there is no model to run
        tuned_loss = None
    errors = [(m.output_error, m.output_error_plain) for m in record.modules]
    known = [(a, b) for a, b in errors if a is not None and b is not None]
    found = Calibration(
        data=texts.name,
        samples=len(texts.fit),
        tokens=texts.tokens,
        held_out=len(texts.held_out),
        modules=len(known),
        output_error=_root_mean_square([a for a, _ in known]),
        output_error_plain=_root_mean_square([b for _, b in known]),
        base_loss=_finite(base_loss),
        tuned_loss=_finite(tuned_loss),
        adapter_loss=_finite(adapter_loss),
        plain_loss=_finite(plain_loss),
    )
    from rankwise.adapters.extraction import RECORD, with_calibration

    record = with_calibration(record, found)
    write_text(job.out / RECORD, to_json(record), force=True)
    return record


def _root_mean_square(values: list[float]) -> float | None:
    return math.sqrt(statistics.fmean(v * v for v in values)) if values else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
