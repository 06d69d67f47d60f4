"""From what a user names to subjects: an adapter's folder, a config, a script, or a command line itself.

In: paths and texts. Out: subjects. What a thing is, is told by its content.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from rankwise.checkpoints import Adapter, open_source
from rankwise.checkpoints.alphas import configs_in_header
from rankwise.checkpoints.patterns import LoraSettings
from rankwise.errors import UnknownFormatError, WrongKindError, without_secrets
from rankwise.linting.names import Shape, targeted
from rankwise.linting.subject import Module, Subject
from rankwise.linting.texts import COMMANDS, parse, parse_command, read_text
from rankwise.linting.trainers import recognise, subject_of
from rankwise.scaling import scaling

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin")


def read_subject(source: str, shapes: Mapping[str, Shape | None] | None, model_config: Any) -> Subject:
    """Return one subject.

    Args:
        source: a path, a hub id or URL of an adapter, or a command line.
        shapes: module -> shape of the base, where it was given.
        model_config: config.json of the base, or None.

    Raises:
        RankwiseError: and nothing else, whatever lies there.
    """
    subject = _read(source)
    if subject.trained or shapes is None:
        return dataclasses.replace(subject, model_config=model_config)
    return dataclasses.replace(subject, model_config=model_config, modules=_laid(subject, shapes))


def _read(source: str) -> Subject:
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # a command line may be too long for a path
        is_file = is_folder = False
    if not is_file and not is_folder and "--" in source and COMMANDS.search(source):
        raw = _with_config(parse_command(source, "the command"), Path())
        return subject_of(raw, recognise(raw, "the command"), path=without_secrets(source), text=source)
    folder = path if is_folder else path.parent
    weights = any((folder / name).is_file() for name in WEIGHTS)
    if is_folder and (path / CONFIG).is_file() and not weights and not _holds_weights(path):
        return _config(path / CONFIG, source)
    if is_file and path.suffix.lower() not in (".safetensors", ".bin", ".pt", ".ckpt"):
        if path.name == CONFIG and weights:
            return _adapter(str(path.parent), source)
        return _config(path, source)
    return _adapter(source, source)


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _config(path: Path, source: str) -> Subject:
    text = read_text(path)
    raw = _with_config(parse(text, str(path)), path.parent)
    return subject_of(raw, recognise(raw, str(path)), path=without_secrets(source), text=text)


def _with_config(raw: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Return a command's flags over the YAML that it names with `--config`, which TRL reads first."""
    named = raw.get("config") if "_command" in raw else None
    if not isinstance(named, str):
        return raw
    path = next((p for p in (Path(named), folder / named) if p.is_file()), None)
    if path is None:
        raise UnknownFormatError(f"the command takes settings from --config {named}, and there is no such file.")
    return {**parse(read_text(path), str(path)), **raw}


def _adapter(place: str, source: str) -> Subject:
    """Return an adapter: its headers and config; no weight is read before `is_untrained` is called."""
    with open_source(place, want="adapter") as opened:
        if not isinstance(opened, Adapter):
            raise WrongKindError(f"{place} is no adapter.")
        adapter = opened
    config = adapter.config
    text = _text_beside(place)
    if config is not None and adapter.format == "peft":
        subject = subject_of(config, "adapter", path=without_secrets(source), text=text)
    else:
        shown = without_secrets(source)
        subject = Subject(path=shown, kind="adapter", text=text, raw=config or {}, keys={}, settings=None)
    modules = tuple(Module(m.module, m.r, m.lora_alpha, m.scaling, m.rule, m.shape) for m in adapter.modules)
    return dataclasses.replace(
        subject,
        modules=modules,
        format=adapter.format,
        alpha_stored=_alpha_stored(adapter),
        config_in_header=adapter.format == "diffusers" and any(configs_in_header(adapter.metadata).values()),
        whole=tuple(s.module for s in adapter.skipped if "whole weight" in s.reason),
        embeddings=tuple(m.module for m in adapter.modules if m.kind == "embedding"),
        noticed=adapter.findings,
        is_untrained=lambda: _is_untrained(place),
    )


def _alpha_stored(adapter: Adapter) -> bool:
    """Tell whether the weights file has alphas as tensors: those that stand in its header alone are read by few."""
    return adapter.format in ("kohya", "diffusers") and any(t.name.endswith(".alpha") for t in adapter.others())


def _text_beside(place: str) -> str:
    path = Path(place)
    config = (path if path.is_dir() else path.parent) / CONFIG
    try:
        return read_text(config) if config.is_file() else ""
    except (OSError, UnknownFormatError):
        return ""


def _is_untrained(place: str) -> bool:
    """Tell whether every B is zero: of a trained adapter, the first module read says no."""
    with open_source(place, want="adapter") as opened:
        if not isinstance(opened, Adapter) or not opened.modules:
            return False
        return all(not np.any(opened.read_factors(module)[1]) for module in opened.modules)


def _laid(subject: Subject, shapes: Mapping[str, Shape | None]) -> tuple[Module, ...] | None:
    """Return the modules that a config adapts in a model; None where that is the trainer's choice."""
    names = targeted(subject, tuple(shapes))
    settings = subject.settings
    if names is None or settings is None:
        return None
    return tuple(module_of(settings, name, shapes[name]) for name in names)


def module_of(settings: LoraSettings, name: str, shape: Shape | None) -> Module:
    """Return what PEFT gives to one module."""
    r, alpha = settings.rank_of(name), settings.alpha_of(name)
    return Module(name, r, alpha, scaling(settings.rule, alpha, r), settings.rule, shape)
