"""Rules about a runtime: the factor that it would apply, what it leaves unread, what it refuses.

In: a subject and a row of `RUNTIMES`. Out: hits. A factor is right where it is the one of the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rankwise.checkpoints.peft import CHANGES_BASE
from rankwise.errors import UsageError
from rankwise.linting.groups import groups_of
from rankwise.linting.subject import Group, Hit, Subject, listed, number, some
from rankwise.runtimes import RUNTIMES, Runtime, padded_rank

SAME: Final = 1e-6
"""Relative difference of two factors below which they are the same: both are one division of the same numbers."""

CONVERTS: Final = ("vllm", "sglang", "llama.cpp", "tensorrt-llm", "comfyui")
"""Runtimes that `rankwise convert --for` knows."""

SERVERS: Final = ("vllm", "sglang", "llama.cpp", "tensorrt-llm")
"""Runtimes of language models, compared where none is asked for. Ollama runs llama.cpp."""


def serves(subject: Subject) -> bool:
    """Tell whether it has a rank to serve: not a config without LoRA."""
    return subject.off is None and bool(groups_of(subject))


def applied(subject: Subject, group: Group, runtime: Runtime) -> float | None:
    """Return the factor that a runtime applies to a group; None where it cannot read the adapter."""
    s = subject.settings
    if not _knows_layout(subject, runtime) or (runtime.name == "peft" and contradicts(subject)):
        return None
    if runtime.name == "diffusers" and subject.config_in_header:
        return group.scaling
    alpha = group.lora_alpha
    if alpha is None and s is None:
        return 1.0 if not subject.alpha_stored else None
    return runtime.applied(
        group.r,
        alpha if alpha is not None else (s.lora_alpha if s else 1.0),
        global_r=s.r if s else group.r,
        global_alpha=s.lora_alpha if s else (alpha or 1.0),
        use_rslora=bool(s and s.use_rslora),
        alpha_stored=subject.alpha_stored,
    )


def contradicts(subject: Subject) -> bool:
    """Tell whether config and tensors disagree, so that PEFT refuses them and nobody knows what was trained with."""
    return any(noticed.code == "rank-contradicts-config" for noticed in subject.noticed)


def _converts(subject: Subject, runtime: Runtime) -> bool:
    """Tell whether `rankwise convert --for` would write it: B @ A times a scale, on the base that it names."""
    changed = (subject.init or "").startswith(CHANGES_BASE)
    return runtime.name in CONVERTS and not subject.use_dora and not changed


def _knows_layout(subject: Subject, runtime: Runtime) -> bool:
    """Tell whether the runtime finds what it reads: PEFT's config, or names of weights that it knows."""
    if runtime.reads_config:
        return subject.settings is not None
    return subject.format in (None, "peft", "kohya", "diffusers")


def _wrong(subject: Subject, runtime: Runtime) -> list[tuple[Group, float, float]]:
    """Return (group, applied, trained) where they differ, the worst first."""
    if contradicts(subject):
        return []
    found = []
    for group in groups_of(subject):
        got = applied(subject, group, runtime)
        if got is not None and group.scaling is not None and abs(got / group.scaling - 1) > SAME:
            found.append((group, got, group.scaling))
    return sorted(found, key=lambda row: -abs(1 - min(row[1] / row[2], row[2] / row[1])))


def runtime_scale(subject: Subject, runtime: Runtime) -> Iterator[Hit]:
    """The factor is not the one of the training."""
    wrong = _wrong(subject, runtime)
    if not wrong:
        return
    group, got, trained = wrong[0]
    off = got / trained
    modules = tuple(name for g, _, _ in wrong for name in g.modules or ())
    label = group.label if len(wrong) == 1 else f"{group.label}, and others"
    where = f"{len(modules)} of {len(subject.modules or ())} modules" if modules else label
    worst = "" if len(wrong) == 1 else f"; furthest off at r = {group.r}"
    strength = f"{number(1 / off)} times too weak" if off < 1 else f"{number(off)} times too strong"
    way_out = ""
    if _converts(subject, runtime):
        when = "" if subject.trained else "Once trained, "
        way_out = f" {when}`rankwise convert --for {runtime.name}` writes an adapter that is right there."
    ignored = subject.settings is not None and subject.settings.use_rslora and not runtime.uses_rslora
    yield Hit(
        f"{runtime.name} applies {number(got)} where the training has {number(trained)}: {strength} ({where}{worst}). "
        f"{_cause(subject, runtime)}{_doubt(runtime)}{way_out}",
        role="use_rslora" if ignored and runtime.reads_config else None,
        modules=modules,
        figure="applied over trained",
        value=off,
    )


