"""The command line as a script meets it: exit codes, what goes to which stream, what is left on the disk."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planting import planted, planted_factors, write_adapter, write_checkpoint
from rankwise.cli import main as cli
from rankwise.records import SimulationRecord, SpectraRecord

SMALL = ("simulate", "--size", "16", "--ranks", "2,4", "--scale-ranks", "1,4")
COMMANDS = sorted(cli.COMMANDS)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process; gives (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rankwise", *words])
        code = cli.run(list(words))
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def process(words: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run one command line in a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "rankwise", *words]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, check=False, timeout=60, **streams)


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one message on stderr and no traceback."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("rankwise: error: ")
    assert err.count("rankwise: error:") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


# --- help and version ---------------------------------------------------------------------------------------


def test_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, importlib.metadata.version("rankwise") + "\n", "")


def test_help_names_every_command(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for name in COMMANDS:
        assert f" {name} " in out
    assert "Exit codes: 0 done; 1 a defect" in " ".join(out.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(run: Run, name: str) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: rankwise {name}")
    for flag in ("--json", "--out", "-o", "--report", "--force", "--quiet", "--seed", "--device"):
        assert flag in out, f"{name} lacks {flag}"


@pytest.mark.parametrize("words", ["plan x", "convert x y", "extract x y z", "train m d"])
def test_a_rank_is_not_rounded(run: Run, words: str) -> None:
    """The parser would make 1 of 0.99, which may have been meant as a share."""
    code, out, err = run(*words.split(), "--rank", "0.99")
    assert (code, out) == (2, "")
    assert "--rank: wanted a whole number; got '0.99'" in err


def test_no_command_shows_the_help_and_did_nothing(run: Run) -> None:
    code, out, _ = run()
    assert code == 2
    assert "Usage: rankwise COMMAND" in out


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from rankwise.cli.main import run\n"
        f"code = run({words!r})\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pandas', 'plotly', 'fsspec'}\n"
        "sys.exit(code or ' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


# --- usage --------------------------------------------------------------------------------------------------

USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown command": (("simulat",), "simulat"),
    "unknown option": (("simulate", "--sise", "16"), "Did you mean --size?"),
    "unknown first option": (("--nope",), "--nope"),
    "missing argument": (("inspect",), "SOURCE"),
    "missing value": (("simulate", "--size"), "--size"),
    "one argument too many": (("simulate", "extra"), "extra"),
    "not a number": (("simulate", "--size", "many"), "--size"),
    "not whole numbers": (("simulate", "--ranks", "2,x"), "--ranks: wanted whole numbers such as 4,16,64"),
    "a fraction of a rank": (("simulate", "--ranks", "2.5"), "--ranks: wanted whole numbers"),
    "no rank": (("simulate", "--ranks", ","), "--ranks: wanted at least one whole number"),
    "no rank at all": (("simulate", "--ranks"), "at least one whole number"),
    "rank 0": (("simulate", "--ranks", "0"), "ranks must be from 1 to 64"),
    "rank of 30 digits": (("simulate", "--scale-ranks", "9" * 30), "scale ranks must be from 1 to"),
    "rank of 5000 digits": (("simulate", "--scale-ranks", "9" * 5000), "wanted whole numbers"),
    "size": (("simulate", "--size", "1"), "size must be from 2 to 4096"),
    "seed": (("simulate", "--seed", "-1"), "seed must be from 0"),
    "alpha": (("simulate", "--lora-alpha", "nan"), "lora_alpha must be a finite number"),
    "noise": (("simulate", "--noise", "1e308"), "past what a float holds"),
    "spectrum": (("simulate", "--spectrum", "lineal:1"), "is no recipe"),
    "spectrum count": (("simulate", "--spectrum", "power:1:1:1e300"), "a larger --size makes room"),
    "device": (("simulate", "--device", "cuda"), "cpu only"),
    "values": (("inspect", "x", "--values", "few"), "--values must be a whole number or all"),
}


@pytest.mark.parametrize("name", sorted(USAGE))
def test_bad_usage_is_refused_in_one_message(run: Run, name: str) -> None:
    words, said = USAGE[name]
    assert_refused(run(*words), said)


def test_the_way_on_names_the_commands_own_help(run: Run) -> None:
    assert run("simulate", "--sise", "4")[2].endswith("See: rankwise simulate --help\n")
    assert run("simulat")[2].endswith("See: rankwise --help\n")


def test_errors_link_to_their_page(run: Run) -> None:
    err = run("simulate", "--size", "1")[2]
    assert err.splitlines()[-1] == "https://rankwise.readthedocs.io/en/latest/reference/messages.html#usage"


# --- simulate -----------------------------------------------------------------------------------------------


def test_json_puts_the_record_on_stdout_and_nothing_else(run: Run) -> None:
    code, out, err = run(*SMALL, "--json")
    assert (code, err) == (0, "")
    record = SimulationRecord.from_json(out)
    assert record.command == ("rankwise", *SMALL, "--json")
    assert record.to_json() == out


def test_the_table_shows_the_published_figures(run: Run) -> None:
    code, out, err = run("simulate")
    assert (code, err) == (0, "")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "8 28.3% 0.847 1.000 1.000 2.620 2.620" in rows
    assert "16 1 4" in rows
    assert max(len(line) for line in out.splitlines() if not line.startswith("Scaling collapse")) <= 140


@pytest.mark.parametrize(
    "words",
    [
        ("2,4", "8"),
        ("2,4,8",),
        ("2", "4", "8"),
        (
            "2, 4",
            ",8",
        ),
    ],
    ids=" ".join,
)
def test_lists_take_commas_and_spaces(run: Run, words: tuple[str, ...]) -> None:
    code, out, _ = run("simulate", "--size", "16", "--ranks", *words, "--json", "--seed", "3")
    assert code == 0
    record = SimulationRecord.from_json(out)
    assert [row.rank for row in record.updates["style"].rows] == [2, 4, 8]
    assert record.seed == 3


def test_the_seed_makes_the_numbers(run: Run) -> None:
    def numbers(seed: str) -> Any:
        return json.loads(run(*SMALL, "--json", "--seed", seed)[1])["updates"]

    assert numbers("1") == numbers("1")
    assert numbers("1") != numbers("2")


def test_markup_in_a_file_name_is_printed_as_it_is(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "[bold]sigma[red].txt"
    path.write_text("2 1")
    code, out, _ = run("simulate", "--size", "4", "--ranks", "1", "--spectrum", str(path))
    assert code == 0
    assert "[bold]sigma[red].txt" in out.replace("\n", "")


# --- outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-o", "--out"])
def test_the_record_is_written_beside_the_table(run: Run, tmp_path: Path, flag: str) -> None:
    path = tmp_path / "sim.json"
    code, out, err = run(*SMALL, flag, str(path))
    assert code == 0
    assert "Scalings" in out
    assert err == f"wrote {path}\n"
    assert SimulationRecord.from_json(path.read_text()).size == 16
    assert [p.name for p in tmp_path.iterdir()] == ["sim.json"]


def test_quiet_says_nothing_of_it(run: Run, tmp_path: Path) -> None:
    assert run(*SMALL, "--quiet", "--json", "-o", str(tmp_path / "sim.json"))[2] == ""


def test_an_existing_output_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sim.json"
    path.write_text("mine")
    monkeypatch.setattr("rankwise.simulation.simulate", lambda **options: pytest.fail("work was done"))
    assert_refused(run(*SMALL, "-o", str(path)), "exists already; nothing was written", "--force")
    assert_refused(run(*SMALL, "--report", str(path)), "exists already; nothing was written")
    assert path.read_text() == "mine"
    monkeypatch.undo()
    assert run(*SMALL, "-o", str(path), "--force")[0] == 0
    assert SimulationRecord.from_json(path.read_text()).size == 16


def test_impossible_outputs_are_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.simulation.simulate", lambda **options: pytest.fail("work was done"))
    assert_refused(run(*SMALL, "-o", str(tmp_path)), "is a folder")
    assert_refused(run(*SMALL, "-o", str(tmp_path / "none" / "sim.json")), "there is no folder")
    assert_refused(run(*SMALL, "-o", "n" * 300), "File name too long")


def test_one_path_for_two_outputs_is_refused(run: Run, tmp_path: Path) -> None:
    path, same = tmp_path / "x", tmp_path / "none" / ".." / "x"
    assert_refused(run(*SMALL, "-o", str(path), "--report", str(path)), "--out and --report both name")
    (tmp_path / "none").mkdir()
    assert_refused(run(*SMALL, "-o", str(path), "--report", str(same)), "--out and --report both name")
    assert not path.exists()


def test_a_full_disk_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run(*SMALL, "-o", str(tmp_path / "sim.json")), "sim.json cannot be written: No space left")
    assert list(tmp_path.iterdir()) == []


# --- exit codes ---------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., None]:
    def fail(**options: object) -> None:
        raise error

    return fail


def test_a_defect_is_1_with_its_traceback_and_where_to_report(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.simulation.simulate", raising(ZeroDivisionError("made up")))
    code, out, err = run(*SMALL)
    assert (code, out) == (1, "")
    assert "Traceback" in err
    assert "ZeroDivisionError: made up" in err
    assert err.splitlines()[-1].startswith("rankwise: this is a defect of rankwise itself; please report it: https://")


def test_an_unforeseen_os_error_is_a_defect_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.simulation.simulate", raising(PermissionError(errno.EACCES, "no", "x")))
    assert run(*SMALL)[0] == 1


def test_an_interrupt_is_130_without_a_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.simulation.simulate", raising(KeyboardInterrupt()))
    assert run(*SMALL) == (130, "", "rankwise: interrupted\n")


def test_no_memory_is_2_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.simulation.simulate", raising(MemoryError()))
    assert_refused(run(*SMALL), "not enough memory")


# --- streams of a real process ------------------------------------------------------------------------------


def test_python_dash_m_is_the_command_line() -> None:
    ended = process([*SMALL, "--json"])
    assert (ended.returncode, ended.stderr) == (0, ""), "no progress and no warning where stderr is no terminal"
    assert SimulationRecord.from_json(ended.stdout).command == ("rankwise", *SMALL, "--json")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize("flags", ["--json", ""])
def test_a_reader_that_goes_away_is_no_error(flags: str) -> None:
    """As in `rankwise simulate | head -1`; this reader is gone before the first line is there."""
    command = f'"{sys.executable}" -m rankwise {" ".join(SMALL)} {flags}; echo "code $?" >&2'
    ended = subprocess.run(["sh", "-c", f"({command}) | true"], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.stdout, ended.stderr) == ("", "code 0\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [["--json"], []], ids=["json", "table"])
def test_a_full_stdout_is_2_and_says_so(flags: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ended = process([*SMALL, *flags], stdout=full)
    assert ended.returncode == 2
    assert ended.stderr == "rankwise: error: stdout cannot be written: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_closed_stdout_still_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sim.json"
    script = f'"{sys.executable}" -m rankwise {" ".join(SMALL)} -q -o "{path}" >&-'
    ended = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert SimulationRecord.from_json(path.read_text()).size == 16


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX alone")
def test_paths_that_are_not_utf_8_are_printed_and_written_all_the_same(tmp_path: Path) -> None:
    spectrum, path = (tmp_path / os.fsdecode(name) for name in (b"\xff.txt", b"\xfe.json"))
    spectrum.write_text("2 1")
    ended = process([*SMALL, "--spectrum", str(spectrum), "-o", str(path)])
    assert ended.returncode == 0, ended.stderr
    assert r"\udcff.txt" in ended.stdout.replace("\n", "")
    assert ended.stderr.endswith("\\udcfe.json\n")
    assert SimulationRecord.from_json(path.read_bytes()).command[-1].endswith(r"\udcfe.json")


# --- inspect ------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    factors = {
        f"model.layers.{i}.self_attn.q_proj": tuple(
            f.astype(np.float32) for f in planted_factors(rng, (24, 16), (8.0, 4.0, 2.0, 1.0), scaling=2.0)
        )
        for i in range(3)
    }
    return write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=8)


def test_an_adapter_is_measured_and_written(run: Run, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "spectra.json"
    code, out, err = run("inspect", str(adapter), "--json", "-o", str(path), "--quiet")
    assert (code, err) == (0, "")
    assert path.read_text() == out
    record = SpectraRecord.from_json(out)
    assert [m.module for m in record.modules] == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    for module in record.modules:
        assert (module.r, module.lora_alpha, module.scaling, module.rule) == (4, 8.0, 2.0, "lora")
        assert module.singular_values == pytest.approx((8, 4, 2, 1), rel=1e-5)  # factors stored as float32
        assert module.rank_90 == 2
    assert record.summary.energy_by_rank["2"] == pytest.approx(80 / 85, rel=1e-5)
    assert set(record.summary.energy_by_rank) == {"1", "2", "4"}


def test_the_table_has_a_row_a_module(run: Run, adapter: Path) -> None:
    code, out, err = run("inspect", str(adapter))
    assert (code, err) == (0, "")
    assert out.startswith(f"adapter {adapter}: 3 modules, 0 skipped\n")
    assert sum("self_attn.q_proj" in line and "24 x 16" in line for line in out.splitlines()) == 3


def test_modules_and_skip_choose(run: Run, adapter: Path) -> None:
    record = SpectraRecord.from_json(run("inspect", str(adapter), "--skip", r"layers\.1\.", "--json")[1])
    assert [m.module.split(".")[2] for m in record.modules] == ["0", "2"]
    assert_refused(run("inspect", str(adapter), "--modules", "("), "--modules '(' is no regular expression")
    assert_refused(run("inspect", str(adapter), "--modules", "nothing"), "leave none of the 3 modules")


def test_a_source_that_is_not_there_is_refused(run: Run, tmp_path: Path) -> None:
    assert_refused(run("inspect", str(tmp_path / "none")), "none")


def test_seeds_out_of_range_are_refused(run: Run, adapter: Path) -> None:
    for seed in ("-1", "9" * 25):
        assert_refused(run("inspect", str(adapter), "--seed", seed), "--seed must be from 0 to")


@pytest.fixture
def pair(tmp_path: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Return a base and a tuned checkpoint: one module moved by a planted rank-2 delta, one did not move."""
    base = {f"layers.{i}.q_proj.weight": rng.standard_normal((60, 40)).astype(np.float32) for i in range(2)}
    base["norm.weight"] = np.ones(40, np.float32)
    step = planted(rng, (60, 40), (4.0, 1.0)).astype(np.float32)
    tuned = base | {"layers.1.q_proj.weight": base["layers.1.q_proj.weight"] + step}
    made = (write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "tuned", tuned))
    return str(made[0]), str(made[1])


