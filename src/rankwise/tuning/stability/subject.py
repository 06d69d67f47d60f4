"""What is checked: a frozen model, the modules that get a branch, and the batches.

In: a loaded model and token ids. Out: losses of one batch, for several copies of it at once. Nothing of the model is
changed for good: `frozen` puts back every flag.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from rankwise.errors import UsageError
from rankwise.tuning.encoding import IGNORED

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class Subject(Protocol):
    """What the measuring needs of a model: the tests put a linear toy in its place.

    Attributes:
        modules: name -> frozen layer with an input (..., in_features) and an output (..., out_features).
    """

    @property
    def modules(self) -> Mapping[str, Module]:
        """Name -> layer."""

    def losses(self, step: int, copies: int) -> Tensor:
        """Return the loss of the batch of a step (1, 2, ...) for each of `copies` copies, shape (copies,).

        The copies stand one after the other in the first dimension of every activation.
        """

    def probe(self) -> None:
        """Run the measuring batch, once."""

    def probe_rows(self) -> Tensor | None:
        """Which rows of a flattened activation of the measuring batch count, (rows,); None: all."""

    def most_copies(self) -> int:
        """Return how many copies fit into the working memory allowed for."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, (rows, tokens) each.

    Attributes:
        ids: padded at the end.
        mask: 1 where there is a token.
        predicts: whether the token after this one is trained on.
        targets: those tokens, in order, (number of them,).
    """

    ids: Tensor
    mask: Tensor
    predicts: Tensor
    targets: Tensor


MOST_TOKENS: Final = 4096
"""Tokens that go through the model at once. On a CPU larger stacks fall out of the cache and are slower."""

MOST_LOGITS: Final = 1 << 26
"""Logits that are held at once: 256 MiB."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A causal language model with its batches.

    Attributes:
        model: of transformers, frozen.
        layers: name -> module.
        batches: of the steps; past the last it begins again.
        measuring: the batch on which branches are measured.
        vocabulary: number of tokens that it knows.
    """

    model: Any
    layers: Mapping[str, Any]
    batches: tuple[Batch, ...]
    measuring: Batch
    vocabulary: int
    _head: Any = field(default=None)

    @property
    def modules(self) -> Mapping[str, Any]:
        """Name -> layer."""
        return self.layers

    def losses(self, step: int, copies: int) -> Tensor:
        """See `Subject`: mean nats per token that is trained on, as transformers' own loss."""
        from torch.nn.functional import cross_entropy

        batch = self.batches[(step - 1) % len(self.batches)]
        predicts = batch.predicts.repeat(copies, 1)
        with self._few_logits(predicts):
            logits = self.model(
                input_ids=batch.ids.repeat(copies, 1), attention_mask=batch.mask.repeat(copies, 1), use_cache=False
            ).logits
        if logits.ndim == 3:  # a model that does not go through its head once, with all positions
            logits = logits[predicts.to(logits.device)]
        targets = batch.targets.repeat(copies).to(logits.device)
        each = cross_entropy(logits.float(), targets, reduction="none")
        return each.view(copies, -1).mean(dim=1)

    @contextlib.contextmanager
    def _few_logits(self, keep: Tensor) -> Iterator[None]:
        """Let the head see only the positions that a loss is taken of: it is a third of a small model's time."""

        def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if args and args[0].ndim == 3 and args[0].shape[:2] == keep.shape:
                return (args[0][keep.to(args[0].device)], *args[1:])  # a model may lie on several devices
            return None

        if self._head is None:
            yield
            return
        handle = self._head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    def probe(self) -> None:
        """See `Subject`."""
        import torch

        batch = self.measuring
        nothing = torch.zeros_like(batch.predicts)
        nothing[0, 0] = True  # one position: some heads want at least that
        with torch.no_grad(), self._few_logits(nothing):
            self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)

    def probe_rows(self) -> Tensor | None:
        """See `Subject`: padding does not count."""
        return self.measuring.mask.flatten().bool()

    def most_copies(self) -> int:
        """See `Subject`."""
        tokens = max(int(batch.ids.numel()) for batch in self.batches)
        logits = max(len(batch.targets) for batch in self.batches) * self.vocabulary
        return max(1, min(MOST_TOKENS // tokens, MOST_LOGITS // logits))


def language_model(
    model: Any, names: Sequence[str], columns: Mapping[str, list[list[int]]], *, steps: int, size: int
) -> LanguageModel:
    """Cut the data into batches, and set the first rows aside for measuring.

    Args:
        model: a causal LM of transformers.
        names: modules to adapt.
        columns: `input_ids` and `labels`, in the order in which they are taken.
        steps: batches needed.
        size: rows a batch.
    """
    rows = list(zip(columns["input_ids"], columns["labels"], strict=True))
    aside = min(size, max(1, len(rows) // 2))
    measuring, rest = rows[:aside], rows[aside:] or rows
    place = model.get_input_embeddings().weight.device
    count = min(steps, math.ceil(len(rest) / size))
    batches = tuple(_batch(_cycle(rest, i * size, size), place) for i in range(count))
    head = model.get_output_embeddings()
    vocabulary = int(model.config.get_text_config().vocab_size)
    layers = {name: model.get_submodule(name) for name in names}
    return LanguageModel(model, layers, batches, _batch(measuring, place), vocabulary, head)


def _cycle(rows: list[Any], start: int, size: int) -> list[Any]:
    """Return `size` rows from a place on, beginning again at the end; fewer where there are fewer."""
    return [rows[(start + i) % len(rows)] for i in range(min(size, len(rows)))]


def _batch(rows: Sequence[tuple[list[int], list[int]]], device: Any) -> Batch:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([r + [r[-1]] * (longest - len(r)) for r, _ in rows])  # padding is masked: any token will do
    labels = torch.tensor([of + [IGNORED] * (longest - len(of)) for _, of in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r, _ in rows])
    after = labels[:, 1:]
    predicts = torch.zeros_like(mask, dtype=torch.bool)
    predicts[:, :-1] = after != IGNORED
    return Batch(*(t.to(device) for t in (ids, mask, predicts, after[after != IGNORED])))


@contextlib.contextmanager
def frozen(model: Any, *, gradient_checkpointing: bool = False) -> Iterator[Any]:
    """Lend a model in evaluation mode without a trainable weight, and put back all that was changed."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    config = getattr(model, "config", None)
    cache = getattr(config, "use_cache", None)
    undo: Callable[[], None] = _nothing
    checkpointed = {m for m in model.modules() if getattr(m, "gradient_checkpointing", False)}
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        if gradient_checkpointing and not checkpointed:
            _checkpoint(model)
        if gradient_checkpointing:
            undo = _checkpointing_in_evaluation(model)
        yield model
    finally:
        undo()
        if gradient_checkpointing and not checkpointed:
            with _unannounced():
                model.gradient_checkpointing_disable()
        for p, flag in wanted:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        if config is not None and cache is not None:
            config.use_cache = cache


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _unannounced() -> Iterator[None]:
    """Keep the name that all of transformers 5 knows, without its word that version 6 will have another."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def _checkpoint(model: Any) -> None:
    embeddings = model.get_input_embeddings()
    hooks = set(embeddings._forward_hooks)
    try:
        with _unannounced():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--gradient-checkpointing: {' '.join(str(error).split())[:300]}") from error
    finally:
        for key in set(embeddings._forward_hooks) - hooks:  # gradients of the inputs: only reentrant ones need them
            del embeddings._forward_hooks[key]


def _checkpointing_in_evaluation(model: Any) -> Callable[[], None]:
    """Let layers be checkpointed, which transformers does in training alone, and yet run as in evaluation.

    A layer is in training while transformers decides, and not while its own forward pass runs: no dropout. Returns the
    function that undoes it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    before = {layer: layer._gradient_checkpointing_func for layer in layers}

    def checkpoint(layer: Any) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def calm(*inner: Any, **named: Any) -> Any:
                layer.training = False
                try:
                    return forward(*inner, **named)
                finally:  # recomputation stops inside a layer, by an exception, once it has what it needs
                    layer.training = True

            return before[layer](calm, *args, **kwargs)

        return run

    for layer in layers:
        layer.training = True
        layer._gradient_checkpointing_func = checkpoint(layer)

    def undo() -> None:
        for layer, function in before.items():
            layer._gradient_checkpointing_func = function

    return undo