def _cause(subject: Subject, runtime: Runtime) -> str:
    """Return why, in one sentence or two."""
    s = subject.settings
    if not runtime.reads_config:
        return (
            "It reads alphas out of the weights file, by alpha / r."
            if subject.alpha_stored
            else "It reads the tensors of the weights file alone, and none of them is an alpha."
        )
    causes = []
    if s is not None and s.use_rslora and not runtime.uses_rslora:
        causes.append("`use_rslora`")
    if s is not None and s.ranks.keys and not runtime.reads_rank_pattern:
        causes.append("`rank_pattern`")
    if s is not None and s.alphas.keys and not runtime.reads_alpha_pattern:
        causes.append("`alpha_pattern`")
    return (
        f"It does not read {listed(causes)} for the scale."
        if causes
        else "Its rank or alpha is not the one that the tensors were trained with."
    )


def _doubt(runtime: Runtime) -> str:
    return "" if runtime.verified else " (So in the copy that was read; not confirmed at a newer version.)"


def runtime_rank_cap(subject: Subject, runtime: Runtime) -> Iterator[Hit]:
    """The rank is above what the runtime takes without being told, or above all that it can be told."""
    groups = groups_of(subject)
    if not groups or runtime.default_cap is None:
        return
    highest = max([g.r for g in groups] + ([subject.settings.r] if subject.settings else []))
    if highest <= runtime.default_cap:
        return
    try:
        wanted = padded_rank(runtime.name, highest)
    except UsageError as error:
        yield Hit(f"{error}.", role="r", figure="rank", value=float(highest))
        return
    yield Hit(
        f"The highest rank is {highest}, and {runtime.name} takes up to {runtime.default_cap} unless told: set "
        f"{runtime.cap_flag} {wanted}.",
        role="r",
        figure="cap to set",
        value=float(wanted),
        level="warning",
    )


def runtime_refuses(subject: Subject, runtime: Runtime) -> Iterator[Hit]:
    """Something in the adapter stops it from loading, or is left out."""
    has: list[tuple[str, str, bool | None]] = []
    whole = (*subject.modules_to_save, *(w for w in subject.whole if w not in subject.modules_to_save))
    if whole:
        has.append((f"whole weights ({some(whole)})", "modules_to_save", runtime.takes_modules_to_save))
    if subject.embeddings:
        has.append((f"factors of embeddings ({some(subject.embeddings)})", "targets", runtime.takes_embeddings))
    if subject.use_dora:
        has.append(("DoRA's magnitudes", "use_dora", runtime.takes_dora))
    if subject.bias != "none":
        has.append((f"trained biases (`bias` is {subject.bias!r:.20})", "bias", runtime.takes_bias))
    for what, role, taken in has:
        if taken is False:
            yield Hit(f"{runtime.name} does not load {what}. Merge the adapter into the model.", role=role)
        elif taken is None:
            yield Hit(
                f"The adapter has {what}; whether {runtime.name} loads them was not found in its source. Compare its "
                "outputs "
                "with PEFT's before you rely on it.",
                role=role,
                level="info",
            )


def runtime_alpha_format(subject: Subject, runtime: Runtime) -> Iterator[Hit]:
    """The alpha is written with a decimal point, and the runtime's reader stops at it."""
    alpha = subject.raw.get("lora_alpha")
    if not runtime.integer_alpha or not isinstance(alpha, float) or subject.kind not in ("adapter", "peft-config"):
        return
    end = f"Write it as {int(alpha)}." if alpha == int(alpha) else "Fold the scale into B and write alpha = r."
    yield Hit(
        f"`lora_alpha` is written as {alpha!r}; {runtime.name} reads a whole number there and stops. {end}",
        role="lora_alpha",
        figure="lora_alpha",
        value=alpha,
    )


def runtime_needs_config(subject: Subject, runtime: Runtime) -> Iterator[Hit]:
    """The runtime reads another layout."""
    if not subject.trained or _knows_layout(subject, runtime):
        return
    if runtime.reads_config:
        text = f"{runtime.name} reads adapter_config.json, and there is none beside this file. "
        if subject.format == "peft":
            yield Hit(text + "Put the one that it was saved with there: nothing else states its alpha.")
            return
    else:
        text = f"{runtime.name} does not know the names that the tensors of {subject.format} files have. "
    yield Hit(text + "Convert it first.")


def scale_differs_by_runtime(subject: Subject) -> Iterator[Hit]:
    """Some runtime of language models would apply another factor."""
    if subject.settings is None or not serves(subject):
        return
    off = {}
    for name in SERVERS:
        wrong = _wrong(subject, RUNTIMES[name])
        if wrong:
            off[name] = wrong[0][1] / wrong[0][2]
    if not off:
        return
    right = [name for name in SERVERS if name not in off]
    words = ", ".join(f"{name} ({number(x)} times the trained scale)" for name, x in off.items())
    end = f"; {', '.join(right)} would apply the trained one" if right else ""
    yield Hit(
        f"Served as it is, it would be wrong in {words}{end}. `--for RUNTIME` says why.",
        figure="applied over trained, the furthest",
        value=min(off.values(), key=lambda x: min(x, 1 / x)),
    )