def test_a_planted_delta_of_two_checkpoints_comes_back(run: Run, pair: tuple[str, str]) -> None:
    base, tuned = pair
    code, out, err = run("inspect", tuned, "--base", base, "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    record = SpectraRecord.from_json(out)
    assert (record.kind, record.source, record.base) == ("delta", tuned, base)
    still, moved = sorted(record.modules, key=lambda m: m.module)
    assert (still.energy, still.unchanged_share, still.warnings) == (0.0, 1.0, ("unchanged-modules",))
    # two roundings to float32 of entries near 1: 1e-7 each, 5e-6 in norm over 2400 entries
    assert moved.singular_values[:2] == pytest.approx((4, 1), abs=1e-5)
    assert (moved.rank_90, moved.signal_rank) == (1, 2)
    assert [s.module for s in record.skipped] == ["norm"]
    assert record.summary.rank_90_mean == 1.0, "the module that did not move has no say"
    assert [f.code for f in record.summary.findings] == ["unchanged-modules"]
    table = run("inspect", tuned, "--base", base, "--device", "cpu")[1]
    assert table.startswith(f"{tuned} - {base}: 2 modules, 1 skipped\n")
    assert "unchanged-modules" in table


def test_few_values_are_asked_for_by_number(run: Run, pair: tuple[str, str]) -> None:
    words = ("inspect", pair[1], "--base", pair[0], "--device", "cpu", "--modules", "1", "--json", "--values")
    (module,) = SpectraRecord.from_json(run(*words, "2")[1]).modules
    assert (len(module.singular_values), module.complete, module.effective_rank) == (2, False, None)
    assert_refused(run(*words, "0"), "--values must be 1 or more")
    assert_refused(run(*words, "-3"))


def test_a_checkpoint_needs_its_base_and_an_adapter_is_none(run: Run, pair: tuple[str, str], adapter: Path) -> None:
    assert_refused(run("inspect", pair[1]), "--base BASE")
    assert_refused(run("inspect", pair[1], "--base", str(adapter)))


def test_equal_checkpoints_are_told(run: Run, pair: tuple[str, str]) -> None:
    code, out, _ = run("inspect", pair[0], "--base", pair[0], "--device", "cpu", "--json")
    assert code == 0
    found = SpectraRecord.from_json(out).summary.findings
    assert [(f.code, f.level) for f in found] == [("identical", "error")]


def test_a_report_is_written_beside_the_record(run: Run, adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, err = run("inspect", str(adapter), "--json", "--report", str(page))
    assert code == 0
    assert err == f"wrote {page}\n"
    assert SpectraRecord.from_json(out).to_json() == out
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_names_in_a_file_do_not_steer_the_terminal(run: Run, tmp_path: Path, rng: np.random.Generator) -> None:
    """A module name may hold an escape sequence: it is shown, on stdout and in errors, and not obeyed."""
    name = "l.0.\x1b]0;owned\x07q\x1b[31m"
    base = rng.standard_normal((6, 8)).astype(np.float32)
    for side, weight in (("base", base), ("tuned", base + 1), ("other", base[:4])):
        write_checkpoint(tmp_path / side, {f"{name}.weight": weight})
    code, out, err = run("inspect", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"))
    assert code == 0
    assert "owned" in out
    assert not {"\x1b", "\x07"} & set(out + err)
    code, out, err = run("inspect", str(tmp_path / "other"), "--base", str(tmp_path / "base"))
    assert code == 2
    assert "owned" in err
    assert not {"\x1b", "\x07"} & set(out + err)


def test_a_closed_stderr_and_an_unknown_user_are_no_defects(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", {"q": planted_factors(np.random.default_rng(0), (6, 8), [2.0, 1.0])})
    quiet = 'exec "$0" -m rankwise inspect "$1" 2>&- >/dev/null'
    assert subprocess.run(["sh", "-c", quiet, sys.executable, str(adapter)]).returncode == 0
    done = process(["inspect", "~nobody-of-that-name-here/adapter"])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
