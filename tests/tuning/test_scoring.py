"""Recall in bits and forgetting, held to models whose every probability is planted."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankwise.records import RunRecord, read_record, to_json
from rankwise.tuning import scoring
from rankwise.tuning.scoring import Answer, Item, Keepsake, Quiz, answers, forgetting_of, keepsake, recall_of, take
from rankwise.tuning.world.builtin import Question, read_builtin

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("transformers", reason="transformers comes with the train extra")

POOL = 8
"""Tokens 0 to 7 are the values of a pool; ASK comes before them."""
ASK = POOL
FLOAT32 = 1e-6
"""Losses are taken in float32: a few units in the last place, of the sum over the vocabulary where that is the larger:
it is near 1, so that its logarithm is off by as much however small the loss. Which units depends on the processor."""


class Table(torch.nn.Module):
    """A causal LM that looks at the last token alone: row i is what follows token i, in probabilities.

    With `tuned`, that is the table of an adapter which `disable_adapter` switches off.
    """

    def __init__(self, table: Any, tuned: Any = None) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(len(table), 1)
        self.tables = [torch.as_tensor(np.asarray(t), dtype=torch.float64).log().float() for t in (table, tuned)
                       if t is not None]  # fmt: skip
        self.adapted = True
        self.shapes: list[tuple[int, int]] = []
        self.modes: set[bool] = set()
        if tuned is not None:
            self.disable_adapter = self._off

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        self.adapted = False
        yield
        self.adapted = True

    def get_input_embeddings(self) -> Any:
        return self.embedding

    def forward(self, input_ids: Any, **_: Any) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        self.modes.add(self.training)
        return SimpleNamespace(logits=self.tables[-1 if self.adapted else 0][input_ids])


def table(right: float, *, size: int = ASK + 1, value: int = 3) -> Any:
    """Return a table where a value of the pool follows ASK, `value` with the probability `right`."""
    rows = np.full((size, size), 1e-30)
    rows[:, :POOL] = (1 - right) / (POOL - 1)
    rows[:, value] = right
    return rows / rows.sum(1, keepdims=True)


def fact(value: int = 3, bits: float | None = math.log2(POOL), attribute: str = "a") -> Item:
    return Item((ASK, value), 1, bits, attribute, "somebody")


def quiz(*items: Item, kind: Any = "pools") -> Quiz:
    return Quiz(kind, {"training": items}, 1)


def bits_known(model: Any, item: Item) -> float:
    """Return the bits of one fact that a model knows."""
    asked = quiz(item)
    found = take(model, asked)
    recall = recall_of(asked, found, found, params=1)
    assert recall is not None
    assert recall.bits == 0, "a model gains nothing on itself"
    assert recall.base_bits is not None
    return recall.base_bits


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [0.5, 0.9, 0.125, 0.01])
def test_the_bits_of_a_fact_are_those_of_its_pool_less_the_loss(right: float) -> None:
    """log2(pool) - loss / ln 2, where the loss is -ln p."""
    (answer,) = answers(Table(table(right)), [fact()])
    assert answer.tokens == 1
    assert answer.loss == pytest.approx(-math.log(right), rel=FLOAT32, abs=FLOAT32)
    assert bits_known(Table(table(right)), fact()) == pytest.approx(math.log2(POOL) + math.log2(right), abs=FLOAT32)


def test_guessing_evenly_over_the_pool_is_worth_nothing() -> None:
    assert bits_known(Table(table(1 / POOL)), fact()) == pytest.approx(0, abs=FLOAT32)


def test_being_certain_is_worth_the_pool_where_it_is_right_and_costs_where_it_is_wrong() -> None:
    assert bits_known(Table(table(1.0)), fact()) == pytest.approx(math.log2(POOL), abs=FLOAT32)
    wrong = table(1 - 7e-20)  # any other value: 1e-20
    wrong[:, 5] = 1e-20
    assert bits_known(Table(wrong), fact(value=5)) == pytest.approx(3 - 20 * math.log2(10), rel=1e-4)


def test_only_the_tokens_of_the_answer_are_counted_and_all_of_them() -> None:
    """Two prompt tokens that the model finds unlikely, then three of the answer at 1/2, 1/16 and 1/4."""
    rows = np.full((9, 9), 1e-9)
    for last, follows, p in ((0, 1, 1e-6), (1, 2, 0.5), (2, 3, 0.0625), (3, 4, 0.25), (4, 5, 1e-6)):
        rows[last] = (1 - p) / 8
        rows[last, follows] = p
    (answer,) = answers(Table(rows), [Item((0, 1, 2, 3, 4), 2)])
    assert answer == Answer(pytest.approx(7 * math.log(2), rel=FLOAT32), 3, False)


def test_what_was_gained_is_the_fall_of_the_loss() -> None:
    asked = quiz(fact(3), fact(5))
    base, tuned = take(Table(table(1 / POOL)), asked), take(Table(table(0.5)), asked)
    recall = recall_of(asked, base, tuned, params=10)
    assert recall is not None
    gained = (3 + math.log2(0.5)) + (3 + math.log2(0.5 / 7))  # the value 5 shares the other half with six more
    assert recall.bits == pytest.approx(gained, abs=2 * FLOAT32)
    assert recall.base_bits == pytest.approx(0, abs=2 * FLOAT32)
    assert recall.bits_possible == 6
    assert recall.bits_per_param == pytest.approx(gained / 10, abs=FLOAT32)
    assert (recall.exact_share, recall.people, recall.facts) == (0.5, 1, 2)


def test_an_answer_that_follows_from_another_is_no_fact() -> None:
    asked = quiz(fact(3, attribute="employer"), fact(3, bits=0.0, attribute="city"))
    base, tuned = take(Table(table(1 / POOL)), asked), take(Table(table(0.5)), asked)
    recall = recall_of(asked, base, tuned, params=1)
    assert recall is not None
    assert (recall.facts, recall.bits_possible) == (1, 3)
    assert recall.bits == pytest.approx(2, abs=FLOAT32)
    wrong = recall_of(asked, base, {"training": (tuned["training"][0], Answer(0.0, 1, False))}, params=1)
    assert (recall.exact_share, wrong and wrong.exact_share) == (1, 1)
    assert wrong is not None
    assert wrong.bits == recall.bits
    assert [(a.attribute, a.bits_possible) for a in recall.by_attribute] == [("employer", 3), ("city", 0)]


@pytest.mark.parametrize("kind", ["pools", "loss"])
def test_the_attributes_sum_to_the_whole(kind: str) -> None:
    """Without pools every attribute counts; with them those that hold bits."""
    draw = random.Random(1)
    sizes = {"date": 5.0, "city": 3.0, "derived": 0.0} if kind == "pools" else dict.fromkeys("abc")
    items = [fact(bits=bits, attribute=name) for _ in range(20) for name, bits in sizes.items()]
    asked = quiz(*items, kind=kind)
    base, tuned = (
        {"training": tuple(Answer(draw.uniform(0, 9), 2, draw.random() < 0.5) for _ in items)} for _ in range(2)
    )
    recall = recall_of(asked, base, tuned, params=None)
    assert recall is not None
    counted = [a for a in recall.by_attribute if a.bits_possible]
    assert [a.attribute for a in recall.by_attribute] == list(sizes)
    if kind == "loss":  # with pools a rise below 0 is cut off in each attribute and in the whole
        assert math.fsum(a.bits_per_fact * a.facts for a in counted) == pytest.approx(recall.bits, rel=1e-12)
    assert math.fsum(a.bits_possible * a.facts for a in counted) == pytest.approx(recall.bits_possible, rel=1e-12)
    exact = sum(a.exact_share * a.facts for a in counted)
    assert exact == pytest.approx(recall.exact_share * recall.facts, rel=1e-12)
    assert (recall.bits_per_param, recall.base_bits is None) == (None, kind == "loss")


NOT_FINITE: dict[str, tuple[float, float]] = {
    "the base is nan": (math.nan, 1.0),
    "the tuned is nan": (1.0, math.nan),
    "the base is inf": (math.inf, 1.0),
    "the tuned is inf": (1.0, math.inf),
    "both are inf": (math.inf, math.inf),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_loss_that_is_no_number_gives_none(name: str) -> None:
    base, tuned = NOT_FINITE[name]
    asked = quiz(fact(attribute="a"), fact(attribute="b"))
    recall = recall_of(
        asked,
        {"training": (Answer(base, 1, False), Answer(2.0, 1, True))},
        {"training": (Answer(tuned, 1, False), Answer(1.0, 1, True))},
        params=5,
    )
    assert recall is not None
    assert (recall.bits, recall.bits_per_param) == (None, None)
    assert (recall.base_bits is None) == (not math.isfinite(base))
    assert [a.bits_per_fact for a in recall.by_attribute] == [None, pytest.approx(1 / math.log(2))]
    assert (recall.exact_share, recall.base_exact_share) == (0.5, 0.5)


def test_infinities_of_both_signs_give_none_as_well() -> None:
    asked = quiz(fact(), fact())
    one, other = ({"training": (Answer(a, 1, False), Answer(b, 1, False))} for a, b in ((math.inf, 1), (1, math.inf)))
    recall = recall_of(asked, one, other, params=1)
    assert recall is not None
    assert recall.bits is None


def test_there_is_no_recall_where_nothing_was_asked() -> None:
    assert recall_of(quiz(), {"training": ()}, {"training": ()}, params=1) is None
    assert recall_of(Quiz("loss", {}, None), {}, {}, params=1) is None
    assert answers(Table(table(0.5)), []) == ()


# --- exactness ----------------------------------------------------------------------------------------------


def greedy(model: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """Decode token by token: the slow oracle."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("levels", [1000, 3, 1], ids=["no ties", "many ties", "nothing but ties"])
def test_exact_means_that_greedy_decoding_writes_it(levels: int) -> None:
    """A table of few levels is full of equal logits; where two are highest, both ways take the same one."""
    draw = random.Random(levels)
    rows = np.array([[1 + draw.randrange(levels) for _ in range(50)] for _ in range(50)], dtype=float)
    model = Table(rows / rows.sum(1, keepdims=True))
    items = []
    for _ in range(150):
        prompt = [draw.randrange(50) for _ in range(draw.randint(1, 6))]
        written = list(greedy(model, prompt, draw.randint(1, 5)))
        if draw.random() < 0.5:  # one token, anywhere in the answer, by another that may be as probable
            at = draw.randrange(len(written))
            written[at] = draw.randrange(50)
        items.append(Item((*prompt, *written), len(prompt)))
    got = [a.exact for a in answers(model, items)]
    wanted = [greedy(model, i.ids[: i.start], len(i.ids) - i.start) == i.ids[i.start :] for i in items]
    assert got == wanted
    assert 0.4 < sum(got) / len(got) < 0.7, "the test must see both"


