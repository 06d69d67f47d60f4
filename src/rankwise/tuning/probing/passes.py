"""What a model makes of rows of tokens: the bits that each token costs, streamed in batches of like length.

In: a causal LM and rows of token ids and labels. Out: bits, row by row; what a batch needs is the most that is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from rankwise.tuning.encoding import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES: Final = 32 * 2**20
"""Logits of a batch take at most so much."""

MOST_TOKENS: Final = 2048
"""Tokens that go through the model at once where a gradient is wanted, and activations are kept."""

MOST_GRADED: Final = 256 * 2**20
"""Bytes of their logits."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One example in tokens.

    Attributes:
        ids: all tokens, cut at the context.
        labels: the same, `IGNORED` where a token is not trained on.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> tuple[int, ...]:
        """Places of the tokens that are trained on. Nothing predicts the first, so it is none."""
        return tuple(at for at in range(1, len(self.ids)) if self.labels[at] != IGNORED)


def rows_of(columns: dict[str, list[list[int]]]) -> tuple[TokenRow, ...]:
    """Return the rows of encoded examples."""
    pairs = zip(columns["input_ids"], columns["labels"], strict=True)
    return tuple(TokenRow(tuple(ids), tuple(labels)) for ids, labels in pairs)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows under one another, padded at the end, where a causal mask hides it.

    Attributes:
        rows: their numbers.
        ids: (rows, tokens).
        labels: (rows, tokens), `IGNORED` at padding.
    """

    rows: tuple[int, ...]
    ids: Tensor
    labels: Tensor


def batch_of(rows: Sequence[TokenRow], numbers: Sequence[int], device: Any) -> Batch:
    """Put rows under one another."""
    import torch

    longest = max(len(rows[i].ids) for i in numbers)
    ids = torch.zeros(len(numbers), longest, dtype=torch.long)
    labels = torch.full((len(numbers), longest), IGNORED)
    for place, i in enumerate(numbers):
        row = rows[i]
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        labels[place, : len(row.ids)] = torch.tensor(row.labels)
    return Batch(tuple(numbers), ids.to(device), labels.to(device))


def batches(rows: Sequence[TokenRow], numbers: Sequence[int], *, vocabulary: int, device: Any) -> Iterator[Batch]:
    """Yield batches of rows of like length, so many that their logits fit into `MOST_BYTES`."""
    waiting: list[int] = []
    for i in sorted(numbers, key=lambda i: len(rows[i].ids)):  # shortest first, so the new one is the longest
        if waiting and (len(waiting) + 1) * len(rows[i].ids) * vocabulary * 4 > MOST_BYTES:
            yield batch_of(rows, waiting, device)
            waiting = []
        waiting.append(i)
    if waiting:
        yield batch_of(rows, waiting, device)


def parts(rows: Sequence[TokenRow], numbers: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Return the numbers in parts for which a gradient fits into memory; a row too long by itself stands alone.

    >>> rows = [TokenRow((0,) * 1000, (0,) * 1000)] * 3
    >>> parts(rows, [2, 0, 1], 100), parts(rows, [2, 0, 1], 100_000), parts(rows, [], 100)
    ([[2, 0], [1]], [[2], [0], [1]], [])
    """
    most = min(MOST_TOKENS, MOST_GRADED // (4 * vocabulary))
    if len(numbers) * max((len(rows[i].ids) for i in numbers), default=0) <= most:
        return [list(numbers)] if numbers else []
    made: list[list[int]] = [[]]
    for i in sorted(numbers, key=lambda i: len(rows[i].ids)):  # shortest first, so the new one is the longest
        if made[-1] and (len(made[-1]) + 1) * len(rows[i].ids) > most:
            made.append([])
        made[-1].append(i)
    return made


def summed_loss(model: Any, batch: Batch) -> Tensor:
    """Return nats over the target tokens, as transformers' own loss but for the mean."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    target = batch.labels[:, 1:]
    counted = target != IGNORED
    loss: Tensor = cross_entropy(logits[counted].float(), target[counted], reduction="sum")
    return loss


def vocabulary_of(model: Any) -> int:
    """Return the number of tokens that a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """Return log p of every token at every place but the first, nats: (rows, tokens - 1, vocabulary), float32."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    found: Tensor = logits.float().log_softmax(-1)
    return found


Said = Callable[[int], None]


def token_bits(model: Any, rows: Sequence[TokenRow], said: Said | None = None) -> tuple[tuple[float, ...], ...]:
    """Return what every token of every row costs the model, in bits; 0 for the first, which nothing predicts.

    Args:
        model: a causal LM; put into evaluation mode by the caller.
        rows: examples.
        said: told the number of rows done.
    """
    import torch

    done: dict[int, tuple[float, ...]] = {}
    device = model.get_input_embeddings().weight.device
    with torch.no_grad():
        for batch in batches(rows, range(len(rows)), vocabulary=vocabulary_of(model), device=device):
            logs = log_probabilities(model, batch)
            each = logs.gather(-1, batch.ids[:, 1:, None])[..., 0].double().cpu() / -math.log(2)  # (rows, tokens - 1)
            for place, i in enumerate(batch.rows):
                done[i] = (0.0, *each[place, : len(rows[i].ids) - 1].tolist())
            if said is not None:
                said(len(done))
    return tuple(done[i] for i in range(len(rows)))


def target_bits(row: TokenRow, bits: Sequence[float]) -> float:
    """Return what the tokens cost that are trained on.

    >>> target_bits(TokenRow((5, 6, 7), (-100, 6, 7)), (0.0, 2.0, 3.0))
    5.0
    """
    return math.fsum(bits[at] for at in row.targets)
