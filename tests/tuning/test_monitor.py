"""The monitor: every figure against a closed form or a slow oracle, every status, and a training it must not change."""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from planting import planted_factors
from rankwise.criteria import Spectrum, effective_rank, stable_rank
from rankwise.errors import NothingToMeasureError, UsageError
from rankwise.linalg import factored_values
from rankwise.tuning.health import (
    FIGURES,
    NO_LOSS,
    STATUSES,
    LossSeen,
    ModuleHealth,
    MonitorConfig,
    average,
    group_health,
    judge,
    module_health,
    worst,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from torch import nn
from torch.utils.checkpoint import checkpoint

from rankwise.tuning.monitor import Observation, RankMonitor

EVERY_STEP = MonitorConfig(interval=1, first_step=None)


class Layer(nn.Module):
    """One layer of a toy model, with the names of a Llama."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(width, hidden)
        self.mlp.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Any) -> Any:
        x = x + torch.tanh(self.self_attn.q_proj(x))
        return x + self.mlp.down_proj(torch.relu(self.mlp.up_proj(x)))


class Toy(nn.Module):
    """Layers behind an embedding; `recompute` checkpoints each layer: None, True (reentrant) or False."""

    def __init__(self, width: int = 12, hidden: int = 20, layers: int = 3, recompute: bool | None = None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(layers))
        self.lm_head = nn.Linear(width, 16)
        self.recompute = recompute

    def forward(self, ids: Any) -> Any:
        x = self.embed_tokens(ids)
        recompute = self.recompute is not None and torch.is_grad_enabled()
        if recompute:
            x = x.detach().requires_grad_()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.recompute) if recompute else layer(x)
        return self.lm_head(x)


ALL_LINEAR = ["q_proj", "up_proj", "down_proj"]


def adapted(make: Callable[[], nn.Module] = Toy, *, b: float = 0.0, **config: Any) -> Any:
    """Return the model with LoRA on; B is random of this scale, or zero as PEFT leaves it."""
    torch.manual_seed(0)
    base = make()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR} | config
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and b:
                parameter.normal_(0, b)
    return model


def batches(steps: int, size: int = 6) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 16, (size, 5), generator=generator) for _ in range(steps)]


def loss_of(model: Any, ids: Any) -> Any:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(
    model: Any,
    steps: int,
    config: MonitorConfig | None = None,
    *,
    rate: float = 1e-2,
    accumulate: int = 1,
    capture: bool = False,
) -> tuple[list[float], list[Observation]]:
    """Train with or without a monitor; return losses and observations."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    monitor = None if config is None else RankMonitor(model, config)
    torch.manual_seed(1)
    losses, seen = [], []
    if monitor is not None:
        monitor.observe(0)
    for step, ids in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        total = 0.0
        for part in ids.chunk(accumulate):
            loss = loss_of(model, part) / accumulate
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        if monitor is not None and capture:
            monitor.capture_gradients()
        optimizer.step()
        if capture:
            optimizer.zero_grad()
        if monitor is not None:
            seen.append(monitor.observe(step, total))
    return losses, [item for item in seen if item is not None]


def layers_of(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def factors_of(model: Any) -> dict[str, tuple[Any, Any, float]]:
    """Return module -> (A, B, s), float64 copies."""
    return {
        name: (
            layer.lora_A["default"].weight.detach().double().clone(),
            layer.lora_B["default"].weight.detach().double().clone(),
            layer.scaling["default"],
        )
        for name, layer in layers_of(model).items()
    }


def delta(factors: tuple[Any, Any, float]) -> Any:
    a, b, s = factors
    return s * b @ a


def look(model: Any, forward: Callable[[], Any], config: MonitorConfig = EVERY_STEP) -> Observation:
    """Return the observation of one step that runs `forward` and changes nothing."""
    monitor = RankMonitor(model, config)
    monitor.observe(0)
    forward()
    seen = monitor.observe(1)
    assert seen is not None
    monitor.close()
    return seen


def rows(seen: Observation) -> dict[str, ModuleHealth]:
    return {row.module: row for row in seen.modules}


# --- figures from the factors ---------------------------------------------------------------------------------------


SPECTRA: dict[str, tuple[tuple[int, int], list[float]]] = {
    "one direction": ((20, 12), [3.0]),
    "flat": ((20, 12), [1.0] * 8),
    "steep": ((20, 12), [10.0**-i for i in range(6)]),
    "as wide as the matrix": ((12, 12), list(np.linspace(5, 1, 12))),
    "tiny": ((20, 12), [1e-12, 1e-13]),
    "large": ((20, 12), [1e9, 1e8, 3.0]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_planted_spectra_are_found(name: str, rng: np.random.Generator) -> None:
    """Figures of known singular values, by the formulas of `rankwise.criteria`; the other oracle is factored_values."""
    shape, sigma = SPECTRA[name]
    a, b = planted_factors(rng, shape, sigma, scaling=0.5)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    model = adapted(
        lambda: nn.ModuleDict({"up_proj": layer}), r=len(sigma), lora_alpha=len(sigma) / 2, target_modules=["up_proj"]
    )
    model.double()
    module = next(iter(layers_of(model).values()))
    module.lora_A["default"].weight.data = torch.from_numpy(a)
    module.lora_B["default"].weight.data = torch.from_numpy(b)
    row = look(model, lambda: None).modules[0]
    spectrum = Spectrum("up_proj", shape, tuple(sigma), math.fsum(s * s for s in sigma))
    # Gram matrices in float64: the condition of the planted factors, some 1e3, costs 1e-16 its square
    assert row.norm == pytest.approx(math.sqrt(spectrum.total_energy), rel=1e-9)
    assert row.effective_rank == pytest.approx(effective_rank(spectrum), rel=1e-8)
    assert row.stable_rank == pytest.approx(stable_rank(spectrum), rel=1e-8)
    values = factored_values(a, b, 0.5)
    ours = Spectrum("up_proj", shape, tuple(values.sigma), values.energy)
    assert (row.norm, row.effective_rank) == pytest.approx((values.energy**0.5, effective_rank(ours)), rel=1e-8)
    assert row.relative_norm == pytest.approx(row.norm / float(layer.weight.norm()), rel=1e-6)
    assert (row.r, row.scaling) == (len(sigma), 0.5)


def test_a_batch_of_many_shapes_agrees_with_dense_svds() -> None:
    """Different ranks, shapes and scalings go through different batches and come back in their places."""
    model = adapted(
        b=0.3, rank_pattern={"up_proj": 7, r"layers\.1\.self_attn\.q_proj": 30}, alpha_pattern={"q_proj": 3}
    )
    seen = rows(look(model, lambda: None))
    assert len(seen) == 9
    for name, factors in factors_of(model).items():
        sigma = torch.linalg.svdvals(delta(factors))
        energy = sigma.square()
        shares = energy / energy.sum()
        assert seen[name].r == factors[0].shape[0]
        assert seen[name].scaling == factors[2]
        assert seen[name].norm == pytest.approx(float(energy.sum().sqrt()), rel=1e-10)
        assert seen[name].stable_rank == pytest.approx(float(energy.sum() / energy[0]), rel=1e-9)
        # rank 30 over 12 inputs: A A' is singular, and the ridge that holds the factorisation is 1e-12 of it
        assert seen[name].effective_rank == pytest.approx(
            float(torch.exp(-torch.xlogy(shares, shares).sum())), rel=1e-7
        )


def test_zero_b_has_a_norm_but_no_rank() -> None:
    model = adapted()
    seen = look(model, lambda: loss_of(model, batches(1)[0]))
    for row in seen.modules:
        assert (row.norm, row.relative_norm, row.branch_ratio, row.update_norm) == (0, 0, 0, 0)
        assert (row.effective_rank, row.stable_rank, row.update_ratio) == (None, None, None)
        assert row.not_finite == ()
    everything = seen.groups[-1]
    assert (everything.norm, everything.branch_ratio, everything.effective_rank) == (0, 0, None)
    assert seen.status == "ok"


def test_the_update_of_a_step_agrees_with_dense_matrices() -> None:
    model = adapted(b=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    monitor = RankMonitor(model, EVERY_STEP)
    monitor.observe(0)
    before = factors_of(model)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    seen = rows(monitor.observe(1))
    for name, after in factors_of(model).items():
        expected = float((delta(after) - delta(before[name])).norm())
        assert seen[name].update_norm == pytest.approx(expected, rel=1e-10)
        assert seen[name].update_ratio == pytest.approx(expected / float(delta(after).norm()), rel=1e-10)


def test_a_small_update_keeps_its_digits() -> None:
    """One float32 step of one entry of B, 6e-8 of it: the norm of B A stands still, the update is known."""
    model = adapted(b=1.0)
    monitor = RankMonitor(model, EVERY_STEP)
    monitor.observe(0)
    before = factors_of(model)
    for layer in layers_of(model).values():
        weight = layer.lora_B["default"].weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(100.0))
    seen = rows(monitor.observe(1))
    for name, (a, b, s) in factors_of(model).items():
        expected = s * abs(float(b[0, 0] - before[name][1][0, 0])) * float(a[0].norm())
        assert seen[name].update_norm == pytest.approx(expected, rel=1e-9)
        assert seen[name].update_ratio < 1e-7


def test_a_change_of_gauge_is_no_update() -> None:
    """B -> 2 B and A -> A / 2 leaves B A as it was; the trace leaves sqrt(1e-16) of the factors' change."""
    model = adapted(b=1.0)

    def gauge() -> None:
        for layer in layers_of(model).values():
            layer.lora_A["default"].weight.data /= 2
            layer.lora_B["default"].weight.data *= 2

    assert all(row.update_ratio < 1e-7 for row in look(model, gauge).modules)


def test_layers_in_a_compiled_graph_call_no_hooks() -> None:
    model = adapted(b=0.3)
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled, batches(1)[0]).backward()
    seen = look(compiled, lambda: loss_of(compiled, batches(1)[0]).backward())
    assert seen.modules[0].module == "layers.0.self_attn.q_proj"
    assert {row.branch_ratio for row in seen.modules} == {None}
    assert all(row.norm > 0 and row.grad_norm_B > 0 for row in seen.modules)
    assert seen.reason == "no figure is out of its bounds; the branch ratio is not known"


def test_autocast_changes_no_figure_but_by_its_rounding() -> None:
    model = adapted(b=0.3)
    ids = batches(1)[0]

    def forward() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model, ids).backward()

    plain = rows(look(model, lambda: loss_of(model, ids)))
    for name, row in rows(look(model, forward)).items():
        assert row.branch_ratio == pytest.approx(plain[name].branch_ratio, rel=2**-6)  # bfloat16 has 8 bits


def test_factors_in_bfloat16() -> None:
    model = adapted(b=0.3).to(torch.bfloat16)
    seen = rows(look(model, lambda: loss_of(model, batches(1)[0])))
    for name, factors in factors_of(model).items():
        assert seen[name].norm == pytest.approx(float(delta(factors).norm()), rel=1e-10)
        assert seen[name].branch_ratio > 0


# --- the branch -----------------------------------------------------------------------------------------------------


def oracle(model: Any, parts: list[Any]) -> dict[str, float]:
    """Return the branch ratios from activations that are kept, in float64, from the layers' inputs."""
    inputs: dict[str, list[Any]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, layer in layers_of(model).items()
    ]
    with torch.no_grad():
        for part in parts:
            model(part)
    for handle in handles:
        handle.remove()
    ratios = {}
    for name, layer in layers_of(model).items():
        x = torch.cat([item.flatten(0, -2) for item in inputs[name]]).double()
        weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias
        frozen = x @ (weight if type(layer.base_layer).__name__ == "Conv1D" else weight.T)
        frozen = frozen if bias is None else frozen + bias.double()
        branch = x @ delta(factors_of(model)[name]).T
        ratios[name] = float(branch.detach().norm() / frozen.detach().norm())
    return ratios


@pytest.mark.parametrize("recompute", [None, False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_branch_ratios_agree_with_kept_activations(recompute: bool | None, accumulate: int) -> None:
    """Non-reentrant recomputation stops inside the last layer, where only the frozen branch has run again."""
    model = adapted(lambda: Toy(recompute=recompute), b=0.3)
    ids = batches(1)[0]
    expected = oracle(model, [ids])

    def forward() -> None:
        for part in ids.chunk(accumulate):
            loss_of(model, part).backward()

    seen = look(model, forward)
    assert {row.module: row.branch_ratio for row in seen.modules} == pytest.approx(expected, rel=1e-5)  # float32 sums


def test_recomputation_really_stops_between_the_branches() -> None:
    """Otherwise the test above would not test what it says."""
    model = adapted(lambda: Toy(recompute=False), b=0.3)
    layer = layers_of(model)["layers.0.mlp.down_proj"]
    calls = {"frozen": 0, "branch": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    layer.base_layer.register_forward_hook(count("frozen"))
    layer.lora_B["default"].register_forward_hook(count("branch"))
    loss_of(model, batches(1)[0]).backward()
    assert calls == {"frozen": 2, "branch": 1}


def test_conv1d_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_attn = transformers.pytorch_utils.Conv1D(30, 10)
            self.c_attn.weight.data.normal_()

        def forward(self, x: Any) -> Any:
            return self.c_attn(x)

    model = adapted(Block, b=0.3, target_modules=["c_attn"], fan_in_fan_out=True)
    x = torch.randn(4, 5, 10)
    expected = oracle(model, [x])
    seen = look(model, lambda: model(x))
    assert {row.module: row.branch_ratio for row in seen.modules} == pytest.approx(expected, rel=1e-5)
    layer = layers_of(model)["c_attn"]
    assert seen.modules[0].relative_norm == pytest.approx(
        float(delta(factors_of(model)["c_attn"]).norm() / layer.base_layer.weight.norm()), rel=1e-6
    )


def test_passes_without_gradients_do_not_count() -> None:
    """An evaluation between two steps, on other data, is not the step's."""
    model = adapted(b=0.3)
    ids, other = batches(2)
    alone = look(model, lambda: loss_of(model, ids))

    def both() -> None:
        with torch.no_grad():
            model(other)
        with torch.inference_mode():
            model(other)
        loss_of(model, ids)

    assert look(model, both).modules == alone.modules
    only = look(model, torch.no_grad()(lambda: model(other)))
    assert {row.branch_ratio for row in only.modules} == {None}
    assert only.status == "ok"


def test_a_branch_that_is_switched_off_is_unknown_not_silent() -> None:
    model = adapted(b=0.3)

    def without() -> None:
        with model.disable_adapter():
            loss_of(model, batches(1)[0])

    seen = look(model, without)
    assert {row.branch_ratio for row in seen.modules} == {None}
    assert all(row.norm > 0 for row in seen.modules)


def test_no_activation_and_no_graph_is_kept() -> None:
    model = adapted(b=0.3)
    monitor = RankMonitor(model, MonitorConfig(interval=3, first_step=None))
    monitor.observe(0)
    monitor.observe(2)  # armed
    kept: list[Any] = []
    layer = layers_of(model)["layers.1.mlp.up_proj"]
    watches = [
        module.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
        for module in (layer.base_layer, layer.lora_B["default"])
    ]
    loss = loss_of(model, batches(1)[0])
    monitor.observe(2, loss)
    for watch in watches:
        watch.remove()
    graph = weakref.ref(loss)
    loss.backward()
    del loss
    gc.collect()
    assert [item() for item in kept] == [None, None]
    assert graph() is None
    assert monitor.observe(3).loss > 0


# --- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_are_those_the_optimizer_saw() -> None:
    model = adapted(b=0.3)
    monitor = RankMonitor(model, EVERY_STEP)
    monitor.observe(0)
    loss_of(model, batches(1)[0]).backward()
    grads = {
        n: (la.lora_A["default"].weight.grad, la.lora_B["default"].weight.grad) for n, la in layers_of(model).items()
    }
    expected = {name: (float(a.norm()), float(b.norm())) for name, (a, b) in grads.items()}
    monitor.capture_gradients()
    captured = monitor._gradients
    assert all(not norm.requires_grad for pair in captured for norm in pair)
    there = monitor.observe(1)
    assert {r.module: (r.grad_norm_A, r.grad_norm_B) for r in there.modules} == {
        name: pytest.approx(pair, rel=1e-5) for name, pair in expected.items()
    }
    later = monitor.observe(2)  # nothing captured: what is in .grad now
    assert [(r.grad_norm_A, r.grad_norm_B) for r in later.modules] == [
        (r.grad_norm_A, r.grad_norm_B) for r in there.modules
    ]
    model.zero_grad()
    none = monitor.observe(3)
    assert {(r.grad_norm_A, r.grad_norm_B) for r in none.modules} == {(None, None)}
    assert none.groups[-1].grad_norm_A is None


def test_captured_before_zeroing_equals_read_before_zeroing() -> None:
    """The order of transformers.Trainer and that of a plain loop give the same rows."""
    config = MonitorConfig(interval=2, first_step=None)
    _, read = train(adapted(), 4, config)
    _, captured = train(adapted(), 4, config, capture=True)
    assert [item.modules for item in read] == [item.modules for item in captured]
    assert captured[0].modules[0].grad_norm_B > 0


# --- it must not change the training --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", [None, False], ids=["plain", "recomputed"])
def test_losses_and_weights_are_the_same_to_the_bit(dtype: Any, recompute: bool | None) -> None:
    """With dropout, so that a monitor that drew random numbers would show."""

    def run(config: MonitorConfig | None) -> tuple[list[float], dict[str, Any], int]:
        model = adapted(lambda: Toy(recompute=recompute), lora_dropout=0.3).to(dtype)
        losses, seen = train(model, 9, config, accumulate=2, capture=True)
        assert not [h for m in model.modules() for h in m._forward_hooks] or config == EVERY_STEP
        return losses, model.state_dict(), len(seen)

    plain, weights, _ = run(None)
    for config, count in ((EVERY_STEP, 9), (MonitorConfig(interval=4, first_step=3), 3)):
        losses, after, observations = run(config)
        assert observations == count
        assert losses == plain
        assert all(torch.equal(after[name], weights[name]) for name in weights)


# --- when it looks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "due"),
    [
        (MonitorConfig(), [10, 50, 100]),
        (MonitorConfig(first_step=None), [50, 100]),
        (MonitorConfig(interval=30, first_step=1), [1, 30, 60, 90]),
        (MonitorConfig(interval=30, first_step=45), [30, 45, 60, 90]),
        (MonitorConfig(interval=30, first_step=30), [30, 60, 90]),
    ],
)
def test_due_steps(config: MonitorConfig, due: list[int]) -> None:
    monitor = RankMonitor(adapted(), config)
    assert [step for step in range(101) if monitor.observe(step)] == due


def test_hooks_and_copies_are_there_for_the_due_step_only() -> None:
    model = adapted()
    monitor = RankMonitor(model, MonitorConfig(interval=4, first_step=None))

    def hooked() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    found = {}
    for step in range(10):
        monitor.observe(step)
        found[step] = (hooked(), monitor._before is not None)
    assert found == {step: ((18, True) if step in (3, 7) else (0, False)) for step in range(10)}
    monitor.observe(11)
    assert hooked() == 18
    monitor.close()
    assert (hooked(), monitor._before) == (0, None)
    assert monitor.observe(12) is None


def test_a_resumed_training_only_arms_at_its_first_step() -> None:
    monitor = RankMonitor(adapted(), MonitorConfig(interval=5, first_step=None))
    assert monitor.observe(100) is None  # the checkpoint; observed in its first life
    assert [step for step in range(101, 112) if monitor.observe(step)] == [105, 110]


def test_a_loop_that_skips_steps_gets_no_figures_of_several_steps() -> None:
    model = adapted(b=0.3)
    monitor = RankMonitor(model, MonitorConfig(interval=10, first_step=None))
    for step in (0, 4, 9):
        assert monitor.observe(step) is None
    loss_of(model, batches(1)[0]).backward()
    seen = monitor.observe(14)  # armed at 9 for 10
    assert seen.step == 14
    assert {(row.branch_ratio, row.update_norm) for row in seen.modules} == {(None, None)}
    assert all(row.norm > 0 for row in seen.modules)
    assert monitor.observe(20).step == 20


def test_losses_are_averaged_between_observations() -> None:
    monitor = RankMonitor(adapted(), MonitorConfig(interval=2, first_step=None))
    given = [None, 1.0, torch.tensor(3.0, requires_grad=True), 5.0, None, None, None]
    seen = [monitor.observe(step, loss) for step, loss in enumerate(given)]
    assert [item.loss for item in seen if item is not None] == [2.0, 5.0, None]


# --- status ---------------------------------------------------------------------------------------------------------


RISEN = NO_LOSS.then(3.0).then(0.5).then(3.1)
JUDGED: dict[str, tuple[int, dict[str, float | None], LossSeen | None, str, str]] = {
    "quiet": (500, {"branch_ratio": 0.1, "update_ratio": 0.01}, None, "ok", "no figure is out of its bounds$"),
    "nothing known": (500, {}, None, "ok", "no figure is out .*; the branch ratio is not known"),
    "all None": (500, dict.fromkeys(FIGURES), None, "ok", "no figure is out"),
    "branch at its bound": (500, {"branch_ratio": 1.0}, None, "ok", ""),
    "branch too loud": (1, {"branch_ratio": 1.01}, None, "unstable", r"1.01 times as loud .* \(bound 1\)"),
    "big step": (10, {"update_ratio": 0.6}, None, "unstable", "moved the adapter by 0.6 of its own norm"),
    "big step at first": (9, {"update_ratio": 1.0}, None, "ok", ""),
    "starved": (100, {"branch_ratio": 0.004}, None, "starved", "after 100 steps .* at 0.004 of the frozen"),
    "starved at a hard zero": (100, {"branch_ratio": 0.0}, None, "starved", "at 0 of the frozen"),
    "still warming up": (99, {"branch_ratio": 0.004}, None, "ok", ""),
    "at the bound of starving": (100, {"branch_ratio": 0.08}, None, "ok", ""),
    "loss risen": (500, {"branch_ratio": 0.1}, RISEN, "unstable", "rose to 3.1: it began at 3 and was down at 0.5"),
    "loss risen, and starved": (500, {"branch_ratio": 0.0}, RISEN, "unstable", "loss"),
    "loss back where it began": (500, {}, NO_LOSS.then(3.0).then(0.5).then(3.0), "ok", ""),
    "loss above the first, not twice the lowest": (500, {}, NO_LOSS.then(1.0).then(0.9).then(1.5), "ok", ""),
    "first loss": (10, {}, NO_LOSS.then(3.0), "ok", ""),
    "loss of policy gradients": (500, {}, NO_LOSS.then(0.0).then(0.01).then(0.5), "ok", ""),
    "loss NaN": (500, {}, NO_LOSS.then(3.0).then(math.nan), "unstable", "the loss is not finite"),
    "first loss infinite": (10, {}, NO_LOSS.then(math.inf), "unstable", "the loss is not finite"),
    "recovered from NaN": (500, {}, NO_LOSS.then(3.0).then(math.nan).then(1.0), "ok", ""),
    "began with NaN": (500, {}, NO_LOSS.then(math.nan).then(3.0).then(2.0), "ok", ""),
}


@pytest.mark.parametrize("name", JUDGED)
def test_status_table(name: str) -> None:
    step, figures, loss, status, words = JUDGED[name]
    found, reason = judge(step, figures, MonitorConfig(), loss=loss)
    assert found == status
    assert re.search(words, reason), reason
    assert ("would tell" in reason) == (status != "ok")


def test_figures_that_are_not_finite_come_before_all_else() -> None:
    bad = [("layers.0.q_proj", "norm"), ("layers.1.q_proj", "norm")]
    status, reason = judge(0, {"branch_ratio": 0.0}, MonitorConfig(), not_finite=bad)
    assert status == "unstable"
    assert reason.startswith("norm of layers.0.q_proj and 1 more figures came out infinite or NaN")


def test_bounds_of_none_are_not_applied() -> None:
    bounds = [field.name for field in fields(MonitorConfig) if field.name.startswith(("starved_", "unstable_"))]
    assert len(bounds) == 4
    config = replace(MonitorConfig(), **dict.fromkeys(bounds))
    for step, figures, loss, _, _ in JUDGED.values():
        if loss is None or math.isfinite(loss.latest):
            assert judge(step, figures, config, loss=loss)[0] == "ok"


@pytest.mark.parametrize(
    "bad",
    [
        {"interval": 0},
        {"interval": 2.0},
        {"interval": True},
        {"first_step": 0},
        {"warm_up": -1},
        {"settled_after": None},
        {"starved_branch_ratio": 0},
        {"unstable_branch_ratio": math.inf},
        {"unstable_update_ratio": math.nan},
        {"unstable_loss_factor": "2"},
        {"unstable_loss_factor": True},
    ],
    ids=str,
)
def test_a_config_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(bad))} must be .* got"):
        MonitorConfig(**bad)


def test_averages_of_a_group() -> None:
    """Geometric means over what is known and above zero; r and scaling where they agree."""
    made = [
        module_health(
            f"m{i}", "mlp", r=4, scaling=s, figures={"norm": norm, "branch_ratio": branch, "stable_rank": rank}
        )
        for i, (s, norm, branch, rank) in enumerate(
            [(2.0, 1.0, 0.0, None), (2.0, 4.0, 0.3, None), (1.0, 16.0, None, None)]
        )
    ]
    row = group_health(7, "mlp", made, MonitorConfig())
    assert (row.step, row.group, row.modules, row.r, row.scaling) == (7, "mlp", 3, 4, None)
    assert (row.norm, row.branch_ratio, row.stable_rank) == (pytest.approx(4.0), pytest.approx(0.3), None)
    assert group_health(7, "mlp", made[:2], MonitorConfig()).scaling == 2.0
    assert average([]) is None


def test_one_spoilt_module_spoils_the_figure_of_its_group() -> None:
    good = module_health("m0", "mlp", r=4, scaling=2.0, figures={"norm": 1.0, "branch_ratio": 0.1})
    bad = module_health("m1", "mlp", r=4, scaling=2.0, figures={"norm": math.inf, "branch_ratio": 0.1})
    assert (bad.norm, bad.not_finite) == (None, ("norm",))
    row = group_health(1, "mlp", [good, bad], MonitorConfig())
    assert (row.norm, row.branch_ratio, row.status) == (None, pytest.approx(0.1), "unstable")


def test_the_worst_group_speaks() -> None:
    def row(group: str, branch: float) -> Any:
        made = module_health("m", group, r=4, scaling=1.0, figures={"branch_ratio": branch})
        return group_health(200, group, [made], MonitorConfig())

    groups = [row("attention", 0.1), row("mlp/early", 0.001), row("mlp/late", 0.002), row("all", 0.003)]
    status, reason = worst(groups)
    assert status == "starved"
    assert reason.startswith("mlp/early: after 200 steps")
    assert reason.endswith("(likewise mlp/late)")
    assert worst([*groups, row("x", 3.0)])[0] == "unstable"
    assert worst(groups[:1]) == ("ok", "no figure is out of its bounds")
    assert STATUSES == ("ok", "starved", "unstable")  # their places are what is logged


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_spoilt_factor_is_unstable_and_no_exception(value: float, factor: str) -> None:
    """The module shares its batch with others, whose figures must be there all the same."""
    model = adapted(b=0.05)
    name = "layers.1.mlp.up_proj"

    def spoil() -> None:
        getattr(layers_of(model)[name], factor)["default"].weight.data[0, 0] = value
        loss_of(model, batches(1)[0])

    seen = look(model, spoil)
    found = rows(seen)
    assert {"norm", "update_norm"} <= set(found[name].not_finite)
    assert found[name].norm is found[name].effective_rank is found[name].stable_rank is found[name].update_ratio is None
    other = found["layers.0.mlp.up_proj"]
    assert other.norm > 0
    assert other.effective_rank > 1
    assert seen.status == "unstable"
    assert "came out infinite or NaN" in seen.reason
    by_group = {row.group: row.status for row in seen.groups}
    assert by_group["mlp/middle"] == by_group["all"] == "unstable"
    assert by_group["mlp/early"] == "ok"
    json.dumps(seen.to_dict(), allow_nan=False)


def test_overflow_of_activations_is_unstable() -> None:
    model = adapted(b=1.0)

    def blow_up() -> None:
        layers_of(model)["layers.2.mlp.up_proj"].base_layer.weight.data *= 1e30
        loss_of(model, batches(1)[0])

    seen = look(model, blow_up)
    assert rows(seen)["layers.2.mlp.up_proj"].not_finite == ("branch_ratio",)
    assert seen.status == "unstable"


def test_a_loss_of_nan_reaches_the_status_and_not_the_json() -> None:
    monitor = RankMonitor(adapted(), EVERY_STEP)
    monitor.observe(0)
    seen = monitor.observe(1, torch.tensor(math.nan))
    assert (seen.loss, seen.status, seen.reason[:4]) == (None, "unstable", "all:")
    assert [row.status for row in seen.groups[:-1]] == ["ok"] * (len(seen.groups) - 1)
    json.dumps(seen.to_dict(), allow_nan=False)


def test_a_training_that_explodes_is_called_unstable_and_one_that_learns_is_not() -> None:
    config = MonitorConfig(interval=10, first_step=None, starved_branch_ratio=None)
    _, calm = train(adapted(), 30, config, rate=1e-3)
    assert {item.status for item in calm} == {"ok"}
    _, wild = train(adapted(), 30, config, rate=30.0)
    assert {item.status for item in wild} == {"unstable"}


def test_a_training_that_hardly_moves_is_starved() -> None:
    config = MonitorConfig(interval=10, first_step=None, warm_up=20)
    _, seen = train(adapted(), 20, config, rate=1e-7)
    assert [item.status for item in seen] == ["ok", "starved"]
    assert "a larger scale or learning rate would tell" in seen[-1].reason


# --- the observation ------------------------------------------------------------------------------------------------


def test_an_observation_as_plain_json() -> None:
    _, seen = train(adapted(), 2, EVERY_STEP)
    record = json.loads(json.dumps(seen[-1].to_dict(), allow_nan=False))
    assert list(record) == ["step", "loss", "status", "reason", "groups", "modules", "skipped", "seconds", "supported"]
    assert (record["step"], record["supported"], record["skipped"]) == (2, True, [])
    assert [row["group"] for row in record["groups"]] == [
        *(f"{kind}/{third}" for kind in ("attention", "mlp") for third in ("early", "middle", "late")),
        "all",
    ]
    assert [row["modules"] for row in record["groups"]] == [1, 1, 1, 2, 2, 2, 9]
    assert set(record["groups"][0]) == {"step", "group", "modules", "r", "scaling", *FIGURES, "status", "reason"}
    assert all(record["groups"][-1][name] > 0 for name in FIGURES)
    assert record["modules"][0]["module"] == "layers.0.self_attn.q_proj"
    assert 0 < record["seconds"] < 5


def test_group_rows_are_the_means_of_their_modules() -> None:
    _, seen = train(adapted(), 3, EVERY_STEP)
    for group in seen[-1].groups:
        members = [row for row in seen[-1].modules if group.group in ("all", row.group)]
        assert group.modules == len(members)
        for name in FIGURES:
            logs = [math.log(getattr(row, name)) for row in members]
            assert getattr(group, name) == pytest.approx(math.exp(sum(logs) / len(logs)))


# --- what cannot be measured ----------------------------------------------------------------------------------------


def test_layers_without_a_branch_are_left_out_and_named() -> None:
    def make() -> nn.Module:
        base = Toy()
        base.conv = nn.Conv1d(3, 3, 1)
        return base

    model = adapted(make, target_modules=["q_proj", "embed_tokens", "conv"])
    seen = look(model, lambda: loss_of(model, batches(1)[0]))
    assert {row.module.rsplit(".", 1)[-1] for row in seen.modules} == {"q_proj"}
    reasons = {item.module: item.reason for item in seen.skipped}
    assert reasons.keys() == {"embed_tokens", "conv"}
    assert "embedding" in reasons["embed_tokens"]
    assert "no linear layer" in reasons["conv"]


def test_dora_has_another_branch(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(use_dora=True)
    with caplog.at_level(logging.WARNING):
        seen = look(model, lambda: loss_of(model, batches(1)[0]))
    assert (seen.supported, seen.status, seen.groups) == (False, None, ())
    assert "none of 9 modules can be measured: its branch is not s B A x but that of Dora" in seen.reason
    assert len(caplog.records) == 1


def test_expert_parameters_are_left_out() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 6))
            self.q_proj = nn.Linear(6, 6)

        def forward(self, x: Any) -> Any:
            return self.q_proj(x @ self.weight[0])

    model = adapted(
        lambda: nn.ModuleDict({"experts": Experts()}), target_modules=["q_proj"], target_parameters=["experts.weight"]
    )
    monitor = RankMonitor(model)
    assert [item.module for item in monitor.skipped] == ["experts"]
    assert "parameter" in monitor.skipped[0].reason


def test_an_adapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(NothingToMeasureError, match="'second'; its adapters are: default"):
        RankMonitor(adapted(), MonitorConfig(adapter="second"))
    with pytest.raises(NothingToMeasureError, match="no LoRA layer at all"):
        RankMonitor(Toy())


def test_one_of_two_adapters_is_watched() -> None:
    model = adapted(b=0.3)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    seen = look(model, lambda: loss_of(model, batches(1)[0]), replace(EVERY_STEP, adapter="second"))
    assert [row.r for row in seen.modules] == [2, 2, 2]
    assert {row.branch_ratio for row in seen.modules} == {0.0}


def test_a_quantised_base_has_no_norm() -> None:
    model = adapted(b=0.3)
    layer = layers_of(model)["layers.0.self_attn.q_proj"].base_layer
    layer.weight = nn.Parameter(torch.zeros(72, 1, dtype=torch.uint8), requires_grad=False)  # two 4-bit numbers a byte
    seen = rows(look(model, lambda: None))
    assert seen["layers.0.self_attn.q_proj"].relative_norm is None
    assert seen["layers.0.self_attn.q_proj"].norm > 0
    assert seen["layers.1.self_attn.q_proj"].relative_norm > 0


def _with_ds_id(model: Any) -> Any:
    next(model.parameters()).ds_id = 0
    return model


def _emptied(model: Any) -> Any:
    next(model.parameters()).data = torch.empty(0)
    return model


def _dtensor(model: Any) -> Any:
    class DTensor(nn.Parameter):
        """Named as torch's, whose making needs a process group."""

    model.extra = DTensor(torch.zeros(2))
    return model


def _fsdp1(model: Any) -> Any:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

    return FullyShardedDataParallel(model)


def _fsdp2(model: Any) -> Any:
    class FSDPModule:
        """Named as torch's mixin."""

    layer = model.base_model.model.layers[1]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {})
    return model


