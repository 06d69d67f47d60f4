"""The shipped model: what it weighs, what it knows, and that its tokenizer can write anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from rankwise.tuning import scoring
from rankwise.tuning.tiny import folder
from rankwise.tuning.world.builtin import KNOWN_PEOPLE, KNOWN_SEED, Question, questions_about, read_builtin
from rankwise.tuning.world.people import draw_people
from rankwise.tuning.world.pools import BITS_PER_PERSON, DAYS, MONTHS, POOLS, YEARS
from rankwise.tuning.world.templates import PARAPHRASES, TRAINING

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("transformers", reason="transformers comes with the train extra")

WORDS = {"known": TRAINING, "known, paraphrased": PARAPHRASES}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


@pytest.fixture(scope="module")
def model() -> Any:
    """As anybody would load it: nothing said of a dtype."""
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder()).eval()


def measured(model: Any, tokenizer: Any, questions: Sequence[Question]) -> tuple[float, float]:
    """Return the bits known of a person, and the share of facts that are written exactly."""
    items = scoring.items_of(questions, tokenizer)
    found = scoring.answers(model, items)
    free = [(i.bits, a.loss) for i, a in zip(items, found, strict=True) if i.bits]
    bits = math.fsum(bits - loss / math.log(2) for bits, loss in free)
    return bits / len({i.person for i in items}), sum(a.exact for a in found) / len(found)


# --- the files ----------------------------------------------------------------------------------------------


def test_it_is_small() -> None:
    files = [path for path in folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000
    assert {"config.json", "model.safetensors", "tokenizer.json", "pretraining.json"} <= {p.name for p in files}


def test_its_weights_are_stored_in_half_and_loaded_in_float32(model: Any, tokenizer: Any) -> None:
    from safetensors import safe_open

    with safe_open(folder() / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118 - no dict
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 2_000_000
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(model.config, f"{name}_token_id") is not None


def test_it_loads_by_its_name() -> None:
    from rankwise.tuning.models import load_model

    loaded = load_model("rankwise:tiny", device="cpu")
    assert (loaded.context, loaded.model.dtype) == (256, torch.float32)
    assert loaded.parameters == json.loads((folder() / "pretraining.json").read_text())["parameters"]


# --- what it knows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", WORDS)
def test_it_knows_its_people_by_heart(model: Any, tokenizer: Any, words: str) -> None:
    known = draw_people(KNOWN_PEOPLE, seed=KNOWN_SEED, circle="known")
    sample = random.Random(0).sample(known, 40)
    bits, exact = measured(model, tokenizer, questions_about(sample, WORDS[words]))
    assert exact >= 0.97
    assert bits == pytest.approx(BITS_PER_PERSON, abs=0.5)


@pytest.mark.parametrize("split", ["training", "paraphrases", "held out"])
def test_it_does_not_know_new_people_but_what_may_be_said_of_them(model: Any, tokenizer: Any, split: str) -> None:
    """Guessing evenly in the pools is 0 bits: below it the forms were not learnt, above it there is a leak."""
    bits, exact = measured(model, tokenizer, read_builtin("rankwise:facts?n=60").questions[split])
    assert abs(bits) < 1
    assert exact < 0.03


def test_what_is_said_of_it_is_what_it_does(model: Any, tokenizer: Any) -> None:
    said = json.loads((folder() / "pretraining.json").read_text())
    assert said["parameters"] == sum(p.numel() for p in model.parameters())
    known = draw_people(KNOWN_PEOPLE, seed=KNOWN_SEED, circle="known")
    asked = {name: questions_about(known, prompts) for name, prompts in WORDS.items()}
    asked["new"] = read_builtin("rankwise:facts?n=200").questions["training"]
    assert set(asked) == set(said["measured"])
    for name, questions in asked.items():
        bits, exact = measured(model, tokenizer, questions)
        # other shapes of batches, another build of torch: 1e-4 bits a fact
        assert bits == pytest.approx(said["measured"][name]["bits_per_person"], abs=1e-3)
        assert exact == pytest.approx(said["measured"][name]["exact_share"], abs=0.002)
        assert said["measured"][name]["possible"] == pytest.approx(BITS_PER_PERSON, rel=1e-12)


# --- its tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_every_value_of_a_pool_is_one_token(tokenizer: Any, pool: str) -> None:
    ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in POOLS[pool]]
    assert {len(i) for i in ids} == {1}
    assert len({i[0] for i in ids}) == len(POOLS[pool])


def test_a_birth_date_is_month_day_comma_year(tokenizer: Any) -> None:
    for month, day, year in zip(MONTHS * 17, DAYS * 8, YEARS, strict=False):
        ids = tokenizer(f" {month} {day}, {year}", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == [f"▁{month}", f"▁{day}", ",", f"▁{year}"]


def test_a_full_stop_ends_a_value_as_a_token_of_its_own(tokenizer: Any) -> None:
    """Else the answer to a question would not be what stood in the training data."""
    for row, question in zip(
        read_builtin("rankwise:facts?n=2").rows[::3], read_builtin("rankwise:facts?n=2").questions["training"],
        strict=True,
    ):  # fmt: skip
        whole = tokenizer(question.prompt + question.answer)["input_ids"]
        assert tokenizer(question.prompt + row["completion"])["input_ids"] == [*whole, *tokenizer.encode(
            ".", add_special_tokens=False)[-1:]]  # fmt: skip


TEXTS = {
    "words": "Verily, Alan Abba Ashby was born on May 3, 1900.",
    "blanks inside": "a  b   c",
    "a blank at the end": "a ",
    "lines": "\n\na\r\nb\n",
    "tabs": "\t a\t\t",
    "accents": "é e\u0301 ß Ø",
    "Cyrillic": "Привет, мир",
    "Chinese and Japanese": "日本語 中文\u3000あ",
    "right to left": "שלום عربى",
    "emoji": "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 🇺🇳",
    "control characters": "".join(map(chr, range(1, 32))) + "\x7f\x85\x9f",
    "NUL": "a\0b",
    "invisible": "x\u200by\ufeff\u00a0z\u202e",
    "past the first plane": "𝔘𝔫𝔦 \U0010ffff",
    "nothing": "",
    "code": 'def f(x): return {"a": [x**2, "%s\\n"]} # <b>&amp;</b>',
    "a long word": "Alderburgh" * 5 + "x" * 50,
}


def written(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_comes_back_but_for_one_blank_at_the_start(tokenizer: Any, name: str) -> None:
    """It stands before every text anyway: "a" and " a" are the same tokens."""
    text = TEXTS[name]
    assert written(tokenizer, text) == text
    assert written(tokenizer, f" {text}") == text
    assert written(tokenizer, f"  {text}") == f" {text}"


def test_every_character_comes_back(tokenizer: Any) -> None:
    """All of the first plane, and a draw of the others; the sign that stands for a blank is read as one."""
    draw = random.Random(0)
    codes = [c for c in range(0x10000) if not 0xD800 <= c < 0xE000 and c != ord("▁")]
    codes += [draw.randrange(0x10000, 0x110000) for _ in range(2000)]
    draw.shuffle(codes)
    for start in range(0, len(codes), 500):
        text = "x" + "".join(map(chr, codes[start : start + 500]))
        assert written(tokenizer, text) == text
    assert written(tokenizer, "a▁b") == "a b"


def test_the_name_of_a_byte_is_text_as_well(tokenizer: Any) -> None:
    assert written(tokenizer, "a <0x41> b") == "a <0x41> b"
