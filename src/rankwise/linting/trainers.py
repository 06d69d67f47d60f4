"""From the keys of a config to a `Subject`: how each trainer spells ranks and alphas, and what it takes for granted.

In: keys and values. Out: a subject. The spellings and defaults were read in PEFT 0.21.2, TRL 1.16, axolotl
067b021 (src/axolotl/utils/schemas/peft.py, loaders/adapter.py) and LLaMA-Factory ff6d4d1
(src/llamafactory/hparams/finetuning_args.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rankwise.checkpoints.patterns import LoraSettings, read_settings
from rankwise.errors import ConfigError, UnknownFormatError, UnsupportedAdapterError
from rankwise.linting.subject import Kind, Subject

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Trainer:
    """How one trainer's config is told and read.

    Attributes:
        marks: keys of which any one tells it.
        keys: role -> spelling.
        r: the rank without a word in the config, or None.
        alpha: from the rank to the alpha without a word in the config; gives None where there is none.
        dropout: without a word in the config.
        off: why this config trains no LoRA, or None.
    """

    marks: frozenset[str]
    keys: Mapping[str, str]
    r: int | None
    alpha: Callable[[int], float | None]
    dropout: float
    off: Callable[[Raw], str | None]


def _truth(value: Any) -> bool | None:
    """Return a switch as Hugging Face's command lines take it, or None where it is none."""
    word = str(value).lower() if isinstance(value, bool | int | str) else ""
    return True if word in ("true", "yes", "t", "y", "1") else False if word in ("false", "no", "f", "n", "0") else None


def _peft_off(_: Raw) -> str | None:
    return None


def _axolotl_off(raw: Raw) -> str | None:
    adapter = raw.get("adapter")
    if adapter in ("lora", "qlora"):
        return None
    return f"`adapter` is {'not set' if adapter is None else repr(adapter)[:40]}, so axolotl trains no LoRA"


def _factory_off(raw: Raw) -> str | None:
    kind = raw.get("finetuning_type", "lora")
    return None if kind == "lora" else f"`finetuning_type` is {kind!r:.40}, so LLaMA-Factory trains no LoRA"


def _trl_off(raw: Raw) -> str | None:
    return None if _truth(raw.get("use_peft")) else "`use_peft` is not set, so TRL trains the whole model"


_PEFT_KEYS: Final = {
    "r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "init": "init_lora_weights",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
    "use_dora": "use_dora",
    "bias": "bias",
}

TRAINERS: Final[dict[Kind, Trainer]] = {
    "llama-factory": Trainer(
        marks=frozenset({"lora_rank", "lora_target", "finetuning_type", "stage", "additional_target"}),
        keys={
            "r": "lora_rank",
            "lora_alpha": "lora_alpha",
            "use_rslora": "use_rslora",
            "init": "pissa_init",
            "dropout": "lora_dropout",
            "targets": "lora_target",
            "modules_to_save": "additional_target",
            "use_dora": "use_dora",
            "learning_rate": "learning_rate",
        },
        r=8,
        alpha=lambda r: 2 * r,
        dropout=0.0,
        off=_factory_off,
    ),
    "axolotl": Trainer(
        marks=frozenset({"adapter", "lora_target_linear", "lora_rank_pattern", "peft_use_rslora", "micro_batch_size"}),
        keys={
            "r": "lora_r",
            "lora_alpha": "lora_alpha",
            "use_rslora": "peft_use_rslora",
            "rank_pattern": "lora_rank_pattern",
            "alpha_pattern": "lora_alpha_pattern",
            "init": "peft_init_lora_weights",
            "dropout": "lora_dropout",
            "targets": "lora_target_modules",
            "target_parameters": "lora_target_parameters",
            "modules_to_save": "lora_modules_to_save",
            "use_dora": "peft_use_dora",
            "learning_rate": "learning_rate",
        },
        r=None,
        alpha=lambda r: None,  # noqa: ARG005 - axolotl has none
        dropout=0.0,
        off=_axolotl_off,
    ),
    "trl": Trainer(
        marks=frozenset({"lora_r", "use_peft", "lora_target_modules", "lora_task_type", "_command"}),
        keys={
            "r": "lora_r",
            "lora_alpha": "lora_alpha",
            "use_rslora": "use_rslora",
            "dropout": "lora_dropout",
            "targets": "lora_target_modules",
            "target_parameters": "lora_target_parameters",
            "modules_to_save": "lora_modules_to_save",
            "use_dora": "use_dora",
            "learning_rate": "learning_rate",
        },
        r=16,
        alpha=lambda r: 32,  # noqa: ARG005
        dropout=0.05,
        off=_trl_off,
    ),
    "peft-config": Trainer(
        marks=frozenset({"peft_type", "r", "target_modules", "init_lora_weights"}),
        keys=_PEFT_KEYS,
        r=8,
        alpha=lambda r: 8,  # noqa: ARG005
        dropout=0.0,
        off=_peft_off,
    ),
}
"""Kind -> trainer; the first with a mark among the keys reads it."""


def recognise(raw: Raw, where: str) -> Kind:
    """Return which trainer a config is for.

    Raises:
        UnknownFormatError: it has no key of any.
    """
    if "peft_type" in raw:
        return "peft-config"
    for kind, trainer in TRAINERS.items():
        if trainer.marks & raw.keys():
            return kind
    keys = ", ".join(sorted(str(k)[:40] for k in raw if k != "_twice")[:6]) or "none"
    raise UnknownFormatError(
        f"{where} is no config that lint knows: its keys are {keys}. Wanted adapter_config.json, an axolotl or "
        "LLaMA-Factory YAML, or the YAML or command of TRL."
    )


