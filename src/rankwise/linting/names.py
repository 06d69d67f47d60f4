"""The modules of a model by name and shape, from headers alone, and which of them a config adapts.

In: a model's folder, and a config's targets. Out: names. Which names a target hits follows PEFT 0.21.2
(`check_target_module_exists` in tuners/tuners_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rankwise.checkpoints import Checkpoint, open_source
from rankwise.checkpoints.slow_patterns import why_slow
from rankwise.checkpoints.strict_json import parse_config
from rankwise.errors import ConfigError, UnknownFormatError
from rankwise.linting.subject import Subject
from rankwise.linting.texts import read_text

Shape = tuple[int, int]

INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_NO_LINEAR: Final = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|embed_out|output_projection)$")
"""Tables and heads, which `all-linear` leaves out."""


def model_modules(source: str) -> tuple[dict[str, Shape | None], Mapping[str, Any] | None]:
    """Return the 2-D weights of a model by module, and its config.json.

    Shapes are None where only the index of a sharded checkpoint is there.

    Raises:
        RankwiseError: there is no such model, or it holds neither weights nor an index.
    """
    folder = Path(source)
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        weight_map = parse_config(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{index} has no `weight_map` of names to files.")
        config = folder / "config.json"
        found = parse_config(read_text(config).encode(), str(config)) if config.is_file() else None
        return {_module(n): None for n in weight_map if n.endswith(".weight")}, found
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UnknownFormatError(
            f"{folder} holds no weights and no index, and the names of a model's layers stand nowhere else. Give a "
            "folder with model.safetensors.index.json or the weights; only their headers are read."
        )
    with open_source(source, want="checkpoint") as opened:
        if not isinstance(opened, Checkpoint):
            raise UnknownFormatError(f"{source} is no checkpoint.")
        shapes = {name: opened.info(name).shape for name in opened.names()}
        modules = {_module(n): (s[0], s[1]) for n, s in shapes.items() if len(s) == 2 and not n.endswith(".bias")}
        return dict(modules), opened.config


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def targeted(subject: Subject, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the names that the config adapts; None where it leaves the choice to the trainer.

    Raises:
        ConfigError: a target is no regular expression.
    """
    targets = subject.targets
    if targets is None:
        return None
    kept = [n for n in names if not _excluded(subject, n)]
    if targets == "all-linear":
        return tuple(n for n in kept if _NO_LINEAR.search(n) is None)
    if isinstance(targets, str) and (subject.kind == "peft-config" or not re.fullmatch(r"[\w.]+", targets)):
        try:
            test = re.compile(targets)
        except (re.error, RecursionError, OverflowError) as error:
            key = subject.key("targets")
            raise ConfigError(f"{subject.path}: {key} is no regular expression: {error}.") from error
        if (slow := why_slow(targets)) is not None:
            raise ConfigError(
                f"{subject.path}: {subject.key('targets')} may take forever to compare with names: {slow}."
            )
        return tuple(n for n in kept if test.fullmatch(n))
    wanted = (targets,) if isinstance(targets, str) else targets
    hit = [n for n in kept if any(hits(t, n) for t in wanted)]
    return tuple(n for n in hit if _layer_wanted(subject.raw, n))


def hits(target: str, name: str) -> bool:
    """Tell whether one entry of a list of targets names a module: all of its path, or the end from a dot on."""
    return name == target or name.endswith(f".{target}")


def _excluded(subject: Subject, name: str) -> bool:
    excluded = subject.raw.get("exclude_modules")
    if isinstance(excluded, list) and any(isinstance(e, str) and hits(e, name) for e in excluded):
        return True
    return any(f".{m}." in f".{name}." for m in subject.modules_to_save)


def _layer_wanted(raw: Mapping[str, Any], name: str) -> bool:
    """Tell whether `layers_to_transform` lets a module through; axolotl spells it `peft_layers_to_transform`."""
    layers = raw.get("layers_to_transform", raw.get("peft_layers_to_transform"))
    if not isinstance(layers, int | list) or layers == []:
        return True
    match = re.match(r".*?\.[^.]*\.(\d+)\.", f".{name}")
    return match is not None and int(match[1]) in (layers if isinstance(layers, list) else [layers])
