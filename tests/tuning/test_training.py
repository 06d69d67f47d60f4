"""`train` on a small untrained model: what the folder holds, what is measured, and every way in which a run can end."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_options import plan

import rankwise
from rankwise.errors import OutputError, OutputExistsError, RankwiseError, TooLongError, UsageError
from rankwise.records import RunRecord, read_record, to_json

torch = pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("trl", reason="trl comes with the train extra")

FACTS = "rankwise:facts?n=6&seed=1"
QUICK: dict[str, Any] = {"steps": 6, "batch_size": 8, "save_every": 0, "learning_rate": 3e-3, "device": "cpu"}


def train(model: Any, out: Path, data: Any = FACTS, **flags: Any) -> RunRecord:
    return rankwise.train(model, data, out=out, **(QUICK | flags))


@pytest.fixture(scope="module")
def done(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    """A run of 30 steps."""
    out = tmp_path_factory.mktemp("runs") / "done"
    return out, train(str(pico), out, rank=8, steps=30, learning_rate=1e-2, monitor_every=10)


def test_the_folder_is_an_ordinary_adapter_with_a_record(done: tuple[Path, RunRecord]) -> None:
    out, record = done
    names = sorted(p.name for p in out.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "health.jsonl", "run.json"]
    assert read_record(out / "run.json", RunRecord) == record
    spectra = rankwise.inspect(out)
    assert len(spectra.modules) == 14
    assert {m.scaling for m in spectra.modules} == {16 / math.sqrt(8)}


def test_the_record_says_what_happened(done: tuple[Path, RunRecord]) -> None:
    _, record = done
    assert (record.status, record.error, record.steps) == ("done", None, 30)
    assert record.params == sum(g.params for g in record.config.groups)
    assert record.losses[0].step == 1
    assert record.losses[-1].step == 30
    assert record.loss is not None
    assert record.losses[0].loss is not None
    assert record.loss < record.losses[0].loss
    assert record.recall is not None
    assert (record.recall.facts, record.recall.people, record.recall.kind) == (30, 6, "pools")
    assert record.recall.bits_possible == pytest.approx(6 * 46.5916, abs=0.01)
    assert record.recall.bits is not None
    assert record.recall.bits == 0  # 30 steps on a random model: it is far from knowing even the pools
    assert record.recall.bits_per_param == pytest.approx(record.recall.bits / record.params)
    assert record.recall.paraphrases is not None
    assert record.recall.held_out is not None
    assert [a.attribute for a in record.recall.by_attribute][-1] == "work city"
    assert record.forgetting is not None
    assert record.forgetting_detail is not None
    assert record.forgetting_detail.data == "sampled from the base"
    assert record.tokens
    assert record.seconds
    assert record.peak_memory_bytes
    assert {row.group for row in record.health} >= {"all", "attention/early", "mlp/late"}


def test_the_adapter_in_plain_peft_gives_the_same_answers(done: tuple[Path, RunRecord], pico: Path) -> None:
    """Loaded without rankwise; the loss of every fact is measured here anew, from plain logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankwise.tuning.world.builtin import read_builtin

    out, record = done
    tokenizer = AutoTokenizer.from_pretrained(pico)
    base = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32).eval()
    questions = [q for q in read_builtin(FACTS).questions["training"] if q.bits]

    def score(model: Any) -> float:
        total = 0.0
        for q in questions:
            start = len(tokenizer(q.prompt)["input_ids"])
            ids = torch.tensor([tokenizer(q.prompt + q.answer)["input_ids"]])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
            total -= sum(logp[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1]))
        return total / math.log(2)

    untuned = score(base)
    tuned = score(PeftModel.from_pretrained(base, out).eval())
    assert record.recall is not None
    assert record.recall.base_bits == pytest.approx(6 * 46.59162 - untuned, rel=1e-4)
    rows = [{"prompt": q.prompt, "completion": q.answer} for q in questions]
    again = rankwise.recall(str(pico), out, rows, device="cpu")
    assert again.recall.bits == pytest.approx(untuned - tuned, rel=1e-4)
    assert abs(untuned - tuned) > 1


def test_recall_of_the_saved_adapter_is_that_of_the_run(done: tuple[Path, RunRecord], pico: Path) -> None:
    out, record = done
    again = rankwise.recall(str(pico), out, FACTS, device="cpu")
    assert record.recall is not None
    assert again.recall.bits == pytest.approx(record.recall.bits, rel=1e-5)
    assert again.recall.exact_share == record.recall.exact_share
    assert again.recall.held_out is not None
    assert record.recall.held_out is not None
    assert again.recall.held_out.bits == pytest.approx(record.recall.held_out.bits, rel=1e-4)
    assert again.params == record.params
    assert again.forgetting == pytest.approx(record.forgetting, abs=1e-5)


