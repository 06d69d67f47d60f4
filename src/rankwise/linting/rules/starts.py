"""Rules about how a branch starts, and about PEFT's own conversions that change its scale.

In: a subject. Out: hits. The two that blame PEFT were reproduced with PEFT 0.21.2 by lab/peft_scaling_defects.py,
and tests/interop/test_peft_defects.py keeps the reproduction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final

from rankwise.checkpoints.peft import CHANGES_BASE
from rankwise.linting.groups import groups_of
from rankwise.linting.names import hits
from rankwise.linting.subject import Hit, Subject, number, some
from rankwise.scaling import scaling

_EXPERT: Final = re.compile(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$")
_FAMILIES: Final = {
    ("w1", "w3"): "mixtral minimax minimax_m2",
    ("gate_proj", "up_proj"): (
        "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe "
        "glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next "
        "qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open"
    ),
}
"""Pair -> `model_type` of the models for which PEFT 0.21.2 with transformers 5.23 puts the pair into one weight."""

_MIXTURE: Final = re.compile(r"mixtral|moe|\d+x\d+b|-a\d+b\b|\bexperts\b", re.IGNORECASE)
_BASES: Final = ("base_model_name_or_path", "base_model", "model_name_or_path")
"""A mixture by its name, and where the name stands: w1 and w3 alone are what dense models have, too."""


def gaussian_init(subject: Subject) -> Iterator[Hit]:
    """A is drawn with a standard deviation of 1 / r."""
    s = subject.settings
    if s is None or subject.off is not None or subject.init != "gaussian":
        return
    yield Hit(
        f"The start `gaussian` draws A with a standard deviation of 1 / r = {number(1 / s.r)}, so that the branch "
        "shrinks "
        "with the rank a second time, on top of the scaling rule. The default start does not depend on r.",
        role="init",
        figure="standard deviation of A",
        value=1 / s.r,
        level="info" if subject.trained else None,
    )


def init_changes_base(subject: Subject) -> Iterator[Hit]:
    """The start takes a part out of the base weights; of an adapter, its reader says so."""
    if subject.trained or subject.off is not None or subject.init is None or not subject.init.startswith(CHANGES_BASE):
        return
    s = subject.settings
    end = (
        ", unless it is converted when it is saved (`path_initial_model_for_weight_conversion`, which doubles the rank)"
    )
    if subject.init.startswith("loftq"):  # PEFT converts the other four only
        end = ""
    elif s is not None and s.use_rslora and (s.ranks.keys or s.alphas.keys):
        end = ", and PEFT refuses to convert it when it is saved, as rsLoRA stands together with patterns"
    yield Hit(
        f"The start `{subject.init[:40]}` changes the base weights, so the file that is saved is not base + scale * "
        f"B @ A: loaded on the original base it is another model{end}.",
        role="init",
    )


def _eva(subject: Subject) -> dict[str, Any] | None:
    """Return EVA's settings where an adapter is started by it and its alphas are adjusted, else None."""
    if subject.off is not None or subject.init != "eva":
        return None
    config = subject.raw.get("eva_config")
    eva = config if isinstance(config, dict) else {}
    return None if eva.get("adjust_scaling_factors") is False else eva


def eva_with_rslora(subject: Subject) -> Iterator[Hit]:
    """EVA multiplies alpha by new_r / r, which keeps alpha / r and not alpha / sqrt(r)."""
    s, eva = subject.settings, _eva(subject)
    if s is None or eva is None or not s.use_rslora:
        return
    plain = scaling("rslora", s.lora_alpha, s.r)
    if subject.trained or s.ranks.keys:
        scales = [g.scaling for g in groups_of(subject) if g.scaling is not None]
        off = max((x / plain for x in scales), key=lambda x: abs(math.log(x)), default=1.0)
        if abs(off - 1) < 0.01:
            return
        text = (
            "EVA moved ranks between modules and adjusted alpha by new r / r, which keeps alpha / r; under alpha / "
            "sqrt(r) "
            f"the scale then goes from {number(min(scales))} to {number(max(scales))} instead of {number(plain)} for "
            "all."
        )
        yield Hit(text, role="init", figure="scaling over the intended", value=off)
        return
    rho = eva.get("rho", 2.0)
    most = math.sqrt(rho) if isinstance(rho, int | float) and rho > 1 else math.sqrt(2.0)
    yield Hit(
        "EVA moves ranks between modules and multiplies alpha by new r / r, which keeps alpha / r and not alpha / "
        "sqrt(r): "
        f"where the rank grows, the scale grows by sqrt(new r / r), up to {number(most)} times {number(plain)}. Use "
        "alpha / r with EVA, or `adjust_scaling_factors: false` and read the scales back.",
        role="init",
        figure="largest factor on the scaling",
        value=most,
    )


