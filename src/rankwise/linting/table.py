"""All rules in one table: code, level and function. A section for every code stands in docs/reference/lints.md.

In: nothing. Out: `LINTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from rankwise.linting.rules import files, patterns, scales, serving, starts
from rankwise.linting.subject import Hit, Subject
from rankwise.records import Level
from rankwise.runtimes import Runtime


@dataclass(frozen=True, slots=True)
class Lint:
    """One rule.

    Attributes:
        level: of its findings, unless a hit says otherwise.
        summary: what it finds, in a few words.
        check: from a subject to what it found; None for the rules of a runtime.
        check_runtime: from a subject and a runtime to what it found.
    """

    level: Level
    summary: str
    check: Callable[[Subject], Iterator[Hit]] | None = None
    check_runtime: Callable[[Subject, Runtime], Iterator[Hit]] | None = None


LINTS: Final[dict[str, Lint]] = {
    "no-lora": Lint("info", "the config trains no LoRA", files.no_lora),
    "no-rank": Lint("error", "axolotl is given no rank or no alpha", files.no_rank),
    "adapter-decides": Lint("warning", "patterns are ignored in favour of an adapter's own", files.adapter_decides),
    "key-of-another-trainer": Lint("warning", "a key is dropped by this trainer", files.key_of_another_trainer),
    "key-given-twice": Lint("warning", "a key stands twice, and the last one holds", files.key_given_twice),
    "alpha-left-at-default": Lint("warning", "r was raised and alpha was not", scales.alpha_left_at_default),
    "small-scale": Lint("warning", "alpha is far below r", scales.small_scale),
    "large-scale": Lint("warning", "the scale is far above the usual", scales.large_scale),
    "alpha-2r-with-rslora": Lint("warning", "alpha = 2 r under alpha / sqrt(r)", scales.alpha_2r_with_rslora),
    "silent-2r": Lint("info", "LLaMA-Factory takes alpha = 2 r by itself", scales.silent_2r),
    "trl-r256-alpha16": Lint("warning", "the example of TRL's documentation", scales.trl_r256_alpha16),
    "low-learning-rate": Lint("info", "the learning rate is that of full fine-tuning", scales.low_learning_rate),
    "integer-alpha": Lint("error", "the trainer takes whole alphas only", scales.integer_alpha),
    "rounded-alphas": Lint("info", "whole alphas that come near one scale", scales.rounded_alphas),
    "rank-pattern-alone": Lint("warning", "ranks differ, alphas do not", patterns.rank_pattern_alone),
    "pattern-order": Lint("error", "keys that overlap change meaning when PEFT saves", patterns.pattern_order),
    "pattern-shadowed": Lint("warning", "a key comes after one that takes its modules", patterns.pattern_shadowed),
    "pattern-unmatched": Lint("error", "a key matches no module", patterns.pattern_unmatched),
    "target-unmatched": Lint("warning", "a target names no module", patterns.target_unmatched),
    "gaussian-init": Lint("warning", "A is drawn with a deviation of 1 / r", starts.gaussian_init),
    "init-changes-base": Lint("warning", "the start changes the base weights", starts.init_changes_base),
    "eva-with-rslora": Lint("warning", "EVA keeps alpha / r, not alpha / sqrt(r)", starts.eva_with_rslora),
    "eva-anchored-key": Lint("warning", "EVA misses keys with ^", starts.eva_anchored_key),
    "moe-with-rslora": Lint("warning", "fused experts get sqrt(2) times the scale", starts.moe_with_rslora),
    "dropout-with-parameters": Lint("error", "dropout with target_parameters", starts.dropout_with_parameters),
    "untrained": Lint("info", "every B is zero", files.untrained),
    "rank-above-shape": Lint("warning", "r is above the smaller side of a weight", files.rank_above_shape),
    "scale-differs-by-runtime": Lint("info", "some runtimes apply another scale", serving.scale_differs_by_runtime),
    "runtime-scale": Lint("error", "the runtime applies another scale", check_runtime=serving.runtime_scale),
    "runtime-rank-cap": Lint("error", "the rank is above the runtime's cap", check_runtime=serving.runtime_rank_cap),
    "runtime-refuses": Lint("error", "the runtime does not load it", check_runtime=serving.runtime_refuses),
    "runtime-alpha-format": Lint("error", "the alpha stops the reader", check_runtime=serving.runtime_alpha_format),
    "runtime-needs-config": Lint("error", "the runtime reads PEFT only", check_runtime=serving.runtime_needs_config),
}
"""Code -> rule, in the order in which they are tried."""
