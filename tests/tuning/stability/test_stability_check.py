"""`check` as a whole: the record, the built-in model, live models, refusals, interruption."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rankwise
from rankwise.errors import NothingToMeasureError, RankwiseError, TargetModulesError, UsageError
from rankwise.records import StabilityRecord, read_record, to_json

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

from rankwise.tuning.models import load_model
from rankwise.tuning.stability import checking

ROWS = [{"prompt": f"The office {i} is", "completion": f" in Alderburgh {i}."} for i in range(20)]
SMALL: dict[str, Any] = {"ranks": (2, 4, 8), "seeds": 2, "steps": (1, 3), "batch_size": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def record(pico: Path) -> StabilityRecord:
    return rankwise.check(str(pico), ROWS, **(SMALL | {"optimizer": ("adamw", "sgd")}))


def test_the_record_is_that_of_the_contract(record: StabilityRecord, tmp_path: Path) -> None:
    plain = json.loads(to_json(record))
    assert plain["format"] == "rankwise/stability/1"
    for name in ("rule", "optimizer", "init", "learning_rate", "group", "step", "rms_exponent", "rms_exponent_ci"):
        assert name in plain["cells"][0]
    assert set(plain["rows"][0]) == {
        "rule", "optimizer", "init", "rank", "seed", "step", "module", "branch_rms", "relative_rms", "update_rms",
        "grad_norm_A", "grad_norm_B", "loss",
    }  # fmt: skip
    assert {"rule", "exponent", "learning_rate_by_rank", "text"} <= set(plain["advice"])
    assert set(plain["advice"]["learning_rate_by_rank"]) == {"2", "4", "8"}
    (tmp_path / "check.json").write_text(to_json(record))
    assert read_record(tmp_path / "check.json", StabilityRecord) == record
    assert "lora, adamw, default" in repr(record)


def test_every_module_run_and_step_has_its_row(record: StabilityRecord) -> None:
    assert len(record.config.target_modules) == 14
    assert len(record.rows) == 2 * 2 * 3 * 2 * 2 * 14
    assert len(set(map(str, record.rows))) == len(record.rows)
    assert {row.step for row in record.rows} == {1, 3}
    for row in record.rows:
        assert row.branch_rms is not None
        assert row.branch_rms > 0
        if row.step == 1:
            assert (row.update_rms, row.grad_norm_A) == (row.branch_rms, 0)
        else:
            assert row.update_rms is not None
            assert 0 < row.update_rms < row.branch_rms
    first = {row.loss for row in record.rows if row.step == 1}
    assert len(first) == 1, "all runs begin from the same loss"
    assert len({(c.rule, c.optimizer, c.group, c.step) for c in record.cells}) == len(record.cells) == 2 * 2 * 5 * 2


def test_transferred_rates_bring_the_ranks_together(record: StabilityRecord) -> None:
    """The branch at rank 8 over that at rank 2, before and after: nearer to 1 wherever it was off by 10 %."""
    tried = [t for t in record.transfers if t.proof is not None and abs(np.log(t.proof.ratio_before)) > 0.1]
    assert tried
    for t in tried:
        assert t.proof is not None
        assert t.proof.how == "steps"
        assert t.proof.ratio_after is not None
        assert abs(np.log(t.proof.ratio_after)) < 0.5 * abs(np.log(t.proof.ratio_before))


def test_the_same_call_gives_the_same_figures_and_moves_no_random_state(pico: Path, record: StabilityRecord) -> None:
    torch.manual_seed(5)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    again = rankwise.check(str(pico), ROWS, **(SMALL | {"optimizer": ("adamw", "sgd")}))
    assert (again.rows, again.cells, again.advice) == (record.rows, record.cells, record.advice)
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert before[1:] == after[1:]
    assert torch.equal(before[0], after[0])


def test_the_first_step_alone_takes_no_step(pico: Path, record: StabilityRecord, monkeypatch: Any) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an optimizer step was made")

    monkeypatch.setattr(checking, "run_cells", never)
    one = rankwise.check(str(pico), ROWS, **(SMALL | {"steps": (1,), "optimizer": ("adamw", "sgd")}))
    # the batch to measure on does not depend on the steps, so that these are the rows of the longer check
    assert one.rows == tuple(row for row in record.rows if row.step == 1)
    assert {t.proof.how for t in one.transfers if t.proof is not None} <= {"closed form"}


@pytest.mark.slow
def test_on_the_built_in_model_the_exponents_lie_between_the_two_kinds_of_inputs() -> None:
    """A study on another small model of this shape found SGD -1.25, -0.25 and AdamW -0.31, +0.19; the theory allows
    -1.5 to -1, -0.5 to 0, -0.5 to 0 and 0 to 0.5."""
    found = rankwise.check(
        "rankwise:tiny", "rankwise:facts?n=40&seed=1", steps=(1,), seeds=3, optimizer=("sgd", "adamw"), device="cpu"
    )
    got = {(v.optimizer, v.rule): v for v in found.verdicts}
    wanted = {("sgd", "lora"): -1.25, ("sgd", "rslora"): -0.25, ("adamw", "lora"): -0.31, ("adamw", "rslora"): 0.19}
    for key, value in wanted.items():
        assert got[key].exponent == pytest.approx(value, abs=0.1)
    assert {key: v.verdict for key, v in got.items()} == {
        ("sgd", "lora"): "collapsing",
        ("sgd", "rslora"): "collapsing",
        ("adamw", "lora"): "collapsing",
        ("adamw", "rslora"): "growing",
    }
    assert found.advice.optimizer == "sgd"
    assert found.more_advice[0].exponent == pytest.approx(0.69, abs=0.05)


def test_a_live_model_comes_back_as_it_was(pico: Path) -> None:
    loaded = load_model(str(pico), device="cpu")
    model = loaded.model.train()
    weights = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    parts = {name: id(module) for name, module in model.named_modules()}
    live = rankwise.check(model, ROWS, tokenizer=loaded.tokenizer, **SMALL)
    assert {name: id(module) for name, module in model.named_modules()} == parts
    assert all(id(p) == weights[n][0] and torch.equal(p, weights[n][1]) for n, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert live.config.model == "LlamaForCausalLM in memory"
    assert live.rows == rankwise.check(str(pico), ROWS, **SMALL).rows


def test_an_interruption_leaves_the_model_as_it_was(pico: Path) -> None:
    loaded = load_model(str(pico), device="cpu")

    def stop(what: str, done: int, total: int) -> None:
        assert done <= total
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rankwise.check(loaded.model, ROWS, tokenizer=loaded.tokenizer, progress=stop, **SMALL)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
    assert all(p.requires_grad for p in loaded.model.parameters())


def test_progress_rises_to_its_end(pico: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    rankwise.check(str(pico), ROWS, progress=lambda *said: seen.append(said), **SMALL)
    counts = [(done, total) for what, done, total in seen if what != "loading model and data"]
    assert counts == sorted(counts)
    assert counts[-1][0] == counts[-1][1]


def test_runs_that_leave_are_named_and_the_verdict_waits(pico: Path) -> None:
    found = rankwise.check(
        str(pico), ROWS, **(SMALL | {"optimizer": "sgd", "scaling": "unscaled", "learning_rate": 1e6, "steps": (1, 4)})
    )
    assert {v.verdict for v in found.verdicts} == {"undecided"}
    assert "diverged-in-check" in {f.code for f in found.findings}
    last = next(c for c in found.cells if c.group == "all" and c.step == 4)
    assert last.runs_diverged == 6
    assert all(v is None for v in last.relative_rms_by_rank.values())
    first = next(c for c in found.cells if c.group == "all" and c.step == 1)
    assert first.rms_exponent is not None
    assert found.advice.step == 1
    to_json(found)  # every number in it is finite or null


def test_modules_can_be_chosen(pico: Path) -> None:
    found = rankwise.check(str(pico), ROWS, **(SMALL | {"target_modules": ["q_proj", "up_proj"], "steps": (1,)}))
    assert {name.rsplit(".", 1)[-1] for name in found.config.target_modules} == {"q_proj", "up_proj"}
    assert len(found.config.target_modules) == 4


def test_cells_that_fail(record: StabilityRecord) -> None:
    every = {(c.rule, c.optimizer, c.step): c.verdict for c in record.cells if c.group == "all"}
    for word in ("collapsing", "growing"):
        assert [c.verdict for c in record.failing(word)] == [v for v in every.values() if v == word]
    assert not any(c.runs_diverged for c in record.cells)
    assert len(record.failing("unstable")) == len(record.failing("collapsing")) + len(record.failing("growing"))
    assert record.failing("collapsing")


BAD: list[tuple[dict[str, Any], type[RankwiseError], str]] = [
    ({"max_length": 1}, UsageError, "--max-length must be 2 or more"),
    ({"max_length": 129}, UsageError, "past the model's context of 128 tokens"),
    ({"target_modules": "none"}, TargetModulesError, "none"),
    ({"target_modules": ["embed_tokens"]}, NothingToMeasureError, "no module can be given a branch"),
    ({"data": []}, RankwiseError, "no rows"),
    ({"data": "rankwise:fact"}, UsageError, "there is no data set rankwise:fact"),
    ({"device": "tpu"}, RankwiseError, "tpu"),
    ({"ranks": (4,)}, UsageError, "two different ranks"),
]


@pytest.mark.parametrize(("changed", "kind", "said"), BAD, ids=[str(c) for c, _, _ in BAD])
def test_what_makes_no_sense_is_refused(
    pico: Path, changed: dict[str, Any], kind: type[RankwiseError], said: str
) -> None:
    call = SMALL | {"data": ROWS} | changed
    with pytest.raises(kind) as caught:
        rankwise.check(str(pico), call.pop("data"), **call)
    assert said in str(caught.value)


def test_a_base_whose_loss_is_no_number_is_refused(pico: Path) -> None:
    """Weights that are numbers, and a loss that is none: logits past float32."""
    loaded = load_model(str(pico), device="cpu")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(3e38)
    with pytest.raises(NothingToMeasureError, match=r"its loss is no number\. Look at the data, or load the model"):
        rankwise.check(loaded.model, ROWS, tokenizer=loaded.tokenizer, **SMALL)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_named(pico: Path, value: str) -> None:
    """Not left to the loss: fused attention makes zeros of a query that is NaN."""
    loaded = load_model(str(pico), device="cpu")
    with torch.no_grad():
        loaded.model.model.layers[0].self_attn.q_proj.weight[3, 5] = float(value)
    said = r"LlamaForCausalLM in memory: model\.layers\.0\.self_attn\.q_proj\.weight holds NaN or infinity"
    with pytest.raises(NothingToMeasureError, match=said):
        rankwise.check(loaded.model, ROWS, tokenizer=loaded.tokenizer, **SMALL)


def test_ranks_that_no_weight_has_room_for_are_refused_before_memory_is_asked_for(pico: Path) -> None:
    with pytest.raises(UsageError, match=r"1000000 is above the larger side of every module, 64 at most"):
        rankwise.check(str(pico), ROWS, **(SMALL | {"ranks": (4, 1_000_000)}))
    assert rankwise.check(str(pico), ROWS, **(SMALL | {"ranks": (4, 64), "steps": (1,)})).rows
