"""The documentation says what is true: its commands run, its outputs, help texts and lists are the program's.

A console block is a shell session: lines after `$ ` are run in order, page by page, in a folder that holds
`adapter/`, `base/` and `tuned/` as the scripts of docs/examples make them; the lines below a command are
compared with what it prints (numbers to 2 %; `...` stands for any lines, or for the rest of a line). A block that
cannot be run here comes after `<!-- not run: why -->`.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import rankwise
import rankwise.records
from rankwise import errors
from rankwise.cli.main import COMMANDS
from rankwise.findings import FINDINGS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCRIPTS = DOCS / "examples"

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")),
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+|:::+)(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$", re.S | re.M
)
NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^>]+?) -->\s*\Z")
RUNNABLE = frozenset({"rankwise", "python", "make", "cat", "ls", "echo"})
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    why_not: str | None


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        marked = NOT_RUN.search(text[: fence.start()])
        body = "".join(line.removeprefix(fence["indent"]) for line in fence["body"].splitlines(keepends=True))
        line = text.count("\n", 0, fence.start()) + 1
        found.append(Block(fence["info"].strip(), body, line, marked["why"] if marked else None))
    return found


def sessions(block: Block) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block with the output printed below it."""
    command, output = "", ""
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line[2:], ""
        elif command.endswith("\\"):
            command = command[:-1] + " " + line.strip()
        else:
            output += line + "\n"
    if command:
        yield command, output


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


CONSOLE = [page for page in PAGES if any(b.language in {"console", "bash", "sh", "shell"} for b in blocks(page))]
PYTHON = [page for page in PAGES if any(b.language in {"python", "pycon"} for b in blocks(page))]


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter/, base/ and tuned/, made once by the scripts that the docs name."""
    folder = tmp_path_factory.mktemp("examples")
    for words in (["make_adapter.py", "adapter"], ["make_pair.py", "base", "tuned"]):
        subprocess.run([sys.executable, SCRIPTS / words[0], *words[1:]], cwd=folder, check=True, timeout=200)
    return folder


@pytest.fixture
def desk(examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to follow a page in: the examples, and the docs' scripts where the commands expect them."""
    for name in ("adapter", "base", "tuned"):
        shutil.copytree(examples / name, tmp_path / name)
    (tmp_path / "story").mkdir()
    shutil.copytree(examples / "adapter", tmp_path / "story" / "style-and-facts")
    (tmp_path / "docs").symlink_to(DOCS)
    (tmp_path / "spectra.json").write_text(rankwise.inspect(examples / "adapter").to_json(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        timeout=200,
    )


def same_line(shown: str, printed: str) -> bool:
    """Compare two lines: words exactly, spacing not at all, numbers to 2 % or one unit of the last digit."""
    if shown.endswith(" ..."):
        shown = shown.removesuffix(" ...")
        printed = " ".join(printed.split()[: len(shown.split())])
    if NUMBER.sub("#", " ".join(shown.split())) != NUMBER.sub("#", " ".join(printed.split())):
        return False
    for a, b in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        mantissa, _, exponent = a.lower().partition("e")
        digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
        # whole numbers are counts: exact, but a rank of many is read off a curve that another BLAS moves a little
        unit = 10.0**-digits if "." in a else float(abs(float(a)) > 8)
        if abs(float(a) - float(b)) > max(0.02 * abs(float(a)), 1.001 * unit):
            return False
    return True


def differs(shown: str, printed: str) -> str | None:
    """Return the first shown line that the program did not print in its place, or None."""
    left = [line for line in printed.splitlines() if line.strip()]
    skipping = False
    for line in (line for line in shown.splitlines() if line.strip()):
        if line.strip() == "...":
            skipping = True
            continue
        while skipping and left and not same_line(line, left[0]):
            left.pop(0)
        skipping = False
        if not left or not same_line(line, left[0]):
            return f"shown:   {line}\nprinted: {left[0] if left else '(nothing more)'}"
        left.pop(0)
    return None if skipping or not left else f"printed, and not shown: {left[0]}"


@pytest.mark.parametrize("page", CONSOLE, ids=page_id)
def test_commands_of_a_page_run(page: Path, desk: Path) -> None:
    for block in blocks(page):
        if block.language not in {"console", "bash", "sh", "shell"}:
            continue
        where = f"{page_id(page)}:{block.line}"
        if block.why_not is not None:
            sys.stdout.write(f"{where}: not run: {block.why_not}\n")
            continue
        assert block.language == "console", f"{where}: write commands as a `console` block, with `$ ` in front"
        pairs = list(sessions(block))
        assert pairs, f"{where}: no line begins with `$ `"
        for command, shown in pairs:
            program = command.split()[0]
            assert program in RUNNABLE, f"{where}: {program} is not run by this test; mark it `<!-- not run: why -->`"
            if program == "make":
                done = run(command.replace("make", "make --dry-run --no-print-directory", 1), ROOT)
                assert done.returncode == 0, f"{where}: $ {command}\n{done.stdout}"
                continue
            done = run(command, desk)
            assert done.returncode == 0, f"{where}: $ {command}\nexit code {done.returncode}\n{done.stdout}"
            assert "Traceback" not in done.stdout, f"{where}: $ {command}\n{done.stdout}"
            if shown.strip():
                difference = differs(shown, done.stdout)
                assert difference is None, f"{where}: $ {command}\n{difference}\n--- all of it:\n{done.stdout}"


@pytest.mark.parametrize("page", PYTHON, ids=page_id)
def test_python_of_a_page_runs(page: Path, desk: Path) -> None:
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.why_not is not None:
            continue
        where = f"{page_id(page)}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)  # noqa: S102 - the page's own code
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, names, where, str(page), block.line)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            said: list[str] = []
            runner.run(test, out=said.append, clear_globs=False)
            names |= test.globs
            assert runner.failures == 0, "".join(said)


