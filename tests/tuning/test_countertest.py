"""Starved or sufficient: made cases, and that all ways of going on begin from the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.errors import RankwiseError, UnsupportedAdapterError, UsageError
from rankwise.records import CounterMove, CounterTestRecord, from_json, to_json
from rankwise.tuning import countertest
from rankwise.tuning.countertest import Move, counter_test, judge, paired
from rankwise.tuning.models import load_model
from rankwise.tuning.probing.passes import TokenRow, rows_of
from rankwise.tuning.training import borrowed
from rankwise.tuning.world.builtin import read_builtin

ROWS = [dict(row) for row in read_builtin("rankwise:facts?n=4&seed=0").rows[:16]]


def encoded(tokenizer: Any) -> tuple[TokenRow, ...]:
    from rankwise.tuning.data import Examples
    from rankwise.tuning.encoding import encode

    examples = Examples(name="rows", form="prompt-completion", rows=tuple(ROWS), places=())
    return rows_of(encode(examples, tokenizer, 64))


def make_adapter(pico: Path, out: Path, *, rank: int, alpha: float, rate: float, steps: int, modules: Any) -> Path:
    """Train an adapter on ROWS with a bare loop, and save it as PEFT does."""
    import torch
    from peft import LoraConfig, get_peft_model

    loaded = load_model(str(pico), device="cpu")
    with borrowed(loaded.model) as model, torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=modules)
        )
        weights = [p for p in tuned.parameters() if p.requires_grad]
        countertest._steps(tuned, weights, encoded(loaded.tokenizer), steps=steps, size=8, rate=rate, seed=0)
        tuned.save_pretrained(out)
    return out


CASES: dict[str, dict[str, Any]] = {
    # a hundredth of a usual scale, at a usual rate
    "starved by scale": {"rank": 8, "alpha": 0.08, "rate": 1e-2, "steps": 20, "modules": "all-linear"},
    # one direction in two of seven kinds of layers, until it learns no more
    "starved by rank": {"rank": 1, "alpha": 4.0, "rate": 1e-2, "steps": 250, "modules": ["q_proj", "v_proj"]},
    # a hundredth of a usual rate, at a usual scale
    "starved by rate": {"rank": 8, "alpha": 16.0, "rate": 1e-4, "steps": 20, "modules": "all-linear"},
    # all there is to learn is learnt
    "sufficient": {"rank": 16, "alpha": 16.0, "rate": 1e-2, "steps": 200, "modules": "all-linear"},
}


@pytest.mark.parametrize("verdict", CASES)
def test_made_cases_get_their_verdict(pico: Path, tmp_path: Path, verdict: str) -> None:
    case = CASES[verdict]
    adapter = make_adapter(pico, tmp_path / "adapter", **case)
    found = counter_test(
        str(pico), adapter, ROWS, steps=25, batch_size=8, seeds=3, learning_rate=case["rate"], device="cpu"
    )
    assert found.verdict == verdict, found.text
    assert found.rank == case["rank"]
    assert [m.move for m in found.moves] == ["as it is", "scale", "rank", "rate"]
    assert from_json(to_json(found), CounterTestRecord) == found


def test_all_ways_of_going_on_begin_from_the_same_function(pico: Path, tmp_path: Path) -> None:
    """The loss before any step is that of the adapter, to float32's rounding, whatever the factor."""
    import torch

    from rankwise.tuning import recalling

    adapter = make_adapter(pico, tmp_path / "a", rank=4, alpha=8.0, rate=1e-2, steps=20, modules="all-linear")
    loaded = load_model(str(pico), device="cpu")
    rows = encoded(loaded.tokenizer)
    with borrowed(loaded.model) as model, torch.random.fork_rng():
        tuned = recalling.attach_adapter(model, str(adapter), recalling.check_adapter(adapter))
        tuned.eval()
        begin = countertest._loss(tuned, rows)
        start = countertest._layers(tuned)
        for move in (Move("as it is"), Move("scale", 64), Move("rank", 4), Move("rank", 1000), Move("rate", 16)):
            weights = countertest._set(start, move, seed=1)
            assert countertest._loss(tuned, rows) == pytest.approx(begin, rel=1e-5)
            assert all(w.requires_grad for w in weights)
            assert max(len(layer.layer.lora_A["default"].weight) for layer in start) <= 32


