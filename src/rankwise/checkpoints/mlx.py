"""mlx-lm's LoRA adapters: adapters.safetensors with adapter_config.json.

In: a weight set and the config. Out: an `Adapter`. `lora_a` is (in, r) and `lora_b` (r, out), the transposes
of PEFT's; stacked experts are (experts, r, in) and (experts, out, r), embeddings (rows, r) and (r, columns)
(mlx_lm/tuner/lora.py). `lora_parameters.scale` is the factor on the product itself, whatever the rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from rankwise.checkpoints.experts import stacked
from rankwise.checkpoints.factors import Draft, Factors, Pair, Scale, table, transposed
from rankwise.checkpoints.kohya import skip_whole
from rankwise.checkpoints.model import Adapter, TensorInfo
from rankwise.checkpoints.sharded import WeightSet
from rankwise.errors import ConfigError, TensorError

_KEY: Final = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b)")
_MAGNITUDE: Final = re.compile(r"(?P<module>.+)\.m")
_TABLES: Final = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embedding|embeddings)$")


def recognises(names: Sequence[str]) -> bool:
    """Tell whether any tensor is named as mlx-lm names factors."""
    return any(name.endswith((".lora_a", ".lora_b")) for name in names)


def read(source: str, weights: WeightSet, config: Mapping[str, Any] | None) -> Adapter:
    """Return an MLX adapter.

    Raises:
        ConfigError: `lora_parameters` is of the wrong type.
    """
    draft = Draft(weights)
    scale = _scale(draft, config, weights.store.label("adapter_config.json"))
    found: dict[str, dict[str, TensorInfo]] = {}
    magnitudes, others = [], []
    for name in weights.names():
        if match := _KEY.fullmatch(name):
            found.setdefault(match["module"], {})[match["part"]] = weights.info(name)
        elif match := _MAGNITUDE.fullmatch(name):
            magnitudes.append(match["module"])
        else:
            others.append(name)
    for module in magnitudes:
        text = "{modules}: DoRA. The figures are of scaling * B @ A; the learned magnitudes are left out."
        draft.note("dora", "info", text, module)
    for name in others:
        skip_whole(draft, name)
    for pair in draft.pair_up(found, "lora_a", "lora_b"):
        if len(pair.a.shape) == 3:
            _add_experts(draft, pair, scale)
        else:
            draft.add(pair, table(pair) if _TABLES.search(pair.module) else transposed(pair), scale)
    return draft.finish(source, "mlx", config)


def _add_experts(draft: Draft, pair: Pair, scale: Scale) -> None:
    a, b = pair.a.shape, pair.b.shape
    if len(b) != 3 or a[0] != b[0] or a[1] != b[2]:
        raise TensorError(
            f"{pair.module}: the factors {pair.a.name} of shape {a} and {pair.b.name} of shape {b} do not fit each "
            "other: wanted (experts, r, in_features) and (experts, out_features, r)."
        )
    for index in range(a[0]):
        factors = Factors((b[1], a[2]), a[1], "expert", partial(stacked, index=index))
        draft.add(pair, factors, scale, module=f"{pair.module}[{index}]")


def _scale(draft: Draft, config: Mapping[str, Any] | None, where: str) -> Scale:
    """Return the one scale of all modules."""
    parameters = (config or {}).get("lora_parameters")
    if parameters is None or (isinstance(parameters, dict) and parameters.get("scale") is None):
        text = (
            "There is no `lora_parameters.scale` in an adapter_config.json beside the weights, so the scaling is "
            "unknown. Figures are of B @ A without a scaling."
        )
        draft.note("no-config", "warning", text)
        return Scale()
    if not isinstance(parameters, dict):
        raise ConfigError(f"{where}: `lora_parameters` is a JSON {type(parameters).__name__}; wanted an object.")
    value = parameters["scale"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: `lora_parameters.scale` is {value!r:.100}; wanted a finite number above 0.")
    if parameters.get("alpha") is not None:
        text = (
            "`lora_parameters` holds alpha beside scale. Early versions of mlx-lm multiplied by scale * alpha / "
            "rank, later ones by scale alone; scale alone is used here."
        )
        draft.note("mlx-alpha", "warning", text)
    try:
        return Scale.by_rule("unscaled", float(value), 1)
    except OverflowError as error:
        raise ConfigError(f"{where}: `lora_parameters.scale` is too large for a number.") from error
