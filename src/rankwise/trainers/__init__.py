"""Plans in the words of trainers: config files and snippets that carry a rank and an alpha for every module.

In: a plan/1 record. Out: the text of the files, each read again and compared with the plan module by module; or an
untrained adapter folder (`as_adapter`) for trainers that take no ranks for single modules.
"""

from __future__ import annotations

from rankwise.trainers.exporting import TRAINERS, export
from rankwise.trainers.model import Export, ExportedModule, Trainer

__all__ = ["TRAINERS", "Export", "ExportedModule", "Trainer", "export"]