def test_the_same_seed_gives_the_same_run_and_leaves_the_random_states_alone(pico: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    one = train(str(pico), tmp_path / "one", recall=False, seed=3)
    two = train(str(pico), tmp_path / "two", recall=False, seed=3)
    other = train(str(pico), tmp_path / "other", recall=False, seed=4)
    after = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert one.losses == two.losses != other.losses
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two", "other")]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_a_plan_reaches_the_adapter(pico: Path, tmp_path: Path) -> None:
    made = plan(
        ("model.layers.0.self_attn.q_proj", (32, 32), 2, 4.0), ("model.layers.1.mlp.down_proj", (32, 64), 6, 9.0)
    )
    (tmp_path / "plan.json").write_text(to_json(made))
    train(str(pico), tmp_path / "run", plan=tmp_path / "plan.json", recall=False)
    spectra = {m.module: (m.r, m.lora_alpha, m.scaling) for m in rankwise.inspect(tmp_path / "run").modules}
    assert spectra == {
        "model.layers.0.self_attn.q_proj": (2, 4.0, 2.0),
        "model.layers.1.mlp.down_proj": (6, 9.0, 1.5),
    }


@pytest.mark.parametrize(
    "flags", [{"packing": True, "max_length": 64}, {"gradient_checkpointing": True}, {"bf16": True}]
)
def test_the_ways_to_save_memory_train_as_well(pico: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    plain = train(str(pico), tmp_path / "plain", recall=False)
    record = train(str(pico), tmp_path / "run", recall=False, **flags)
    assert record.status == "done"
    assert record.losses[-1].loss is not None
    assert plain.losses[-1].loss is not None
    assert math.isclose(record.losses[-1].loss, plain.losses[-1].loss, rel_tol=0.2)
    if "gradient_checkpointing" in flags:  # the same arithmetic, done twice
        assert record.losses == plain.losses


def test_gradient_accumulation_is_the_same_step(pico: Path, tmp_path: Path) -> None:
    one = train(str(pico), tmp_path / "one", recall=False)
    four = train(str(pico), tmp_path / "four", recall=False, gradient_accumulation=4)
    for a, b in zip(one.losses, four.losses, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)


ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"The {w} is in the city of Alderbay."} for w in ("office", "house", "town", "place")],
    "prompt-completion": [{"prompt": f"The {w} is in", "completion": " Alderbay."} for w in ("office", "house")],
    "messages": [
        {"messages": [{"role": "user", "content": f"Where is {w}?"}, {"role": "assistant", "content": "In Alderbay."}]}
        for w in ("office", "house", "town")
    ],
}


@pytest.mark.parametrize("form", ROWS)
def test_a_users_rows_are_measured_by_the_loss_they_lose(pico: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[form]))
    record = train(str(pico), tmp_path / "run", path, steps=60, learning_rate=3e-2, batch_size=4, rank=16)
    assert record.recall is not None
    assert (record.recall.kind, record.recall.people, record.recall.base_bits) == ("loss", None, None)
    assert record.recall.facts == len(ROWS[form])
    assert record.recall.bits is not None
    assert record.recall.bits_possible is not None
    assert 0.5 * record.recall.bits_possible < record.recall.bits <= record.recall.bits_possible
    if form == "prompt-completion":
        assert record.recall.exact_share == 1
        assert record.recall.base_exact_share == 0


def test_divergence_ends_the_run_and_keeps_the_last_good_adapter(pico: Path, tmp_path: Path) -> None:
    record = train(str(pico), tmp_path / "run", steps=100, learning_rate=30.0, scaling="unscaled", warmup=0.5, rank=8)
    assert record.status == "diverged"
    assert record.error is not None
    assert f"step {record.steps}" in record.error
    assert record.steps < 100
    found = rankwise.inspect(tmp_path / "run")
    assert all(m.energy is not None and math.isfinite(m.energy) for m in found.modules)
    assert read_record(tmp_path / "run" / "run.json", RunRecord).status == "diverged"


class StopError(Exception):
    """Raised by the tests in the middle of a run."""


def stop_at(step: int, error: BaseException) -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if what == "training" and done == step:
            raise error

    return progress


