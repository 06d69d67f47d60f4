"""What a trained model is held against, taken before it is trained.

In: a model, a job or texts. Out: questions to recall, texts not to forget, the loss of the base on the data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Final

from rankwise.tuning import scoring
from rankwise.tuning.encoding import IGNORED
from rankwise.tuning.preparing import Job
from rankwise.tuning.world.builtin import is_builtin, read_builtin

BASE_ROWS: Final = 256
"""Rows on which the loss of the untuned model is taken, to hold divergence against."""

PLAIN: Final = "rankwise:plain"
"""Text that `rankwise:tiny` must not forget."""


def make_quiz(job: Job, *, seed: int) -> scoring.Quiz:
    """Return what is asked before and after: the questions of a built-in set, else a sample of the user's examples."""
    if job.builtin is not None and job.builtin.questions:
        return scoring.quiz_of(job.builtin, job.loaded.tokenizer)
    return scoring.quiz_of_examples(job.examples, job.loaded.tokenizer, job.config.max_length, seed=seed)


def base_loss(model: Any, job: Job) -> float | None:
    """Return the loss of the untuned model on a sample of the data, nats per trained token.

    None where the trained tokens of some row are not all at its end.
    """
    rows = list(zip(job.columns["input_ids"], job.columns["labels"], strict=True))
    rows = random.Random(0).sample(rows, min(len(rows), BASE_ROWS))
    items = []
    for ids, labels in rows:
        start = max(1, next((k for k, label in enumerate(labels) if label != IGNORED), len(labels)))
        if start >= len(ids):
            continue
        if IGNORED in labels[start:]:
            return None
        items.append(scoring.Item(tuple(ids), start))
    found = scoring.answers(model, items)
    tokens = sum(answer.tokens for answer in found)
    loss = sum(answer.loss for answer in found) / tokens if tokens else math.nan
    return loss if math.isfinite(loss) else None


def make_keepsake(loaded: Any, data: str | None, *, model: str, length: int, seed: int) -> scoring.Keepsake | None:
    """Take text that must not be forgotten and score the base on it.

    Args:
        loaded: the model and its tokenizer.
        data: DATA of texts; None for the built-in text of `rankwise:tiny`, else for text sampled from the base.
        model: the model's name.
        length: tokens a text is cut at.
        seed: of the sampling.
    """
    from rankwise.tuning.data import read_data

    name = data if data is not None else PLAIN if model == "rankwise:tiny" else None
    texts: Sequence[str] | None = None
    if name is not None:
        if is_builtin(name):
            builtin = read_builtin(name)
            name = builtin.name
            rows: Sequence[dict[str, Any]] = builtin.rows
        else:
            examples = read_data(name)
            name, rows = examples.name, examples.rows  # the name without the secrets of a URL
        if len(rows) > scoring.MOST_EXAMPLES:
            rows = random.Random(seed).sample(list(rows), scoring.MOST_EXAMPLES)
        texts = [_text(row, loaded.tokenizer) for row in rows]
    return scoring.keepsake(
        loaded.model,
        loaded.tokenizer,
        name if name is not None else "sampled from the base",
        texts,
        seed=seed,
        length=length,
    )


def _text(row: dict[str, Any], tokenizer: Any) -> str:
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return str(row["text"] if "text" in row else row["prompt"] + row["completion"])
