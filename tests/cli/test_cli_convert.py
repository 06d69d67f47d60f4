"""convert as a script meets it: exit codes, streams, and what is left on the disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_making import SHAPES, peft_adapter
from adapter_reading import config_of, gap, kohya, peft

from rankwise.cli import main as cli
from rankwise.records import ConversionRecord, from_json, read_record

Run = Callable[..., tuple[int, str, str]]


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


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    return peft_adapter(tmp_path / "a", rng, ranks={next(iter(SHAPES)): 4})


def test_a_table_on_stdout_and_an_adapter_in_out(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, out, err = run("convert", adapter, tmp_path / "b", "--rank", 6, "--bake")
    assert code == 0, err
    assert "8 > 6 + 2 zeros" in out
    assert "relative error" in out
    assert err == ""
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "conversion.json",
    ]
    assert set(peft(adapter)) == set(peft(tmp_path / "b"))


def test_json_is_the_record_and_nothing_else(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", adapter, tmp_path / "b", "--scaling", "rslora", "--json", "-o", tmp_path / "r.json")
    assert code == 0
    record = from_json(out, ConversionRecord)
    assert record == read_record(tmp_path / "r.json", ConversionRecord)
    assert record == read_record(tmp_path / "b" / "conversion.json", ConversionRecord)
    assert record.command[:2] == ("rankwise", "convert")
    assert record.exact
    assert "NaN" not in out
    assert json.loads(out)["format"] == "rankwise/conversion/1"


def test_a_page_is_written_beside(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", adapter, tmp_path / "b", "--energy", "0.8", "--report", tmp_path / "p.html")
    assert code == 0
    assert "wrote" in err
    page = (tmp_path / "p.html").read_text()
    assert "What became of the adapter" in page
    assert "conversion-error-plot" in page
    assert "llama.cpp" in page


def test_every_flag_reaches_the_function(run: Run, adapter: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    other = peft_adapter(tmp_path / "second", rng)
    words = ["--add", f"{other}=0.5", "--weight", "2", "--rank", "5", "--lora-alpha", "3", "--scaling", "rslora"]
    code, out, err = run("convert", adapter, tmp_path / "b", *words, "--dtype", "bfloat16", "--json")
    assert code == 0, err
    record = from_json(out, ConversionRecord)
    assert [(a.weight) for a in record.adapters] == [2.0, 0.5]
    assert {(m.after.r, m.after.lora_alpha, m.after.rule, m.dtype) for m in record.modules} == {
        (5, 3.0, "rslora", "BF16")
    }


def test_several_adapters_are_added_by_one_flag(
    run: Run, adapter: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    more = [peft_adapter(tmp_path / name, rng) for name in ("x", "y=z")]
    code, out, err = run("convert", adapter, tmp_path / "b", "--add", more[0], more[1], "--json")
    assert code == 0, err
    assert [a.weight for a in from_json(out, ConversionRecord).adapters] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "llama.cpp", "ollama", "tensorrt-llm"])
def test_for_a_runtime(run: Run, adapter: Path, tmp_path: Path, runtime: str) -> None:
    code, out, err = run("convert", adapter, tmp_path / "b", "--for", runtime)
    assert code == 0, err
    assert f"note: For {runtime}" in out
    if runtime != "tensorrt-llm":
        for module, triple in peft(adapter).items():
            assert gap(triple, peft(tmp_path / "b", runtime)[module]) < 1e-7


def test_for_comfyui_a_file(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", adapter, tmp_path / "b.safetensors", "--for", "comfyui")
    assert code == 0, err
    assert len(kohya(tmp_path / "b.safetensors")) == len(SHAPES)


REFUSALS = {
    "no such adapter": (["missing", "b"], "is not there"),
    "two choices": (["a", "b", "--rank", "4", "--energy", "0.5"], "--rank and --energy"),
    "signal": (["a", "b", "--signal"], "no such noise"),
    "unknown runtime": (["a", "b", "--for", "tgi"], "tgi"),
    "unknown format": (["a", "b", "--format", "gguf"], "gguf"),
    "a folder as a file": (["a", "b.safetensors"], "is a folder"),
    "no parent": (["a", "no/where/b"], "Make it first"),
    "no number": (["a", "b", "--add", "a=half"], "ADAPTER=WEIGHT"),
    "record in OUT": (["a", "b", "-o", "b/r.json"], "folder|lies in OUT"),
    "itself": (["a", "a", "--force"], "the adapter itself"),
    "a plan that is none": (["a", "b", "--plan", "a/adapter_config.json"], "record"),
    "a GPU": (["a", "b", "--device", "cuda"], "cpu only"),
    "too high for vllm": (["a", "b", "--rank", "600", "--for", "vllm"], "512"),
    "a flag that is none": (["a", "b", "--ranks", "4"], "ranks"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_gets_one_message_and_leaves_nothing(
    run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    import re

    words, message = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, out, err = run("convert", *words)
    assert code == 2
    assert out == ""
    assert err.startswith("rankwise: error: ")
    assert re.search(message, err)
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert adapter.is_dir()


def test_taken_out_is_kept_without_force(run: Run, adapter: Path, tmp_path: Path) -> None:
    assert run("convert", adapter, tmp_path / "b")[0] == 0
    code, _, err = run("convert", adapter, tmp_path / "b", "--scaling", "rslora")
    assert code == 2
    assert "--force" in err
    assert config_of(tmp_path / "b")["use_rslora"] is False
    assert run("convert", adapter, tmp_path / "b", "--scaling", "rslora", "--force")[0] == 0
    assert config_of(tmp_path / "b")["use_rslora"] is True


def full_disk() -> None:
    """Let files grow to 4 KiB only, as a full disk would; SIGXFSZ is what comes first."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_a_full_disk_gets_one_message(adapter: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "rankwise", "convert", str(adapter), str(tmp_path / "b")]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, preexec_fn=full_disk, env=os.environ | {"NO_COLOR": "1"}
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2  # the message, and where it is explained
    assert "cannot be written" in lines[0]
    assert not (tmp_path / "b").exists()
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_interrupt_is_said_and_the_same_command_goes_on(
    run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankwise.adapters import conversion_job

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion_job.Job, "_finish", stop)
    code, _, err = run("convert", adapter, tmp_path / "b")
    assert (code, err) == (130, "rankwise: interrupted\n")
    assert not (tmp_path / "b").exists()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["rankwise"])
    assert cli.run(["convert", str(adapter), str(tmp_path / "b")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_names_in_a_file_do_not_steer_the_terminal(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    source = peft_adapter(tmp_path / "a", rng, shapes={"h.\x1b[31mred[bold]": (6, 5)})
    code, out, _ = run("convert", source, tmp_path / "b")
    assert code == 0
    assert "\x1b" not in out
    assert "[bold]" in out


def test_no_torch_is_imported(adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from rankwise.cli.main import run; "
        f"assert run(['convert', {str(adapter)!r}, {str(tmp_path / 'b')!r}, '--rank', '2', '--json']) == 0; "
        "assert not {'torch', 'transformers', 'peft', 'scipy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
