"""Starved or sufficient: made cases, and that all ways of going on begin from the same function."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import rankwise

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.errors import NothingToMeasureError, RankwiseError, UnsupportedAdapterError, UsageError
from rankwise.records import CounterTestRecord, from_json, to_json
from rankwise.tuning import continuing, countertest
from rankwise.tuning.borrowing import borrowed
from rankwise.tuning.continuing import Move
from rankwise.tuning.countertest import counter_test
from rankwise.tuning.models import load_model
from rankwise.tuning.probing.passes import TokenRow, rows_of
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
        continuing.take_steps(tuned, weights, encoded(loaded.tokenizer), steps=steps, size=8, rate=rate, seed=0)
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
        begin = continuing.loss_of(tuned, rows)
        start = continuing.layers_of(tuned)
        for move in (Move("as it is"), Move("scale", 64), Move("rank", 4), Move("rank", 1000), Move("rate", 16)):
            weights = continuing.place(start, move, seed=1)
            assert continuing.loss_of(tuned, rows) == pytest.approx(begin, rel=1e-5)
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


def test_experts_in_one_parameter_are_refused() -> None:
    """PEFT's ParamWrapper is a LoraLayer whose factors are those of all experts side by side."""
    from types import SimpleNamespace

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=50, num_key_value_heads=1, num_local_experts=2, **sizes)
    config_of = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with torch.random.fork_rng():
        tuned = get_peft_model(MixtralForCausalLM(config), config_of)
    with pytest.raises(UnsupportedAdapterError, match="stacked experts"):
        continuing.layers_of(SimpleNamespace(base_model=tuned.base_model))


def test_losses_that_are_no_numbers_are_refused_before_any_step(pico: Path, tmp_path: Path) -> None:
    import torch

    adapter = make_adapter(pico, tmp_path / "a", rank=2, alpha=8.0, rate=1e-2, steps=1, modules=["q_proj"])
    loaded = load_model(str(pico), device="cpu")
    more: dict[str, Any] = {"steps": 1, "seeds": 2, "tokenizer": loaded.tokenizer}
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights.items()}
    shutil.copytree(adapter, tmp_path / "b")
    save_file(broken, tmp_path / "b" / "adapter_model.safetensors")
    # the loss does not tell: fused attention makes zeros of such queries
    with pytest.raises(NothingToMeasureError, match=r"b: .*q_proj.lora_A.* holds NaN or infinity, as do 3 more"):
        counter_test(loaded.model, tmp_path / "b", ROWS, **more)
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NothingToMeasureError, match=r"LlamaForCausalLM.*model\.norm\.weight holds NaN"):
        counter_test(loaded.model, adapter, ROWS, **more)


def test_with_more_rows_than_the_steps_take_some_are_gone_on_with(pico: Path, tmp_path: Path) -> None:
    """Rows that no step sees cannot be learnt in it, and would only thin out what is gained."""
    adapter = make_adapter(pico, tmp_path / "a", rank=2, alpha=8.0, rate=1e-2, steps=1, modules=["q_proj"])
    few = counter_test(str(pico), adapter, ROWS, steps=2, batch_size=4, seeds=2, device="cpu")
    assert (few.examples, few.judged_examples) == (16, 8)
    assert "sampled-rows" in [f.code for f in few.findings]
    every = counter_test(str(pico), adapter, ROWS, steps=2, batch_size=8, seeds=2, device="cpu")
    assert (every.examples, every.judged_examples) == (16, 16)
    assert "sampled-rows" not in [f.code for f in every.findings]


def test_what_counts_as_a_gain_is_a_share_of_the_loss_and_of_the_bases(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(pico, tmp_path / "a", rank=2, alpha=8.0, rate=1e-2, steps=20, modules="all-linear")
    small: dict[str, Any] = {"steps": 1, "batch_size": 4, "seeds": 2, "device": "cpu"}
    found = counter_test(str(pico), adapter, ROWS, **small)
    assert found.start_loss < 0.9 * found.base_loss
    assert found.least_gain == pytest.approx(0.02 * found.start_loss)
    monkeypatch.setattr(countertest, "LEAST_OF_BASE", 0.02)
    found = counter_test(str(pico), adapter, ROWS, **small)
    assert found.least_gain == pytest.approx(0.02 * found.base_loss)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 7e-4), ("sgd", 2e-4)])
def test_the_rate_is_that_of_the_run_where_adamw_would_bear_it(
    pico: Path, tmp_path: Path, optimizer: str, rate: float
) -> None:
    rankwise.train(
        str(pico), ROWS, out=tmp_path / "run", rank=2, steps=1, optimizer=optimizer, learning_rate=7e-4, batch_size=4,
        save_every=0, monitor_every=0, device="cpu", recall=False,
    )  # fmt: skip
    assert countertest._rate_of(tmp_path / "run", str(pico)) == rate
    (tmp_path / "run" / "run.json").write_text("{}")
    assert countertest._rate_of(tmp_path / "run", str(pico)) == 2e-4, "the default for a model that is not built in"


def test_how_far_to_go_ends_where_the_loss_no_longer_falls() -> None:
    tried: list[int] = []

    def going(losses: dict[int, float]) -> Any:
        def go(move: Move) -> float:
            tried.append(move.factor)
            return losses[move.factor]

        return go

    assert countertest._climb("rank", (4, 16, 64), going({4: 2.0, 16: 1.0, 64: 1.5})) == Move("rank", 16)
    assert countertest._climb("rate", (4, 16, 64), going({4: 2.0, 16: 2.0})) == Move("rate", 4)
    assert countertest._climb("rate", (4, 16, 64), going({4: float("nan")})) == Move("rate", 4)
    assert tried == [4, 16, 64, 4, 16, 4]


def test_an_interruption_leaves_the_live_model_as_it_was(pico: Path, tmp_path: Path) -> None:
    adapter = make_adapter(pico, tmp_path / "a", rank=2, alpha=8.0, rate=1e-2, steps=1, modules=["q_proj"])
    loaded = load_model(str(pico), device="cpu")
    names = [name for name, _ in loaded.model.named_parameters()]

    def stop(what: str, done: int, total: int) -> None:
        assert done <= total
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        counter_test(loaded.model, adapter, ROWS, steps=1, seeds=2, tokenizer=loaded.tokenizer, progress=stop)
    assert [name for name, _ in loaded.model.named_parameters()] == names
    assert all(p.requires_grad for p in loaded.model.parameters())
