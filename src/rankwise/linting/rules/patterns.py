"""Rules about patterns and targets: keys that match nothing, hide each other, or change meaning when PEFT saves.

In: a subject. Out: hits. What a key matches is PEFT's own rule, `rankwise.checkpoints.patterns.Pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rankwise.checkpoints.patterns import LoraSettings, Pattern, idle_keys
from rankwise.linting.groups import groups_of, literal
from rankwise.linting.names import hits
from rankwise.linting.subject import Hit, Subject, number, some
from rankwise.scaling import scaling


def _tables(settings: LoraSettings) -> tuple[tuple[str, Pattern[int] | Pattern[float]], ...]:
    return ("rank_pattern", settings.ranks), ("alpha_pattern", settings.alphas)


def _names(subject: Subject) -> tuple[str, ...]:
    """Return names to try keys on: those that are known, or the paths that the keys spell out."""
    if subject.modules is not None:
        return tuple(m.name for m in subject.modules)
    if subject.settings is None:
        return ()
    keys = {key for _, pattern in _tables(subject.settings) for key in pattern.keys}
    return tuple(path for key in sorted(keys) if (path := literal(key)) is not None)


def pattern_order(subject: Subject) -> Iterator[Hit]:
    """Two keys match one module with different values, and PEFT sorts the keys when it saves."""
    s = subject.settings
    if s is None or subject.trained or subject.off is not None:
        return
    for role, pattern in _tables(s):
        by_key = dict(zip(pattern.keys, pattern.values, strict=True))
        saved = Pattern({key: by_key[key] for key in sorted(by_key)})
        changed = [n for n in _names(subject) if pattern.first(n, 0) != saved.first(n, 0)]
        if not changed:
            continue
        name = changed[0]
        now, then = pattern.first(name, 0), saved.first(name, 0)
        what = "r" if role == "rank_pattern" else "alpha"
        effect = (
            "PEFT then refuses the tensors" if role == "rank_pattern" else "the adapter then loads with another scale"
        )
        yield Hit(
            f"{subject.key(role)} gives {name} {what} {now:g} by the first key that matches. PEFT sorts the keys "
            "when it "
            f"saves, and then another key comes first and gives {then:g}: {effect}. "
            f"{len(changed)} {'module is' if len(changed) == 1 else 'modules are'} concerned. Make the keys exclusive: "
            "`^` and the whole path, with dots escaped.",
            role=role,
            modules=tuple(changed) if subject.modules is not None else (),
            figure=f"{what} after saving",
            value=float(then),
        )


def pattern_shadowed(subject: Subject) -> Iterator[Hit]:
    """A key comes after one that takes every module it matches, with another value."""
    s = subject.settings
    if s is None or subject.trained or subject.off is not None:
        return
    names = _names(subject)
    for role, pattern in _tables(s):
        found = {name: pattern.matches(name) for name in names}
        used = {positions[0] for positions in found.values() if positions}
        taken: dict[int, list[str]] = {}
        for name, positions in found.items():
            for at in positions:
                taken.setdefault(at, []).append(name)
        for at, key in enumerate(pattern.keys):
            mine = taken.get(at, [])
            if not mine or at in used:
                continue
            other = pattern.matches(mine[0])[0]
            if pattern.values[other] == pattern.values[at]:
                continue
            yield Hit(
                f"{subject.key(role)}: the key {key!r} asks for {pattern.values[at]:g}, but every module that it "
                "matches is "
                f"taken by {pattern.keys[other]!r}, which comes first and gives {pattern.values[other]:g}. The first "
                "match "
                "wins, not the most specific. Put the longer path first, anchored with `^`.",
                role=role,
                modules=tuple(mine) if subject.modules is not None else (),
                figure="value that holds",
                value=float(pattern.values[other]),
            )


def pattern_unmatched(subject: Subject) -> Iterator[Hit]:
    """A key matches no module."""
    s = subject.settings
    if s is None or subject.trained or subject.off is not None:
        return
    idle: list[str]
    if subject.modules is not None:
        idle = idle_keys(s, [m.name for m in subject.modules])[0]
        why = "no module that this config adapts"
    else:
        idle = [f"{role}[{k!r}]" for role, p in _tables(s) for k in p.keys if k.lstrip("^").startswith("base_model.")]
        why = "nothing: PEFT takes `base_model.model.` off before it compares"
        if not idle:
            targets = subject.targets if isinstance(subject.targets, tuple) else ()
            idle = [f"{role}[{k!r}]" for role, p in _tables(s) for k in p.keys if targets and _misses(k, targets)]
            why = f"no module that {subject.key('targets')} can name"
    if not idle:
        return
    yield Hit(
        f"{some(idle)} {'matches' if len(idle) == 1 else 'match'} {why}, so "
        f"{'it changes' if len(idle) == 1 else 'they change'} "
        f"nothing and those modules get r = {s.r} and alpha = {s.lora_alpha:g}. A key is a regular expression that "
        "has to "
        "cover the end of a module's path from a dot on: `q_proj` does, `proj` and `layers.0` do not.",
        role=idle[0].partition("[")[0],
        figure="keys that match nothing",
        value=float(len(idle)),
    )


def _misses(key: str, targets: tuple[str, ...]) -> bool:
    """Tell whether a key that spells a path out can match no module that a list of targets names.

    >>> [_misses(key, ("q_proj", "mlp.up")) for key in ("proj", "layers.0", "a.q_proj", "^q_proj", "up", "x.up")]
    [True, True, False, False, False, True]
    """
    path = literal(key)
    if path is None:
        return False
    if any(hits(path, t) or hits(t, path) for t in targets):
        return False
    # a dot that is not escaped stands for any character, and a target for a part of the path only
    wild = {at for at, sign in enumerate(_signs(key)) if sign == "."}
    return not any(_fits(path, wild, t, whole=key.startswith("^")) for t in targets)


def _signs(key: str) -> list[str]:
    """Return a key's characters, each escaped one with its backslash."""
    return re.findall(r"\\.|[^^$]", key, re.DOTALL)


