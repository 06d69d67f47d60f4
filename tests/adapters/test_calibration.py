"""Calibration: the closed form against a brute-force minimum, and on a real model lower output errors at equal rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from planting import planted
from rankwise.adapters.calibration import output_energy, truncate_outputs
from rankwise.adapters.truncation import truncate


def _moment(rng: np.random.Generator, features: int) -> np.ndarray:
    """A second moment whose eigenvalues fall over three decades."""
    basis = np.linalg.qr(rng.standard_normal((features, features)))[0]
    return (basis * np.geomspace(10, 0.01, features)) @ basis.T


def test_output_energy_is_the_mean_over_samples(rng: np.random.Generator) -> None:
    x = rng.standard_normal((500, 12))
    delta = rng.standard_normal((9, 12)).astype(np.float32)
    a, b = rng.standard_normal((2, 12)), rng.standard_normal((9, 2))
    wanted = np.mean(np.sum((x @ (delta - 0.5 * b @ a).T) ** 2, axis=1))
    assert output_energy(delta, x.T @ x / 500, a, b, 0.5) == pytest.approx(wanted, rel=1e-5)  # float32 products


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_no_other_factors_have_a_lower_output_error(rng: np.random.Generator, rank: int) -> None:
    """The minimum under a well-conditioned C has a closed form, which damping by a hundredth hardly moves."""
    delta = planted(rng, (40, 24), 0.8 ** np.arange(24)).astype(np.float32)
    basis = np.linalg.qr(rng.standard_normal((24, 24)))[0]
    moment = (basis * np.geomspace(4, 0.25, 24)) @ basis.T
    values, vectors = np.linalg.eigh(moment)
    sigma = np.linalg.svd(delta @ (vectors * np.sqrt(values)) @ vectors.T, compute_uv=False)
    best = float(np.sum(sigma[rank:] ** 2))
    found = truncate_outputs(delta, moment, rank)
    got = output_energy(delta, moment, found.a, found.b)
    assert best * (1 - 1e-5) <= got <= best * 1.002
    plain = truncate(delta, rank)
    assert got < output_energy(delta, moment, plain.a, plain.b)
    assert found.residual >= plain.residual * (1 - 1e-6)  # what is won in outputs is paid in weights


def test_a_white_moment_changes_nothing(rng: np.random.Generator) -> None:
    delta = planted(rng, (30, 20), 0.7 ** np.arange(20)).astype(np.float32)
    plain, found = truncate(delta, 5), truncate_outputs(delta, 3.0 * np.eye(20), 5)
    np.testing.assert_allclose(found.b @ found.a, plain.b @ plain.a, atol=1e-6)


def test_a_direction_that_is_never_used_keeps_its_factors_finite(rng: np.random.Generator) -> None:
    moment = np.zeros((16, 16))
    moment[0, 0] = 1.0
    found = truncate_outputs(rng.standard_normal((12, 16)).astype(np.float32), moment, 4)
    assert np.isfinite(found.a).all()
    assert np.isfinite(found.b).all()
    assert np.abs(found.a).max() < 100


def test_factors_are_balanced(rng: np.random.Generator) -> None:
    found = truncate_outputs(rng.standard_normal((30, 20)).astype(np.float32), _moment(rng, 20), 6)
    np.testing.assert_allclose(np.sum(found.a**2, axis=1), np.sum(found.b**2, axis=0), rtol=1e-4)


def test_moments_and_losses_are_those_of_the_model() -> None:
    """q, k and v share one moment; the loss is the one that transformers computes; padding plays no part."""
    torch = pytest.importorskip("torch", reason="torch comes with the train extra")
    pytest.importorskip("transformers", reason="transformers comes with the train extra")
    from rankwise.tuning import moments
    from rankwise.tuning.models import load_model

    loaded = load_model("rankwise:tiny", device="cpu")
    texts = moments.read_texts("rankwise:style", loaded, samples=5)
    measured = moments.measure(loaded.model, texts)
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    width = loaded.model.config.hidden_size
    first, *others = (measured.moment(name, width) for name in names)
    assert first is not None
    assert all(np.array_equal(first, other) for other in others)
    seen = []
    layer = loaded.model.get_submodule(names[0])
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double().numpy()))
    total = count = 0.0
    with torch.no_grad():
        for ids, _ in texts.fit:
            loaded.model(input_ids=torch.tensor([ids]))
        hook.remove()
        for ids, labels in texts.held_out:
            counted = sum(label != -100 for label in labels[1:])
            out = loaded.model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
            total, count = total + float(out.loss) * counted, count + counted
    x = np.concatenate(seen)
    np.testing.assert_allclose(first, x.T @ x / len(x), rtol=1e-4, atol=1e-5)  # kept in float32
    losses = moments.losses_of(loaded.model, texts)
    assert len(losses) == count
    assert float(losses.mean()) == pytest.approx(total / count, rel=1e-5)


def test_on_a_model_it_lowers_output_error_and_loss_difference(tmp_path: Path) -> None:
    """A shipped model, a tuned copy whose deltas are of full rank, texts of its world: at rank 2."""
    torch = pytest.importorskip("torch", reason="torch comes with the train extra")
    pytest.importorskip("peft", reason="peft comes with the train extra")
    pytest.importorskip("transformers", reason="transformers comes with the train extra")
    import shutil

    import rankwise
    from rankwise.tuning.models import load_model
    from rankwise.tuning.tiny import folder

    base = folder()
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    model = load_model(str(base), device="cpu").model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tuned)
    out = tmp_path / "adapter"
    record = rankwise.extract(
        base, tuned, out, rank=8, calibration="rankwise:style", calibration_samples=24, device="cpu", dtype="float32"
    )
    c = record.calibration
    assert c is not None
    assert c.modules == len(record.modules)
    assert c.output_error is not None
    assert c.output_error_plain is not None
    assert c.output_error < 0.97 * c.output_error_plain
    assert all(m.output_error < m.output_error_plain for m in record.modules if m.output_error and m.output_error_plain)
    assert all(m.relative_error >= m.least_relative_error for m in record.modules)
    losses = (c.base_loss, c.tuned_loss, c.adapter_loss, c.plain_loss)
    assert all(loss is not None and loss > 0 for loss in losses)
    assert c.inputs == "tuned"
    ours, plain = c.loss_difference, c.loss_difference_plain
    assert ours is not None
    assert plain is not None
    assert ours < 0.9 * plain
    assert ours >= abs(c.adapter_loss - c.tuned_loss)  # a mean of sizes is no less than the size of the mean
    assert c.loss_difference_lowered == pytest.approx(1 - ours / plain)
    assert json.loads((out / "extraction.json").read_text())["calibration"]["samples"] == c.samples


def test_a_tuned_model_that_cannot_be_run_is_fitted_on_the_inputs_of_the_base(tmp_path: Path) -> None:
    """Weights without a config: their loss is not known, and the record says whose inputs were measured."""
    pytest.importorskip("torch", reason="torch comes with the train extra")
    pytest.importorskip("peft", reason="peft comes with the train extra")
    pytest.importorskip("transformers", reason="transformers comes with the train extra")
    from safetensors.numpy import load_file, save_file

    import rankwise
    from rankwise.tuning.tiny import folder

    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(Path(folder()) / "model.safetensors")
    rng = np.random.default_rng(0)
    tensors[name] = tensors[name] + (0.05 * rng.standard_normal(tensors[name].shape)).astype(tensors[name].dtype)
    save_file(tensors, tmp_path / "tuned.safetensors")
    record = rankwise.extract(
        folder(),
        tmp_path / "tuned.safetensors",
        tmp_path / "adapter",
        rank=4,
        calibration="rankwise:style",
        calibration_samples=16,
        device="cpu",
    )
    c = record.calibration
    assert c is not None
    assert (c.inputs, c.tuned_loss, c.loss_difference, c.loss_difference_lowered) == ("base", None, None, None)
    assert [m.module for m in record.modules] == [name.removesuffix(".weight")]
    assert c.output_error is not None
    assert c.output_error_plain is not None
    assert c.output_error < c.output_error_plain
