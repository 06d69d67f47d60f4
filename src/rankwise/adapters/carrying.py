"""What an adapter holds besides factors: carried, left out because the user said so, or refused by name.

In: an open adapter, and what is to become of it. Out: the names of the tensors to copy, and what was left out. Nothing
is dropped in silence: what a target cannot hold stops the conversion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rankwise.adapters.stored_units import Unit, names
from rankwise.checkpoints.model import Adapter, TensorInfo
from rankwise.errors import UnsupportedAdapterError
from rankwise.records import Skipped
from rankwise.runtimes import Runtime

_MAGNITUDE: Final = re.compile(r"\.lora_magnitude_vector(\.|$)|\.dora_scale$")
_ALPHA: Final = re.compile(r"\.(alpha|lora_alpha)$")


@dataclass(frozen=True, slots=True)
class Cargo:
    """What travels beside the factors.

    Attributes:
        units: those that are written.
        tensors: to copy as they are.
        left_out: what is dropped, and why.
        dora: whether there are magnitudes among the tensors.
    """

    units: tuple[Unit, ...]
    tensors: tuple[TensorInfo, ...]
    left_out: tuple[Skipped, ...]
    dora: bool


def refuse(adapter: Adapter) -> None:
    """Refuse an adapter whose file is not base + scaling * B @ A, or whose scaling is not known.

    Raises:
        UnsupportedAdapterError: says which, and what to do.
    """
    for finding in adapter.findings:
        if finding.level == "error":
            raise UnsupportedAdapterError(
                f"{adapter.source} cannot be converted, as it is not known what it does: {finding.text}"
            )
        if finding.code == "init-changes-base":
            init = (adapter.config or {}).get("init_lora_weights")
            raise UnsupportedAdapterError(
                f"{adapter.source} was started by `init_lora_weights` = {init!r:.60}, which changes the base weights "
                "when it is loaded, by an amount that depends on r and alpha: with others the function would be "
                "another. Save it once more with PEFT's `path_initial_model_for_weight_conversion`, or merge it and "
                "extract an adapter from the result: rankwise extract BASE MERGED OUT."
            )
    if not adapter.modules:
        raise UnsupportedAdapterError(f"{adapter.source} holds no pair of factors: there is nothing to convert.")
    unknown = [m.module for m in adapter.modules if m.scaling is None]
    if unknown:
        why = "its adapter_config.json is missing or gives no scale" if adapter.format in ("peft", "mlx") else ""
        raise UnsupportedAdapterError(
            f"{adapter.source}: the scaling of {unknown[0]}"
            + (f" and {len(unknown) - 1} more modules" if len(unknown) > 1 else "")
            + f" is not known{f' ({why})' if why else ''}, so the function is not. Put the config that it was trained "
            "with beside the weights."
        )


def is_dora(adapter: Adapter) -> bool:
    """Tell whether it has magnitudes (DoRA)."""
    if (adapter.config or {}).get("use_dora"):
        return True
    mlx = adapter.format == "mlx"
    return any(_MAGNITUDE.search(t.name) or (mlx and t.name.endswith(".m")) for t in adapter.others())


def is_magnitude(tensor: str) -> bool:
    """Tell whether a tensor is a magnitude of DoRA, by its name in PEFT's or kohya's files."""
    return _MAGNITUDE.search(tensor) is not None


def stow(
    adapter: Adapter,
    units: Sequence[Unit],
    *,
    form: str,
    runtime: Runtime | None,
    merging: bool,
    drop_others: bool,
) -> Cargo:
    """Decide what travels with the factors of one adapter.

    Args:
        adapter: open.
        units: its units.
        form: format to write.
        runtime: what it is made for, or None.
        merging: whether other adapters are added to it.
        drop_others: whether what cannot travel is left out instead.

    Raises:
        UnsupportedAdapterError: something cannot travel, and is not to be dropped.
    """
    if form != adapter.format or merging:
        _refuse_config(adapter, form, merging=merging)
    dora = is_dora(adapter)
    if dora:
        _refuse_dora(adapter, form, runtime, merging)
    others = [t for t in adapter.others() if not _ALPHA.search(t.name)]
    why = _why_not(adapter, others, form, runtime, merging) if others else None
    left_out: list[Skipped] = []
    if why is not None:
        _drop_or_refuse(adapter, [t.name for t in others], "whole weights beside the factors", why, drop_others)
        left_out += [Skipped(module=t.name, reason=f"dropped on request: {why}") for t in others]
        others = []
    tables = [u for u in units if u.kind == "embedding"]
    why = _why_no_tables(form, runtime) if tables else None
    if why is not None:
        _drop_or_refuse(adapter, [u.name for u in tables], "factors of embedding tables", why, drop_others)
        left_out += [Skipped(module=u.name, reason=f"dropped on request: {why}") for u in tables]
        units = [u for u in units if u.kind != "embedding"]
    return Cargo(tuple(units), tuple(others), tuple(left_out), dora)


def _read_in(row: Runtime) -> str:
    """Say where it stands; the threads of a row are about scales, not about what is loaded."""
    return f"{row.source} at {row.version}"


def _why_not(
    adapter: Adapter, others: Sequence[TensorInfo], form: str, runtime: Runtime | None, merging: bool
) -> str | None:
    """Return why whole weights cannot travel, or None."""
    if form != adapter.format:
        return f"the {form} format has no place for them"
    if merging:
        return "whole weights cannot be added up with weights as factors can"
    if runtime is not None and runtime.takes_modules_to_save is False:
        return f"{runtime.name} does not load them ({_read_in(runtime)})"
    if runtime is not None and runtime.takes_bias is False and any(t.name.endswith(".bias") for t in others):
        return f"{runtime.name} does not load biases ({_read_in(runtime)})"
    return None


def _why_no_tables(form: str, runtime: Runtime | None) -> str | None:
    """Return why factors of embedding tables cannot travel, or None."""
    if form in ("kohya", "diffusers"):
        return f"the {form} format has no name for them"
    if runtime is not None and runtime.takes_embeddings is False:
        return f"{runtime.name} does not load factors of embedding tables ({_read_in(runtime)})"
    return None


_CONFIG_ONLY: Final = {
    "alora_invocation_tokens": "aLoRA acts only on the tokens after its invocation",
    "layer_replication": "it repeats layers of the base",
}
"""Fields of PEFT's config that change what the factors do, and which nothing but that config can say."""


