"""`recall` of any adapter: what it says of one whose worth is known, what it refuses, and what it leaves as it was."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import make_pico, pico_config

import rankwise
from planting import planted_factors, write_adapter
from rankwise.errors import (
    MalformedFileError,
    NothingToMeasureError,
    RankwiseError,
    UsageError,
    WrongKindError,
)
from rankwise.records import RecallRecord, read_record, to_json

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
peft = pytest.importorskip("peft", reason="peft comes with the train extra")

FACTS = "rankwise:facts?n=3&seed=1"
PLAIN = "rankwise:plain?n=3&seed=0"


def recall(model: Any, adapter: Any, data: Any = FACTS, **flags: Any) -> RecallRecord:
    """Measure; forgetting on three texts, which is quicker than to sample some."""
    return rankwise.recall(model, adapter, data, **({"device": "cpu", "forgetting_data": PLAIN} | flags))


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(pico: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico)


def adapt(base: Any, *, b: float = 0.0, **flags: Any) -> Any:
    """Return the model with an adapter of rank 4; B holds random numbers of that size."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", **flags))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * b)
    return model


@pytest.fixture(scope="module")
def loud(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moves every layer."""
    out = tmp_path_factory.mktemp("adapters") / "loud"
    adapt(load(pico), b=0.3).save_pretrained(out)
    return out


# --- what is measured ---------------------------------------------------------------------------------------


def test_an_adapter_of_zeros_recalls_nothing_and_forgets_nothing(pico: Path, tmp_path: Path) -> None:
    """Exactly: the same numbers are added to and taken away."""
    adapt(load(pico), b=0.0).save_pretrained(tmp_path / "zero")
    record = recall(str(pico), tmp_path / "zero")
    assert (record.recall.bits, record.forgetting, record.recall.bits_per_param) == (0, 0, 0)
    assert record.recall.exact_share == record.recall.base_exact_share
    assert record.recall.paraphrases is not None
    assert record.recall.paraphrases.bits == 0


def test_the_record_says_what_was_measured_and_can_be_read_again(pico: Path, loud: Path, tmp_path: Path) -> None:
    record = recall(str(pico), loud, seed=7, command=("rankwise", "recall", "x"), forgetting_data=None)
    (tmp_path / "recall.json").write_text(to_json(record))
    assert read_record(tmp_path / "recall.json", RecallRecord) == record
    assert (record.model, record.adapter, record.data) == (str(pico), str(loud), FACTS)
    assert (record.seed, record.device, record.command) == (7, "cpu", ("rankwise", "recall", "x"))
    widths = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "gate": (32, 64), "up": (32, 64)}
    assert record.params == 2 * 4 * sum(a + b for a, b in [*widths.values(), (64, 32)])
    assert (record.recall.people, record.recall.facts, record.recall.kind) == (3, 15, "pools")
    assert record.forgetting is not None
    assert record.forgetting > 0.1
    assert record.forgetting_detail is not None
    assert record.forgetting_detail.data == "sampled from the base"


def test_the_seed_is_that_of_the_text_that_is_sampled(pico: Path, loud: Path) -> None:
    one, same, other = (recall(str(pico), loud, seed=seed, forgetting_data=None) for seed in (0, 0, 1))
    assert (one.recall, one.forgetting_detail) == (same.recall, same.forgetting_detail)
    assert one.recall == other.recall
    assert one.forgetting_detail != other.forgetting_detail


def test_no_random_state_moves(pico: Path, loud: Path) -> None:
    torch.manual_seed(5)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    recall(str(pico), loud)
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert before[1:] == after[1:]
    assert torch.equal(before[0], after[0])


def test_text_of_the_users_own_may_be_what_must_not_be_forgotten(
    pico: Path, loud: Path, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "kept.txt").write_text("He was born in Alderburgh.\n\nThe office is in Embermouth.\n")
    record = recall(str(pico), loud, forgetting_data=str(tmp_path / "kept.txt"))
    assert record.forgetting_detail is not None
    assert record.forgetting_detail.data == str(tmp_path / "kept.txt")
    assert record.forgetting_detail.tokens == sum(
        len(tokenizer(text)["input_ids"]) - 1 for text in ("He was born in Alderburgh.", "The office is in Embermouth.")
    )


@pytest.mark.parametrize("length", [None, 8])
def test_rows_are_cut_where_they_are_told_to_be(pico: Path, loud: Path, length: int | None) -> None:
    rows = [{"text": "The office is in the city of Alderburgh."}, {"text": "So."}]
    record = recall(str(pico), loud, rows, max_length=length)
    assert (record.recall.kind, record.recall.facts, record.recall.base_bits) == ("loss", 2, None)
    whole = recall(str(pico), loud, rows)
    assert whole.recall.bits_possible is not None
    assert (record.recall.bits_possible == whole.recall.bits_possible) is (length is None)


# --- what is left as it was ---------------------------------------------------------------------------------


def test_a_live_base_gets_its_own_layers_and_weights_back(pico: Path, loud: Path, tokenizer: Any) -> None:
    base = load(pico)
    names = {name: (type(module), id(module)) for name, module in base.named_modules()}
    before = {name: (id(p), p.detach().clone()) for name, p in base.named_parameters()}
    one = recall(base, loud, tokenizer=tokenizer)
    assert {name: (type(module), id(module)) for name, module in base.named_modules()} == names
    after = dict(base.named_parameters())
    assert list(after) == list(before)
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in after.items())
    assert not hasattr(base, "peft_config")
    assert recall(base, loud, tokenizer=tokenizer).recall == one.recall == recall(str(pico), loud).recall
    assert one.model == "LlamaForCausalLM in memory"


def test_a_live_base_can_be_trained_afterwards_as_before(pico: Path, loud: Path, tokenizer: Any) -> None:
    base = load(pico).train()
    recall(base, loud, tokenizer=tokenizer)
    assert {p.requires_grad for p in base.parameters()} == {True}
    assert base.training


def test_a_live_base_is_left_alone_by_an_adapter_that_does_not_fit(loud: Path, tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM(pico_config(hidden_size=64))
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(MalformedFileError):
        recall(base, loud, tokenizer=tokenizer)
    assert [name for name, _ in base.named_parameters()] == names


def test_a_live_peft_model_is_measured_as_it_is(pico: Path, loud: Path, tokenizer: Any) -> None:
    live = peft.PeftModel.from_pretrained(load(pico), loud)
    record = recall(live, None, tokenizer=tokenizer)
    assert record.adapter is None
    assert record.recall == recall(str(pico), loud).recall
    assert [name for name, _ in live.named_parameters() if "lora_A" in name], "it keeps its adapter"


def test_the_call_in_the_record_can_be_typed_again(pico: Path, loud: Path) -> None:
    assert recall(pico, loud).command == (f"rankwise.recall({str(pico)!r}, {str(loud)!r}, {FACTS!r})",)


# --- refusals -----------------------------------------------------------------------------------------------


def test_an_adapter_of_another_width_is_refused(loud: Path, tmp_path: Path, pico: Path) -> None:
    from transformers import LlamaForCausalLM

    make_pico(tmp_path / "wide")
    LlamaForCausalLM(pico_config(hidden_size=64)).save_pretrained(tmp_path / "wide")
    with pytest.raises(MalformedFileError, match=r"loud does not fit the model: .*size mismatch") as caught:
        recall(str(tmp_path / "wide"), loud)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_an_adapter_of_a_deeper_model_is_refused(loud: Path, tokenizer: Any) -> None:
    """Half of it would be measured, and the record would not say so."""
    from transformers import LlamaForCausalLM

    with pytest.raises(RankwiseError, match="does not fit"):
        recall(LlamaForCausalLM(pico_config(num_hidden_layers=1)), loud, tokenizer=tokenizer)


def test_an_adapter_of_a_shallower_model_is_refused(tokenizer: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    """It names q_proj without a layer: peft would give the third one an adapter of its own making."""
    from transformers import LlamaForCausalLM

    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    factors = {name: planted_factors(rng, (32, 32), (1.0, 0.5)) for name in names}
    adapter = write_adapter(tmp_path / "two", factors, r=2, lora_alpha=2)
    deeper = LlamaForCausalLM(pico_config(num_hidden_layers=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as a user may have it; under pytest every warning is an error anyway
        with pytest.raises(MalformedFileError, match="two does not fit the model: Found missing adapter keys"):
            recall(deeper, adapter, tokenizer=tokenizer)


def test_an_adapter_of_another_architecture_is_refused(pico: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    factors = planted_factors(rng, (32, 32), (1.0, 0.5))
    write_adapter(tmp_path / "gpt", {"transformer.h.0.attn.c_attn": factors}, r=2, lora_alpha=2)
    with pytest.raises(MalformedFileError, match="gpt does not fit the model: "):
        recall(str(pico), tmp_path / "gpt")


def test_what_is_no_lora_adapter_is_refused(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(WrongKindError, match="is a full checkpoint; ADAPTER is meant to be a LoRA adapter"):
        recall(str(pico), pico)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RankwiseError, match="empty"):
        recall(str(pico), tmp_path / "empty")
    with pytest.raises(RankwiseError, match="none"):
        recall(str(pico), tmp_path / "none")
    peft.get_peft_model(load(pico), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(RankwiseError, match="IA3"):
        recall(str(pico), tmp_path / "ia3")


def test_an_adapter_in_the_bases_place_and_none_at_all(pico: Path, loud: Path) -> None:
    with pytest.raises(WrongKindError, match="holds a PEFT adapter"):
        recall(str(loud), loud)
    with pytest.raises(WrongKindError, match="has no adapter, and none was given"):
        recall(str(pico), None)


BAD: list[tuple[dict[str, Any], type[RankwiseError], str]] = [
    ({"max_length": 1}, UsageError, "--max-length must be 2 or more, got 1"),
    ({"max_length": 0}, UsageError, "--max-length must be 2 or more, got 0"),
    ({"seed": -1}, UsageError, "--seed must be from 0 to 4294967295, got -1"),
    ({"seed": 2**32}, UsageError, "--seed must be from 0 to 4294967295"),
    ({"device": "tpu"}, RankwiseError, "tpu"),
    ({"data": "rankwise:plain"}, NothingToMeasureError, "rankwise:plain holds no facts to ask for"),
    ({"data": "rankwise:fact"}, UsageError, "there is no data set rankwise:fact"),
    ({"data": [{"text": ""}]}, RankwiseError, ""),
    ({"data": []}, RankwiseError, "no rows"),
    ({"forgetting_data": "rankwise:nothing"}, UsageError, "there is no data set rankwise:nothing"),
]


@pytest.mark.parametrize(("flags", "kind", "words"), BAD, ids=[str(flags) for flags, _, _ in BAD])
def test_what_makes_no_sense_is_refused(
    pico: Path, loud: Path, flags: dict[str, Any], kind: type[RankwiseError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        recall(str(pico), loud, **flags)
    assert words in str(caught.value)


def test_a_length_past_the_context_is_refused(pico: Path, loud: Path) -> None:
    with pytest.raises(UsageError, match="past the model's context of 128 tokens"):
        recall(str(pico), loud, max_length=129)
