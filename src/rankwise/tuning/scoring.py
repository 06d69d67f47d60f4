"""Recall in bits, and forgetting: what a model says of facts and texts, with its adapter and without.

In: a model, its tokenizer, questions or texts. Out: losses, and the scores made of them.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from rankwise.records import AttributeRecall, Forgetting, Recall, RecallScore
from rankwise.tuning.encoding import last_turn, templated
from rankwise.tuning.world.builtin import BuiltIn, Question, is_builtin, read_builtin

if TYPE_CHECKING:
    from rankwise.tuning.data import Examples

MOST_BYTES: Final = 16 * 2**20
"""Logits of a batch take at most so much."""

MOST_EXAMPLES: Final = 1000
"""Examples asked where there are no pools; above that an even sample of them is."""

SAMPLES: Final = 48
SAMPLE_TOKENS: Final = 64
"""Texts sampled from the base, and their length, where no other text is given to measure forgetting on."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to score, in tokens.

    Attributes:
        ids: prompt and answer.
        start: index in `ids` of the first token of the answer, 1 or more.
        bits: log2 of the number of values the answer may take, or None.
        attribute: what is asked, or "".
        person: whom it is about, or "".
    """

    ids: tuple[int, ...]
    start: int
    bits: float | None = None
    attribute: str = ""
    person: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a model did on one item.

    Attributes:
        loss: summed over the tokens of the answer, in nats.
        tokens: number of them.
        exact: whether each token is the most probable one. Given the tokens before it, so that greedy decoding from
            the prompt writes the answer exactly when this holds.
    """

    loss: float
    tokens: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Quiz:
    """All that is asked to measure recall.

    Attributes:
        kind: "pools" where the pool of every value is known.
        splits: "training", and for built-in data "paraphrases" and "held out".
        people: number of people asked about, or None.
        share: share of the facts in the data that are asked.
    """

    kind: Literal["pools", "loss"]
    splits: dict[str, tuple[Item, ...]]
    people: int | None
    share: float = 1.0


