"""`rankwise:tiny`: the model that ships in the package, as a folder.

In: nothing. Out: the folder with its config, its weights (float16, about 1.3 M parameters) and its tokenizer, which
`AutoModelForCausalLM` and `AutoTokenizer` load. Made by `lab/pretrain_tiny.py`; `pretraining.json` beside the weights
says how, and what it knows.
"""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """Return the folder of the shipped model."""
    return Path(__file__).parent / "model"
