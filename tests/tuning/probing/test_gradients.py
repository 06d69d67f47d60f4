"""Gradient spectra against gradients that autograd forms whole, one row after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.tuning.encoding import IGNORED
from rankwise.tuning.models import load_model
from rankwise.tuning.probing import gradients, passes
from rankwise.tuning.probing.gradients import pulls
from rankwise.tuning.probing.passes import TokenRow
from rankwise.tuning.targets import target_modules

ROWS = (
    *(
        TokenRow((1, 40 + i, 90 + i % 3, 200 + 7 * i, 5), (IGNORED, IGNORED, 90 + i % 3, 200 + 7 * i, 5))
        for i in range(6)
    ),
    TokenRow((1, 8, 9), (IGNORED, 8, 9)),
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from small_models import make_pico

    return load_model(str(make_pico(tmp_path_factory.mktemp("models") / "pico")), device="cpu").model.eval()


@pytest.fixture(scope="module")
def shapes(subject: Any) -> dict[str, tuple[int, int]]:
    return {name: tuple(subject.get_submodule(name).weight.shape) for name in target_modules(subject)}


def oracle(subject: Any, name: str) -> tuple[Any, float]:
    """Return the gradient summed over the rows, and the sum of the rows' own energies."""
    import torch
    from torch.nn.functional import cross_entropy

    weight = subject.get_submodule(name).weight
    total, own = 0.0, 0.0
    for row in ROWS:
        ids = torch.tensor([row.ids])
        loss = cross_entropy(subject(input_ids=ids).logits[0, :-1], torch.tensor(row.labels[1:]), reduction="sum")
        gradient = torch.autograd.grad(loss, weight)[0].double()
        total = total + gradient
        own += float(gradient.square().sum())
    return total, own


def test_spectrum_and_coherence_are_those_of_whole_gradients(subject: Any, shapes: Any) -> None:
    """1e-4: float32 products."""
    from rankwise.criteria import Spectrum, effective_rank

    found = {p.module: p for p in pulls(subject, shapes, ROWS, seed=0)}
    assert found.keys() == shapes.keys()
    for name in list(shapes)[::3]:
        total, own = oracle(subject, name)
        sigma = np.linalg.svd(total.numpy(), compute_uv=False)
        energy = float((sigma**2).sum())
        wanted = effective_rank(Spectrum(name, shapes[name], tuple(map(float, sigma)), energy))
        assert found[name].energy == pytest.approx(energy, rel=1e-4)
        assert found[name].effective_rank == pytest.approx(wanted, rel=1e-3)
        assert found[name].coherence == pytest.approx(energy / (len(ROWS) * own), rel=1e-4)


def test_rows_that_are_equal_pull_the_same_way(subject: Any, shapes: Any) -> None:
    for pull in pulls(subject, shapes, [ROWS[0]] * 4, seed=0):
        assert pull.coherence == pytest.approx(1.0, rel=1e-4)


def test_batches_do_not_matter(subject: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[int] = []
    together = pulls(subject, shapes, ROWS, seed=0, said=said.append)
    monkeypatch.setattr(passes, "MOST_TOKENS", 1)
    apart = pulls(subject, shapes, ROWS, seed=0, said=said.append)
    assert said == [7, 1, 2, 3, 4, 5, 6, 7], "all rows at once, then one after another"
    for one, other in zip(together, apart, strict=True):
        assert one.energy == pytest.approx(other.energy, rel=1e-4)
        assert one.coherence == pytest.approx(other.coherence, rel=1e-4)


def test_a_sketch_keeps_the_energy_and_a_low_rank(subject: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sketch of 24 sides of weights of 32: energy is right on average, 40 % a module at this size."""
    monkeypatch.setattr(gradients, "SKETCH", 24)
    whole = pulls(subject, shapes, ROWS, seed=0)
    rough = pulls(subject, shapes, ROWS, seed=0, most_held=0)
    assert any(p.sketched for p in rough)
    ratios = [r.energy / w.energy for r, w in zip(rough, whole, strict=True) if r.sketched and w.energy]
    assert float(np.mean(ratios)) == pytest.approx(1.0, abs=0.4)
    assert all(p.rank_99 <= 24 for p in rough if p.sketched)


def test_the_model_comes_back_as_it_was(subject: Any, shapes: Any, tmp_path: Path) -> None:
    wanted = {name: p.requires_grad for name, p in subject.named_parameters()}
    pulls(subject, shapes, ROWS, seed=0)
    assert {name: p.requires_grad for name, p in subject.named_parameters()} == wanted
    assert not any(m._forward_hooks for m in subject.modules())
    assert all(p.grad is None for p in subject.parameters())