# --- batches ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(pico: Path) -> tuple[Any, Any]:
    """An untrained Llama of two layers, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(pico)


def test_padding_and_order_change_no_answer(small: tuple[Any, Any]) -> None:
    """A model that looks at all that came before; one item at a time has no padding."""
    model, _ = small
    draw = random.Random(0)
    items = []
    for length in [*range(2, 40), 127, 128]:
        ids = tuple(draw.randrange(3388) for _ in range(length))
        items.append(Item(ids, draw.randint(1, length - 1)))
    draw.shuffle(items)
    alone = [answers(model, [item])[0] for item in items]
    for order in (items, items[::-1]):
        found = dict(zip(order, answers(model, order), strict=True))
        for item, wanted in zip(items, alone, strict=True):
            # other shapes, other orders of summation: 1e-6 a token, measured
            assert found[item].loss == pytest.approx(wanted.loss, rel=1e-5)
            assert (found[item].tokens, found[item].exact) == (wanted.tokens, wanted.exact)
            assert found[item].tokens == len(item.ids) - item.start


def test_a_batch_holds_no_more_than_its_logits_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 150,000: ten megabytes are 17 tokens."""
    monkeypatch.setattr(scoring, "MOST_BYTES", 10 * 2**20)
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 40, 8, 9, 7]
    items = [Item(tuple(range(n)), 1) for n in lengths]
    order = sorted(range(len(items)), key=lambda i: lengths[i])
    made = list(scoring._batches(order, items, 150_000))
    assert list(itertools.chain(*made)) == order
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) * 150_000 * 4 <= 10 * 2**20
    for one, following in itertools.pairwise(made):  # none could have taken one more
        assert (len(one) + 1) * lengths[following[0]] * 150_000 * 4 > 10 * 2**20
    assert [lengths[i] for i in made[-1]] == [40], "longer than allowed, and so alone"


