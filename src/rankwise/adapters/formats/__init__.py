"""The formats that adapters are written in: one file each, one table.

In: modules as they are to be written. Out: tensors under a format's names, and the files beside them.
"""

from __future__ import annotations

from typing import Final

from rankwise.adapters.formats import diffusers, kohya, mlx, peft
from rankwise.adapters.formats.writer import Entry, Result, Setup, Writer

__all__ = ["WRITERS", "Entry", "Result", "Setup", "Writer"]

WRITERS: Final[dict[str, Writer]] = {
    "peft": peft.WRITER,
    "kohya": kohya.WRITER,
    "diffusers": diffusers.WRITER,
    "mlx": mlx.WRITER,
}
"""Format -> writer."""
