"""Examples as the trainer wants them: token ids, and labels that say which of them are trained on.

In: rows of text. Out: `input_ids` and `labels`, cut at the context.

The rules are those of TRL's SFTTrainer (1.16): the end-of-sequence token closes a text or completion, prompt and
completion are tokenised together, and the completion begins where the tokens of prompt and whole part. They
are done here in batches, where TRL maps row by row. Packing is left to TRL.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rankwise.tuning.data import Examples

IGNORED: Final = -100
"""Label of a token that is not trained on."""


def encode(examples: Examples, tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    """Return the columns `input_ids` and `labels`, a list a row.

    A chat is trained on the turns of the assistant where the template marks them with {% generation %}, and on its last
    turn otherwise.
    """
    if examples.form == "messages":
        pairs = [_chat(row["messages"], tokenizer) for row in examples.rows]
    else:
        pairs = _plain(examples, tokenizer)
    return {
        "input_ids": [ids[:max_length] for ids, _ in pairs],
        "labels": [labels[:max_length] for _, labels in pairs],
    }


def _plain(examples: Examples, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    end = tokenizer.eos_token or ""
    if examples.form == "text":
        texts = [row["text"] if row["text"].endswith(end) else row["text"] + end for row in examples.rows]
        return [(ids, ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    prompts = tokenizer([row["prompt"] for row in examples.rows], verbose=False)["input_ids"]
    wholes = tokenizer(
        [
            row["prompt"] + (row["completion"] if row["completion"].endswith(end) else row["completion"] + end)
            for row in examples.rows
        ],
        verbose=False,
    )["input_ids"]
    return [(ids, _masked(ids, prompt)) for prompt, ids in zip(prompts, wholes, strict=True)]


def _masked(ids: list[int], prompt: list[int]) -> list[int]:
    start = 0
    for a, b in zip(ids, prompt, strict=False):
        if a != b:
            break
        start += 1
    return [IGNORED] * start + ids[start:]


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or ""):
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = list(out["input_ids"])
        return ids, [i if on else IGNORED for i, on in zip(ids, out["assistant_masks"], strict=True)]
    asked, answered = last_turn(messages)
    ids = templated(tokenizer, answered, asking=False)
    return ids, _masked(ids, templated(tokenizer, asked, asking=True))


def last_turn(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return a chat up to its last turn of the assistant, without that turn and with it; what follows it is dropped."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[: last + 1]


def templated(tokenizer: Any, messages: list[dict[str, str]], *, asking: bool) -> list[int]:
    """Return the tokens of a chat; none for an empty one, which templates need not take."""
    if not messages:
        return []
    out = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=asking)
    return list(out["input_ids"])
