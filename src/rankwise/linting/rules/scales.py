"""Rules about rank, alpha and the rule between them: the scale that follows, and whether it was meant.

In: a subject. Out: hits. They name a scale and what is usual; whether a small one starves a training depends on
optimizer, rate and data, which a config does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from rankwise.linting.groups import groups_of
from rankwise.linting.subject import Hit, Subject, number
from rankwise.scaling import alpha_for, scaling

FALLEN: Final = 0.5
"""A scale at or below this, with alpha left at its default, is named; as `train` does."""

SMALL: Final = 0.25
"""A scale below this is named. QLoRA's alpha 16 at r 64 gives 0.25 and is common; alpha 16 at r 256 gives 0.06."""

LARGE: Final = 16.0
"""A scale at or above this is named: twice that of PEFT's own rsLoRA experiment (alpha 64 at r 64 gives 8)."""

LEAST_2R: Final = 8
"""Below this rank, alpha = 2 r under alpha / sqrt(r) gives less than 5.7 and is left alone; and one alpha for all
ranks, such as the 32 of "LoRA Without Regret", gives a large scale on purpose."""

FULL_RATE: Final = 2e-5
"""The learning rate that trainers take for full fine-tuning."""


def _scale(subject: Subject) -> float | None:
    """Return the scale of modules that no pattern changes; None where no LoRA is trained."""
    s = subject.settings
    return None if s is None or subject.off is not None else scaling(s.rule, s.lora_alpha, s.r)


def _silent_2r(subject: Subject) -> bool:
    return subject.kind == "llama-factory" and not subject.raw.get("lora_alpha")


def _left(subject: Subject) -> bool:
    s, scale = subject.settings, _scale(subject)
    if s is None or scale is None or _silent_2r(subject):
        return False
    return not subject.given("lora_alpha") and subject.given("r") and s.rule == "lora" and scale <= FALLEN


def _regret(subject: Subject) -> bool:
    s = subject.settings
    if s is None or subject.kind != "trl" or subject.off is not None:
        return False
    return s.rule == "lora" and (s.r, s.lora_alpha) == (256, 16)


def alpha_left_at_default(subject: Subject) -> Iterator[Hit]:
    """R was raised, and alpha stayed where the library has it."""
    s, scale = subject.settings, _scale(subject)
    if s is None or scale is None or not _left(subject):
        return
    yield Hit(
        f"{subject.key('r')} is {s.r} and {subject.key('lora_alpha')} is not given, so alpha stays at {s.lora_alpha:g} "
        f"and the scale is alpha / r = {number(scale)}. It falls as r rises. Whether that slows the "
        "training depends on optimizer and rate: `rankwise check` measures it. Write the alpha that is meant down: "
        f"{s.r} gives a scale of 1, {2 * s.r} one of 2.",
        role="r",
        figure="scaling",
        value=scale,
    )


def small_scale(subject: Subject) -> Iterator[Hit]:
    """Alpha is given, and far below r."""
    if _left(subject) or _regret(subject):
        return
    low = [g for g in groups_of(subject) if g.scaling is not None and g.scaling < SMALL]
    if not low:
        return
    worst = min(low, key=lambda g: g.scaling or 0.0)
    r, alpha, scale = worst.r, worst.lora_alpha, worst.scaling
    if alpha is None or scale is None:
        return
    word = "alpha / r" if worst.rule == "lora" else "alpha / sqrt(r)"
    rate = "" if subject.learning_rate is None else f" at a learning rate of {subject.learning_rate:g}"
    end = (
        "A low effective rank of this adapter may come from that, and not from the task."
        if subject.trained
        else "If alpha was kept while r was raised, the scale fell with it: `rankwise check` measures whether that "
        "matters "
        "for a model and its data."
    )
    yield Hit(
        f"r = {r} with alpha = {alpha:g} gives a scale of {word} = {number(scale)}{rate}"
        f"{_where(worst.label, worst.modules)}. {end}",
        role="lora_alpha",
        modules=worst.modules or (),
        figure="scaling",
        value=scale,
        level="info" if subject.trained else None,
    )


