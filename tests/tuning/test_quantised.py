"""Bases of 4 bits: `check`, `probe` and the counter-test find what they find on a model with the same values as floats.

bitsandbytes needs a GPU, so stand-ins with the same shape of weight take its place (`small_models.pack_to_4_bit`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import pack_to_4_bit, unpack_to_floats

import rankwise

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.tuning.models import Loaded, load_model

WORDS = ("Alderburgh", "Brambleport", "Coppermouth", "Doverhaven")
ROWS = [{"prompt": f"The office {i} of {WORDS[i % 4]} is", "completion": f" in {WORDS[i % 3]} {i}."} for i in range(12)]


@pytest.fixture
def packed(pico: Path) -> Loaded:
    loaded = load_model(str(pico), device="cpu")
    pack_to_4_bit(loaded.model)
    assert loaded.model.model.layers[0].mlp.up_proj.weight.shape == (64 * 32 // 2, 1)
    return loaded


@pytest.fixture
def floats(pico: Path) -> Loaded:
    loaded = load_model(str(pico), device="cpu")
    pack_to_4_bit(loaded.model)
    unpack_to_floats(loaded.model)
    return loaded


def bytes_of(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_check_finds_the_same(packed: Loaded, floats: Loaded, checkpointing: bool) -> None:
    before = bytes_of(packed.model)
    small: dict[str, Any] = {
        "ranks": (2, 8),
        "seeds": 2,
        "steps": (1, 2),
        "batch_size": 4,
        "optimizer": ("adamw", "sgd"),
    }
    small["gradient_checkpointing"] = checkpointing
    one, other = (rankwise.check(of.model, ROWS, tokenizer=of.tokenizer, **small) for of in (packed, floats))
    assert len(one.rows) == len(other.rows) == 14 * 2 * 2 * 2 * 2 * 2
    for a, b in zip(one.rows, other.rows, strict=True):
        assert (a.module, a.rank, a.rule, a.optimizer, a.seed, a.step) == (
            (b.module, b.rank, b.rule, b.optimizer, b.seed, b.step)
        )
        # 1e-4: the same float32 products, in the order in which the two kinds of layers take them
        assert a.branch_rms == pytest.approx(b.branch_rms, rel=1e-4)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert all((p == before[name]).all() for name, p in packed.model.named_parameters())


def test_probe_finds_the_same_and_plans_the_sizes_that_the_layers_have(packed: Loaded, floats: Loaded) -> None:
    before = bytes_of(packed.model)
    one, other = (
        rankwise.probe(of.model, ROWS, tokenizer=of.tokenizer, steps=10, learning_rate=1e-2) for of in (packed, floats)
    )
    assert one.bits_to_learn == pytest.approx(other.bits_to_learn, rel=1e-3)
    assert one.base_bits == pytest.approx(other.base_bits, rel=1e-5)
    for a, b in zip(one.gradient, other.gradient, strict=True):
        assert (a.module, a.shape) == (b.module, b.shape)
        assert a.energy == pytest.approx(b.energy, rel=1e-3)
    assert {m.module: m.shape for m in one.recommendation.modules}["model.layers.0.mlp.up_proj"] == (64, 32)
    assert [p.learning_rate for p in one.rates] == [p.learning_rate for p in other.rates]
    assert all((p == before[name]).all() for name, p in packed.model.named_parameters())


def test_a_counter_test_goes_on_from_an_adapter_on_it(packed: Loaded, floats: Loaded, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from rankwise.tuning.borrowing import borrowed

    with borrowed(floats.model) as model:
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "up_proj"]))
        tuned.save_pretrained(tmp_path / "a")
    before = bytes_of(packed.model)
    one, other = (
        rankwise.counter_test(
            of.model, tmp_path / "a", ROWS, steps=3, seeds=2, tokenizer=of.tokenizer, learning_rate=1e-2
        )
        for of in (packed, floats)
    )
    assert one.start_loss == pytest.approx(other.start_loss, rel=1e-5)
    for a, b in zip(one.moves, other.moves, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-3)
    assert all((p == before[name]).all() for name, p in packed.model.named_parameters())