def test_the_models_vocabulary_decides_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MOST_BYTES", 4 * 2 * 100 * 7)  # seven items of two tokens
    model = Table(np.full((100, 100), 0.01))
    answers(model, [Item((1, 2), 1)] * 20)
    assert model.shapes == [(7, 2), (7, 2), (6, 2)]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_asked_in_eval_mode_and_put_back(training: bool) -> None:
    model = Table(table(0.5)).train(training)
    answers(model, [fact()])
    assert model.modes == {False}
    assert model.training is training
    with pytest.raises(IndexError):
        answers(model, [Item((ASK, 10_000), 1)])
    assert model.training is training


# --- questions into tokens ----------------------------------------------------------------------------------


def test_an_answer_begins_where_the_tokens_of_prompt_and_whole_part(small: tuple[Any, Any]) -> None:
    _, tokenizer = small
    asked = [("He was born in the city of", " Alderburgh"), ("He was born in the city of Alder", "burgh"), ("", " Lo")]
    items = scoring.items_of([Question(p, a, 1.0, "city", "he") for p, a in asked], tokenizer)
    for (prompt, answer), item in zip(asked, items, strict=True):
        assert list(item.ids) == tokenizer(prompt + answer)["input_ids"]
        assert list(item.ids[: item.start]) == tokenizer(prompt)["input_ids"][: item.start]
        assert 1 <= item.start < len(item.ids)
    blank, merged, nothing = items
    assert tokenizer.decode(blank.ids[blank.start :]) == "Alderburgh"
    assert merged.ids == blank.ids, "one token for the city, over the end of the prompt"
    assert merged.start == blank.start < len(tokenizer(asked[1][0])["input_ids"])
    assert nothing.start == 1