def large_scale(subject: Subject) -> Iterator[Hit]:
    """The branch is multiplied by far more than is usual."""
    if _two_r(subject) or _silent_2r(subject):
        return
    high = [g for g in groups_of(subject) if g.scaling is not None and g.scaling >= LARGE]
    if not high:
        return
    worst = max(high, key=lambda g: g.scaling or 0.0)
    if worst.lora_alpha is None or worst.scaling is None or worst.rule == "unscaled":
        return
    word = "alpha / r" if worst.rule == "lora" else "alpha / sqrt(r)"
    end = "" if subject.trained else " High scales want a lower learning rate; watch the loss of the first steps."
    yield Hit(
        f"r = {worst.r} with alpha = {worst.lora_alpha:g} gives a scale of {word} = {number(worst.scaling)}"
        f"{_where(worst.label, worst.modules)}; usual are 0.25 to 8.{end}",
        role="lora_alpha",
        modules=worst.modules or (),
        figure="scaling",
        value=worst.scaling,
        level="info" if subject.trained or worst.r < LEAST_2R else None,
    )


def _where(label: str, modules: tuple[str, ...] | None) -> str:
    if label == "all modules":
        return ""
    if modules is not None and len(modules) == 1:
        return f" in {label}"
    return f" in {len(modules)} modules ({label})" if modules is not None else f" for {label}"


def _two_r(subject: Subject) -> bool:
    s = subject.settings
    if s is None or subject.off is not None or _silent_2r(subject):
        return False
    return s.use_rslora and s.r >= LEAST_2R and s.lora_alpha == 2 * s.r and subject.given("lora_alpha")


def alpha_2r_with_rslora(subject: Subject) -> Iterator[Hit]:
    """The habit of alpha / r, under the other rule."""
    s, scale = subject.settings, _scale(subject)
    if s is None or scale is None or not _two_r(subject):
        return
    end = (
        ""
        if subject.trained
        else f" For a scale of 2, write {number(alpha_for('rslora', 2.0, s.r))}; for 8, "
        f"{number(alpha_for('rslora', 8.0, s.r))}."
    )
    yield Hit(
        f"{subject.key('lora_alpha')} is 2 r = {s.lora_alpha:g} with {subject.key('use_rslora')}. Under alpha / r that "
        f"would be a scale of 2; under alpha / sqrt(r) it is {number(scale)}.{end}",
        role="lora_alpha",
        figure="scaling",
        value=scale,
        level="info" if subject.trained else None,
    )


def silent_2r(subject: Subject) -> Iterator[Hit]:
    """LLaMA-Factory takes alpha = 2 r where none is given, also with rsLoRA."""
    s, scale = subject.settings, _scale(subject)
    if s is None or scale is None or not _silent_2r(subject):
        return
    state = "not given" if subject.raw.get("lora_alpha") is None else "0"
    if s.use_rslora:
        text = (
            f"`lora_alpha` is {state}, so LLaMA-Factory takes 2 r = {s.lora_alpha:g}, with `use_rslora` too: the "
            "scale is "
            f"2 sqrt(r) = {number(scale)}, not 2. Write `lora_alpha: {round(alpha_for('rslora', 2.0, s.r))}` for "
            "about 2."
        )
        yield Hit(text, role="use_rslora", figure="scaling", value=scale, level="warning")
        return
    text = (
        f"`lora_alpha` is {state}, so LLaMA-Factory takes 2 r = {s.lora_alpha:g}: the scale is 2. Other trainers "
        "have "
        "other defaults; write it down if the config may travel."
    )
    yield Hit(text, role="r", figure="scaling", value=scale, level="info")


def trl_r256_alpha16(subject: Subject) -> Iterator[Hit]:
    """The example of TRL's documentation on high ranks."""
    scale = _scale(subject)
    if scale is None or not _regret(subject):
        return
    rate = subject.learning_rate
    learn = (
        ""
        if rate is None
        else f" The learning rate here is {rate:g}"
        + (", a tenth of the one of the Python example." if math.isclose(rate, FULL_RATE) else ".")
    )
    yield Hit(
        f"r 256 with alpha 16 is the example of TRL's page on high ranks. Its scale is 16 / 256 = {number(scale)}; the "
        f"page gives it with a learning rate of 2e-4 in Python and 2e-5 on the command line.{learn} "
        "A scale so small wants the higher rate, or alpha 256.",
        role="lora_alpha",
        figure="scaling",
        value=scale,
    )


