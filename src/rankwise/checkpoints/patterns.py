"""The rank, alpha and rule that an adapter_config.json gives to each module, exactly as PEFT reads them.

In: the config as a dict. Out: checked settings, and (r, lora_alpha) by module name. Semantics of PEFT
(`get_pattern_key` in utils/other.py and `_create_and_replace` in tuners/lora/model.py, the same from 0.10
to 0.21): a key matches by `re.match(rf"(.*\\.)?({key})$", name)`, so it is a regular expression that must
cover the end of the name from a dot on; the first match in the order of the file wins, not the most
specific; r and alpha are looked up independently; `use_rslora` holds for all modules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.errors import ConfigError

DEFAULTS: Final = {"r": 8, "lora_alpha": 8}
"""What PEFT's LoraConfig takes where the config is silent."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of an adapter_config.json that decides ranks and scalings.

    Attributes:
        r: rank of modules that no key of `rank_pattern` matches.
        lora_alpha: alpha of modules that no key of `alpha_pattern` matches.
        use_rslora: whether the scaling is alpha / sqrt(r) rather than alpha / r, for all modules.
        rank_pattern: (key, rank), in the order of the file.
        alpha_pattern: (key, alpha), in the order of the file.
        defaulted: fields that the config lacks, so that PEFT's defaults hold.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    defaulted: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The scaling rule of all modules."""
        return "rslora" if self.use_rslora else "lora"

    def rank_of(self, name: str) -> int:
        """Return the rank that PEFT gives to the module `name`."""
        found = first_match(self.rank_pattern, name)
        return self.r if found is None else self.rank_pattern[found][1]

    def alpha_of(self, name: str) -> float:
        """Return the alpha that PEFT gives to the module `name`."""
        found = first_match(self.alpha_pattern, name)
        return self.lora_alpha if found is None else self.alpha_pattern[found][1]

    def claims(self, name: str) -> tuple[list[int], list[float]]:
        """Return the distinct ranks and alphas of all keys that match `name`, not of the first alone.

        PEFT sorts the keys when it saves a config, so the first in the file need not be the first in training.
        """
        ranks = [r for key in self.rank_pattern if first_match((key,), name) is not None for r in key[1:]]
        alphas = [a for key in self.alpha_pattern if first_match((key,), name) is not None for a in key[1:]]
        return list(dict.fromkeys(ranks)), list(dict.fromkeys(alphas))


def first_match(pattern: Sequence[tuple[str, Any]], name: str) -> int | None:
    """Return the position of the first key that matches `name`, or None.

    >>> first_match((("q_proj", 8), ("layers.0.q_proj", 64)), "model.layers.0.q_proj")
    0
    >>> first_match((("proj", 8), ("^q_proj", 4)), "model.layers.0.q_proj")
    """
    for position, (key, _) in enumerate(pattern):
        if re.match(rf"(.*\.)?({key})$", name):
            return position
    return None


def idle_keys(settings: LoraSettings, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the keys that match no name, and those that match only names an earlier key has taken.

    Each comes as `rank_pattern['key']`.
    """
    unmatched: list[str] = []
    shadowed: list[str] = []
    tables: tuple[tuple[str, Sequence[tuple[str, Any]]], ...] = (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    )
    for field, pattern in tables:
        used = {first_match(pattern, name) for name in names} if pattern else set()
        for position, item in enumerate(pattern):
            if position in used:
                continue
            matches = any(first_match((item,), name) is not None for name in names)
            (shadowed if matches else unmatched).append(f"{field}[{item[0]!r}]")
    return unmatched, shadowed


def read_settings(config: Mapping[str, Any], where: str) -> LoraSettings:
    """Check the fields that decide ranks and scalings, and return them.

    Args:
        config: adapter_config.json.
        where: its name, for messages.

    Raises:
        ConfigError: a field is of the wrong type or out of its range, or a key is no regular expression.
    """
    missing = tuple(field for field in DEFAULTS if config.get(field) is None)
    r = _rank(DEFAULTS["r"] if "r" in missing else config["r"], "r", where)
    alpha = _alpha(DEFAULTS["lora_alpha"] if "lora_alpha" in missing else config["lora_alpha"], "lora_alpha", where)
    rslora = config.get("use_rslora")
    if rslora is not None and not isinstance(rslora, bool):
        raise ConfigError(f"{where}: `use_rslora` is {rslora!r:.100}; wanted true or false.")
    ranks = _pattern(config, "rank_pattern", where)
    alphas = _pattern(config, "alpha_pattern", where)
    return LoraSettings(
        r,
        alpha,
        bool(rslora),
        tuple((key, _rank(value, f"rank_pattern[{key!r}]", where)) for key, value in ranks.items()),
        tuple((key, _alpha(value, f"alpha_pattern[{key!r}]", where)) for key, value in alphas.items()),
        missing,
    )


def _rank(value: Any, field: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{where}: `{field}` is {value!r:.100}; wanted an integer of 1 or more, without quotes.")
    return value


def _alpha(value: Any, field: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: `{field}` is {value!r:.100}; wanted a number, without quotes.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ConfigError(f"{where}: `{field}` is {value!r:.100}; wanted a finite number above 0.")
    return value if isinstance(value, float) else number


def _pattern(config: Mapping[str, Any], field: str, where: str) -> Mapping[str, Any]:
    found = config.get(field)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{where}: `{field}` is a JSON {type(found).__name__}; wanted an object from module patterns to numbers."
        )
    for key in found:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{where}: the key {key!r:.200} of `{field}` is no regular expression: {error}."
            ) from error
    return found
