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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from rankwise.checkpoints.slow_patterns import why_slow
from rankwise.errors import ConfigError

DEFAULTS: Final = {"r": 8, "lora_alpha": 8}
"""What PEFT's LoraConfig takes where the config is silent."""


_LITERAL: Final = re.compile(r"[\w.]+", re.ASCII)
_ANCHORED: Final = re.compile(r"\^((?:[\w-]|\\[^\w\s])+)", re.ASCII)
"""A key that is one whole path, as plans write them: `^`, and the path with its dots escaped."""

Number = TypeVar("Number", int, float)


class Pattern(Generic[Number]):
    """A `rank_pattern` or `alpha_pattern`: keys that are regular expressions, in the order of the file.

    >>> q = Pattern({"q_proj": 8, "layers.0.q_proj": 64, "proj": 4, "^q_proj": 2})
    >>> q.matches("model.layers.0.q_proj")
    (0, 1)
    """

    def __init__(self, items: Mapping[str, Number]) -> None:
        self.keys = tuple(items)
        self.values: tuple[Number, ...] = tuple(items.values())
        # a plan may have a key for every module: whole paths are looked up, and so are plain ends, by their length and
        # by where their dots stand, as each stands for any character (the cache of `re` holds 512 expressions)
        self._whole_paths: dict[str, list[int]] = {}
        self._ends: dict[tuple[int, tuple[int, ...]], dict[str, list[int]]] = {}
        self._tests: list[tuple[int, Callable[[str], object]]] = []
        for at, key in enumerate(items):
            if anchored := _ANCHORED.fullmatch(key):
                self._whole_paths.setdefault(re.sub(r"\\(.)", r"\1", anchored[1]), []).append(at)
            elif _LITERAL.fullmatch(key):
                dots = tuple(i for i, sign in enumerate(key) if sign == ".")
                self._ends.setdefault((len(key), dots), {}).setdefault(key, []).append(at)
            else:
                self._tests.append((at, re.compile(_whole(key)).match))
        self._known: dict[str, tuple[int, ...]] = {}

    def matches(self, name: str) -> tuple[int, ...]:
        """Return the positions of all keys that match `name`; the first is the one that holds."""
        if name not in self._known:
            found = [at for at, match in self._tests if match(name) is not None]
            for plain in {name, name.removesuffix("\n")}:  # `$` also matches before a line break
                found += self._whole_paths.get(plain, ())
                found += self._by_end(plain)
            self._known[name] = tuple(sorted(found))
        return self._known[name]

    def _by_end(self, name: str) -> list[int]:
        """Return the positions of the plain keys that a name ends in, from a dot on."""
        found: list[int] = []
        if "\n" in name:  # which no dot stands for
            return found
        for (length, dots), keys in self._ends.items():
            start = len(name) - length
            if start < 0 or (start > 0 and name[start - 1] != "."):
                continue
            signs = list(name[start:])
            for dot in dots:
                signs[dot] = "."
            found += keys.get("".join(signs), ())
        return found

    def first(self, name: str, default: Number) -> Number:
        """Return the value of the first key that matches, else `default`."""
        found = self.matches(name)
        return self.values[found[0]] if found else default

    def every(self, name: str) -> list[Number]:
        """Return the distinct values of all keys that match, not of the first alone.

        PEFT sorts the keys when it saves a config, so the first in the file need not be the first in training.
        """
        return list(dict.fromkeys(self.values[i] for i in self.matches(name)))


def _whole(key: str) -> str:
    return rf"(.*\.)?({key})$"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of an adapter_config.json that decides ranks and scalings.

    Attributes:
        r: rank of modules that no key of `rank_pattern` matches.
        lora_alpha: alpha of modules that no key of `alpha_pattern` matches.
        use_rslora: whether the scaling is alpha / sqrt(r) rather than alpha / r, for all modules.
        ranks: `rank_pattern`.
        alphas: `alpha_pattern`.
        defaulted: fields that the config lacks, so that PEFT's defaults hold.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    ranks: Pattern[int]
    alphas: Pattern[float]
    defaulted: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """The scaling rule of all modules."""
        return "rslora" if self.use_rslora else "lora"

    def rank_of(self, name: str) -> int:
        """Return the rank that PEFT gives to the module `name`."""
        return self.ranks.first(name, self.r)

    def alpha_of(self, name: str) -> float:
        """Return the alpha that PEFT gives to the module `name`."""
        return self.alphas.first(name, self.lora_alpha)


def idle_keys(settings: LoraSettings, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the keys that match no name, and those that match only names an earlier key has taken.

    Each comes as `rank_pattern['key']`.
    """
    unmatched: list[str] = []
    shadowed: list[str] = []
    tables: tuple[tuple[str, Pattern[int] | Pattern[float]], ...] = (
        ("rank_pattern", settings.ranks),
        ("alpha_pattern", settings.alphas),
    )
    for field, pattern in tables:
        found = [m for name in names if (m := pattern.matches(name))]
        matched = {position for positions in found for position in positions}
        used = {positions[0] for positions in found}
        for position, key in enumerate(pattern.keys):
            if position not in used:
                (shadowed if position in matched else unmatched).append(f"{field}[{key!r}]")
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
        Pattern({key: _rank(value, f"rank_pattern[{key!r}]", where) for key, value in ranks.items()}),
        Pattern({key: _alpha(value, f"alpha_pattern[{key!r}]", where) for key, value in alphas.items()}),
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
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {key!r:.60} of `{field}` is no text; put it in quotes.")
        if _LITERAL.fullmatch(key) or _ANCHORED.fullmatch(key):
            continue
        try:
            re.compile(_whole(key))
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(
                f"{where}: the key {key!r:.200} of `{field}` is no regular expression: {error}."
            ) from error
        if (slow := why_slow(key)) is not None:
            raise ConfigError(
                f"{where}: the key {key!r:.200} of `{field}` may take forever to compare with names: {slow}. Spell "
                "the module's path out, or use `.*`."
            )
    return found