def test_the_live_model_comes_back_as_it_was(pico: Path, tmp_path: Path) -> None:
    adapter = make_adapter(pico, tmp_path / "a", rank=2, alpha=8.0, rate=1e-2, steps=3, modules=["q_proj"])
    loaded = load_model(str(pico), device="cpu")
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    counter_test(loaded.model, adapter, ROWS, steps=1, seeds=2, tokenizer=loaded.tokenizer)
    after = dict(loaded.model.named_parameters())
    assert after.keys() == before.keys()
    assert all((after[name] == before[name]).all() for name in before)


def moves(*gains: tuple[float, float, float] | None) -> list[CounterMove]:
    """Return moves of which each gained (mean, low, high) of its interval."""
    found = [
        CounterMove(
            move="as it is",
            text="as it is",
            rank=1,
            factor=1.0,
            losses=(1.0, 1.0),
            loss=1.0,
            gain=None,
            gain_interval=None,
        )
    ]
    for name, gain in zip(("scale", "rank", "rate"), gains, strict=True):
        mean = None if gain is None else gain[0]
        losses = (None, None) if mean is None else (1.0 - mean, 1.0 - mean)
        found.append(
            CounterMove(
                move=name,
                text=name,
                rank=1,
                factor=4.0,
                losses=losses,
                loss=losses[0],
                gain=mean,
                gain_interval=None if gain is None else gain[1:],
            )
        )
    return found


@pytest.mark.parametrize(
    ("gains", "scaling", "verdict"),
    [
        (((0.5, 0.4, 0.6), (0.1, 0.05, 0.15), (0.2, 0.1, 0.3)), 2.0, "starved by scale"),
        (((0.1, 0.05, 0.2), (0.5, 0.4, 0.6), (0.2, 0.1, 0.3)), 2.0, "starved by rank"),
        (((0.500, 0.49, 0.51), (0.1, 0.05, 0.15), (0.505, 0.49, 0.52)), 0.01, "starved by scale"),
        (((0.505, 0.49, 0.51), (0.1, 0.05, 0.15), (0.500, 0.49, 0.52)), 2.0, "starved by rate"),
        (((-0.1, -0.2, 0.0), (0.005, 0.0, 0.01), None), 2.0, "sufficient"),
        (((0.1, -0.2, 0.4), (0.0, -0.1, 0.1), (-0.1, -0.2, 0.0)), 2.0, "undecided"),
    ],
)
def test_verdicts(gains: Any, scaling: float, verdict: str) -> None:
    assert judge(moves(*gains), 1.0, scaling)[0] == verdict


def test_intervals_are_students() -> None:
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 4.303 at two degrees of freedom."""
    mean, interval = paired([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 4.303 / 3**0.5)
    assert paired([1.0, float("nan")]) == (None, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"seeds": 1},
        {"batch_size": 0},
        {"factors": ()},
        {"factors": (4, 2)},
        {"factors": (1, 2)},
        {"learning_rate": float("nan")},
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        counter_test("no such model", "no such adapter", ROWS, **wrong)


def test_dora_and_missing_adapters_are_refused(pico: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    loaded = load_model(str(pico), device="cpu")
    with borrowed(loaded.model) as model:
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "d")
    with pytest.raises(UnsupportedAdapterError, match="DoRA"):
        counter_test(str(pico), tmp_path / "d", ROWS, steps=1, seeds=2, device="cpu")
    with pytest.raises(RankwiseError):
        counter_test(str(pico), tmp_path / "nothing", ROWS, device="cpu")