def _fits(path: str, wild: set[int], target: str, *, whole: bool) -> bool:
    """Tell whether some module's name ends in the target and fits the path with its wild dots."""
    longest, shared = len(path), min(len(path), len(target))
    if any(path[-i] != target[-i] and longest - i not in wild for i in range(1, shared + 1)):
        return False
    if len(target) > longest:
        return not whole and target[-longest - 1] == "."
    return len(target) == longest or path[-shared - 1] == "." or longest - shared - 1 in wild


def target_unmatched(subject: Subject) -> Iterator[Hit]:
    """An entry of the targets names no module."""
    if subject.modules is None or subject.off is not None:
        return
    names = [m.name.partition("[")[0] for m in subject.modules]
    if not names and not subject.trained:
        yield Hit(
            f"{subject.key('targets')} matches no module of the model; PEFT refuses to start.",
            role="targets",
            level="error",
        )
        return
    if isinstance(subject.targets, str) or subject.targets is None:
        return
    idle = [t for t in subject.targets if not any(hits(t, name) for name in names)]
    if not idle:
        return
    what = (
        "but the file holds no factors for it: saved in part, or never attached"
        if subject.trained
        else "which names no module of the model; PEFT passes over it without a word"
    )
    yield Hit(
        f"{subject.key('targets')} lists {some(idle)}, {what}.",
        role="targets",
        figure="targets without a module",
        value=float(len(idle)),
    )


def rank_pattern_alone(subject: Subject) -> Iterator[Hit]:
    """Ranks differ, alphas do not follow: so does the scale of every module."""
    s = subject.settings
    if s is None or subject.off is not None or not s.ranks.keys:
        return
    if subject.modules is not None:
        bare = [m.name for m in subject.modules if s.ranks.matches(m.name) and not s.alphas.matches(m.name)]
    else:
        keys = set(s.alphas.keys)
        bare = [k for k in s.ranks.keys if k not in keys and not ((n := literal(k)) and s.alphas.matches(n))]
    plain = scaling(s.rule, s.lora_alpha, s.r)
    scales = [plain, *(g.scaling for g in groups_of(subject) if g.scaling is not None)]
    if not bare or max(scales) / min(scales) < 1.01:
        return
    low, high = min(scales), max(scales)
    rule = "alpha / r" if s.rule == "lora" else "alpha / sqrt(r)"
    names = subject.key("alpha_pattern") if "alpha_pattern" in subject.keys else "`alpha_pattern`"
    end = (
        ""
        if subject.trained
        else f" To keep {number(plain)} everywhere, give {names} alpha = "
        + ("" if number(plain) == "1" else f"{number(plain)} * ")
        + ("r" if s.rule == "lora" else "sqrt(r)")
        + " under the same keys."
    )
    yield Hit(
        f"{subject.key('rank_pattern')} changes ranks and alpha stays at {s.lora_alpha:g}, so the scale {rule} goes "
        "from "
        f"{number(low)} to {number(high)}, a factor of {number(high / low)} ({number(plain)} is that of r = {s.r})."
        f"{end}",
        role="rank_pattern",
        modules=tuple(bare) if subject.modules is not None else (),
        figure="largest over smallest scaling",
        value=high / low,
    )
