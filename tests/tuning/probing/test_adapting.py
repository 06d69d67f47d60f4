"""The adapter of the form and the ramp of rates: gradients in parts, the moment that is kept, rules that PEFT lacks."""

from __future__ import annotations

import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.tuning.borrowing import borrowed
from rankwise.tuning.encoding import IGNORED
from rankwise.tuning.models import load_model
from rankwise.tuning.probing import adapting, passes, rates
from rankwise.tuning.probing.adapting import EVERY, PATIENCE, adapted, order_of, pull_mean, wrapped
from rankwise.tuning.probing.passes import TokenRow, target_bits, token_bits
from rankwise.tuning.probing.rates import FACTOR, LOWEST, SPENT, ramp
from rankwise.tuning.targets import target_modules

ROWS = tuple(
    TokenRow((1, 40 + i, *range(90, 91 + i % 3), 200 + 7 * i), (IGNORED, IGNORED, *range(90, 91 + i % 3), 200 + 7 * i))
    for i in range(12)
)


@pytest.fixture
def model(pico: Path) -> Any:
    return load_model(str(pico), device="cpu").model.eval()


def bits_of(model: Any, rows: tuple[TokenRow, ...]) -> float:
    return math.fsum(target_bits(row, each) for row, each in zip(rows, token_bits(model, rows), strict=True))


def known(model: Any) -> tuple[TokenRow, ...]:
    """Return rows that end in what the model says by itself: every way from it is a way down."""
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row.ids[:2]])).logits[0, -1].argmax() for row in ROWS]
    return tuple(
        TokenRow((*row.ids[:2], int(t)), (IGNORED, IGNORED, int(t))) for row, t in zip(ROWS, found, strict=True)
    )


def test_the_gradient_of_rows_that_do_not_fit_together_is_that_of_the_mean(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike length: a mean of the parts' means would be another."""
    from torch.nn.functional import cross_entropy

    weight = model.model.layers[0].self_attn.q_proj.weight
    nats = [
        cross_entropy(
            model(input_ids=torch.tensor([r.ids])).logits[0, :-1], torch.tensor(r.labels[1:]), reduction="sum"
        )
        for r in ROWS
    ]
    mean = torch.stack(nats).sum() / sum(len(r.targets) for r in ROWS)
    wanted, value = torch.autograd.grad(mean, weight)[0], float(mean.detach())
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    for most, count in ((10_000, 1), (1, 12)):
        monkeypatch.setattr(passes, "MOST_TOKENS", most)
        calls.clear()
        model.zero_grad()
        assert pull_mean(model, ROWS, range(12)) == pytest.approx(value, rel=1e-5)
        assert len(calls) == count
        assert torch.allclose(weight.grad, wanted, rtol=1e-4, atol=1e-7)  # float32 sums in another order
    handle.remove()


def test_the_best_moment_is_kept_and_waiting_ends(model: Any) -> None:
    """Held-out rows that are known already get dearer at every step: none is kept, and the model is lent as it was."""
    judges = known(model)
    before = bits_of(model, judges)
    with adapted(model, target_modules(model), ROWS, judges, learning_rate=1e-2, most_steps=200, seed=0) as made:
        assert made.steps == 0
        assert [look.step for look in made.looks] == [EVERY * i for i in range(PATIENCE + 1)]
        assert bits_of(made.model, judges) == pytest.approx(before, rel=1e-6)


def test_what_helps_is_kept(model: Any) -> None:
    """The held-out rows are those that are learnt from: each look is better, and the last is lent."""
    said: list[int] = []
    with adapted(
        model, target_modules(model), ROWS, ROWS, learning_rate=1e-2, most_steps=25, seed=0, said=said.append
    ) as made:
        assert [look.step for look in made.looks] == [0, 10, 20, 25]
        best = min(made.looks, key=lambda look: look.bits_per_token)
        assert made.steps == best.step > 0
        tokens = sum(len(row.targets) for row in ROWS)
        assert bits_of(made.model, ROWS) / tokens == pytest.approx(best.bits_per_token, rel=1e-5)
    assert said == list(range(1, 26))


def test_all_rows_are_seen_before_one_comes_again() -> None:
    order = order_of(10, steps=5, size=4, seed=0)
    flat = [i for batch in order for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert [len(batch) for batch in order] == [4] * 5
    assert order == order_of(10, steps=5, size=4, seed=0) != order_of(10, steps=5, size=4, seed=1)


def test_what_peft_turns_over_in_gpt2_is_not_told_to_the_user() -> None:
    from peft import LoraConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    with warnings.catch_warnings(record=True) as heard, borrowed(gpt2):
        warnings.simplefilter("always")
        tuned = wrapped(gpt2, LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.5, target_modules=["c_attn"]))
        assert not any(module.training for module in tuned.modules())
    assert [str(w.message) for w in heard if "fan_in_fan_out" in str(w.message)] == []


def ramped(model: Any, scaling: str, alpha: float, rows: tuple[TokenRow, ...] = ROWS, **more: Any) -> Any:
    return ramp(model, target_modules(model), rows, rank=4, scaling=scaling, lora_alpha=alpha, seed=0, **more)


def test_a_ramp_rises_by_a_factor_until_the_loss_has_left(model: Any) -> None:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    said: list[int] = []
    points = ramped(model, "lora", 64.0, known(model), said=said.append)
    assert 10 < len(points) < 60
    assert [p.learning_rate for p in points] == pytest.approx([LOWEST * FACTOR**i for i in range(len(points))])
    ends = [later.smoothed > SPENT * min(p.smoothed for p in points[: i + 1]) for i, later in enumerate(points)]
    assert ends == [False] * (len(points) - 1) + [True]
    for before, after in itertools.pairwise(points):
        assert after.smoothed == pytest.approx(0.7 * before.smoothed + 0.3 * after.loss)
    assert said == list(range(1, len(points)))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("rule", "alpha"), [("unscaled", 16.0), ("rslora", 32.0)])
def test_the_rules_of_a_ramp_are_those_of_the_plan(
    model: Any, rule: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At rank 4 both are a scale of 16, and so alpha 64 under alpha / r; PEFT has no rule `unscaled`."""
    monkeypatch.setattr(rates, "HIGHEST", 1e-4)  # thirteen steps tell
    assert ramped(model, rule, alpha) == ramped(model, "lora", 64.0)
    assert ramped(model, rule, alpha) != ramped(model, "lora", 16.0)


def test_a_loss_that_is_no_number_ends_a_ramp(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter((2.0, 1.5, math.nan, 1.0))
    monkeypatch.setattr(rates, "pull_mean", lambda *_: next(values))
    assert [p.loss for p in ramped(model, "lora", 16.0)] == [2.0, 1.5]


def test_judges_are_a_sample_where_there_are_many(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "JUDGES", 3)
    heard: list[int] = []
    monkeypatch.setattr(adapting, "token_bits", lambda _, rows: heard.append(len(rows)) or [(0.0,) * 9] * len(rows))
    with adapted(model, ["q_proj"], ROWS, ROWS, learning_rate=1e-3, most_steps=0, seed=0) as made:
        assert made.steps == 0
    assert heard == [3]
