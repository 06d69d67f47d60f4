"""Rules about what a config or a file is: keys that nobody reads, LoRA that is off, factors that are empty.

In: a subject. Out: hits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rankwise.linting.subject import Hit, Subject, some
from rankwise.linting.texts import twice_in_json

_NOT_READ: Final = {
    "axolotl": {"lora_rank": "lora_r", "r": "lora_r", "use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora"}
    | {
        "rank_pattern": "lora_rank_pattern",
        "alpha_pattern": "lora_alpha_pattern",
        "target_modules": "lora_target_modules",
    },
    "peft-config": {"lora_r": "r", "lora_rank": "r", "rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora"},
}
"""Kind -> keys that its reader drops without stopping -> the key that it reads. TRL and LLaMA-Factory stop."""


def _json(value: object) -> str:
    """Return a value as a config spells it."""
    return str(value).lower() if isinstance(value, bool) else f"{value!r:.40}"


def no_lora(subject: Subject) -> Iterator[Hit]:
    """Nothing is adapted."""
    if subject.off is None:
        return
    stray = [k for role, k in subject.keys.items() if role in ("r", "lora_alpha", "targets", "rank_pattern")]
    stated = [k for k in stray if subject.raw.get(k) is not None]
    if subject.kind == "trl" and stated:
        yield Hit(
            f"{subject.off}, and {some(stated)} {'does' if len(stated) == 1 else 'do'} nothing. Add `--use_peft` "
            "(`use_peft: true`).",
            role="r",
            level="error",
        )
        return
    yield Hit(f"{subject.off}: there is nothing to check.", role=None)


def no_rank(subject: Subject) -> Iterator[Hit]:
    """A trainer without a default is given no rank or no alpha."""
    if subject.off is not None or subject.settings is not None or subject.kind != "axolotl":
        return
    if subject.raw.get("lora_model_dir"):
        return
    missing = [k for k in ("lora_r", "lora_alpha") if subject.raw.get(k) is None]
    yield Hit(f"{some([f'`{k}`' for k in missing])} is not given, and axolotl has no default for it.", role="r")


def adapter_decides(subject: Subject) -> Iterator[Hit]:
    """Ranks stand in a config that starts from an adapter with its own."""
    if subject.kind != "axolotl" or not subject.raw.get("lora_model_dir") or subject.off is not None:
        return
    stated = [k for k in ("lora_rank_pattern", "lora_alpha_pattern") if subject.raw.get(k)]
    if stated:
        yield Hit(
            "`lora_model_dir` is given, so axolotl takes ranks and alphas from that adapter and ignores "
            f"{some(stated)} here. "
            "Lint the adapter's folder instead.",
            role="rank_pattern",
        )


def key_of_another_trainer(subject: Subject) -> Iterator[Hit]:
    """A key is spelled as another trainer spells it, and dropped."""
    known = _NOT_READ.get("peft-config" if subject.trained and subject.format == "peft" else subject.kind, {})
    for wrong, right in known.items():
        if subject.raw.get(wrong) is None:
            continue
        value, held = subject.raw[wrong], subject.raw.get(right)
        same = held == value
        yield Hit(
            f"`{wrong}` is not a key of {'PEFT' if subject.kind != 'axolotl' else 'axolotl'} and is dropped; the one "
            f"that is read is `{right}`, "
            + (
                f"which has the same value ({_json(value)})."
                if same
                else f"which is {'not given' if held is None else _json(held)}."
            ),
            role=None,
            level="info" if same else None,
        )


def key_given_twice(subject: Subject) -> Iterator[Hit]:
    """A key stands twice in one mapping, and the last one holds."""
    text = subject.text.lstrip("\ufeff \t\r\n")
    twice = subject.raw.get("_twice") or (twice_in_json(text) if text.startswith("{") else ())
    if twice:
        yield Hit(
            f"{some([f'`{key[:60]}`' for key in twice])} {'stands' if len(twice) == 1 else 'stand'} there twice; every "
            "reader takes the last without a word. Remove the other.",
            role=next((role for role, key in subject.keys.items() if key == twice[0]), None),
        )


def untrained(subject: Subject) -> Iterator[Hit]:
    """Every B is zero."""
    if subject.is_untrained is not None and subject.is_untrained():
        count = len(subject.modules or ())
        yield Hit(
            f"B is zero in all {count} modules: the adapter changes nothing yet. That is how a start for a training "
            "looks; "
            "if this is the result of one, the wrong step was saved or no gradient arrived.",
            figure="modules with B = 0",
            value=float(count),
        )


def rank_above_shape(subject: Subject) -> Iterator[Hit]:
    """R is above the smaller side of a weight."""
    above = [m for m in subject.modules or () if m.shape is not None and m.r > min(m.shape)]
    if not above:
        return
    first = above[0]
    shape = first.shape or (0, 0)
    yield Hit(
        f"r is above the smaller side of the weight in {len(above)} of {len(subject.modules or ())} modules, first "
        f"{first.name} "
        f"with r {first.r} on {shape[0]} x {shape[1]}: ranks past {min(shape)} cost parameters and reach no further "
        "update.",
        role="r",
        modules=tuple(m.name for m in above),
        figure="largest useful rank",
        value=float(min(shape)),
    )
