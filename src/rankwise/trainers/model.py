"""What the exporters of all trainers share: the job, what is written, and how what was written is read again.

In: nothing. Out: the frozen types of this room. A `Trainer` is a pair of functions, one that writes files for a job and
one that parses their text; between the two stands nothing but the text.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rankwise.checkpoints.patterns import LoraSettings, read_settings
from rankwise.scaling import scaling

GPT2_LAYER: Final = re.compile(r"(.*\.)?h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
"""Layers that GPT-2 keeps as Conv1D, with the weight stored as (in, out)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the plan asks for one module.

    Attributes:
        module: full dotted name in the model that is trained.
        shape: (out_features, in_features).
        r: rank, 1 or more.
        lora_alpha: alpha under the plan's rule.
        scaling: the factor on B @ A.
        experts: how many, of a stacked parameter, all of this shape, rank and scaling; 0 of a module.
    """

    module: str
    shape: tuple[int, int]
    r: int
    lora_alpha: float
    scaling: float
    experts: int = 0

    @property
    def params(self) -> int:
        """Entries of A and B."""
        return self.r * sum(self.shape) * max(1, self.experts)


@dataclass(frozen=True, slots=True)
class Job:
    """A plan as the exporters take it: checked, without modules of rank 0.

    Attributes:
        modules: what is asked for, in the order of the plan.
        idle: modules that have to stay without an adapter: rank 0 in the plan, or known from the model.
        rule: scaling rule of the plan.
        learning_rate: or None where the plan has none.
        tolerance: relative error that a scale may have where the trainer takes whole alphas only.
        targets: what selects the modules in a list of target modules: their full names, or suffixes that were shown
            to select nothing else. Stacked parameters are not among them.
        conv1d: whether the weights are stored as (in, out), as GPT-2 does.
        model: base model to name in the file, or None.
        adapter: adapter folder to start from, or None.
        head: lines for the top of the file.
        idle_stacks: stacked parameters of experts that have to stay without an adapter.
    """

    modules: tuple[Asked, ...]
    idle: tuple[str, ...]
    rule: str
    learning_rate: float | None
    tolerance: float
    targets: tuple[str, ...]
    conv1d: bool
    model: str | None = None
    adapter: str | None = None
    head: tuple[str, ...] = ()
    idle_stacks: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[Asked, ...]:
        """What is asked for modules."""
        return tuple(m for m in self.modules if not m.experts)

    @property
    def stacks(self) -> tuple[Asked, ...]:
        """What is asked for stacked parameters of experts."""
        return tuple(m for m in self.modules if m.experts)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, rising."""
        return tuple(sorted({m.r for m in self.modules}))


@dataclass(frozen=True, slots=True)
class Written:
    """What a trainer's writer returns.

    Attributes:
        files: suggested file name -> text.
        notes: sentences for people.
    """

    files: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Given:
    """What one module gets from a file that was read again."""

    r: int
    lora_alpha: float
    scaling: float


class Reading(abc.ABC):
    """The settings in one file, parsed from its text.

    Attributes:
        file: its name.
    """

    file: str

    @abc.abstractmethod
    def gives(self, module: str, *, stack: bool = False) -> Given | None:
        """Return what the trainer gives to a module, or to each expert of a stack; None where it adds no adapter."""

    def peft_config(self) -> Mapping[str, Any] | None:
        """Return the keyword arguments of the LoraConfig that the trainer builds; None if it does not use PEFT."""
        return None

    def idle_keys(self, modules: Sequence[str], stacks: Sequence[str] = ()) -> list[str]:
        """Return the entries that select none of these modules and stacked parameters."""
        del modules, stacks
        return []