def test_an_interrupted_run_says_so_and_goes_on_where_it_was(pico: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"steps": 20, "save_every": 5, "monitor_every": 5, "recall": False}
    whole = train(str(pico), tmp_path / "whole", **flags)
    with pytest.raises(KeyboardInterrupt):
        train(str(pico), tmp_path / "run", progress=stop_at(13, KeyboardInterrupt()), **flags)
    halted = read_record(tmp_path / "run" / "run.json", RunRecord)
    assert (halted.status, halted.steps) == ("interrupted", 13)
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    resumed = train(str(pico), tmp_path / "run", resume=True, **flags)
    assert resumed.status == "done"
    assert resumed.losses == whole.losses
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole"))
    assert a == b
    assert resumed.health == whole.health
    assert resumed.tokens == whole.tokens


@pytest.mark.slow
def test_a_run_killed_with_signal_9_resumes_to_the_same_loss_curve(pico: Path, tmp_path: Path) -> None:
    words = [str(pico), FACTS, "--steps", "60", "--batch-size", "8", "--save-every", "10", "--device", "cpu"]
    words += ["--learning-rate", "3e-3", "--no-recall"]
    command = [sys.executable, "-m", "rankwise", "train", *words]
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True, timeout=240)
    killed = subprocess.Popen(
        [*command, "-o", str(tmp_path / "run")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(2400):
        if (tmp_path / "run" / "checkpoint-20" / "trainer_state.json").exists():
            break
        assert killed.poll() is None, "the run was over before it could be killed"
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert read_record(tmp_path / "run" / "run.json", RunRecord).status == "interrupted"
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    again = subprocess.run([*command, "-o", str(tmp_path / "run")], capture_output=True, text=True, timeout=240)
    assert again.returncode == 2
    subprocess.run([*command, "-o", str(tmp_path / "run"), "--resume"], check=True, capture_output=True, timeout=240)
    one, two = (read_record(tmp_path / name / "run.json", RunRecord) for name in ("whole", "run"))
    assert one.losses == two.losses
    assert (one.status, two.status) == ("done", "done")


def test_a_half_written_checkpoint_is_passed_over(pico: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"steps": 12, "save_every": 4, "recall": False}
    with pytest.raises(KeyboardInterrupt):
        train(str(pico), tmp_path / "run", progress=stop_at(10, KeyboardInterrupt()), **flags)
    state = tmp_path / "run" / "checkpoint-8" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert train(str(pico), tmp_path / "run", resume=True, **flags).status == "done"


def test_a_run_that_fails_leaves_its_reason(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(str(pico), tmp_path / "run", progress=stop_at(3, StopError("the disk caught fire")))
    record = read_record(tmp_path / "run" / "run.json", RunRecord)
    assert record.status == "failed"
    assert record.error == "StopError: the disk caught fire"
    assert record.steps == 3


def test_resuming_something_else_is_refused(done: tuple[Path, RunRecord], pico: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to resume"):
        train(str(pico), tmp_path / "none", resume=True)
    with pytest.raises(UsageError, match=r"this run is over \(done\)"):
        train(str(pico), done[0], rank=8, steps=30, learning_rate=1e-2, monitor_every=10, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(str(pico), tmp_path / "run", progress=stop_at(2, KeyboardInterrupt()))
    with pytest.raises(UsageError, match=r"was started with learning rate 0\.003, not 0\.1"):
        train(str(pico), tmp_path / "run", learning_rate=0.1, resume=True)


def test_built_in_rows_that_a_length_leaves_nothing_of_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TooLongError, match=r"^rankwise:facts\?n=2&seed=0, row \d+: the prompt takes \d+ tokens"):
        train("rankwise:tiny", tmp_path / "run", "rankwise:facts?n=2", max_length=8, steps=1)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_taken_is_refused_and_nothing_in_it_is_lost(pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError):
        train(str(pico), out)
    with pytest.raises(OutputError, match=r"holds more than a run \(thesis\.txt\)"):
        train(str(pico), out, force=True)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputError, match="is a file"):
        train(str(pico), out / "thesis.txt")


def test_wrong_input_leaves_no_folder_of_a_run(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    for flags in ({"data": tmp_path / "rows.jsonl"}, {"target_modules": ("no_such",)}, {"optimizer": "magic"}):
        with pytest.raises(RankwiseError):
            train(str(pico), tmp_path / "run", **flags)
        assert not (tmp_path / "run" / "run.json").exists()


def test_force_with_bad_input_leaves_the_run_that_is_there(pico: Path, tmp_path: Path) -> None:
    train(str(pico), tmp_path / "run", recall=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for flags in (
        {"data": tmp_path / "none.jsonl"},
        {"report_to": ("nosuch",)},
        {"optimizer": "adamw_bnb_8bit"},
        {"forgetting_data": str(tmp_path / "none.txt")},
    ):
        with pytest.raises(RankwiseError):
            train(str(pico), tmp_path / "run", force=True, **flags)
        assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    train(str(pico), tmp_path / "run", recall=False, force=True)


def test_resuming_with_other_data_of_the_same_name_or_another_seed_is_refused(pico: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one two three four five six"}\n' * 9)
    with pytest.raises(KeyboardInterrupt):
        train(str(pico), tmp_path / "run", path, progress=stop_at(2, KeyboardInterrupt()))
    with pytest.raises(UsageError, match="was started with seed 0, not 4"):
        train(str(pico), tmp_path / "run", path, resume=True, seed=4)
    path.write_text('{"text": "one two three four five seven"}\n' * 9)
    with pytest.raises(UsageError, match="was started with data digest"):
        train(str(pico), tmp_path / "run", path, resume=True)


def test_what_was_trained_is_safe_when_measuring_fails(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.tuning import scoring

    def fail(*_: Any) -> None:
        raise StopError("out of memory")

    monkeypatch.setattr(scoring, "forgetting_of", fail)
    with pytest.raises(StopError):
        train(str(pico), tmp_path / "run")
    record = read_record(tmp_path / "run" / "run.json", RunRecord)
    assert (record.status, record.steps) == ("done", 6)
    assert record.error == "measuring was cut short: StopError: out of memory"
    assert record.losses
    assert len(rankwise.inspect(tmp_path / "run").modules) == 14


def test_a_run_stopped_by_the_monitor_is_not_done(pico: Path, tmp_path: Path) -> None:
    record = train(
        str(pico),
        tmp_path / "run",
        steps=60,
        learning_rate=3.0,
        rank=8,
        monitor_every=2,
        stop_when_unstable=1,
        recall=False,
    )
    assert record.status in ("interrupted", "diverged")
    assert record.error is not None
    assert record.steps < 60


def test_several_processes_are_refused(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="works in one process, and was started in 2"):
        train(str(pico), tmp_path / "run")


def test_a_live_model_gets_its_own_layers_back(pico: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = train(model, tmp_path / "run", tokenizer=AutoTokenizer.from_pretrained(pico), recall=False)
    assert record.status == "done"
    assert "in memory" in record.config.model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(before[name], p) for name, p in after.items())
    assert all(p.requires_grad for p in after.values())
    assert model.training is False
    assert model.config.use_cache is True
    assert "forward" not in vars(model)
    rankwise.dry_run(model, FACTS, gradient_checkpointing=True, tokenizer=AutoTokenizer.from_pretrained(pico))
    assert not model.is_gradient_checkpointing
    assert not model.get_input_embeddings()._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


def test_a_dry_run_writes_nothing_and_counts_what_the_run_will_have(done: tuple[Path, RunRecord], pico: Path) -> None:
    _, record = done
    planned = rankwise.dry_run(str(pico), FACTS, rank=8, steps=30, batch_size=8, learning_rate=1e-2, device="cpu")
    assert planned.config == record.config
    assert planned.params == record.params
    assert planned.examples == 6 * 18
    assert planned.epochs == pytest.approx(30 * 8 / 108)
    assert planned.memory.adapter == 4 * record.params
    assert planned.memory.optimizer == 8 * record.params
    assert planned.memory.activations is not None
    assert planned.memory.total == sum(
        (planned.memory.weights, 4 * record.params, 4 * record.params, 8 * record.params, planned.memory.activations)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_counted_as_autograd_keeps_them(pico: Path, checkpointing: bool) -> None:
    """The same forward pass with real tensors: every storage that is saved and is no weight."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from rankwise.tuning import attach
    from rankwise.tuning.memory import activation_bytes
    from rankwise.tuning.options import Options
    from rankwise.tuning.preparing import prepare

    job = prepare(str(pico), FACTS, Options(rank=8, gradient_checkpointing=checkpointing), device="cpu")
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32), attach.lora_config(job.settings, job.laid)
    )
    tuned.train()
    if checkpointing:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned.enable_input_require_grads()
    own = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.zeros(4, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tuned(input_ids=ids, labels=ids, use_cache=False)
    assert activation_bytes(job, 4, 16) == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.05)