def test_facts_are_asked_in_pools_and_style_by_its_loss(small: tuple[Any, Any]) -> None:
    facts = scoring.quiz_of(read_builtin("rankwise:facts?n=3&seed=2"), small[1])
    assert (facts.kind, facts.people, list(facts.splits)) == ("pools", 3, ["training", "paraphrases", "held out"])
    assert {len(items) for items in facts.splits.values()} == {18}
    style = scoring.quiz_of(read_builtin("rankwise:style?n=3&seed=2"), small[1])
    assert (style.kind, style.people) == ("loss", 3)


EXAMPLES: dict[str, dict[str, Any]] = {
    "text": {"text": "He was born in the city of Alderburgh"},
    "prompt-completion": {"prompt": "He was born in", "completion": " the city of Alderburgh"},
    "messages": {
        "messages": [
            {"role": "user", "content": "He was born in"},
            {"role": "assistant", "content": "the city of Alderburgh"},
            {"role": "user", "content": "Lo"},
        ]
    },
}


@pytest.mark.parametrize("form", EXAMPLES)
def test_a_users_rows_are_asked_for_what_they_train(small: tuple[Any, Any], form: Any) -> None:
    from rankwise.tuning.data import Examples

    examples = Examples("rows", form, (EXAMPLES[form],), ("row 1",))
    (item,) = scoring.quiz_of_examples(examples, small[1], 128, seed=0).splits["training"]
    answer = small[1].decode(item.ids[item.start :], skip_special_tokens=True)
    assert answer == ("He was born in the city of Alderburgh" if form == "text" else "the city of Alderburgh")
    cut = scoring.quiz_of_examples(examples, small[1], item.start + 2, seed=0).splits["training"]
    assert cut == (Item(item.ids[: item.start + 2], item.start),)
    assert scoring.quiz_of_examples(examples, small[1], item.start, seed=0).splits["training"] == ()


def test_of_many_examples_an_even_sample_is_asked(small: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from rankwise.tuning.data import Examples

    monkeypatch.setattr(scoring, "MOST_EXAMPLES", 5)
    examples = Examples("rows", "text", tuple({"text": f"{n} is the number {n}"} for n in range(40)), ())
    one, same, other = (
        scoring.quiz_of_examples(examples, small[1], 99, seed=seed).splits["training"] for seed in (1, 1, 2)
    )
    assert len(set(one)) == 5
    assert one == same != other


# --- forgetting ---------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of which the texts are digits, each its own token."""

    eos_token_id = bos_token_id = pad_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(c) for c in text] for text in texts]}


def test_forgetting_is_the_rise_of_the_loss_a_token() -> None:
    """Token 3 goes from a probability of 0.5 to 0.125, the others from 1/14 to 1/8: planted to the last digit."""
    model = Table(table(0.5), tuned=table(0.125))
    kept = keepsake(model, Letters(), "digits", ["83", "8333", "835", "8", ""], seed=0, length=3)
    assert [i.ids for i in kept.items] == [(8, 3), (8, 3, 3), (8, 3, 5)], "cut at 3; one token alone says nothing"
    lost = forgetting_of(model, kept)
    assert lost is not None
    assert (lost.data, lost.tokens) == ("digits", 5)
    assert lost.base_loss == pytest.approx((4 * math.log(2) + math.log(14)) / 5, rel=FLOAT32)
    assert lost.tuned_loss == pytest.approx(math.log(8), rel=FLOAT32)
    assert model.adapted


