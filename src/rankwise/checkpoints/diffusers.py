"""LoRA files as diffusers writes and reads them, through its several spellings.

In: a weight set without an adapter_config.json. Out: an `Adapter`. Spellings, oldest first:
`...processor.to_q_lora.down.weight`, `...lora_linear_layer.down.weight`, `...lora.down.weight`, and
`...lora_A.weight` with `unet.`, `text_encoder.`, `transformer.` or `diffusion_model.` before it. Scaling: an
`.alpha` tensor; else the header (`lora_adapter_metadata` as diffusers writes it since 0.34, or a plain
alpha); else 1, as diffusers takes alpha = r where nothing is stated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rankwise.checkpoints.alphas import alphas_in_header, configs_in_header, read_alphas, scale_from
from rankwise.checkpoints.factors import Draft, Scale, linear
from rankwise.checkpoints.kohya import skip_whole
from rankwise.checkpoints.model import Adapter, TensorInfo
from rankwise.checkpoints.patterns import LoraSettings, read_settings
from rankwise.checkpoints.sharded import WeightSet

_OLD: Final = re.compile(r"(?P<module>.+?)(?P<glue>\.lora_linear_layer|\.lora|_lora)\.(?P<part>down|up)\.weight")
_NEW: Final = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(?:\.default)?\.weight")
_ALPHA: Final = re.compile(r"(?P<module>.+?)(?:\.lora_linear_layer|\.lora|_lora)?\.alpha")
_DORA: Final = re.compile(r"(?P<module>.+?)(?:\.lora)?\.(lora_magnitude_vector|dora_scale)(\.weight)?")
_ROLE: Final = {"down": "A", "up": "B", "lora_A": "A", "lora_B": "B"}

# names that only image models have: `transformer.h.0.attn` is GPT-2's
_IMAGE: Final = re.compile(
    r"(unet|text_encoder(_\d)?|prior|controlnet|diffusion_model|transformer(_\d)?"
    r"(?=\.(single_transformer_blocks|transformer_blocks|joint_transformer_blocks|temporal_transformer_blocks"
    r"|blocks\.\d+\.attn[12]|context_embedder|x_embedder|time_text_embed|norm_out|proj_out)))\."
)


def recognises(names: Sequence[str]) -> bool:
    """Tell whether any tensor is named as only diffusers names factors."""
    return any("lora" in n and (_OLD.fullmatch(n) or (_NEW.fullmatch(n) and _IMAGE.match(n))) for n in names)


def read(source: str, weights: WeightSet, config: Mapping[str, Any] | None) -> Adapter:
    """Return a diffusers adapter."""
    draft = Draft(weights)
    found: dict[str, dict[str, TensorInfo]] = {}
    alphas: dict[str, TensorInfo] = {}
    for name in weights.names():
        match = _OLD.fullmatch(name) or _NEW.fullmatch(name)
        if match:
            found.setdefault(_module(match["module"]), {})[_ROLE[match["part"]]] = weights.info(name)
        elif match := _ALPHA.fullmatch(name):
            alphas[_module(match["module"])] = weights.info(name)
        elif match := _DORA.fullmatch(name):
            text = "{modules}: DoRA. The figures are of scaling * B @ A; the learned magnitudes are left out."
            draft.note("dora", "info", text, _module(match["module"]))
        else:
            skip_whole(draft, name)
    values = read_alphas(draft, {module: info for module, info in alphas.items() if module in found})
    pairs = draft.pair_up(found, "A", "B")
    header = _Header(draft, weights) if not values else None
    for pair in pairs:
        factors = linear(pair)
        scale = scale_from(values, pair.module, factors.r) if header is None else header.scale(pair.module, factors.r)
        draft.add(pair, factors, scale)
    return draft.finish(source, "diffusers", config)


def _module(path: str) -> str:
    """`attn1.processor.to_q` is the delta of `attn1.to_q`, and `to_out` of `to_out.0`."""
    if ".processor." in path:
        path = re.sub(r"\.to_out$", ".to_out.0", path.replace(".processor.", "."))
    return path


class _Header:
    """The scalings that a file's header states."""

    def __init__(self, draft: Draft, weights: WeightSet) -> None:
        where = f"`lora_adapter_metadata` in the header of {weights.label}"
        self._settings: dict[str, LoraSettings] = {
            component: read_settings(config, f"{where}, {component}")
            for component, config in configs_in_header(weights.metadata).items()
            if "lora_alpha" in config
        }
        self._plain = alphas_in_header(draft, weights.metadata) if not self._settings else []

    def scale(self, module: str, r: int) -> Scale:
        """Return the scale of a module of rank r."""
        component, _, name = module.partition(".")
        settings = self._settings.get(component)
        if settings is not None:
            return Scale.by_rule(settings.rule, settings.alpha_of(name), r)
        if len(self._plain) > 1:
            return Scale()
        return Scale.by_rule("lora", self._plain[0], r) if self._plain else Scale(scaling=1.0)
