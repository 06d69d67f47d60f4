"""`rankwise probe` as a script meets it: exit codes, streams, files, refusals."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import make_pico

import rankwise
from rankwise.cli import main as cli
from rankwise.errors import NothingToMeasureError
from rankwise.records import CounterTestRecord, PlanRecord, ProbeRecord, read_record

pytest.importorskip("torch", reason="torch comes with the train extra")
pytest.importorskip("peft", reason="peft comes with the train extra")

Run = Callable[..., tuple[int, str, str]]

QUICK = ("--steps", "10", "--device", "cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process; gives (exit code, stdout, stderr)."""

    def call(*words: Any) -> tuple[int, str, str]:
        line = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["rankwise", *line])
        capsys.readouterr()
        code = cli.run(line)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico(tmp_path_factory.mktemp("models") / "pico")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    words = ("Alderburgh", "Brambleport", "Coppermouth", "Doverhaven", "Emberview", "Falconpolis")
    return [
        {"prompt": f"{start} {word} {end}", "completion": f" {word}."}
        for word in words
        for start, end in (("The office of", "is in"), ("What is the town of", "?"))
    ]


@pytest.fixture(scope="module")
def file(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_says_bits_room_gradient_and_start(run: Run, pico: Path, file: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "probe", pico, file, *QUICK, "-o", tmp_path / "p.json", "--plan-out", tmp_path / "plan.json",
        "--report", tmp_path / "p.html",
    )  # fmt: skip
    assert code == 0
    for words in (
        "= to learn",
        "room: rank",
        "gradient at the base",
        "to start with",
        "learning rate",
        "- Bits to learn",
    ):
        assert words in out
    assert "\r" not in err
    record = read_record(tmp_path / "p.json", ProbeRecord)
    assert record.command[:2] == ("rankwise", "probe")
    assert record.base_bits == pytest.approx(record.form_bits + record.repeated_bits + record.bits_to_learn)
    assert len(record.rows) == record.examples == 12
    plan = read_record(tmp_path / "plan.json", PlanRecord)
    assert plan == record.recommendation
    assert {m.module for m in plan.modules} == set(record.target_modules)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")


def test_a_plan_of_the_probe_can_be_trained(run: Run, pico: Path, file: Path, tmp_path: Path) -> None:
    code, _, _ = run("probe", pico, file, *QUICK, "--plan-out", tmp_path / "plan.json", "--quiet")
    assert code == 0
    code, out, _ = run("train", pico, file, "--plan", tmp_path / "plan.json", "--dry-run", "--device", "cpu")
    assert code == 0
    plan = read_record(tmp_path / "plan.json", PlanRecord)
    assert f"learning rate {plan.learning_rate:g}" in out
    assert f"{plan.params:,} trainable parameters" in out


def test_json_is_the_record_and_nothing_else(run: Run, pico: Path, file: Path) -> None:
    code, out, err = run("probe", pico, file, *QUICK, "--json", "--no-ramp-rates", "--job", "style", "--quiet")
    assert (code, err) == (0, "")
    record = ProbeRecord.from_json(out)
    assert (record.job, record.job_given, record.rates) == ("style", True, ())
    assert record.epochs == 3


def test_the_same_seed_gives_the_same_figures(pico: Path, rows: list[dict[str, str]]) -> None:
    """In Python, with a live model, which comes back as it was; a sample of the rows says so."""
    from rankwise.tuning.models import load_model

    live = load_model(str(pico), device="cpu")
    before = {name: p.detach().clone() for name, p in live.model.named_parameters()}
    live.model.train()
    more: dict[str, Any] = {"steps": 10, "tokenizer": live.tokenizer, "examples": 10, "ramp_rates": False}
    one, two = (rankwise.probe(live.model, rows, **more) for _ in range(2))
    assert (one.bits_to_learn, one.gradient) == (two.bits_to_learn, two.gradient)
    assert one.measured_examples == 10
    assert "sampled-rows" in [f.code for f in one.findings]
    assert live.model.training
    after = dict(live.model.named_parameters())
    assert after.keys() == before.keys()
    assert all((after[name] == before[name]).all() for name in before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--job", "nonsense"), "--job"),
        (("--epochs", "0"), "--epochs"),
        (("--steps", "-1"), "--steps"),
        (("--examples", "0"), "--examples"),
        (("--scaling", "nonsense"), "--scaling"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--target-modules", "nothing_such"), "nothing_such"),
        (("--max-length", "100000"), "--max-length"),
    ],
)
def test_bad_input_is_one_message_and_no_file(
    run: Run, pico: Path, file: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    code, out, err = run("probe", pico, file, *words, "--device", "cpu", "-o", tmp_path / "p.json")
    assert code == 2, err
    assert out == ""
    assert err.count("rankwise: error:") == 1
    assert said in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_outputs_must_differ_and_must_not_be_taken(run: Run, pico: Path, file: Path, tmp_path: Path) -> None:
    taken = tmp_path / "plan.json"
    taken.write_text("mine")
    code, _, err = run("probe", pico, file, "--plan-out", taken)
    assert code == 2
    assert "exists already" in err
    code, _, err = run("probe", pico, file, "--plan-out", tmp_path / "x.json", "-o", tmp_path / "x.json")
    assert code == 2
    assert "give each its own path" in err
    assert taken.read_text() == "mine"


def test_few_rows_are_measured_and_said_to_be_few(pico: Path, rows: list[dict[str, str]]) -> None:
    record = rankwise.probe(str(pico), rows[:3], device="cpu", ramp_rates=False)
    assert "too-few-rows" in [f.code for f in record.findings]
    assert record.form_bits == pytest.approx(0.0, abs=1e-3)  # float32 sums in another order
    assert record.adaptation == ()


def test_weights_that_are_no_numbers_are_refused(run: Run, pico: Path, file: Path, tmp_path: Path) -> None:
    """Also those that fused attention would make zeros of, with finite figures."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(pico, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run("probe", broken, file, *QUICK, "-o", tmp_path / "p.json")
    assert (code, out) == (2, "")
    assert "broken: model.layers.1.self_attn.q_proj.weight holds NaN or infinity" in err
    assert not (tmp_path / "p.json").exists()


def test_a_loss_that_is_no_number_is_refused(pico: Path, rows: list[dict[str, str]]) -> None:
    """Weights that are numbers, and logits past float32."""
    import torch

    from rankwise.tuning.models import load_model

    live = load_model(str(pico), device="cpu")
    with torch.no_grad():
        live.model.model.norm.weight.fill_(3e38)
    with pytest.raises(NothingToMeasureError, match="no finite loss on 12 of 12 rows, first row 0"):
        rankwise.probe(live.model, rows, tokenizer=live.tokenizer)


def test_an_interruption_writes_nothing(
    run: Run, pico: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.tuning.probing import measuring

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "ramp", stopped)
    words = ("-o", tmp_path / "p.json", "--plan-out", tmp_path / "plan.json", "--report", tmp_path / "p.html")
    code, out, err = run("probe", pico, file, "--steps", "1", "--device", "cpu", "--job", "facts", *words)
    assert (code, out, err) == (130, "", "rankwise: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_a_live_model_as_it_was(pico: Path, rows: list[dict[str, str]]) -> None:
    from rankwise.tuning.models import load_model

    live = load_model(str(pico), device="cpu")
    live.model.train()
    names = [name for name, _ in live.model.named_parameters()]

    def stop(what: str, done: int, total: int) -> None:
        assert done <= total
        if "form" in what and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rankwise.probe(live.model, rows, steps=10, tokenizer=live.tokenizer, progress=stop)
    assert [name for name, _ in live.model.named_parameters()] == names
    assert all(p.requires_grad for p in live.model.parameters())
    assert not any(m._forward_hooks for m in live.model.modules())
    assert live.model.training


# --- check --adapter ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(pico: Path, rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "done"
    rankwise.train(
        str(pico), rows, out=out, rank=4, steps=2, batch_size=4, save_every=0, monitor_every=0, device="cpu",
        recall=False, learning_rate=1e-4,
    )  # fmt: skip
    return out


def test_check_with_an_adapter_is_a_counter_test(
    run: Run, pico: Path, file: Path, adapter: Path, tmp_path: Path
) -> None:
    quick = ("--adapter", adapter, "--steps", "3", "--seeds", "2", "--batch-size", "4", "--device", "cpu")
    code, out, err = run("check", pico, file, *quick, "-o", tmp_path / "c.json", "--report", tmp_path / "c.html")
    assert code == 0, err
    for words in ("as it is", "scale 8 ->", "rank 4 ->", "rate 0.0001 ->"):
        assert words in out
    record = read_record(tmp_path / "c.json", CounterTestRecord)
    assert record.learning_rate == 1e-4, "that of the run beside the adapter"
    assert record.verdict in out
    assert record.verdict == "starved by rate"
    assert (tmp_path / "c.html").exists()
    code, _, _ = run("check", pico, file, *quick, "--fail-on", "starved", "--quiet")
    assert code == 3


def test_check_with_an_adapter_refuses_what_does_not_concern_it(run: Run, pico: Path, file: Path) -> None:
    for words in (("--ranks", "4,8"), ("--scaling", "lora"), ("--fail-on", "unstable"), ("--lora-alpha", "8")):
        code, out, err = run("check", pico, file, "--adapter", "nowhere", *words)
        assert (code, out) == (2, ""), words
        assert err.count("rankwise: error:") == 1
    code, _, err = run("check", pico, file, "--adapter", "nowhere", "--device", "cpu")
    assert code == 2
    assert "nowhere" in err