def low_learning_rate(subject: Subject) -> Iterator[Hit]:
    """The rate is that of full fine-tuning."""
    rate = subject.learning_rate
    if (
        rate is None
        or subject.method != "sft"
        or subject.off is not None
        or not 0 < rate <= FULL_RATE
        or _regret(subject)
    ):
        return
    whence = "" if subject.given("learning_rate") else " (TRL's default, made for full fine-tuning)"
    yield Hit(
        f"The learning rate is {rate:g}{whence}. LoRA is usually trained at about ten times the rate of full "
        "fine-tuning; at a "
        "rate that starves the branch, runs of different rank look the same.",
        role="learning_rate",
        figure="learning rate",
        value=rate,
    )


def integer_alpha(subject: Subject) -> Iterator[Hit]:
    """The trainer takes whole alphas, and the one that is meant is none."""
    s = subject.settings
    if s is None or subject.off is not None or subject.kind not in ("axolotl", "llama-factory", "trl"):
        return
    pattern = subject.raw.get(subject.keys.get("alpha_pattern", ""))
    stated: dict[str, Any] = {"lora_alpha": subject.raw.get("lora_alpha")}
    stated |= {f"alpha_pattern[{k!r}]": v for k, v in pattern.items()} if isinstance(pattern, dict) else {}
    broken = {field: float(v) for field, v in stated.items() if isinstance(v, float) and v != int(v)}
    if not broken:
        return
    field, alpha = next(iter(broken.items()))
    nearest = max(1, round(alpha))
    error = nearest / alpha - 1
    in_words = subject.kind == "trl" and "lora_alpha" in subject.raw.get("_flags", ())
    refuses = subject.kind == "axolotl" or in_words
    name = {"axolotl": "axolotl", "llama-factory": "LLaMA-Factory", "trl": "TRL"}[subject.kind]
    shown = subject.key("lora_alpha") if field == "lora_alpha" else f"`lora_{field}`"
    what = "declares alpha as a whole number"
    if refuses:
        what = "takes whole alphas only and refuses this"
    elif subject.kind == "trl":  # TRL 1.16: the parser converts words and leaves what a YAML says as it is
        what += "; it passes on what a YAML says, and a command line refuses it"
    plural = "" if len(broken) == 1 else f" (and {len(broken) - 1} more)"
    yield Hit(
        f"{shown} is {alpha:g}{plural}, and {name} {what}. The nearest, {nearest}, makes the scale {error:+.1%} off. "
        "Choose "
        "r so that alpha comes out whole, or start from an adapter that carries the scale.",
        role="lora_alpha" if field == "lora_alpha" else "alpha_pattern",
        figure="relative error of the scale",
        value=error,
        level=None if refuses else "info" if subject.kind == "trl" else "warning",
    )


def rounded_alphas(subject: Subject) -> Iterator[Hit]:
    """Whole alphas per module that come near one scale and miss it."""
    s = subject.settings
    if s is None or subject.kind != "axolotl" or subject.off is not None or not s.ranks.keys or not s.alphas.keys:
        return
    want = scaling(s.rule, s.lora_alpha, s.r)
    near = [g for g in groups_of(subject) if g.scaling is not None and 1e-6 < abs(g.scaling / want - 1) < 0.1]
    near = [g for g in near if g.lora_alpha == max(1, round(alpha_for(s.rule, want, g.r)))]
    if not near:
        return
    worst = max(near, key=lambda g: abs((g.scaling or want) / want - 1))
    error = (worst.scaling or want) / want - 1
    yield Hit(
        f"The alphas of the pattern are whole numbers next to those that would keep the scale at {number(want)}; for "
        f"{worst.label} it is {error:+.1%} off (alpha {worst.lora_alpha:g} at r {worst.r}).",
        role="alpha_pattern",
        modules=worst.modules or (),
        figure="relative error of the scale",
        value=error,
    )