@dataclass(frozen=True, slots=True)
class PeftReading(Reading):
    """A file from which a PEFT LoraConfig is made.

    Attributes:
        file: its name.
        config: keyword arguments of LoraConfig.
    """

    file: str
    config: Mapping[str, Any]
    settings: LoraSettings = field(init=False)
    targets: str | frozenset[str] = field(init=False)
    parameters: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", read_settings(self.config, self.file))
        targets = self.config.get("target_modules") or ()
        object.__setattr__(self, "targets", targets if isinstance(targets, str) else frozenset(targets))
        object.__setattr__(self, "parameters", frozenset(self.config.get("target_parameters") or ()))

    def gives(self, module: str, *, stack: bool = False) -> Given | None:
        """As PEFT does: `target_modules` or `target_parameters` selects, the first pattern that matches decides."""
        if not selects(self.parameters if stack else self.targets, module):
            return None
        r, alpha = self.settings.rank_of(module), self.settings.alpha_of(module)
        return Given(r, alpha, scaling(self.settings.rule, alpha, r))

    def peft_config(self) -> Mapping[str, Any]:
        """Return the fields as they stand in the file."""
        return self.config

    def idle_keys(self, modules: Sequence[str], stacks: Sequence[str] = ()) -> list[str]:
        """Return pattern keys and targets that select none of these modules and stacked parameters."""
        idle = []
        named = [*modules, *stacks]
        for name, pattern in (("rank_pattern", self.settings.ranks), ("alpha_pattern", self.settings.alphas)):
            used = {place for module in named for place in pattern.matches(module)}
            idle += [f"{name}[{key!r}]" for place, key in enumerate(pattern.keys) if place not in used]
        ends = {tail for stack in stacks for tail in _tails(stack)}
        idle += [f"target_parameters[{entry!r}]" for entry in sorted(self.parameters - ends)]
        if isinstance(self.targets, str):
            return idle
        tails = {tail for module in modules for tail in _tails(module)}
        return idle + [f"target_modules[{entry!r}]" for entry in sorted(self.targets - tails)]


def selects(targets: str | Collection[str], module: str) -> bool:
    """Tell whether PEFT's `target_modules` means a module (`check_target_module_exists` of 0.21).

    A string is a regular expression over the full name; an entry of a list is a full name or its last parts.

    >>> selects(["q_proj", "layers.1.up"], "a.layers.1.up"), selects("q_proj", "a.q_proj")
    (True, False)
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(tail in targets for tail in _tails(module))


def _tails(module: str) -> list[str]:
    """Return a name and every part of it that begins after a dot."""
    return [module] + [module[dot.end() :] for dot in re.finditer(r"\.", module)]


@dataclass(frozen=True, slots=True)
class FlatReading(Reading):
    """A file with one rank and one scale, for every module that it selects.

    Attributes:
        file: its name.
        given: what each of them gets.
        chosen: whether a module is selected.
    """

    file: str
    given: Given
    chosen: Callable[[str], bool]

    def gives(self, module: str, *, stack: bool = False) -> Given | None:
        """Return the one setting, or None."""
        return self.given if not stack and self.chosen(module) else None


@dataclass(frozen=True, slots=True)
class AdapterReading(Reading):
    """A file that starts from an adapter folder; ranks and scales are those of the folder.

    Attributes:
        file: its name.
        adapter: the folder as it stands in the file.
    """

    file: str
    adapter: str

    def gives(self, module: str, *, stack: bool = False) -> Given | None:
        """Return None: the folder is compared with the plan as a whole."""
        del module, stack
        return None


@dataclass(frozen=True, slots=True)
class Trainer:
    """One trainer: what it can carry, and how its files are written and read.

    Attributes:
        title: as its users write it.
        read_at: version or commit whose source the keys were taken from.
        per_module: whether it takes a rank and an alpha for each module.
        rslora: whether it knows alpha / sqrt(r); without, alpha is turned into that of alpha / r.
        whole_alpha: whether alpha has to be a whole number.
        from_adapter: whether training can start from a PEFT adapter folder.
        write: from a job to files.
        read: from file names and texts to what they say.
        stacks: whether it takes stacked parameters of experts, as PEFT's `target_parameters`.
    """

    title: str
    read_at: str
    per_module: bool
    rslora: bool
    whole_alpha: bool
    from_adapter: bool
    write: Callable[[Job], Written]
    read: Callable[[Mapping[str, str]], Sequence[Reading]]
    stacks: bool = False


@dataclass(frozen=True, slots=True)
class ExportedModule:
    """What one module gets from the files, after they were read again.

    Attributes:
        module: full name.
        r: rank.
        lora_alpha: alpha as the trainer takes it, which need not be that of the plan's rule.
        scaling: the factor on B @ A that the trainer applies.
        scale_error: scaling / planned scaling - 1.
    """

    module: str
    r: int
    lora_alpha: float
    scaling: float
    scale_error: float


@dataclass(frozen=True, slots=True)
class Export:
    """A plan in the words of one trainer, read again and found to be the plan.

    Attributes:
        trainer: name in `TRAINERS`.
        files: suggested file name -> text.
        notes: sentences for people.
        modules: what each module gets.
    """

    trainer: str
    files: dict[str, str]
    notes: tuple[str, ...]
    modules: tuple[ExportedModule, ...]