def eva_anchored_key(subject: Subject) -> Iterator[Hit]:
    """EVA looks ranks up by a name with a prefix, which keys with `^` do not match."""
    s, eva = subject.settings, _eva(subject)
    if s is None or eva is None or subject.trained:
        return
    ranks = dict(zip(s.ranks.keys, s.ranks.values, strict=True))
    anchored = {key: r for key, r in ranks.items() if key.startswith("^") and r != s.r}
    if not anchored:
        return
    key, r = max(anchored.items(), key=lambda item: abs(math.log(item[1] / s.r)))
    yield Hit(
        f"EVA compares keys with names that begin `base_model.model.`, so it misses {len(anchored)} "
        f"{'key' if len(anchored) == 1 else 'keys'} with `^` and takes r = {s.r} for the rank before: the alpha of "
        f"{key!r} "
        f"(r {r}) is multiplied by {number(r / s.r)} though its rank did not change. Write these keys without `^`.",
        role="rank_pattern",
        figure="factor on the scaling",
        value=r / s.r,
    )


def moe_with_rslora(subject: Subject) -> Iterator[Hit]:
    """PEFT puts two projections of each expert into one weight, with twice the rank and twice the alpha."""
    s = subject.settings
    if s is None or subject.off is not None or not s.use_rslora:
        return
    concerned = _fused(subject)
    if concerned is None:
        return
    plain = scaling("rslora", s.lora_alpha, s.r)
    off = math.sqrt(2.0)
    sure = subject.trained or subject.model_config is not None
    what = (
        "This adapter has" if subject.trained else "These targets are" if sure else "By their names these targets are"
    )
    yield Hit(
        f"{what} separate {' and '.join(concerned)} in each expert. With transformers 5, PEFT puts the two into one "
        "weight "
        "with twice the rank and twice the alpha: right under alpha / r, but under alpha / sqrt(r) the scale becomes "
        f"{number(off * plain)} instead of {number(plain)}, {number(off)} times too strong. Other modules keep theirs.",
        role="use_rslora",
        modules=tuple(m.name for m in subject.modules or () if _EXPERT.search(m.name)),
        figure="factor on the scaling",
        value=off,
        level=None if sure else "info",
    )


def _fused(subject: Subject) -> tuple[str, str] | None:
    """Return the pair of projections that PEFT would put together, where it is certain that these are experts."""
    if subject.trained:
        ends = {match[1] for m in subject.modules or () if (match := _EXPERT.search(m.name))}
        return next((pair for pair in _FAMILIES if ends.issuperset(pair)), None)
    targets = () if subject.targets is None or isinstance(subject.targets, str) else subject.targets
    config = subject.model_config
    if config is None:
        names = (*targets, *(str(subject.raw.get(key, "")) for key in _BASES))
        if not any(_MIXTURE.search(name) for name in names):
            return None
    for pair, families in _FAMILIES.items():
        known = config is None or config.get("model_type") in families.split()
        if known and all(any(hits(end, t) or hits(t, end) for t in targets) for end in pair):
            return pair
    return None


def dropout_with_parameters(subject: Subject) -> Iterator[Hit]:
    """PEFT refuses dropout where parameters are adapted without a module."""
    if subject.off is not None or subject.trained or not subject.target_parameters or subject.dropout == 0:
        return
    whence = "" if subject.given("dropout") else ", TRL's default,"
    yield Hit(
        f"{subject.key('dropout')} is {subject.dropout:g}{whence} and {subject.key('target_parameters')} is "
        f"{some(subject.target_parameters)}: PEFT refuses dropout there and does not start. Set it to 0.",
        role="dropout" if subject.given("dropout") else "target_parameters",
        figure="dropout",
        value=subject.dropout,
    )
