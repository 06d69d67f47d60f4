"""Examples in tokens: the same ids and labels that TRL's SFTTrainer makes of the same rows, in the same order."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from rankwise.tuning.data import Examples
from rankwise.tuning.encoding import IGNORED, encode, last_turn, templated
from rankwise.tuning.world.builtin import read_builtin

trl = pytest.importorskip("trl", reason="trl comes with the train extra")
torch = pytest.importorskip("torch", reason="torch comes with the train extra")

Columns = dict[str, list[list[int]]]

TEXTS = [
    "The office is in the city of Alderburgh.",
    "",
    "Привет 🏳\ufe0f\u200d🌈\n\n  two blanks  ",
    "It ended already.</s>",
    "</s> in front, and in </s> between",
    "word " * 60,
    " a blank in front",
]
PAIRS = [
    ("He was born in the city of", " Alderburgh."),
    ("He was born in the city of Alder", "burgh."),  # one token over the boundary
    ("", " Everything is answer."),
    ("He was born in ", "Alderburgh"),
    ("Told already:", " the end.</s>"),
    ("A prompt with </s> inside", " and text after"),
    ("long " * 20, "and an answer that is cut " * 9),
    ("é", "́ joins"),
]
CHATS: list[list[tuple[str, str]]] = [
    [("user", "Where is the office?"), ("assistant", "In Alderburgh.")],
    [("system", "Be short."), ("user", "Where?"), ("assistant", "Here."), ("user", "And?"), ("assistant", "There.")],
    [("assistant", "I begin."), ("user", "Then go on."), ("assistant", "So I do.")],
    [("user", "a" * 30), ("assistant", "b " * 90)],
    [("user", "Who has the last word?"), ("assistant", "I have."), ("user", "No."), ("user", "I.")],
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": text} for text in TEXTS],
    "prompt-completion": [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS],
    "messages": [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in CHATS],
}
PLAIN_CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""A template as most of them are: it does not mark what the assistant says."""


@pytest.fixture
def tokenizer(pico: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico)


@pytest.fixture(scope="module")
def model(pico: Path) -> Any:
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)


def ours(form: Any, rows: Any, tokenizer: Any, length: int = 128) -> Columns:
    return encode(Examples("rows", form, tuple(rows), ()), tokenizer, length)


def theirs(model: Any, rows: Any, tokenizer: Any, tmp_path: Path, length: int = 128, **flags: Any) -> Columns:
    """Return the columns that TRL trains on, for rows given as they are."""
    import datasets

    from rankwise.tuning.borrowing import quiet

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=str(tmp_path / "out"), max_length=length, report_to="none", use_cpu=True, bf16=False,
                shuffle_dataset=False, **flags,
            ),
            train_dataset=datasets.Dataset.from_list(list(rows)),
            processing_class=tokenizer,
        )  # fmt: skip
    made = trainer.train_dataset
    return {name: [list(row) for row in made[name]] for name in ("input_ids", "labels")}


@pytest.mark.parametrize("length", [128, 24])
@pytest.mark.parametrize("form", ROWS)
def test_ids_and_labels_are_those_of_trl(model: Any, tokenizer: Any, tmp_path: Path, form: str, length: int) -> None:
    """TRL drops a row of which nothing is left to train on; `check_examples` refuses it before that."""
    flags = {"assistant_only_loss": True} if form == "messages" else {}
    got = ours(form, ROWS[form], tokenizer, length)
    kept = [i for i, labels in enumerate(got["labels"]) if any(label != IGNORED for label in labels)]
    assert len(kept) == len(ROWS[form]) or length == 24
    assert max(map(len, got["input_ids"])) == length, "a row must be cut, or the test sees less than it says"
    wanted = theirs(model, ROWS[form], tokenizer, tmp_path, length, **flags)
    assert {name: [got[name][i] for i in kept] for name in got} == wanted


def test_the_facts_are_encoded_as_trl_would(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = read_builtin("rankwise:facts?n=2&seed=5").rows
    assert ours("prompt-completion", rows, tokenizer) == theirs(model, rows, tokenizer, tmp_path)


def test_a_chat_without_marks_is_a_prompt_and_its_last_turn(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """TRL has no such rule for messages; of the same turns as prompt and completion it makes the same tokens."""
    tokenizer.chat_template = PLAIN_CHAT
    rows = []
    for row in ROWS["messages"]:
        asked, answered = last_turn(row["messages"])
        rows.append({"prompt": asked, "completion": answered[len(asked) :]})
    got = ours("messages", ROWS["messages"], tokenizer)
    assert got == theirs(model, rows, tokenizer, tmp_path)
    last, tail = got["input_ids"][-1], got["labels"][-1]
    assert "No." not in tokenizer.decode(last), "what follows the last turn of the assistant is dropped"
    assert tokenizer.decode([i for i in tail if i != IGNORED], skip_special_tokens=True).strip() == "I have."


def test_a_chat_that_begins_with_its_only_answer_is_learnt_whole(tokenizer: Any) -> None:
    """Templates need not take an empty chat, so it is not asked for."""
    tokenizer.chat_template = "{{ raise_exception('empty') if not messages }}" + PLAIN_CHAT
    (labels,) = ours("messages", [{"messages": [{"role": "assistant", "content": "Lo"}]}], tokenizer)["labels"]
    assert IGNORED not in labels
    assert templated(tokenizer, [], asking=True) == []


@pytest.mark.parametrize("form", ["text", "prompt-completion"])
def test_the_end_is_written_once(tokenizer: Any, form: str) -> None:
    end = tokenizer.eos_token_id
    name = "text" if form == "text" else "completion"
    bare = {"prompt": "Where?", "completion": " Here."} if form != "text" else {"text": "Here."}
    closed = bare | {name: bare[name] + tokenizer.eos_token}
    one, other = ours(form, [bare], tokenizer), ours(form, [closed], tokenizer)
    assert one == other
    assert one["input_ids"][0][-1] == one["labels"][0][-1] == end
    assert one["input_ids"][0].count(end) == 1


def test_what_is_asked_is_not_trained_on(tokenizer: Any) -> None:
    got = ours("prompt-completion", [{"prompt": "He was born in", "completion": " Alderburgh."}], tokenizer)
    (ids,), (labels,) = got["input_ids"], got["labels"]
    start = len(tokenizer("He was born in")["input_ids"])
    assert labels == [IGNORED] * start + ids[start:]
    assert tokenizer.decode(ids[start:-1]) == "Alderburgh."


def test_columns_are_separate_lists(tokenizer: Any) -> None:
    """Of a text ids and labels are equal; whoever masks one of them must not mask the other."""
    got = ours("text", [{"text": "Here."}], tokenizer)
    got["labels"][0][0] = IGNORED
    assert got["input_ids"][0][0] == tokenizer.bos_token_id


MARKS = ["{% generation %}", "{%- generation %}", "{% generation -%}", "{%- generation -%}"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_marked_template_trains_every_turn_of_the_assistant(tokenizer: Any, mark: str) -> None:
    """However the marks are spelled: a dash takes the blanks beside it away."""
    dashed = mark.replace("generation", "endgeneration")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + mark + "{{ ' ' + m['content'] + eos_token }}" + dashed
        + "{% else %}{{ ' ' + m['content'] }}{% endif %}{% endfor %}"
    )  # fmt: skip
    (labels,) = ours("messages", [ROWS["messages"][1]], tokenizer)["labels"]
    learnt = tokenizer.decode([i for i in labels if i != IGNORED])
    assert "Here." in learnt
    assert "There." in learnt
    assert "Where?" not in learnt
