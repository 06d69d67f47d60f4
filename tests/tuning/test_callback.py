"""The callback in the real Trainer of transformers and the SFTTrainer of TRL, on a tiny random Llama."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.errors import NothingToMeasureError, OutputError, UsageError
from rankwise.tuning.callback import GROUP_FIGURES, RankMonitorCallback, numbers_of
from rankwise.tuning.health import FIGURES, GroupHealth, MonitorConfig, Observation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerControl, TrainerState

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

EVERY_OTHER = MonitorConfig(interval=2, first_step=None)
VOCABULARY = 24


def llama(**lora: Any) -> Any:
    """Return a tiny random Llama with LoRA, the same every time."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
    )
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def data() -> Any:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, VOCABULARY, (64, 8), generator=generator).tolist()
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


class Reporter(TrainerCallback):
    """Stands where TensorBoard and W&B stand: before every callback of the user."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append({**logs, "step": state.global_step})


def arguments(folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**(settings | changes))


def trainer_of(folder: Path, *callbacks: Any, model: Any = None, **changes: Any) -> tuple[Any, Reporter]:
    """Return a Trainer with a reporter in the place of the reporters."""
    made = Trainer(
        model=llama() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=data(),
        callbacks=list(callbacks),
    )
    reporter = Reporter()
    first = next((i for i, item in enumerate(made.callback_handler.callbacks) if item in callbacks), None)
    made.callback_handler.callbacks.insert(1 if first is None else first, reporter)
    return made, reporter


def ours(reporter: Reporter) -> list[dict[str, Any]]:
    return [row for row in reporter.rows if "rankwise/status" in row]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_numbers_reach_the_reporters(tmp_path: Path) -> None:
    callback = RankMonitorCallback(config=EVERY_OTHER, jsonl=tmp_path / "new" / "rank.jsonl")
    trainer, reporter = trainer_of(tmp_path, callback)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    assert trainer.callback_handler.callbacks.index(reporter) < trainer.callback_handler.callbacks.index(callback)
    trainer.train()

    rows = ours(reporter)
    assert [row["step"] for row in rows] == [2, 4, 6]
    last = rows[-1]
    assert last["rankwise/status"] == 0
    assert {f"rankwise/all/{name}" for name in FIGURES} <= last.keys()
    groups = ["attention/early", "attention/late", "mlp/early", "mlp/late"]
    assert {f"rankwise/{group}/{name}" for group in groups for name in GROUP_FIGURES} <= last.keys()
    assert all(isinstance(value, int | float) and math.isfinite(value) for row in rows for value in row.values())
    assert last["rankwise/all/grad_norm_B"] > 0  # gone by on_step_end, so captured before

    written = lines(tmp_path / "new" / "rank.jsonl")
    assert [line["step"] for line in written] == [2, 4, 6]
    assert len(written[0]["modules"]) == 14
    assert written[-1]["groups"][-1]["branch_ratio"] == last["rankwise/all/branch_ratio"]
    assert callback.observations == [row for line in written for row in line["groups"]]
    # a loss is logged after the observation of its step: the one of step 2 is in the observation of step 4
    logged = [row["loss"] for row in reporter.rows if "loss" in row]
    assert [line["loss"] for line in written] == [None, *logged[:2]]
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_the_training_and_its_own_log_stay_as_they_were(tmp_path: Path) -> None:
    """Weights to the bit, and the rows of losses: an extra log must neither drop one nor cut its average."""

    def run(name: str, *callbacks: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        trainer, reporter = trainer_of(
            tmp_path / name, *callbacks, gradient_accumulation_steps=2, model=llama(lora_dropout=0.2), logging_steps=3
        )
        for callback in callbacks:
            callback.attach(trainer)
        trainer.train()
        rows = [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in reporter.rows]
        return trainer.model.state_dict(), [row for row in rows if "rankwise/status" not in row]

    plain, log = run("plain")
    watched, watched_log = run("watched", RankMonitorCallback(config=MonitorConfig(interval=1, first_step=None)))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert [row["step"] for row in log if "loss" in row] == [3, 6]
    assert watched_log == log


def test_added_through_the_constructor(tmp_path: Path) -> None:
    trainer, reporter = trainer_of(tmp_path, max_steps=2)
    trainer.add_callback(RankMonitorCallback(trainer, config=EVERY_OTHER))
    trainer.train()
    assert [row["step"] for row in ours(reporter)] == [2]


def test_attach_adds_itself(tmp_path: Path) -> None:
    trainer, reporter = trainer_of(tmp_path, max_steps=2)
    RankMonitorCallback(config=EVERY_OTHER).attach(trainer)
    trainer.train()
    assert len(ours(reporter)) == 1


def test_without_a_trainer_there_is_the_file_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = RankMonitorCallback(config=EVERY_OTHER, jsonl=str(tmp_path / "rank.jsonl"))
    trainer, reporter = trainer_of(tmp_path, callback, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        trainer.train()
        trainer.train()
    assert ours(reporter) == []
    assert [line["step"] for line in lines(tmp_path / "rank.jsonl")] == [2]  # the second training began anew
    assert [r.getMessage() for r in caplog.records if "knows no trainer" in r.getMessage()] == [
        f"RankMonitorCallback knows no trainer, so its numbers go to {tmp_path / 'rank.jsonl'} alone; "
        "callback.attach(trainer) mends that"
    ]


def test_resuming_repeats_no_line(tmp_path: Path) -> None:
    """Killed after step 6 with a checkpoint of step 4: the lines of 5 and 6 are of a life that never was."""
    path = tmp_path / "rank.jsonl"
    config = MonitorConfig(interval=1, first_step=None)

    def run(steps: int, **train: Any) -> list[dict[str, Any]]:
        callback = RankMonitorCallback(config=config, jsonl=path)
        trainer, _ = trainer_of(tmp_path, callback, max_steps=steps, save_strategy="steps", save_steps=4)
        callback.attach(trainer)
        trainer.train(**train)
        assert callback.observations == [row for line in lines(path) for row in line["groups"]]
        return lines(path)

    assert [line["step"] for line in run(6)] == [1, 2, 3, 4, 5, 6]
    kept = path.read_text(encoding="utf-8").splitlines()[:4]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 7, "gro')  # the kill came in the middle of a line
    again = run(8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert path.read_text(encoding="utf-8").splitlines()[:4] == kept
    assert not list(tmp_path.glob("*.part*"))


def test_a_change_of_status_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = MonitorConfig(interval=1, first_step=None, warm_up=3, starved_branch_ratio=1e3, unstable_branch_ratio=None)
    callback = RankMonitorCallback(config=config)
    trainer, reporter = trainer_of(tmp_path, callback)
    callback.attach(trainer)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("rankwise, step 3: starved. attention/early: after 3 steps the adapter branch is at")
    assert [row["rankwise/status"] for row in ours(reporter)] == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("stop_after", "last"), [(None, 6), (1, 1), (3, 3)])
def test_stopping_is_opt_in_and_patient(tmp_path: Path, stop_after: int | None, last: int) -> None:
    config = MonitorConfig(interval=1, first_step=None, unstable_update_ratio=1e-9, settled_after=1)
    callback = RankMonitorCallback(config=config, stop_after=stop_after)
    trainer, reporter = trainer_of(tmp_path, callback)
    callback.attach(trainer)
    trainer.train()
    assert trainer.state.global_step == last
    assert {row["rankwise/status"] for row in ours(reporter)} == {2}


def test_a_training_that_explodes_is_unstable_in_numbers_that_are_finite(tmp_path: Path) -> None:
    callback = RankMonitorCallback(config=EVERY_OTHER, jsonl=tmp_path / "rank.jsonl")
    trainer, reporter = trainer_of(
        tmp_path, callback, learning_rate=1e18, lr_scheduler_type="constant", max_grad_norm=0
    )
    callback.attach(trainer)
    trainer.train()
    assert ours(reporter)[-1]["rankwise/status"] == 2
    assert all(math.isfinite(value) for row in ours(reporter) for value in row.values())
    assert lines(tmp_path / "rank.jsonl")[-1]["status"] == "unstable"


def test_sft_trainer_keeps_its_own_means(tmp_path: Path) -> None:
    """TRL's log averages entropy and accuracy and resets them: our rows must not take them away from the losses'."""
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w3", model_max_length=16
    )
    texts = datasets.Dataset.from_list(
        [{"text": " ".join(f"w{(i + j) % VOCABULARY}" for j in range(8))} for i in range(24)]
    )

    def run(*callbacks: Any) -> tuple[list[dict[str, Any]], Reporter]:
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=4,
            save_strategy="no",
            disable_tqdm=True,
            max_length=16,
        )
        trainer = trl.SFTTrainer(
            model=llama().unload(),
            args=args,
            train_dataset=texts,
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        reporter = Reporter()
        trainer.callback_handler.callbacks.insert(1, reporter)
        for callback in callbacks:
            callback.attach(trainer)
        torch.manual_seed(5)
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row], reporter

    plain, _ = run()
    watched, reporter = run(RankMonitorCallback(config=EVERY_OTHER))
    assert [row["step"] for row in ours(reporter)] == [2, 4]
    assert "mean_token_accuracy" in plain[0]
    assert [row.keys() for row in watched] == [row.keys() for row in plain]
    assert [row["mean_token_accuracy"] for row in watched] == [row["mean_token_accuracy"] for row in plain]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    callback = RankMonitorCallback(config=EVERY_OTHER)
    trainer = Trainer(model=llama(), args=arguments(tmp_path, report_to="tensorboard"), train_dataset=data())
    callback.attach(trainer)
    assert any(isinstance(item, TensorBoardCallback) for item in trainer.callback_handler.callbacks)
    trainer.train()
    events = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.*"))
    assert b"train/rankwise/all/branch_ratio" in events


# --- without a trainer at all ---------------------------------------------------------------------------------------


def begun(callback: RankMonitorCallback, model: Any = None, step: int = 0, **state: Any) -> tuple[Any, Any, Any]:
    control = TrainerControl()
    made = TrainerState(global_step=step, **state)
    args = SimpleNamespace(world_size=1)
    callback.on_train_begin(args, made, control, model=llama() if model is None else model)
    return args, made, control


def test_every_event_of_transformers_is_answered() -> None:
    callback = RankMonitorCallback()
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    assert len(events) > 15
    assert all(callable(getattr(callback, name)) for name in [*events, "on_an_event_of_next_year"])
    assert callback.on_epoch_begin(None, None, None, model=None) is None
    with pytest.raises(AttributeError, match="no attribute 'steps'"):
        callback.steps  # noqa: B018
    assert copy.copy(callback).observations == []


def test_only_the_first_process_watches(tmp_path: Path) -> None:
    callback = RankMonitorCallback(jsonl=tmp_path / "rank.jsonl")
    args, state, control = begun(callback, is_world_process_zero=False)
    assert callback.monitor is None
    callback.on_pre_optimizer_step(args, state, control)
    assert callback.on_step_end(args, state, control) is control
    callback.on_train_end(args, state, control)
    assert list(tmp_path.iterdir()) == []


def test_sharded_training_is_said_once_and_written_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    next(model.parameters()).ds_id = 0
    logged: list[Any] = []
    trainer = SimpleNamespace(
        callback_handler=SimpleNamespace(callbacks=[]), add_callback=logged.append, log=logged.append
    )
    callback = RankMonitorCallback(trainer, config=EVERY_OTHER, jsonl=tmp_path / "rank.jsonl")
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        args, state, control = begun(callback, model)
        for step in range(1, 7):
            state.global_step = step
            callback.on_pre_optimizer_step(args, state, control)
            callback.on_step_end(args, state, control)
    assert [(line["step"], line["supported"], line["status"]) for line in lines(tmp_path / "rank.jsonl")] == [
        (2, False, None)
    ]
    assert logged == []
    assert callback.observations == []
    assert len(caplog.records) == 1
    assert "ZeRO-3" in caplog.text


def test_refusals(tmp_path: Path) -> None:
    for bad in (0, -1, 2.5, True, "3"):
        with pytest.raises(UsageError, match=r"stop_after must be a whole number"):
            RankMonitorCallback(stop_after=bad)
    with pytest.raises(UsageError, match=r"stop_after=2 works in one process only, and there are 8"):
        RankMonitorCallback(stop_after=2).on_train_begin(
            SimpleNamespace(world_size=8), TrainerState(), TrainerControl()
        )
    with pytest.raises(NothingToMeasureError, match="no LoRA layer at all"):
        begun(RankMonitorCallback(), torch.nn.Linear(2, 2))
    with pytest.raises(OutputError, match="is a folder"):
        begun(RankMonitorCallback(jsonl=tmp_path))


def test_a_file_that_cannot_be_written_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RankMonitorCallback(config=EVERY_OTHER, jsonl=tmp_path / "run" / "rank.jsonl")
    args, state, control = begun(callback)
    (tmp_path / "run" / "rank.jsonl").unlink()
    (tmp_path / "run").rmdir()
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        for step in range(1, 5):
            state.global_step = step
            callback.on_step_end(args, state, control)
    assert len(callback.observations) == 2 * 5
    path = tmp_path / "run" / "rank.jsonl"
    assert [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()] == [
        f"{path} cannot be written (No such file or directory); no more observations go there"
    ]


def test_flags_of_the_control_survive_a_log_that_clears_them() -> None:
    control = TrainerControl(should_log=True)

    def log(numbers: dict[str, float]) -> None:
        control.should_log = False

    callback = RankMonitorCallback(SimpleNamespace(log=log, control=control), config=EVERY_OTHER)
    args, state, _ = begun(callback)
    for step in (1, 2):
        state.global_step = step
        assert callback.on_step_end(args, state, control) is control
    assert control.should_log


def test_null_figures_are_left_out_of_the_numbers() -> None:
    figures = dict.fromkeys(FIGURES) | {"norm": 0.0}
    row = GroupHealth(step=1, group="all", modules=1, r=None, scaling=None, status="starved", reason="", **figures)
    seen = Observation(step=1, loss=None, status="starved", reason="", groups=(row,))
    assert numbers_of(seen) == {"rankwise/all/norm": 0.0, "rankwise/status": 1.0}