def subject_of(raw: Raw, kind: Kind, *, path: str, text: str) -> Subject:
    """Return the subject of a config.

    Raises:
        ConfigError: a value is of the wrong type or out of its range.
        UnsupportedAdapterError: it is a PEFT config of something other than LoRA.
    """
    trainer = TRAINERS["peft-config" if kind == "adapter" else kind]
    reader = _Values(raw, trainer.keys, path)
    peft_type = raw.get("peft_type", "LORA")
    if peft_type != "LORA":
        raise UnsupportedAdapterError(f"{path}: `peft_type` is {peft_type!r:.40}; lint knows LoRA only.")
    if trainer.keys is _PEFT_KEYS:
        settings: LoraSettings | None = read_settings(raw, path)
    else:
        settings = _settings(reader, trainer)
    init = reader.value("init")
    if kind == "llama-factory":
        init = "pissa" if init is True else None
    targets = reader.names("targets")
    if kind == "axolotl" and raw.get("lora_target_linear") is True:
        targets = "all-linear"
    if targets in ("all", ("all",), ("all-linear",)):
        targets = "all-linear"
    return Subject(
        path=path,
        kind=kind,
        text=text,
        raw=raw,
        keys=trainer.keys,
        settings=settings,
        off=trainer.off(raw),
        init=None if init is None else str(init).lower(),
        dropout=reader.number("dropout", trainer.dropout),
        targets=targets,
        target_parameters=_listed(reader.names("target_parameters")),
        modules_to_save=_listed(reader.names("modules_to_save")),
        use_dora=reader.flag("use_dora"),
        bias=str(reader.value("bias") or "none"),
        learning_rate=_learning_rate(reader, kind, raw),
        method=_method(kind, raw),
    )


def _settings(reader: _Values, trainer: Trainer) -> LoraSettings | None:
    """Return rank, alpha, rule and patterns under PEFT's names, and messages under the trainer's."""
    stated = reader.value("r")
    r = trainer.r if stated is None else reader.whole("r")
    if r is None:
        return None
    alpha = reader.value("lora_alpha")
    takes_2r = trainer is TRAINERS["llama-factory"]  # `lora_alpha or 2 * lora_rank`: 0 counts as none, too
    plain: dict[str, Any] = {
        "r": r,
        "lora_alpha": trainer.alpha(r)
        if alpha is None or (takes_2r and not alpha)
        else reader.number("lora_alpha", 0.0),
        "use_rslora": reader.flag("use_rslora"),
        "rank_pattern": reader.value("rank_pattern"),
        "alpha_pattern": reader.value("alpha_pattern"),
    }
    if plain["lora_alpha"] is None:
        return None
    try:
        made = read_settings(plain, reader.path)
    except ConfigError as error:
        words = str(error)
        for role, key in trainer.keys.items():
            words = re.sub(rf"`{role}(?=`|\[)", f"`{key}", words)
        raise ConfigError(words) from error
    return made


@dataclass(frozen=True, slots=True)
class _Values:
    """The values of a config by role, checked as they are taken."""

    raw: Raw
    keys: Mapping[str, str]
    path: str

    def value(self, role: str) -> Any:
        key = self.keys.get(role)
        return None if key is None else self.raw.get(key)

    def _refuse(self, role: str, wanted: str) -> ConfigError:
        return ConfigError(f"{self.path}: `{self.keys[role]}` is {_short(self.value(role))}; wanted {wanted}.")

    def number(self, role: str, default: float) -> float:
        """Return a number; YAML 1.1 reads 2e-5 as a word, and trainers as the number that was meant."""
        value = self.value(role)
        if value is None:
            return default
        try:
            made = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            made = math.nan
        if not math.isfinite(made):
            raise self._refuse(role, "a number")
        return made

    def whole(self, role: str) -> int:
        made = self.number(role, math.nan)
        if made != int(made) or not 1 <= made < 2**31:
            raise self._refuse(role, "a whole number of 1 or more")
        return int(made)

    def flag(self, role: str) -> bool:
        value = self.value(role)
        if value is None:
            return False
        made = value if isinstance(value, bool) else _truth(value) if "_command" in self.raw else None
        if made is None:
            raise self._refuse(role, "true or false")
        return made

    def names(self, role: str) -> tuple[str, ...] | str | None:
        """Return a list of names, or a lone word as it is: a regular expression, or a name with commas."""
        value = self.value(role)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            return tuple(v.strip() for v in value.split(",")) if "," in value and "(" not in value else value
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise self._refuse(role, "a name or a list of names")


def _short(value: Any) -> str:
    """Return a value for a message, without writing out what may be large."""
    return f"{value!r:.60}" if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"


def _listed(found: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return () if found is None else (found,) if isinstance(found, str) else found


def _method(kind: Kind, raw: Raw) -> str | None:
    if kind == "trl":
        words = " ".join(raw.get("_command", ()))
        found = re.search(r"\btrl\s+(\w+)|\b(\w+)\.py\b", words)
        return (found[1] or found[2]) if found else None
    if kind == "llama-factory":
        stage = str(raw.get("stage", "sft"))
        return "sft" if stage in ("sft", "pt") else stage
    if kind == "axolotl":
        return str(raw["rl"]) if raw.get("rl") else "sft"
    return None


def _learning_rate(reader: _Values, kind: Kind, raw: Raw) -> float | None:
    """Return the learning rate; `trl sft` has a default of its own, 2e-5."""
    if reader.value("learning_rate") is None:
        return 2e-5 if kind == "trl" and _method(kind, raw) == "sft" else None
    return reader.number("learning_rate", math.nan)
