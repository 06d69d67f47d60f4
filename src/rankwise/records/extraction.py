"""extraction/1: what an adapter holds of a full fine-tune, and what it does not.

In: numbers and words. Out: the record that `extract` returns and leaves in the adapter's folder.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Finding, Part, Record, data_frame


class ExtractedModule(Part, frozen=True, kw_only=True):
    """One delta as the adapter carries it; of a stack of experts, one expert.

    Attributes:
        module: dotted path of the weight, without `.weight`; experts end in `[i]`.
        kind: what the delta is added to.
        shape: (out_features, in_features) of the delta; a kernel is taken as (out, in * kh * kw).
        r: rank.
        lora_alpha: alpha.
        scaling: the factor on B @ A that follows from them under the record's rule.
        relative_norm: norm(dW) / norm(W_base), or None where the base is zero.
        kept_energy_share: 1 - relative_error^2 of what is on file.
        relative_error: norm(dW - scaling B A) / norm(dW) of what is on file, after the cast to its dtype.
        relative_error_uncast: the same before the cast.
        least_relative_error: no factors of this rank leave less; certified, see `truncation`.
        route: how the factors were found: "subspace" (randomised, certified) or "exact" (float64).
        output_error: norm((dW - scaling B A) C^(1/2)) / norm(dW C^(1/2)) on texts that were held out of the
            calibration data, C the second moment of the module's inputs; None without calibration.
        output_error_plain: the same of the factors that minimise the error of the weights, at the same rank.
        notes: in words: a rank that was cut, a rank raised for other experts.
    """

    module: str
    kind: Literal["linear", "embedding", "conv", "expert"]
    shape: tuple[int, int]
    r: int
    lora_alpha: float
    scaling: float
    relative_norm: float | None
    kept_energy_share: float
    relative_error: float
    relative_error_uncast: float
    least_relative_error: float
    route: Literal["subspace", "exact"]
    output_error: float | None = None
    output_error_plain: float | None = None
    notes: tuple[str, ...] = ()


class WholeModule(Part, frozen=True, kw_only=True):
    """A module that is stored as it is in the tuned checkpoint (`modules_to_save`)."""

    module: str
    tensors: tuple[str, ...]
    params: int
    relative_norm: float | None


class NotExtracted(Part, frozen=True, kw_only=True):
    """A tensor that changed and is not in the adapter.

    Attributes:
        module: dotted path, with its last part where that is not `.weight`.
        reason: in words.
        relative_norm: norm(dW) / norm(W_base), or None where the two cannot be subtracted.
        energy: squared norm of the delta, or None likewise.
    """

    module: str
    reason: str
    relative_norm: float | None
    energy: float | None


class Calibration(Part, frozen=True, kw_only=True):
    """What calibration was done with and what it brought.

    Attributes:
        data: as given.
        samples: examples that the inputs were measured on.
        tokens: of these examples.
        held_out: examples that errors and losses are of; the factors were not fitted to them.
        inputs: "tuned" or "base": the model whose inputs were measured. The base's where the tuned one cannot be run.
        modules: modules whose inputs were measured.
        output_error: root mean square over these modules, on the held-out examples; None where there are none.
        output_error_plain: the same at equal rank without calibration.
        base_loss: nats a token on the held-out examples.
        tuned_loss: likewise.
        adapter_loss: base with the adapter.
        plain_loss: base with an adapter of equal rank without calibration.
        loss_difference: mean over the held-out tokens of how far the adapter's loss is from the tuned model's, nats,
            without regard to the sign: means of losses may agree where the models do not.
        loss_difference_plain: likewise without calibration.
    """

    data: str
    samples: int
    tokens: int
    held_out: int
    modules: int
    output_error: float | None
    output_error_plain: float | None
    base_loss: float | None = None
    tuned_loss: float | None = None
    adapter_loss: float | None = None
    plain_loss: float | None = None
    loss_difference: float | None = None
    loss_difference_plain: float | None = None
    inputs: Literal["base", "tuned"] = "base"

    @property
    def loss_difference_lowered(self) -> float | None:
        """The share of the loss difference that calibration takes away; below 0 where it adds to it."""
        if self.loss_difference is None or not self.loss_difference_plain:
            return None
        return 1 - self.loss_difference / self.loss_difference_plain


class ExtractionRecord(Record, frozen=True, kw_only=True):
    """extraction/1: a LoRA adapter out of a full fine-tune.

    Attributes:
        base: as given.
        tuned: as given.
        out: the folder of the adapter, as given.
        choice: how ranks were chosen: "rank", "energy", "relative-error", "signal" or "plan".
        wanted: the number, or the path of the plan, that came with it; None for "signal".
        rule: scaling rule of all modules.
        dtype: of the factors on file, or None where modules differ.
        params: entries of all factors, and of what is stored whole.
        relative_error: over all deltas in `modules` together, after the cast.
        carried_energy_share: of the squared norm of everything that changed and can be subtracted, what the adapter
            carries; None where nothing changed.
        modules: one entry a delta, in the order of the file.
        whole: modules that are stored whole.
        left_out: tensors that changed and are not in the adapter.
        unchanged: number of tensors that are equal bit by bit, and so are not in the adapter.
        target_modules: as in adapter_config.json.
        calibration: what calibration brought, or None without.
        findings: worst first.
    """

    FORMAT: ClassVar[str] = "rankwise/extraction/1"

    base: str
    tuned: str
    out: str
    choice: Literal["rank", "energy", "relative-error", "signal", "plan"]
    wanted: float | int | str | None
    rule: str
    dtype: str | None
    params: int
    relative_error: float | None
    carried_energy_share: float | None
    modules: tuple[ExtractedModule, ...]
    whole: tuple[WholeModule, ...]
    left_out: tuple[NotExtracted, ...]
    unchanged: int
    target_modules: tuple[str, ...]
    calibration: Calibration | None
    findings: tuple[Finding, ...]

    def to_dataframe(self) -> Any:
        """Return one row a module as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(m) for m in self.modules])

    def __repr__(self) -> str:
        error = "unknown" if self.relative_error is None else f"{self.relative_error:.3g}"
        return (
            f"ExtractionRecord({self.tuned!r} - {self.base!r}: {len(self.modules)} modules, {self.params:,} params, "
            f"relative error {error}, {len(self.left_out)} tensors left out)"
        )
