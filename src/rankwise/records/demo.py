"""demo/1: the story that `demo` tells, run by run.

In: figures of its training runs. Out: the record.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from rankwise.records.base import Part, Record, data_frame
from rankwise.records.runs import Status


class DemoRun(Part, frozen=True, kw_only=True):
    """One training run of the demo, in the figures that the page compares.

    Attributes:
        name: "rank 64, rslora" and so on; unique.
        role: "fixed rate": at the learning rate that all share; "best rate": at the one that suits it;
            "style": the style data.
        path: of the run/1 record, relative to the demo's folder.
        rank: r of every module.
        scaling: rule.
        factor: the factor on B @ A.
        learning_rate: highest learning rate.
        steps: optimizer steps.
        params: trainable parameters.
        status: as in run/1.
        loss: last training loss, nats a token.
        bits_per_person: bits recalled a person, minus the base's; of a style run, loss reduction in bits a sentence.
        exact_share: share of the facts (style: of the sentences) that greedy decoding gets right.
        paraphrased_bits_per_person: the same, asked in held-out words.
        paraphrased_exact_share: the same.
        forgetting: rise of the loss on plain text, nats a token.
        relative_norm: mean over the modules of norm(dW) / norm(W).
        effective_rank: mean over the modules.
        rank_90: mean over the modules.
        energy_by_rank: rank -> mean share of the energy.
        seconds: of training.
    """

    name: str
    role: Literal["fixed rate", "best rate", "style"]
    path: str
    rank: int
    scaling: str
    factor: float
    learning_rate: float
    steps: int
    params: int
    status: Status
    loss: float | None
    bits_per_person: float | None
    exact_share: float | None
    paraphrased_bits_per_person: float | None
    paraphrased_exact_share: float | None
    forgetting: float | None
    relative_norm: float | None
    effective_rank: float | None
    rank_90: float | None
    energy_by_rank: dict[str, float | None]
    seconds: float | None


class DemoRecord(Record, frozen=True, kw_only=True):
    """demo/1: the whole story on the built-in model and facts.

    Attributes:
        model: the model.
        model_params: its parameters.
        data: the facts trained on.
        style_data: the style data trained on.
        people: number of people in the facts.
        facts: number of facts that hold bits.
        bits_per_person: bits in the facts about one person.
        base_bits_per_person: what the untuned model scores.
        steps: optimizer steps of a run.
        batch_size: examples a step.
        lora_alpha: alpha of every run.
        learning_rate: that the runs at a fixed rate share.
        best_learning_rate: of the run at its best rate, chosen on other facts beforehand.
        best_chosen: how it was chosen.
        runs: the runs.
        caveats: what these figures do not show; read first.
        reading: what they show, in sentences made from the figures.
        seconds: of the whole demo.
    """

    FORMAT: ClassVar[str] = "rankwise/demo/1"

    model: str
    model_params: int
    data: str
    style_data: str
    people: int
    facts: int
    bits_per_person: float
    base_bits_per_person: float | None
    steps: int
    batch_size: int
    lora_alpha: float
    learning_rate: float
    best_learning_rate: float
    best_chosen: str
    runs: tuple[DemoRun, ...]
    caveats: tuple[str, ...]
    reading: tuple[str, ...]
    seconds: float

    def to_dataframe(self) -> Any:
        """Return one row a run as a pandas DataFrame (needs pandas)."""
        return data_frame([msgspec.structs.asdict(run) for run in self.runs])

    def __repr__(self) -> str:
        parts = []
        for run in self.runs:
            bits = "unknown" if run.bits_per_person is None else f"{run.bits_per_person:.1f} bits"
            parts.append(f"{run.name} at {run.learning_rate:g}: {bits}")
        return f"DemoRecord({self.people} people of {self.bits_per_person:.1f} bits; {'; '.join(parts)})"
