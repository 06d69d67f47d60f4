"""What the rules look at: one config or adapter, whatever trainer it is for, in one set of words.

In: nothing. Out: frozen descriptions. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rankwise.checkpoints.patterns import LoraSettings
from rankwise.records import Finding, Level

Kind = Literal["adapter", "peft-config", "axolotl", "llama-factory", "trl"]


@dataclass(frozen=True, slots=True)
class Module:
    """One module, as it is trained.

    Attributes:
        name: dotted path.
        r: rank.
        lora_alpha: alpha, or None.
        scaling: factor on B @ A, or None.
        rule: the rule that gives it, or None.
        shape: (out_features, in_features), or None where only the name is known.
    """

    name: str
    r: int
    lora_alpha: float | None
    scaling: float | None
    rule: str | None
    shape: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Group:
    """Modules with the same rank, alpha and scale.

    Attributes:
        label: which, in words.
        modules: their names, or None where only a pattern is known.
        r: rank.
        lora_alpha: alpha, or None.
        scaling: factor on B @ A, or None.
        rule: the rule that gives it, or None.
    """

    label: str
    modules: tuple[str, ...] | None
    r: int
    lora_alpha: float | None
    scaling: float | None
    rule: str | None


@dataclass(frozen=True, slots=True)
class Subject:
    """One config or adapter.

    Attributes:
        path: as given.
        kind: which trainer it is for, or "adapter" for a trained one.
        text: the config as it was written, for line numbers.
        raw: its keys and values.
        keys: role ("r", "lora_alpha", "use_rslora", ...) -> the key as this trainer spells it.
        settings: rank, alpha, rule and patterns; None where it states no rank at all.
        off: why no LoRA is trained with this, or None.
        init: `init_lora_weights`, in lower case; None for the default.
        dropout: of the branch.
        targets: `target_modules` as a list, a regular expression or "all-linear"; None where it is not given.
        target_parameters: names of parameters that are adapted without a module of their own.
        modules_to_save: weights that are trained and stored whole.
        use_dora: whether it is a DoRA.
        bias: "none", or which biases are trained.
        learning_rate: of the training, or None.
        method: "sft" where it is supervised fine-tuning or pre-training, else the method's name; None if unknown.
        modules: where names are known; None otherwise.
        model_config: config.json of the base, where it was given.
        format: of the weights: "peft", "kohya", ...; None for a config.
        alpha_stored: whether the weights file has alphas as tensors.
        config_in_header: whether its header carries the whole config, as diffusers writes and reads it.
        whole: weights stored whole beside the factors (of an adapter).
        embeddings: modules that adapt an embedding table.
        noticed: what the reader of the adapter noticed.
        is_untrained: tells, by reading, whether every B is zero; None for a config.
    """

    path: str
    kind: Kind
    text: str
    raw: Mapping[str, Any]
    keys: Mapping[str, str]
    settings: LoraSettings | None
    off: str | None = None
    init: str | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    use_dora: bool = False
    bias: str = "none"
    learning_rate: float | None = None
    method: str | None = None
    modules: tuple[Module, ...] | None = None
    model_config: Mapping[str, Any] | None = None
    format: str | None = None
    alpha_stored: bool = False
    config_in_header: bool = False
    whole: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    noticed: Sequence[Finding] = ()
    is_untrained: Callable[[], bool] | None = field(default=None, compare=False)

    @property
    def trained(self) -> bool:
        """Whether it is an adapter, and so past changing."""
        return self.kind == "adapter"

    def given(self, role: str) -> bool:
        """Tell whether the config itself gives a value."""
        key = self.keys.get(role)
        return key is not None and self.raw.get(key) is not None

    def key(self, role: str) -> str:
        """Return a role as this trainer spells it, between backticks."""
        return f"`{self.keys.get(role, role)}`"


@dataclass(frozen=True, slots=True)
class Hit:
    """What a rule found.

    Attributes:
        text: what was seen, with the figure, and what to do.
        role: what it hangs on, or None.
        modules: the modules concerned, where they are known.
        figure: what `value` is.
        value: the figure that matters.
        level: where it differs from the rule's own.
    """

    text: str
    role: str | None = None
    modules: tuple[str, ...] = ()
    figure: str | None = None
    value: float | None = None
    level: Level | None = None


def number(value: float) -> str:
    """Return a figure as messages show it: three digits."""
    return f"{value:.3g}"


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them.

    >>> listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