def _refuse_config(adapter: Adapter, form: str, *, merging: bool) -> None:
    if adapter.format != "peft":
        return
    for name, what in _CONFIG_ONLY.items():
        if (adapter.config or {}).get(name):
            why = f"the {form} format cannot say so" if form != "peft" else "a sum with others would not"
            raise UnsupportedAdapterError(
                f"{adapter.source} has `{name}` in its config: {what}, and {why}. Keep the peft format"
                + (", and leave --add and --weight out." if merging else ".")
            )


def _refuse_dora(adapter: Adapter, form: str, runtime: Runtime | None, merging: bool) -> None:
    why = None
    if form != adapter.format:
        why = f"the magnitudes have another shape and meaning in the {form} format"
    elif merging:
        why = "magnitudes belong to one direction, and do not add up"
    elif runtime is not None and runtime.takes_dora is False:
        why = f"{runtime.name} does not load DoRA ({_read_in(runtime)})"
    if why is not None:
        raise UnsupportedAdapterError(
            f"{adapter.source} is a DoRA adapter: its update is m (W + s B A) / norm(W + s B A) - W, not s B A, and "
            f"{why}. Merge it into its base; rankwise extract BASE MERGED OUT makes a plain adapter of the result."
        )


def refuse_cut(source: str, unit: Unit) -> None:
    """Refuse another rank for DoRA: what it would cost depends on the base weights.

    Raises:
        UnsupportedAdapterError: always.
    """
    raise UnsupportedAdapterError(
        f"{source} is a DoRA adapter: its update is m (W + s B A) / norm(W + s B A) - W, so what a lower rank of "
        f"{unit.name} costs cannot be told without the base. Merge it into its base, and cut the difference: rankwise "
        "extract BASE MERGED OUT --rank N. A rule, a layout or a higher rank can be changed here."
    )


def _drop_or_refuse(adapter: Adapter, found: Sequence[str], what: str, why: str, drop: bool) -> None:
    if drop:
        return
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    raise UnsupportedAdapterError(
        f"{adapter.source} holds {what} ({shown}), and {why}. Nothing was written. --drop-others leaves them out, "
        "which changes what the adapter does; or merge the adapter into its base."
    )


def refuse_groups(source: str, units: Sequence[Unit]) -> None:
    """Refuse another rank for grouped convolutions, whose B is a block diagonal.

    Raises:
        UnsupportedAdapterError: there is one.
    """
    grouped = [u for u in units if u.groups > 1]
    if grouped:
        raise UnsupportedAdapterError(
            f"{source}: {names(grouped)} adapts a convolution in groups, where each group has directions of its own; "
            "its rank cannot be changed or padded. Leave the ranks as they are."
        )