def test_help_texts_are_the_programs() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "tools" / "write_help.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"run `make docs-help`\n{done.stdout}{done.stderr}"


def headings(path: Path, level: int = 2) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {line[level + 1 :].strip("` ") for line in text.splitlines() if line.startswith("#" * level + " ")}


def test_every_command_has_its_help_in_the_docs() -> None:
    page = DOCS / "reference" / "cli.md"
    assert {f"rankwise {name}" for name in COMMANDS} == headings(page) - {"rankwise", "Exit codes"}
    for name in COMMANDS:
        assert f"<!-- help: rankwise {name} -->" in page.read_text(encoding="utf-8")


def subclasses(kind: type[errors.RankwiseError]) -> Iterator[type[errors.RankwiseError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


def test_every_error_has_its_section_and_every_section_its_error() -> None:
    modules = [module.name for module in pkgutil.walk_packages(rankwise.__path__, "rankwise.")]
    for name in modules:
        if name != "rankwise.__main__":
            importlib.import_module(name)
    classes = [kind for kind in subclasses(errors.RankwiseError) if kind.__module__ in modules and "slug" in vars(kind)]
    slugs = [kind.slug for kind in classes]
    assert len(slugs) == len(set(slugs)), "two errors share a slug"
    assert set(slugs) == headings(DOCS / "reference" / "messages.md")


def finding_codes() -> set[str]:
    """Return every code that the source gives to a finding, and the names of the rules."""
    codes = set(FINDINGS)
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called == "Finding":
                given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            else:
                given = node.args[:1] if called == "note" else []
            for value in given:
                codes |= constants(value, loops)
    return codes


def constants(value: ast.expr, loops: list[ast.For]) -> set[str]:
    """Return the strings that an expression stands for: itself, or what the loops in this file give its name."""
    if isinstance(value, ast.Constant):
        return {str(value.value)}
    found = set()
    for loop in loops:
        names = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
        at = [i for i, name in enumerate(names) if isinstance(name, ast.Name) and ast.unparse(value) == name.id]
        rows = loop.iter.elts if isinstance(loop.iter, ast.Tuple | ast.List) else []
        cells = [row.elts[i] for row in rows if isinstance(row, ast.Tuple) for i in at]
        found |= {str(cell.value) for cell in cells if isinstance(cell, ast.Constant)}
    return found


def test_every_finding_has_its_section_and_every_section_its_finding() -> None:
    assert finding_codes() == headings(DOCS / "reference" / "findings.md")


def test_links_from_the_front_pages_lead_somewhere() -> None:
    """Sphinx checks the links between the docs; README and its neighbours are read on their own."""
    for page in PAGES:
        if page.parent != ROOT:
            continue
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]+)(?:#[^)\s]*)?\)|src=\"(?!https?:)([^\"]+)\"", text):
            name = target[0] or target[1]
            assert (page.parent / name).exists(), f"{page_id(page)} links to {name}, which is not there"


def test_the_front_page_gives_the_two_commands_and_ci_runs_the_second() -> None:
    commands = [
        command
        for block in blocks(ROOT / "README.md")
        if block.language == "console"
        for command, _ in sessions(block)
        if command.startswith("make ")
    ]
    assert commands[:2] == ["make demo", "make test"]
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("\nmake test")


def test_pages_name_no_machine_of_their_author() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        found = re.findall(r"(?:^|[\s\"'`(])(/(?:work|tmp|root|home)/\S*)", page.read_text(encoding="utf-8"))
        assert found == [], page_id(page)


@pytest.mark.slow
def test_docs_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed; it comes with the extra docs")
    pytest.importorskip("myst_parser", reason="myst-parser is not installed; it comes with the extra docs")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-E", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", DOCS, tmp_path / "html"], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    anchors = (tmp_path / "html" / "reference" / "messages.html").read_text(encoding="utf-8")
    for kind in subclasses(errors.RankwiseError):
        if kind.__module__ == errors.__name__:
            assert f'id="{kind.slug}"' in anchors, f"the link that the program prints, #{kind.slug}, leads nowhere"


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("rank 8  0.993", "rank 8   0.993", True),
        ("rank 8  0.993", "rank 9  0.993", False),
        ("norm 0.749", "norm 0.750", True),
        ("norm 0.749", "norm 0.80", False),
        ("a 1", "b 1", False),
        ("rank 14", "rank 15", True),
        ("rank 14", "rank 16", False),
        ("a 1 ...", "a 1 and so on", True),
        ("a 1 ...", "b 1 and so on", False),
        ("3.1e-05", "3.2e-05", True),
        ("3.1e-05", "3.5e-05", False),
        ("0.0012", "0.0013", True),
    ],
)
def test_lines_are_compared_by_words_and_nearly_by_numbers(shown: str, printed: str, expected: bool) -> None:
    assert same_line(shown, printed) is expected


def test_a_shown_output_has_to_be_printed_in_its_order() -> None:
    assert differs("a\n...\nc\n", "a\nb\nb\nc\n") is None
    assert differs("a\n...\n", "a\nb\n") is None
    assert differs("a\nc\n", "a\nb\nc\n") is not None
    assert differs("a\n", "a\nb\n") is not None
    assert differs("a\n...\nd\n", "a\nb\n") is not None


def test_the_history_of_records_names_every_format() -> None:
    page = (DOCS / "reference" / "records.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z0-9/, -]+) \|", page.partition("## History")[2].partition("\n## ")[0], re.M)
    named = {name for row in rows for name in row.split(", ")} - {"format", "---"}
    formats = {
        record.FORMAT.removeprefix("rankwise/")
        for record in vars(rankwise.records).values()
        if isinstance(record, type) and issubclass(record, rankwise.records.Record) and record.FORMAT
    }
    assert named == formats
