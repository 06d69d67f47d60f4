"""Records with planted spectra, and no model behind them: what the page tests draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankwise import criteria
from rankwise.findings import find
from rankwise.records import Finding, ModuleSpectrum, Skipped, SpectraRecord, SpectraSummary

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FIXED = {"rankwise": "0.1.0", "created": "2026-01-02T03:04:05+00:00", "device": "cpu", "seed": 7}


def module(name: str, values: Sequence[float], **more: Any) -> ModuleSpectrum:
    """Return the module that `inspect` would write for these singular values."""
    sigma = tuple(sorted(map(float, values), reverse=True))
    complete = more.get("complete", True)
    energy = more.pop("energy", math.fsum(v * v for v in sigma))
    shape = more.pop("shape", (max(len(sigma), 1) * 2, max(len(sigma), 1) * 2))
    spectrum = criteria.Spectrum(name, shape, sigma, energy, complete)
    numbers: dict[str, Any] = {
        "shape": shape,
        "r": len(sigma),
        "lora_alpha": 16.0,
        "scaling": 16.0 / max(len(sigma), 1),
        "rule": "lora",
        "dtype": "F32",
        "complete": complete,
        "energy": energy,
        "stable_rank": criteria.stable_rank(spectrum),
        "effective_rank": criteria.effective_rank(spectrum),
        "rank_90": criteria.rank_for_energy(spectrum, 0.9) if complete else None,
        "rank_99": criteria.rank_for_energy(spectrum, 0.99) if complete else None,
        "relative_norm": None,
        "unchanged_share": None,
        "noise_edge": None,
        "signal_rank": None,
        "rounding_limited": False,
    }
    return ModuleSpectrum(module=name, singular_values=sigma, **(numbers | more))


def unknown(name: str) -> ModuleSpectrum:
    """Return a module of which nothing is known: every field that may be null is."""
    nothing = dict.fromkeys(
        ("r", "lora_alpha", "scaling", "rule", "energy", "stable_rank", "effective_rank", "rank_90", "rank_99"),
    )
    return ModuleSpectrum(
        module=name,
        shape=(3, 2),
        dtype="BF16",
        singular_values=(),
        complete=False,
        relative_norm=None,
        unchanged_share=None,
        noise_edge=None,
        signal_rank=None,
        rounding_limited=False,
        warnings=("not-finite",),
        **nothing,  # type: ignore[arg-type]
    )


def record(modules: Sequence[ModuleSpectrum], **more: Any) -> SpectraRecord:
    """Return a record of these modules with the summary that `inspect` would write."""
    moved = [m for m in modules if m.energy]
    curves = [criteria.Spectrum(m.module, m.shape, m.singular_values, float(m.energy or 0), m.complete) for m in moved]
    longest = max((len(m.singular_values) for m in modules), default=0)
    shares: dict[str, float | None] = {}
    for rank in (2**k for k in range(longest.bit_length())):
        known = [criteria.energy_share(c, rank) for c in curves]
        shares[str(rank)] = None if None in known or not known else float(np.mean(known))  # type: ignore[arg-type]
    others: Sequence[Finding] = more.pop("others", ())
    summary = SpectraSummary(
        modules=len(modules),
        params=sum(m.shape[0] * m.shape[1] for m in modules),
        energy_by_rank=shares,
        effective_rank_mean=_mean([m.effective_rank for m in moved]),
        rank_90_mean=_mean([m.rank_90 for m in moved]),
        findings=find(modules, others)[1],
    )
    head: dict[str, Any] = {
        "format": SpectraRecord.FORMAT,
        "command": ("rankwise", "inspect", "runs/a b/adapter"),
        "source": "runs/a b/adapter",
        "base": None,
        "kind": "adapter",
        "skipped": (),
        **FIXED,
    }
    return SpectraRecord(modules=tuple(modules), summary=summary, **(head | more))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def adapter(layers: int = 32, r: int = 16, seed: int = 1) -> SpectraRecord:
    """Return an adapter of `layers` x 7 modules, later layers wider; no noise edge."""
    rng = np.random.default_rng(seed)
    modules = []
    for layer in range(layers):
        for kind in KINDS:
            decay = 1.5 + 4.0 * layer / layers + rng.uniform(0, 2.5)
            values = rng.uniform(0.5, 1.5) * np.exp(-np.arange(r) / decay) * rng.uniform(0.9, 1.1, r)
            shape = (11008, 4096) if "mlp" in kind else (4096, 4096)
            modules.append(module(f"model.layers.{layer}.{kind}", values, shape=shape))
    return record(modules)


def delta(layers: int = 32, n: int = 512, seed: int = 2, limited: float = 0.6) -> SpectraRecord:
    """Return tuned - base of `layers` x 7 modules: planted directions over a bulk of rounding noise."""
    rng = np.random.default_rng(seed)
    modules = []
    for layer in range(layers):
        for kind in KINDS:
            signal = int(rng.integers(4, 24))
            noise = 0.02 * np.sqrt(np.linspace(1.0, 1e-4, n)) * rng.uniform(0.98, 1.02, n)
            strength = 0.4 if rng.uniform() < limited else 8.0
            values = np.sort(noise)[::-1].copy()
            values[:signal] += strength * np.exp(-np.arange(signal) / 5) * 0.3 + 0.01
            edge = 0.0211
            weak = strength < 1
            modules.append(
                module(
                    f"model.layers.{layer}.{kind}",
                    values,
                    shape=(n, n),
                    r=None,
                    lora_alpha=None,
                    scaling=None,
                    rule=None,
                    dtype="BF16",
                    relative_norm=float(rng.uniform(0.5, 2) * strength * 1e-3),
                    unchanged_share=float(rng.uniform(0.2, 0.7)),
                    noise_edge=edge,
                    signal_rank=int((values > edge).sum()),
                    rounding_limited=weak,
                    warnings=("rounding-limited",) if weak else (),
                )
            )
    still = {"r": None, "lora_alpha": None, "scaling": None, "rule": None, "dtype": "BF16", "shape": (n, n)}
    edgeless: dict[str, Any] = {"unchanged_share": 1.0, "noise_edge": 0.0, "signal_rank": 0, "relative_norm": 0.0}
    modules.append(module("lm_head", (), warnings=("unchanged-modules",), **still, **edgeless))
    return record(
        modules,
        kind="delta",
        source="org/model-tuned",
        base="org/model-base",
        command=("rankwise", "inspect", "org/model-tuned", "--base", "org/model-base"),
        skipped=(
            Skipped(module="model.embed_tokens", reason="shape (32000, 512) in the base, (32001, 512) in the tuned"),
            Skipped(module="model.norm", reason="not a matrix: shape (512,)"),
        ),
    )
