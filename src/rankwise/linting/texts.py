"""From a file or a command line to keys and values, whoever wrote it.

In: a path, or the text of a command. Out: a flat mapping of keys to plain values, and the line of each key.
YAML is read by the safe loader alone; text that is huge, binary, or grows when its aliases are followed is
refused before anything is made of it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rankwise.checkpoints.strict_json import parse_config
from rankwise.errors import AccessError, ConfigError, UnknownFormatError

LARGEST: Final = 4 * 2**20
"""Bytes of the largest config that is read: a plan with a key for each of 20,000 modules takes half of it."""

MOST_NODES: Final = 200_000
"""Values in a YAML file once its aliases are followed; a plan as above has 40,000."""

COMMANDS: Final = re.compile(r"\btrl\s+\w+|--use_peft\b|--lora_(?:r|rank|alpha)\b|--finetuning_type\b")
"""What a command that trains with LoRA looks like."""


def read_text(path: Path) -> str:
    """Return a small text file.

    Raises:
        AccessError: it cannot be read.
        UnknownFormatError: it is too large for a config, or no text.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UnknownFormatError(f"{path} has {path.stat().st_size:,} bytes; a config has at most {LARGEST:,}.")
        data = path.read_bytes()
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnknownFormatError(f"{path} is no text (byte {error.start} is not UTF-8); wanted a config.") from error
    if "\x00" in text:
        raise UnknownFormatError(f"{path} is no text (it holds a NUL byte); wanted a config.")
    return text


def parse(text: str, where: str) -> Mapping[str, Any]:
    """Return the keys and values of a config: JSON, YAML or the commands of a script, told by the content.

    Raises:
        ConfigError: it is JSON or YAML that is broken.
        UnknownFormatError: it is none of them.
    """
    if text.lstrip().startswith("{"):
        return {**_plain(parse_config(text.encode(), where)), "_twice": twice_in_json(text)}
    if COMMANDS.search(text) and "--" in text and not re.search(r"^[\w-]+\s*:\s", text, re.MULTILINE):
        return parse_command(text, where)
    return _parse_yaml(text, where)


def _plain(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a file's keys without those that only a command may have."""
    return {key: value for key, value in raw.items() if key not in ("_command", "_flags", "_twice")}


def twice_in_json(text: str) -> tuple[str, ...]:
    """Return the keys that an object of a JSON text has twice; every reader takes the last."""
    found: dict[str, None] = {}

    def look(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found[key] = None
            seen.add(key)

    try:
        json.loads(text, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return ()
    return tuple(found)


def _twice_in_yaml(root: Any) -> tuple[str, ...]:
    """Return the keys that the mapping of a YAML document, or a mapping right in it, has twice."""
    import yaml

    found: dict[str, None] = {}
    inner = [value for _, value in root.value] if isinstance(root, yaml.MappingNode) else []
    for node in (root, *inner):
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                found[key.value] = None
            seen.add(str(key.value))
    return tuple(found)


def parse_command(text: str, where: str) -> Mapping[str, Any]:
    """Return the flags of the first command in a text that trains with LoRA.

    `_command` holds its words, `_flags` the names of its flags: what a `--config` adds later is not among them.

    Raises:
        ConfigError: a quote is not closed.
        UnknownFormatError: there is no such command, or there are several.
    """
    joined = re.sub(r"\\\r?\n", " ", text)
    found = [line for line in joined.splitlines() if COMMANDS.search(line) and not line.lstrip().startswith("#")]
    if not found:
        raise UnknownFormatError(f"{where} holds no command with LoRA flags (--lora_r, --lora_rank, ...).")
    if len(found) > 1:
        raise UnknownFormatError(f"{where} holds {len(found)} commands with LoRA flags; give them one at a time.")
    try:
        words = shlex.split(found[0], comments=True)
    except ValueError as error:
        raise ConfigError(f"{where} cannot be split into words: {error}") from error
    flags: dict[str, Any] = {"_command": tuple(words)}
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--") or len(word) == 2:
            continue
        name, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and at < len(words) and not words[at].startswith("--"):
            values.append(words[at])
            at += 1
        plain = [plain_value(v) for v in values]
        flags[name.replace("-", "_")] = True if not plain else plain[0] if len(plain) == 1 else plain
    flags["_flags"] = tuple(flags)
    return flags


def plain_value(word: str) -> Any:
    """Return a word of a command as what it stands for: a number, true or false, or itself."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _parse_yaml(text: str, where: str) -> Mapping[str, Any]:
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _refuse_growth(node, where)
            found = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        words = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:300]
        raise ConfigError(f"{where} is neither JSON nor YAML: {words}") from error
    if not isinstance(found, dict):
        kind = "nothing" if found is None else f"a YAML {type(found).__name__}"
        raise UnknownFormatError(f"{where} holds {kind}; wanted the keys and values of a training or PEFT config.")
    return {**_plain({str(key): value for key, value in found.items()}), "_twice": _twice_in_yaml(node)}


def _refuse_growth(root: Any, where: str) -> None:
    """Refuse aliases that lead back to themselves, or that multiply: ten lines can stand for 10**10 values."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) in sizes:
            if sizes[id(node)] < 0:
                raise ConfigError(f"{where}: a YAML alias leads back to itself.")
            return sizes[id(node)]
        if isinstance(node.value, str):
            return 1
        sizes[id(node)] = -1
        children = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        total = 1 + sum(size(child) for child in children)
        if total > MOST_NODES:
            raise ConfigError(
                f"{where}: with its aliases followed it holds more than {MOST_NODES:,} values; no config does. "
                "Write the values out."
            )
        sizes[id(node)] = total
        return total

    size(root)


def line_of(text: str, key: str) -> int | None:
    """Return the line, from 1, on which a key or flag is first given a value, or None."""
    name = re.escape(key)
    spelled = name.replace("_", "[_-]")
    match = re.search(rf"""(?m)^\s*["']?{name}["']?\s*:|["']{name}["']\s*:|--{spelled}(?![\w-])""", text)
    if match is None:
        return None
    start = match.start() + len(match.group()) - len(match.group().lstrip())
    return text.count("\n", 0, start) + 1
