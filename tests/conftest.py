"""Fixtures that every test may use, and an environment without network or surprises."""

import os

# before anything imports a Hugging Face library or a BLAS
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # the tests themselves run in parallel

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def rng() -> np.random.Generator:
    """A fresh generator with the same seed in every test."""
    return np.random.default_rng(20260427)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of real adapters and checkpoint pairs; the test skips where there is none."""
    named = os.environ.get("RANKWISE_SAMPLES")
    beside = ROOT.parent / "shared" / "data"
    for folder in [Path(named)] if named else [beside]:
        if folder.is_dir():
            return folder
    pytest.skip(
        f"no sample data: RANKWISE_SAMPLES is {'not set' if named is None else f'{named!r}, which is no folder'}"
        + ("" if named else f", and there is no folder {beside.parent.name}/{beside.name} beside the repository")
    )
