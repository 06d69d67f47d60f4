"""Names of modules across formats: dotted, underscored, and with the component of a pipeline before them.

In: a module's name in one format. Out: its name in another, or a refusal. kohya's names write underscores for dots, so
they lead back only where the words between are known: from the file's own header, or from the list below.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

from rankwise.adapters.stored_units import Unit
from rankwise.checkpoints.model import Adapter
from rankwise.errors import UsageError

HEADER: Final = "rankwise_modules"
"""Key of the header under which a kohya file keeps its dotted names, as JSON."""

_COMPONENT: Final = re.compile(r"(unet|text_encoder(_\d)?|prior|controlnet|diffusion_model|transformer(_\d)?)\.")
_BARE: Final[tuple[tuple[str, re.Pattern[str]], ...]] = (
    ("unet", re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")),
    ("text_encoder", re.compile(r"text_model\.")),
    ("transformer", re.compile(r"(single_|joint_|temporal_)?transformer_blocks\.")),
)
_AFTER_TRANSFORMER: Final = re.compile(
    r"transformer(_\d)?\.((single_|joint_|temporal_)?transformer_blocks|blocks\.\d+\.attn[12]|context_embedder|x_embedder"
    r"|time_text_embed|norm_out|proj_out)"
)

_PREFIXES: Final = {
    "unet": "lora_unet",
    "diffusion_model": "lora_unet",
    "text_encoder": "lora_te",
    "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
    "transformer": "lora_transformer",
    "prior": "lora_prior_unet",
}
_COMPONENTS: Final = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
}

_WORDS: Final = frozenset(
    """
    down_blocks up_blocks mid_block attentions resnets transformer_blocks single_transformer_blocks blocks block layers
    attn attn1 attn2 to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj ff ff_context net proj proj_in
    proj_out proj_mlp norm norm1 norm1_context norm_out linear linear_1 linear_2 conv conv1 conv2 conv_in conv_out
    conv_shortcut downsamplers upsamplers time_embedding add_embedding time_emb_proj text_model encoder self_attn q_proj
    k_proj v_proj out_proj mlp fc1 fc2 text_projection time_text_embed timestep_embedder guidance_embedder text_embedder
    context_embedder x_embedder
    """.split()  # noqa: SIM905 - a list of words reads best as one
)
"""The parts of a path in the models of diffusers and in CLIP."""


def component_of(path: str) -> str | None:
    """Return the component of a pipeline that a path is of, by its first words; None of a language model.

    >>> component_of("unet.mid_block.conv"), component_of("transformer.h.0.attn.c_attn")
    ('unet', None)
    """
    found = _COMPONENT.match(path)
    if found and (not found[1].startswith("transformer") or _AFTER_TRANSFORMER.match(path)):
        return found[1]
    return next((name for name, pattern in _BARE if pattern.match(path)), None)


def inside(path: str) -> str:
    """Return a path without the component before it."""
    component = component_of(path)
    return path if component is None else path.removeprefix(f"{component}.")


def dotted(adapter: Adapter, units: Sequence[Unit], form: str) -> dict[str, str]:
    """Return unit -> dotted path with its component, whatever the source calls it.

    Raises:
        UsageError: the source stores no dotted names, and they cannot be told.
    """
    if adapter.format == "cloneofsimo":
        raise UsageError(
            f"{adapter.source} numbers its modules ({units[0].name}) by the order in which one version of its trainer "
            f"met them, and holds no names: it cannot be written as {form}."
        )
    if adapter.format != "kohya":
        return {u.name: u.name for u in units}
    known = _header_names(adapter.metadata)
    made = {u.name: known.get(u.name) or spelled_out(u.name) for u in units}
    lost = [name for name, path in made.items() if path is None]
    if lost:
        raise UsageError(
            f"{adapter.source}: {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else "") + " stands with "
            f"underscores for dots, which does not lead back to the module's path, so it cannot be written as {form}. "
            "Names as diffusers and CLIP have them are told; those of other models are where the file was written by "
            "rankwise convert, which keeps them in the header. --format kohya keeps the names as they are."
        )
    return {name: path for name, path in made.items() if path is not None}


def _header_names(metadata: Mapping[str, str]) -> dict[str, str]:
    try:
        found = json.loads(metadata.get(HEADER, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and k.endswith(v.replace(".", "_"))} | {
        k: v for k, v in found.items() if isinstance(v, str) and k.endswith(inside(v).replace(".", "_"))
    }


def spelled_out(name: str) -> str | None:
    """Return the dotted path of a name of kohya's, where every part of it is a word that is known.

    >>> spelled_out("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'
    >>> spelled_out("lora_unet_input_blocks_4_1_proj_in") is None
    True
    """
    prefix = max((p for p in _COMPONENTS if name.startswith(f"{p}_")), key=len, default=None)
    if prefix is None:
        return None
    words = name.removeprefix(f"{prefix}_").split("_")
    path = _split(words)
    return None if path is None else ".".join([_COMPONENTS[prefix], *path])


def _split(words: list[str]) -> list[str] | None:
    """Join words into known parts, the longest first; None where that cannot be done, or only in several ways."""
    if not words:
        return []
    if words[0].isdecimal():
        rest = _split(words[1:])
        return None if rest is None else [words[0], *rest]
    for length in range(min(4, len(words)), 0, -1):
        part = "_".join(words[:length])
        if part in _WORDS and (rest := _split(words[length:])) is not None:
            return [part, *rest]
    return None


def underscored(paths: Mapping[str, str]) -> dict[str, str]:
    """Return unit -> kohya's name, for dotted paths.

    Raises:
        UsageError: two paths become one name.
    """
    second = any(component_of(p) == "text_encoder_2" for p in paths.values())
    made: dict[str, str] = {}
    taken: dict[str, str] = {}
    for unit, path in paths.items():
        component = component_of(path)
        prefix = "lora" if component is None else _PREFIXES.get(component, f"lora_{component}")
        if component == "text_encoder" and second:  # SDXL has two, and numbers both
            prefix = "lora_te1"
        name = f"{prefix}_{inside(path)}".replace(".", "_")
        if taken.setdefault(name, path) != path:
            raise UsageError(f"{taken[name]} and {path} would both be called {name} in a kohya file.")
        made[unit] = name
    return made
