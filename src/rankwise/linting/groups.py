"""The scale that each module really gets: modules with the same rank, alpha and scale in one row.

In: a subject. Out: groups. Where names are known, they are told by what they end in; where only patterns are,
the row is what the pattern would give.
"""

from __future__ import annotations

import re
from collections import Counter

from rankwise.checkpoints.patterns import LoraSettings
from rankwise.linting.subject import Group, Module, Subject, some
from rankwise.scaling import scaling

_INDEX = re.compile(r"(\[\d+\]|:\d+)$")


def groups_of(subject: Subject) -> tuple[Group, ...]:
    """Return the groups of a subject, the largest first."""
    if subject.off is not None:
        return ()
    if subject.modules:
        return _named(subject.modules)
    return () if subject.settings is None else _by_key(subject.settings)


def _named(modules: tuple[Module, ...]) -> tuple[Group, ...]:
    rows: dict[tuple[int, float | None, float | None, str | None], list[str]] = {}
    for m in modules:
        rows.setdefault((m.r, m.lora_alpha, m.scaling, m.rule), []).append(m.name)
    made = [Group(_label(names), tuple(names), *key) for key, names in rows.items()]
    return tuple(sorted(made, key=lambda g: -len(g.modules or ())))


def _label(names: list[str], most: int = 4) -> str:
    """Return what the modules of a group end in: `q_proj, v_proj`; of one module its path."""
    if len(names) == 1:
        return names[0]
    ends = Counter(_INDEX.sub("", name).rsplit(".", 1)[-1] for name in names)
    shown = ", ".join(sorted(ends)[:most])
    return shown + (f" and {len(ends) - most} more" if len(ends) > most else "")


def _by_key(settings: LoraSettings) -> tuple[Group, ...]:
    """Return a row for the modules that no key matches, and one for each key."""
    rest = "all modules" if not settings.ranks.keys and not settings.alphas.keys else "modules that no key matches"
    rows = [(rest, settings.r, settings.lora_alpha)]
    ranks = dict(zip(settings.ranks.keys, settings.ranks.values, strict=True))
    alphas = dict(zip(settings.alphas.keys, settings.alphas.values, strict=True))
    for key in {**ranks, **alphas}:
        name = literal(key)
        if name is not None:
            r, alpha = settings.rank_of(name), settings.alpha_of(name)
        else:
            r, alpha = ranks.get(key, settings.r), alphas.get(key, settings.lora_alpha)
        rows.append((key, r, alpha))
    merged: dict[tuple[int, float], list[str]] = {}
    for label, r, alpha in rows:
        merged.setdefault((r, alpha), []).append(label)
    return tuple(
        Group(some(labels), None, r, alpha, scaling(settings.rule, alpha, r), settings.rule)
        for (r, alpha), labels in merged.items()
    )


def literal(key: str) -> str | None:
    """Return the path that a key of a pattern spells out, or None where it is a true regular expression.

    >>> literal("^model\\\\.layers\\\\.0\\\\.q_proj"), literal("layers.0.q_proj"), literal(".*q_proj")
    ('model.layers.0.q_proj', 'layers.0.q_proj', None)
    """
    bare = key.removeprefix("^").removesuffix("$")
    return re.sub(r"\\(.)", r"\1", bare) if re.fullmatch(r"(?:\w|\.|-|\\[.\-\[\]])+", bare, re.ASCII) else None