def items_of(questions: Sequence[Question], tokenizer: Any) -> tuple[Item, ...]:
    """Turn questions into tokens."""
    prompts = tokenizer([q.prompt for q in questions])["input_ids"]
    whole = tokenizer([q.prompt + q.answer for q in questions])["input_ids"]
    return tuple(
        Item(tuple(ids), _common(prompt, ids), q.bits, q.attribute, q.person)
        for q, prompt, ids in zip(questions, prompts, whole, strict=True)
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return where two token lists part, 1 at least: tokens may merge across the end of the prompt."""
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return max(same, 1)


def quiz_of(builtin: BuiltIn, tokenizer: Any) -> Quiz:
    """Make the quiz of a built-in data set."""
    splits = {name: items_of(questions, tokenizer) for name, questions in builtin.questions.items()}
    pools = all(item.bits is not None for items in splits.values() for item in items)
    people = {item.person for item in splits.get("training", ())}
    return Quiz("pools" if pools else "loss", splits, len(people), len(people) / builtin.people)


def quiz_of_examples(examples: Examples, tokenizer: Any, max_length: int, *, seed: int) -> Quiz:
    """Make the quiz of a user's data: to write every completion, or every text, again.

    A chat is asked for its last turn. Examples are cut where training cut them.
    """
    rows = list(examples.rows)
    if len(rows) > MOST_EXAMPLES:
        rows = random.Random(seed).sample(rows, MOST_EXAMPLES)
    items = []
    for row in rows:
        if examples.form == "messages":
            asked, answered = last_turn(row["messages"])
            ids = templated(tokenizer, answered, asking=False)
            start = _common(templated(tokenizer, asked, asking=True), ids)
        elif examples.form == "prompt-completion":
            ids = tokenizer(row["prompt"] + row["completion"], verbose=False)["input_ids"]
            start = _common(tokenizer(row["prompt"], verbose=False)["input_ids"], ids)
        else:
            ids, start = tokenizer(row["text"], verbose=False)["input_ids"], 1
        ids = ids[:max_length]
        if start < len(ids):
            items.append(Item(tuple(ids), start))
    return Quiz("loss", {"training": tuple(items)}, None, len(rows) / len(examples.rows))


def answers(model: Any, items: Sequence[Item]) -> tuple[Answer, ...]:
    """Score items, in their order. The model is put into eval mode and back.

    Args:
        model: causal LM.
        items: of any lengths; batched by length so that little is padded.
    """
    import torch
    from torch.nn.functional import cross_entropy

    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    done: dict[int, Answer] = {}
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    try:
        with torch.no_grad():
            for batch in _batches(order, items, vocabulary):
                longest = max(len(items[i].ids) for i in batch)
                ids = torch.zeros(len(batch), longest, dtype=torch.long)
                wanted = torch.full((len(batch), longest), -100)
                for row, i in enumerate(batch):
                    item = items[i]
                    ids[row, : len(item.ids)] = torch.tensor(item.ids)
                    wanted[row, item.start : len(item.ids)] = ids[row, item.start : len(item.ids)]
                # right-padded under a causal mask: no token sees the padding after it
                logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
                target = wanted[:, 1:].to(device)
                counted = target != -100
                loss = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
                loss[counted] = cross_entropy(logits[counted].float(), target[counted], reduction="none").double()
                nats = loss.sum(-1).tolist()
                right = ((logits.argmax(-1) == target) | ~counted).all(-1).tolist()
                tokens = counted.sum(-1).tolist()
                for row, i in enumerate(batch):
                    done[i] = Answer(nats[row], tokens[row], right[row])
    finally:
        model.train(was_training)
    return tuple(done[i] for i in range(len(items)))


def _batches(order: Sequence[int], items: Sequence[Item], vocabulary: int) -> Iterator[list[int]]:
    """Yield indices, so many that the logits of a batch fit."""
    batch: list[int] = []
    for i in order:  # shortest first, so the new one is the longest
        if batch and (len(batch) + 1) * len(items[i].ids) * vocabulary * 4 > MOST_BYTES:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextlib.contextmanager
def base_of(model: Any) -> Iterator[None]:
    """Switch the adapter off, where there is one."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def take(model: Any, quiz: Quiz) -> dict[str, tuple[Answer, ...]]:
    """Ask everything."""
    return {split: answers(model, items) for split, items in quiz.splits.items()}


def recall_of(
    quiz: Quiz,
    base: Mapping[str, Sequence[Answer]],
    tuned: Mapping[str, Sequence[Answer]],
    *,
    params: int | None,
) -> Recall | None:
    """Make the recall of a record out of the answers of base and tuned model; None where nothing was asked."""
    if not quiz.splits.get("training"):
        return None
    scores = {split: _score(quiz, items, base[split], tuned[split]) for split, items in quiz.splits.items() if items}
    training = scores["training"]
    bits = training.bits
    return Recall(
        kind=quiz.kind,
        people=quiz.people,
        facts=training.facts,
        bits=bits,
        bits_possible=training.bits_possible,
        base_bits=training.base_bits,
        exact_share=training.exact_share,
        base_exact_share=training.base_exact_share,
        asked_share=quiz.share,
        bits_per_param=None if bits is None or not params else bits / quiz.share / params,
        paraphrases=scores.get("paraphrases"),
        held_out=scores.get("held out"),
        by_attribute=_by_attribute(quiz, base["training"], tuned["training"]),
    )


def _score(quiz: Quiz, items: Sequence[Item], base: Sequence[Answer], tuned: Sequence[Answer]) -> RecallScore:
    """Score a split. An answer that follows from another (0 bits) counts for exactness, not for bits."""
    free = [i for i, item in enumerate(items) if item.bits != 0]
    before = sum(base[i].loss for i in free) / math.log(2)
    after = sum(tuned[i].loss for i in free) / math.log(2)
    pools = quiz.kind == "pools"
    possible = math.fsum(items[i].bits or 0.0 for i in free)
    base_bits = possible - before if pools else None
    gained = _gain(possible, before, after, pools=pools)
    return RecallScore(
        facts=len(free),
        bits=_known(gained),
        bits_possible=possible if pools else _known(before),
        base_bits=None if base_bits is None else _known(base_bits),
        exact_share=sum(tuned[i].exact for i in free) / max(1, len(free)),
        base_exact_share=sum(base[i].exact for i in free) / max(1, len(free)),
    )


def _gain(possible: float, before: float, after: float, *, pools: bool) -> float:
    """Return the bits recalled beyond the base.

    Args:
        possible: log2 of the pools, summed.
        before: summed loss of the base, in bits.
        after: that of the tuned model.
        pools: whether there are pools. With them a rise that ends at 0 or below counts for nothing: to learn the form
            of the sentences, and with it what is in the pools, is not recall. A fall always counts.
    """
    if not (math.isfinite(before) and math.isfinite(after)):
        return math.nan
    if not pools or possible >= before:
        return before - after
    return possible - after if possible >= after else min(0.0, before - after)


def _by_attribute(quiz: Quiz, base: Sequence[Answer], tuned: Sequence[Answer]) -> tuple[AttributeRecall, ...]:
    items = quiz.splits["training"]
    rows = []
    for attribute in dict.fromkeys(item.attribute for item in items if item.attribute):
        members = [i for i, item in enumerate(items) if item.attribute == attribute]
        before = sum(base[i].loss for i in members) / math.log(2)
        after = sum(tuned[i].loss for i in members) / math.log(2)
        pool, pools = items[members[0]].bits, quiz.kind == "pools"
        gained = math.nan if pool == 0 else _gain((pool or 0.0) * len(members), before, after, pools=pools)
        row = AttributeRecall(
            attribute=attribute,
            facts=len(members),
            bits_per_fact=_known(gained / len(members)),
            bits_possible=pool if pools else _known(before / len(members)),
            exact_share=sum(tuned[i].exact for i in members) / len(members),
        )
        rows.append(row)
    return tuple(rows)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Keepsake:
    """Text that must not be forgotten, and what the base made of it.

    Attributes:
        data: what text.
        items: in tokens.
        base: answers of the base.
    """

    data: str
    items: tuple[Item, ...]
    base: tuple[Answer, ...]


def keepsake(model: Any, tokenizer: Any, name: str, texts: Iterable[str] | None, *, seed: int, length: int) -> Keepsake:
    """Take text the base already models and score the base on it.

    Args:
        model: with or without an adapter, which is switched off.
        tokenizer: of the model.
        name: what the text is called in the record.
        texts: the text; None samples from the base itself, so that the rise of the loss is the mean
            Kullback-Leibler divergence per token of the tuned model from its base.
        seed: of the sampling.
        length: tokens a text is cut at.
    """
    with base_of(model):
        if texts is None:
            items = _sampled(model, tokenizer, seed=seed, length=min(length, SAMPLE_TOKENS))
        else:
            ids = [tuple(i[:length]) for i in tokenizer(list(texts), verbose=False)["input_ids"]]
            items = tuple(Item(i, 1) for i in ids if len(i) > 1)
        return Keepsake(name, items, answers(model, items))


def _sampled(model: Any, tokenizer: Any, *, seed: int, length: int) -> tuple[Item, ...]:
    """Let the base write, at temperature 1, from its first token on."""
    import torch
    from transformers import GenerationConfig

    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    first = next(i for i in ids if i is not None)
    device = next(model.parameters()).device
    start = torch.full((SAMPLES, 1), first, device=device)
    was_training = model.training
    model.eval()
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else (own,))} - {None}
    plain = GenerationConfig(  # a model's own may punish repetition or cut the tail: that is not its distribution
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=first if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    devices = [device] if device.type == "cuda" else []
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = owner.generation_config
    owner.generation_config = plain  # what `plain` leaves open would be taken from the model's own
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            written = model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
            ).tolist()
    finally:
        owner.generation_config = settings
        model.train(was_training)
    ends |= {tokenizer.pad_token_id} - {None}
    items = []
    for row in written:
        stop = next((k for k, token in enumerate(row) if k and token in ends), len(row) - 1)
        if stop >= 1:
            items.append(Item(tuple(row[: stop + 1]), 1))
    return tuple(items)


def forgetting_of(model: Any, kept: Keepsake) -> Forgetting | None:
    """Score the tuned model on the text its base was scored on; None where there is no token to score."""
    tokens = sum(a.tokens for a in kept.base)
    if not tokens:
        return None
    before = sum(a.loss for a in kept.base) / tokens
    after = sum(a.loss for a in answers(model, kept.items)) / tokens
    if not math.isfinite(before):
        return None
    return Forgetting(data=kept.data, tokens=tokens, base_loss=before, tuned_loss=_known(after))


def plain_texts(name: str) -> tuple[str, ...] | None:
    """Return the texts of a built-in data set of texts, or None where the name is not one."""
    if not is_builtin(name):
        return None
    return tuple(row["text"] for row in read_builtin(name).rows if "text" in row)
