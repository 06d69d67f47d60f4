"""`rankwise lint` as CI meets it: exit codes, streams, files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rankwise.cli import main as cli
from rankwise.records import LintRecord

Run = Callable[..., tuple[int, str, str]]

SOUND = {"peft_type": "LORA", "r": 8, "lora_alpha": 8}
WARNED = {"peft_type": "LORA", "r": 64}
BROKEN = {"peft_type": "LORA", "alpha_pattern": {"base_model.model.q_proj": 4}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankwise", *words])
        code = cli.run(list(words))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def config(tmp_path: Path, fields: dict[str, object], name: str = "adapter_config.json") -> str:
    path = tmp_path / name
    path.write_text(json.dumps(fields), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("fields", "flags", "code"),
    [
        (SOUND, [], 0),
        (WARNED, [], 0),
        (WARNED, ["--strict"], 3),
        (WARNED, ["--strict", "--ignore", "alpha-left-at-default"], 0),
        (BROKEN, [], 3),
        (BROKEN, ["--ignore", "pattern-unmatched"], 0),
        (SOUND | {"use_rslora": True}, ["--for", "sglang"], 3),
        (SOUND, ["--for", "vllm,sglang", "--for", "llama.cpp"], 0),
    ],
)
def test_exit_codes(run: Run, tmp_path: Path, fields: dict[str, object], flags: list[str], code: int) -> None:
    assert run("lint", config(tmp_path, fields), *flags)[0] == code


def test_flags_before_the_sources_do_not_take_them(run: Run, tmp_path: Path) -> None:
    """pre-commit puts the files last."""
    code, out, _ = run("lint", "--for", "vllm", "--ignore", "small-scale", config(tmp_path, SOUND), "--json")
    record = LintRecord.from_json(out)
    assert (code, record.runtimes, record.ignored, len(record.sources)) == (0, ("vllm",), ("small-scale",), 1)


def test_table_shows_the_scale_that_each_group_gets(run: Run, tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "r": 64, "lora_alpha": 16, "use_rslora": True}
    code, out, err = run("lint", config(tmp_path, fields), "--for", "vllm,sglang")
    assert code == 3
    assert err == ""
    lines = out.splitlines()
    assert lines[1].split() == ["group", "modules", "r", "alpha", "scale", "rule", "vllm", "sglang"]
    assert lines[2].split() == ["all", "modules", "-", "64", "16", "2", "rslora", "2", "0.25"]
    assert "8 times too weak" in out
    assert lines[-1] == "1 error, 1 warning"


def test_json_is_the_record_and_nothing_else(run: Run, tmp_path: Path) -> None:
    code, out, err = run("lint", config(tmp_path, WARNED), "--json")
    assert (code, err) == (0, "")
    record = LintRecord.from_json(out)
    assert [f.code for f in record.findings] == ["alpha-left-at-default"]
    assert record.command[:2] == ("rankwise", "lint")


def test_files(run: Run, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("x.sarif", "x.json", "x.html")}
    words = ("lint", config(tmp_path, WARNED), "--sarif", str(paths["x.sarif"]), "-o", str(paths["x.json"]))
    code, _, err = run(*words, "--report", str(paths["x.html"]))
    assert code == 0
    assert err.count("wrote ") == 3
    assert json.loads(paths["x.sarif"].read_text())["version"] == "2.1.0"
    assert LintRecord.from_json(paths["x.json"].read_text()).warnings == 1
    page = paths["x.html"].read_text()
    assert "alpha-left-at-default" in page
    assert "0.125" in page
    assert run(*words)[0] == 2  # taken
    assert run(*words, "--force")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to lint"),
        (["absent.yml"], "no file or folder of that name"),
        (["{sound}", "--for", "tgi"], "no runtime is called"),
        (["{sound}", "--ignore", "smal-scale"], "did you mean small-scale"),
        (["{sound}", "--model", "absent"], "absent"),
        (["{sound}", "--sarif", "x", "--out", "x"], "both name"),
        (["{sound}", "--device", "cuda"], "cpu only"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    sound = config(tmp_path, SOUND)
    code, out, err = run("lint", *(w.format(sound=sound) for w in words))
    assert (code, out) == (2, "")
    assert err.count("rankwise: error:") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == [Path(sound)]


def test_names_in_a_file_do_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "rank_pattern": {"a\x1b[31mb[red]": 4}, "target_modules": ["\x1b]0;x\x07"]}
    _, out, _ = run("lint", config(tmp_path, fields))
    assert "\x1b" not in out
    assert "[red]" in out


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from rankwise.cli.main import run; "
        f"assert run(['lint', {config(tmp_path, SOUND)!r}, '--for', 'vllm']) == 0; "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_hook_definition_names_a_command_that_runs(root: Path, run: Run, tmp_path: Path) -> None:
    """What pre-commit needs of a hook, its file pattern on names that are meant, and its entry on such a file."""
    hooks = yaml.safe_load((root / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    by_id = {hook["id"]: hook for hook in hooks}
    assert set(by_id) == {"rankwise-lint"}
    hook = by_id["rankwise-lint"]
    assert {"id", "name", "entry", "language", "files"} <= set(hook)
    assert hook["language"] == "python"
    for name in ("adapter_config.json", "runs/a/adapter_config.json"):
        assert re.search(hook["files"], name)
    for name in ("tokenizer_config.json", "adapter_config.json.bak", "config.yml"):
        assert not re.search(hook["files"], name)
    program, *words = hook["entry"].split()
    assert program == "rankwise"
    assert run(*words, config(tmp_path, BROKEN))[0] == 3


@pytest.mark.interop
def test_real_adapters_and_configs_raise_no_false_alarm(samples: Path, run: Run) -> None:
    """Public adapters that load and work in PEFT, and configs of its own experiments: nothing above an info."""
    folders = sorted((samples / "adapters").iterdir())
    configs = [p for p in sorted((samples / "configs").rglob("*.json")) if "osf" not in p.name]
    assert len(folders) >= 9
    assert len(configs) >= 6
    code, out, _ = run("lint", *map(str, folders), *map(str, configs), "--json")
    assert code == 0
    record = LintRecord.from_json(out)
    assert (record.errors, record.warnings) == (0, 0)
    assert {f.code for f in record.findings} <= {
        "large-scale",  # r 1 with alpha 32
        "key-of-another-trainer",  # `alpha` beside `lora_alpha`, with the same value
        "scale-differs-by-runtime",  # patterns and rsLoRA
    }
