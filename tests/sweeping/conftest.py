"""A small model for sweeps of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_models import make_pico


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained Llama of two layers, width 32, and the shipped tokenizer."""
    pytest.importorskip("torch", reason="torch comes with the train extra")
    return make_pico(tmp_path_factory.mktemp("models") / "pico")
