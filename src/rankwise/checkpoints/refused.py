"""Adapters whose update is not scaling * B @ A: recognised by name, and refused with the reason.

In: the tensor names and config of a source. Out: nothing, or an `UnsupportedAdapterError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rankwise.errors import UnsupportedAdapterError


@dataclass(frozen=True, slots=True)
class Refusal:
    """One kind of adapter that is not read.

    Attributes:
        name: what its users call it.
        marks: one of these is in every name that `pattern` matches; a checkpoint may have 100,000 names, and
            a search for a word is a hundred times faster.
        pattern: found in the names of its tensors.
        update: what it adds instead.
    """

    name: str
    marks: tuple[str, ...]
    pattern: re.Pattern[str]
    update: str


REFUSED: Final = (
    Refusal("LoHa", ("hada_",), re.compile(r"\bhada_(w|t)[12]"), "the entrywise product of two low-rank products"),
    Refusal("LoKr", ("lokr_",), re.compile(r"\blokr_(w|t)[12]"), "a Kronecker product"),
    Refusal("IA3", ("ia3_l", ".on_input"), re.compile(r"\bia3_l\b|\.on_input$"), "a rescaling of activations"),
    Refusal("BOFT", ("boft_",), re.compile(r"\bboft_"), "an orthogonal factor on the weight"),
    Refusal("OFT", ("oft_",), re.compile(r"\boft_|\.oft_(blocks|diag)"), "an orthogonal factor on the weight"),
    Refusal("VeRA", ("vera_",), re.compile(r"\bvera_(lambda|A|B)"), "shared random matrices, rescaled"),
    Refusal("RandLoRA", ("randlora_",), re.compile(r"\brandlora_"), "sums of shared random matrices, rescaled"),
    Refusal("FourierFT", ("fourierft_",), re.compile(r"\bfourierft_"), "a sparse spectrum under a Fourier transform"),
    Refusal("KaSA", ("lora_diag",), re.compile(r"\blora_diag\b"), "B @ diag @ A on a base that was truncated first"),
    Refusal("AdaLoRA", ("lora_E",), re.compile(r"\blora_E\b"), "B @ diag(E) @ A"),
    Refusal("a Tucker (CP) LoRA", ("lora_mid",), re.compile(r"\blora_mid\b"), "a product of three factors"),
    Refusal(
        "prompt tuning",
        ("prompt_embeddings",),
        re.compile(r"\bprompt_embeddings\b"),
        "virtual tokens, no change of weights",
    ),
    Refusal(
        "a LoRA with a bias on B", (".bias",), re.compile(r"\blora_B(\.[^.]+)?\.bias$"), "scaling * B @ A and a bias"
    ),
)
"""The kinds that are told by the names of their tensors."""

_GLORA: Final = re.compile(r"(.+)\.(a1|a2|b1|b2)\.weight")

_CONFIG_FLAGS: Final[dict[str, tuple[str, str]]] = {
    "lora_bias": ("a LoRA with a bias on B", "scaling * B @ A and a bias"),
    "use_qalora": ("QA-LoRA", "B @ A on inputs pooled in groups, so that A is narrower than the weight"),
    "use_bdlora": ("BD-LoRA", "a product with a block diagonal factor"),
    "kasa_config": ("KaSA", "B @ diag @ A on a base that was truncated first"),
}


def refuse_unsupported(names: Sequence[str], config: Mapping[str, Any] | None, label: str) -> None:
    """Refuse adapters that rankwise cannot measure.

    Raises:
        UnsupportedAdapterError: names the kind, how it was told, and what it does instead of B @ A.
    """
    together = "\n".join(names)
    for refusal in REFUSED:
        if not any(mark in together for mark in refusal.marks):
            continue
        hits = [name for name in names if refusal.pattern.search(name)]
        if hits:
            raise _error(label, refusal.name, f"{len(hits)} tensors such as {hits[0]}", refusal.update)
    parts: dict[str, set[str]] = {}
    for name in names:
        if name.endswith((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight")) and (
            match := _GLORA.fullmatch(name)
        ):
            parts.setdefault(match[1], set()).add(match[2])
    if any(len(found) == 4 for found in parts.values()):
        raise _error(label, "GLoRA", "tensors a1, a2, b1 and b2", "a product with the weight and a sum")
    if config is None:
        return
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind.upper() != "LORA":
        raise _error(label, kind, f"peft_type {kind!r:.100} in adapter_config.json", "something else")
    for field, (name, update) in _CONFIG_FLAGS.items():
        if config.get(field):
            raise _error(label, name, f"`{field}` in adapter_config.json", update)


def _error(label: str, name: str, told_by: str, update: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{label} is {name} (told by {told_by}): its update is {update}, not scaling * B @ A, so the figures of "
        "rankwise would be wrong for it. Merge it into its base and inspect the two checkpoints instead."
    )
