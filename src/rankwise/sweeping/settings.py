"""What a sweep was asked for: flags and a config file, checked for every cell before anything is started.

In: MODEL, DATA, flags of `train` and lists of the grid, from Python, the command line or a file. Out: a `Request`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import Any, Final, get_args, get_type_hints

import msgspec

from rankwise.errors import ConfigError, UsageError, without_secrets
from rankwise.sweeping.grid import Cell, Grid
from rankwise.tuning.options import DEFAULT_RATE, TINY_RATE, Options, settle
from rankwise.tuning.training import check_extras

GRID: Final = ("ranks", "scaling", "learning_rates", "seeds")
OF_THE_CELL: Final = ("rank", "scaling", "learning_rate", "seed", "plan")
"""Options of `train` that the grid sets, or that contradict it."""

MACHINES: Final = (
    "jobs",
    "cpus_per_run",
    "gpus_per_run",
    "memory_per_run",
    "cluster",
    "device",
    "keep_adapters",
    "asha",
)

TRAINING: Final[dict[str, Any]] = {
    **{f.name: None if f.default is MISSING else f.default for f in fields(Options) if f.name not in OF_THE_CELL},
    "recall": True,
    "forgetting_data": None,
    "monitor_every": None,
    "stop_when_unstable": None,
    "report_to": (),
    "save_every": 0,  # a cell that is cut off is run again from its beginning
}
"""Flag of `train` that all cells share -> its default."""

KINDS: Final[dict[str, Any]] = {
    **{name: kind for name, kind in get_type_hints(Options).items() if name not in OF_THE_CELL},
    "recall": bool,
    "forgetting_data": str | None,
    "monitor_every": int | None,
    "stop_when_unstable": int | None,
    "report_to": tuple[str, ...],
    "save_every": int,
    "jobs": int | None,
    "cpus_per_run": float,
    "gpus_per_run": float | None,
    "memory_per_run": float | None,
    "cluster": str | None,
    "device": str | None,
    "keep_adapters": bool,
    "asha": float | None,
}
"""Setting -> what its value must be."""

PATTERN: Final = frozenset("\\^$*+?()[]|")
"""Characters of a regular expression that no name of a module has."""

WORDS: Final = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", tuple: "words"}

WITHOUT_EFFECT: Final = ("monitor_every", "report_to", "save_every")
"""Of these, the ones that change nothing in the adapter or in what is measured of it."""


@dataclass(frozen=True, slots=True)
class Request:
    """What all cells share.

    Attributes:
        model: MODEL, a local path in full: a worker may stand in another folder.
        data: the same of DATA.
        settings: flags of `train` with their defaults, as JSON has them.
    """

    model: str
    data: str
    settings: dict[str, Any]

    @property
    def public(self) -> Request:
        """The same without the secrets of URLs: what is written down, where the request itself is what is fetched."""
        texts = self.settings["forgetting_data"]
        settings = self.settings | {"forgetting_data": None if texts is None else without_secrets(texts)}
        return replace(self, model=without_secrets(self.model), data=without_secrets(self.data), settings=settings)

    @property
    def shared(self) -> dict[str, Any]:
        """What must be the same for runs to be compared; a link that was signed anew is the same."""
        public = self.public
        told = {name: value for name, value in public.settings.items() if name not in WITHOUT_EFFECT}
        return {"model": public.model, "data": public.data, **told}

    @property
    def digest(self) -> str:
        """What tells two requests apart."""
        return hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode()).hexdigest()[:16]


def make_request(model: Any, data: Any, training: Mapping[str, Any]) -> Request:
    """Check names and fill the gaps.

    Raises:
        UsageError: a name is unknown, belongs to the grid, or model or data is no name of something.
    """
    for name in training:
        if name not in TRAINING:
            raise UsageError(_unknown(name, "sweep has no setting", [*TRAINING, *GRID, *MACHINES]))
    for what, thing in (("model", model), ("data", data)):
        if not isinstance(thing, str | PathLike):
            raise UsageError(
                f"the {what} of a sweep is loaded in other processes: give a folder, a file or a name, not a "
                f"{type(thing).__name__}; save it first"
            )
    settings = TRAINING | {name: of_kind(name, value) for name, value in training.items() if value is not None}
    if settings["forgetting_data"] is not None:
        settings["forgetting_data"] = _in_full(settings["forgetting_data"])
    return Request(_in_full(model), _in_full(data), json.loads(json.dumps(settings)))


def of_kind(name: str, value: Any) -> Any:
    """Return a setting's value as what it must be: one way to write one value, or 2 and 2.0 would be two sweeps.

    >>> of_kind("epochs", 2), of_kind("steps", 100.0), of_kind("target_modules", ["q_proj"])
    (2.0, 100, ('q_proj',))

    Raises:
        UsageError: it is something else.
    """
    kinds = get_args(KINDS[name]) if NoneType in get_args(KINDS[name]) else (KINDS[name],)
    plain = fspath(value) if isinstance(value, PathLike) else value
    plain = plain.item() if hasattr(plain, "item") and not isinstance(plain, list | tuple) else plain  # of numpy
    plain = tuple(plain) if isinstance(plain, list) else plain
    if int in kinds and isinstance(plain, float) and plain.is_integer():
        plain = int(plain)
    try:
        return msgspec.convert(plain, type=KINDS[name])
    except msgspec.ValidationError:
        wanted = " or ".join(
            words for kind, words in WORDS.items() if any(kind in (k, getattr(k, "__origin__", k)) for k in kinds)
        )
        raise UsageError(f"--{name.replace('_', '-')} must be {wanted}, got {value!r}") from None


def _in_full(name: Any) -> str:
    """Return a local path in full, and anything else as it is."""
    path = Path(fspath(name))
    return str(path.resolve()) if path.exists() else fspath(name)


def _unknown(name: str, what: str, known: Sequence[str]) -> str:
    if name in OF_THE_CELL:
        return f"{what} {name!r}: the grid sets it; use {', '.join(GRID)} (a plan fixes the rank and cannot be swept)"
    near = difflib.get_close_matches(name, known, 1)
    return f"{what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}")


def default_rates(model: str) -> tuple[float, ...]:
    """Return train's default rate between one third and three times as much, or nearly so.

    >>> default_rates("rankwise:tiny")
    (0.001, 0.003, 0.01)
    """
    middle = TINY_RATE if model == "rankwise:tiny" else DEFAULT_RATE
    return tuple(float(f"{middle * factor:.0e}") for factor in (1 / 3, 1.0, 10 / 3))


def options_of_cell(request: Request, cell: Cell) -> Options:
    """Return the options of one cell."""
    given = {name: request.settings[name] for name in TRAINING if name in Options.__dataclass_fields__}
    if isinstance(given["target_modules"], list):
        given["target_modules"] = tuple(given["target_modules"])
    return Options(**given, rank=cell.rank, scaling=cell.scaling, learning_rate=cell.learning_rate, seed=cell.seed)


def check_cells(request: Request, grid: Grid) -> None:
    """Refuse settings that `train` would refuse, before anything is loaded or started.

    Raises:
        UsageError: a value is out of its range, or contradicts another.
    """
    check_extras(*(request.settings[name] for name in ("save_every", "monitor_every", "stop_when_unstable")))
    for cell in Grid(grid.ranks, grid.scaling, grid.learning_rates, grid.seeds[:1]).cells:
        settle(options_of_cell(request, cell), request.model)


def read_config(path: Path) -> dict[str, Any]:
    """Read a sweep's YAML or JSON file: the names of the flags, with - or _, and their values.

    Raises:
        ConfigError: it cannot be read, or says something that no flag says.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{path} must hold names and values, such as `ranks: [4, 16]`; it holds {type(found).__name__}"
        )
    for name, times in Counter(str(key.value) for key, _ in root.value).items():
        if times > 1:  # YAML forbids that, and PyYAML takes the last
            raise ConfigError(f"{path} has {name} twice")
    config: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in (*TRAINING, *GRID, *MACHINES, "model", "data"):
            raise ConfigError(f"{path}: " + _unknown(name, "there is no setting", [*GRID, *TRAINING, *MACHINES]))
        if name in config:
            raise ConfigError(f"{path} has {name} twice")
        if value is not None:
            config[name] = _typed(path, name, value)
    return config


