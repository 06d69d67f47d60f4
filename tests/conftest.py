"""Fixtures that every test may use, and an environment without network or surprises."""

import os

# before anything imports a Hugging Face library or a BLAS
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # the tests themselves run in parallel

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.joining import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # Ray looks when it is imported, which test modules do to see whether it is there
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


@pytest.fixture(scope="session")
def ray_local() -> Iterator[Any]:
    """A Ray of two CPUs on this machine, one for all tests of a process: `cluster="auto"` is it."""
    ray = pytest.importorskip("ray", reason="ray comes with the cluster extra")
    with pytest.MonkeyPatch.context() as patch:
        # workers import the stand-ins, which hold no test
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "sweeping"), os.environ.get("PYTHONPATH", "")])
        )
        # address="local": without it the left-over of a killed run would be joined
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
        )
    yield ray
    ray.shutdown()
