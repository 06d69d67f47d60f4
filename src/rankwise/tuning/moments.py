"""What goes into the layers of a model on real texts: second moments of their inputs, and losses on other texts.

In: a model, texts, the names of layers. Out: for each layer the mean of x x' over all tokens, and losses with and
without an adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import NoDataError, UsageError
from rankwise.tuning.encoding import IGNORED

Array = NDArray[Any]

LONGEST: Final = 1024
"""Tokens of a text that are looked at."""

LEAST_HELD_OUT: Final = 4


@dataclass(frozen=True, slots=True)
class Texts:
    """Encoded texts, parted into those to measure inputs on and those that are held out.

    Attributes:
        name: the data as given.
        fit: (token ids, labels) of each text.
        held_out: likewise.
        digest: of all tokens: the same texts give the same.
    """

    name: str
    fit: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    held_out: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    digest: str

    @property
    def tokens(self) -> int:
        """Return the number of tokens to measure on."""
        return sum(len(ids) for ids, _ in self.fit)

    @property
    def largest(self) -> int:
        """Return the largest token id."""
        return max(max(ids) for ids, _ in (*self.fit, *self.held_out))


def read_texts(data: object, loaded: Any, *, samples: int) -> Texts:
    """Read texts, and hold every fifth of them out.

    Args:
        data: as in `train`.
        loaded: model and tokenizer.
        samples: texts to measure on; a quarter more is held out.

    Raises:
        RankwiseError: the data cannot be read, or are too few.
    """
    from rankwise.tuning.data import Examples, read_data
    from rankwise.tuning.encoding import encode
    from rankwise.tuning.world.builtin import is_builtin, read_builtin

    if samples < 1:
        raise UsageError(f"--calibration-samples must be 1 or more, got {samples}")
    most = samples + max(samples // 4, LEAST_HELD_OUT)
    if is_builtin(data):
        builtin = read_builtin(str(data))
        form: Any = "text" if "text" in builtin.rows[0] else "prompt-completion"
        examples = Examples(builtin.name, form, builtin.rows[:most], ())
    else:
        examples = read_data(data, limit=most)
    length = min(LONGEST, loaded.context or LONGEST)
    columns = encode(examples, loaded.tokenizer, length)
    rows = [(tuple(i), tuple(t)) for i, t in zip(columns["input_ids"], columns["labels"], strict=True) if len(i) > 1]
    held = tuple(rows[4::5])
    if not held:
        raise NoDataError(f"{examples.name}: {len(rows)} texts of two tokens or more; calibration needs five at least")
    fit = tuple(row for index, row in enumerate(rows) if index % 5 != 4)
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()
    return Texts(examples.name, fit, held, digest)


class Measured:
    """Second moments by layer; layers with one input (q, k and v) share one matrix.

    Attributes:
        layers: names of the layers that were measured.
    """

    def __init__(self, leaders: dict[str, str], fit: dict[str, Array], held_out: dict[str, Array]) -> None:
        self._leaders, self._fit, self._held_out = leaders, fit, held_out
        self.layers = tuple(leaders)

    def moment(self, module: str, features: int) -> Array | None:
        """Return the mean of x x' over the texts to fit, (in, in) float64, or None where it is not known."""
        return self._of(self._fit, module, features)

    def held_out(self, module: str, features: int) -> Array | None:
        """Return the same of the texts that were held out."""
        return self._of(self._held_out, module, features)

    def _of(self, moments: dict[str, Array], module: str, features: int) -> Array | None:
        found = moments.get(self._leaders.get(module, ""))
        return None if found is None or found.shape[0] != features else found.astype(np.float64)


def measure(model: Any, texts: Texts, *, progress: Callable[[str, int, int], None] | None = None) -> Measured:
    """Run the texts through a model and return the second moments of the inputs of its linear layers.

    The moments are kept in float32, one for each distinct input: a model of width 4096 needs 64 MiB for each.
    """
    import torch

    layers = {name: m for name, m in model.named_modules() if _linear(m)}
    leaders: dict[str, str] = {}
    sums: dict[str, Any] = {}
    with torch.no_grad(), _evaluating(model):
        _find_leaders(model, layers, texts.fit[0][0], leaders)
        results = []
        for part in (texts.fit, texts.held_out):
            sums.clear()
            hooks = [layers[name].register_forward_pre_hook(_adder(name, sums)) for name in set(leaders.values())]
            try:
                for done, (ids, _) in enumerate(part):
                    if progress is not None:
                        progress("inputs", done, len(part))
                    model(input_ids=torch.tensor([ids], device=next(model.parameters()).device))
            finally:
                for hook in hooks:
                    hook.remove()
            count = sum(len(ids) for ids, _ in part)
            results.append({name: (total / count).float().cpu().numpy() for name, total in sums.items()})
    return Measured(leaders, results[0], results[1])


def _linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _find_leaders(model: Any, layers: dict[str, Any], ids: Sequence[int], leaders: dict[str, str]) -> None:
    """Run one text, and let layers that were given the same tensor share the first one's moment."""
    import torch

    first: list[tuple[Any, str]] = []  # kept alive, so that no address is used twice

    def see(name: str) -> Callable[[Any, Any], None]:
        def hook(_: Any, inputs: Any) -> None:
            x = inputs[0]
            leader = next((n for t, n in first if t is x), name)
            if leader == name:
                first.append((x, name))
            leaders[name] = leader

        return hook

    hooks = [module.register_forward_pre_hook(see(name)) for name, module in layers.items()]
    try:
        model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()


def _adder(name: str, sums: dict[str, Any]) -> Callable[[Any, Any], None]:
    def hook(_: Any, inputs: Any) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
        product = (x.T @ x).double()
        sums[name] = product if name not in sums else sums[name] + product

    return hook


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def losses_of(model: Any, texts: Texts) -> Array:
    """Return the loss of each token of the held-out texts that counts, nats, float64 in their order."""
    import torch

    found = []
    with torch.no_grad(), _evaluating(model):
        device = next(model.parameters()).device
        for ids, labels in texts.held_out:
            logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, :-1].float()
            wanted = torch.tensor(labels[1:], device=device)
            counted = wanted != IGNORED
            losses = torch.nn.functional.cross_entropy(logits[counted], wanted[counted], reduction="none")
            found.append(losses.double().cpu().numpy())
    return np.concatenate(found)


def losses_with(model: Any, adapter: str, texts: Texts) -> Array:
    """Return the losses of a base with an adapter; the base comes back as it was."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a head that is tied: it has its own factors
        adapted = PeftModel.from_pretrained(model, adapter)
    try:
        return losses_of(adapted, texts)
    finally:
        adapted.unload()
