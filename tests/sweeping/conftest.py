"""One local Ray for all tests of sweeping, on loopback, with nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import make_pico

from rankwise.sweeping.engine import ENVIRONMENT

os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="ray comes with the cluster extra")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before])  # workers import the stand-ins
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
    os.environ["PYTHONPATH"] = before
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Llama of two layers, width 32, and the shipped tokenizer."""
    pytest.importorskip("torch", reason="torch comes with the train extra")
    return make_pico(tmp_path_factory.mktemp("models") / "pico")