@pytest.mark.parametrize("shard", [_with_ds_id, _emptied, _dtensor, _fsdp1, _fsdp2])
def test_sharded_trainings_are_not_measured(shard: Callable[[Any], Any], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted()
    monitor = RankMonitor(model if shard is not _fsdp1 else shard(model), EVERY_STEP)
    if shard is not _fsdp1:
        shard(model)  # after the monitor was made, as a launcher may do
    with caplog.at_level(logging.WARNING):
        seen = [monitor.observe(step, 1.0) for step in range(4)]
    assert seen[0] is None
    for item in seen[1:]:
        assert (item.supported, item.status, item.modules, item.groups, item.loss) == (False, None, (), (), 1.0)
        assert "measure" in item.reason
        json.dumps(item.to_dict(), allow_nan=False)
    assert [record.message for record in caplog.records] == [f"rankwise does not watch this training: {seen[1].reason}"]
    assert not any(module._forward_hooks for module in model.modules())


def test_no_memory_for_the_copy_costs_one_figure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(sites: Any) -> Iterator[Any]:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr("rankwise.tuning.monitor.snapshot", refuse)
    model = adapted(b=0.3)
    with caplog.at_level(logging.WARNING):
        seen = look(model, lambda: loss_of(model, batches(1)[0]))
    assert {row.update_norm for row in seen.modules} == {None}
    assert all(row.branch_ratio > 0 for row in seen.modules)
    assert "no memory for a copy" in caplog.text


def test_names_lose_the_prefixes_of_wrappers() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

    plain = [row.module for row in look(adapted(), lambda: None).modules]
    assert plain[0] == "layers.0.self_attn.q_proj"
    assert [row.module for row in look(DistributedDataParallel(adapted()), lambda: None).modules] == plain


def test_the_modules_import_no_torch() -> None:
    code = (
        "import sys, rankwise.tuning.monitor, rankwise.tuning.callback, rankwise.tuning.groups;"
        "bad = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(repr(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
