"""JSON as it must be: bytes that came from anywhere, read into one object or refused in words.

In: bytes and the file's name. Out: a dict. `parse_strict` refuses what other readers of the same format
would read otherwise (duplicate keys, NaN); `parse_config` takes what Python writes.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from rankwise.errors import ConfigError, MalformedFileError, RankwiseError


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r} is there twice")
        made[key] = value
    return made


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _natural_or_float(word: str) -> int | float:
    """Read integers; "-0" is a float to the reference reader of safetensors, and so no shape."""
    return -0.0 if word == "-0" else int(word)


def _parse(data: bytes, where: str, error: type[RankwiseError], **hooks: Any) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        found = json.loads(text, **hooks)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except (ValueError, RecursionError) as caught:  # UnicodeError is a ValueError
        words = "nested too deep" if isinstance(caught, RecursionError) else " ".join(str(caught).split())[:300]
        raise error(f"{where} is not JSON: {words}. Copy or download it again.") from caught
    if not isinstance(found, dict):
        raise error(f"{where} holds a JSON {type(found).__name__}; wanted an object {{...}}.")
    return found


def parse_strict(data: bytes, where: str) -> dict[str, Any]:
    """Return the object in a header or index.

    Raises:
        MalformedFileError: not UTF-8, not JSON, not an object, a key twice, NaN.
    """
    return _parse(
        data,
        where,
        MalformedFileError,
        object_pairs_hook=_no_duplicates,
        parse_constant=_no_constant,
        parse_int=_natural_or_float,
    )


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    """Return the object in a config. Some models' configs hold Infinity, so constants pass.

    Raises:
        ConfigError: not UTF-8, not JSON, not an object.
    """
    return _parse(data, where, ConfigError)