def test_forgetting_of_nothing_is_none_and_of_a_broken_model_not_known() -> None:
    assert forgetting_of(Table(table(0.5)), Keepsake("nothing", (), ())) is None
    broken = table(0.5)
    broken[8] = math.nan
    model = Table(table(0.5), tuned=broken)
    lost = forgetting_of(model, keepsake(model, Letters(), "digits", ["83"], seed=0, length=9))
    assert lost is not None
    assert lost.base_loss == pytest.approx(math.log(2), rel=FLOAT32)
    assert lost.tuned_loss is None


def test_a_base_that_is_broken_leaves_a_record_that_can_be_read(tmp_path: Path) -> None:
    from run_samples import run

    lost = forgetting_of(Table(table(0.5)), Keepsake("digits", (Item((8, 3), 1),), (Answer(math.nan, 1, False),)))
    (tmp_path / "run.json").write_text(to_json(run(forgetting_detail=lost, forgetting=None)))
    assert read_record(tmp_path / "run.json", RunRecord) is not None


def test_plain_texts_are_those_of_the_data_set() -> None:
    texts = scoring.plain_texts("rankwise:plain?n=5&seed=3")
    assert texts is not None
    assert len(texts) == 5
    assert scoring.plain_texts("some/file.txt") is None


# --- text sampled from the base -----------------------------------------------------------------------------


def sampled(model: Any, tokenizer: Any, *, seed: int, length: int = 12) -> Keepsake:
    return keepsake(model, tokenizer, "sampled", None, seed=seed, length=length)


def test_the_seed_decides_what_the_base_writes_and_nobody_elses_numbers_move(small: tuple[Any, Any]) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, other = sampled(*small, seed=1), sampled(*small, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert sampled(*small, seed=1) == one
    assert one.items != other.items
    assert all(2 <= len(i.ids) <= 12 and i.start == 1 for i in one.items)
    assert len(one.items) == scoring.SAMPLES


def test_the_base_is_sampled_and_scored_even_where_an_adapter_is_attached(pico: Path, small: tuple[Any, Any]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    wanted = sampled(*small, seed=4)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True),
    )
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 30)
    got = sampled(adapted, small[1], seed=4)
    assert got.items == wanted.items
    assert [a.loss for a in got.base] == pytest.approx([a.loss for a in wanted.base], rel=1e-5)
    lost, same = forgetting_of(adapted, got), forgetting_of(small[0], wanted)
    assert lost is not None
    assert lost.tuned_loss is not None
    assert lost.tuned_loss > lost.base_loss + 0.5, "the adapter is on again"
    assert same is not None
    assert same.tuned_loss == pytest.approx(same.base_loss, rel=1e-6)


def test_the_text_is_what_the_model_says_at_temperature_1() -> None:
    """Its mean loss is then the entropy of the model: 2 bits for four tokens that are as probable as each other."""
    from small_models import pico_config
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(pico_config(vocab_size=4, eos_token_id=None, pad_token_id=None, bos_token_id=0))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # tied: every logit is 0
    kept = sampled(model, Letters(), seed=0)
    lost = forgetting_of(model, kept)
    assert lost is not None
    assert lost.base_loss == pytest.approx(math.log(4), rel=FLOAT32)
    counts = np.bincount([token for i in kept.items for token in i.ids[1:]], minlength=4)
    # 48 x 11 draws: four standard deviations of a share of 1/4 are 0.075
    assert np.abs(counts / counts.sum() - 0.25).max() < 0.075


SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "min_p": {"min_p": 0.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_bases_own_settings_for_generating_do_not_bend_the_text(pico: Path, small: Any, name: str) -> None:
    """Of the models on the hub many bring a repetition penalty; what they write then is not drawn from the model."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=3, bos_token_id=1, **SETTINGS[name])
    assert sampled(model, small[1], seed=3).items == sampled(*small, seed=3).items


def test_a_text_ends_at_any_token_that_ends_it(pico: Path, small: tuple[Any, Any]) -> None:
    """Chat models have two or three; the padding after one of them was never drawn."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    ends = list(range(100, 1500))
    model.generation_config.eos_token_id = [2, *ends]
    kept = sampled(model, small[1], seed=3)
    assert any(set(i.ids[1:]) & set(ends) for i in kept.items)
    assert not any(small[1].pad_token_id in i.ids for i in kept.items)