def _typed(path: Path, name: str, value: Any) -> Any:
    """Return a value of the file as its flag would have it: lists split, numbers read.

    YAML 1.1 takes `1e-3` for a word (it wants `1.0e-3`); here it is the number that was meant.
    """
    if name in ("model", "data"):
        return value
    if name in GRID or name in ("report_to", "target_modules"):
        return _listed(path, name, value)
    number = isinstance(value, str) and not {str, bool} & {KINDS[name], *get_args(KINDS[name])}
    try:
        return of_kind(name, _number(value) if number else value)
    except UsageError as error:
        raise ConfigError(f"{path}: {error}") from None


def _number(word: str) -> float | str:
    try:
        return float(word)
    except ValueError:
        return word


def _listed(path: Path, name: str, value: Any) -> Any:
    wanted: Any = {"ranks": int, "seeds": int, "learning_rates": float}.get(name, str)
    if name == "target_modules" and isinstance(value, str) and (value == "all-linear" or set(value) & PATTERN):
        return value
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    items = items if isinstance(items, list) else [items]
    try:
        if any(isinstance(item, bool) or (wanted is int and int(item) != float(item)) for item in items):
            raise ValueError
        found = tuple(wanted(item) for item in items)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{path}: {name} must be a list of {_words(wanted)}, got {value!r}") from None
    # as with the flag, one number says how many
    return found[0] if name == "seeds" and len(found) == 1 and not isinstance(value, list) else found


def _words(kind: Any) -> str:
    return {int: "whole numbers", float: "numbers"}.get(kind, "words")
