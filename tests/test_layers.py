"""The house rules on imports: who may see whom, and that the light half of rankwise stays light."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from planting import planted_factors, write_adapter

HEAVY = frozenset({"torch", "transformers", "peft", "accelerate", "datasets", "trl", "ray", "pandas"})

PROBE = """
import io, json, sys
from contextlib import redirect_stdout
code = 0
with redirect_stdout(io.StringIO()):
    {body}
print(json.dumps({{"code": code, "modules": sorted(name.split(".")[0] for name in sys.modules)}}))
"""


def loaded_by(body: str, folder: Path) -> set[str]:
    """Return the top-level modules in a fresh interpreter after `body`, which may set `code`."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(body=body)], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["code"] == 0, done.stderr
    return set(report["modules"])


def command(*words: str) -> str:
    return f"from rankwise.cli.main import run; code = run({list(words)!r})"


LIGHT: dict[str, tuple[str, frozenset[str]]] = {
    "import rankwise": ("import rankwise", HEAVY | {"scipy", "numpy", "plotly", "fsspec", "huggingface_hub"}),
    "rankwise --help": (command("--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise --version": (command("--version"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise inspect --help": (command("inspect", "--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise simulate --help": (command("simulate", "--help"), HEAVY | {"scipy", "numpy", "plotly"}),
    "rankwise plan --help": (command("plan", "--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise plan ADAPTER": (
        command("plan", "adapter", "--budget", "rank:2"),
        HEAVY | {"scipy", "plotly", "huggingface_hub"},
    ),
    "rankwise train --help": (command("train", "--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise check --help": (command("check", "--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise recall --help": (command("recall", "--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise demo --help": (command("demo", "--help"), HEAVY | {"scipy", "numpy", "plotly", "huggingface_hub"}),
    "rankwise report --help": (command("report", "--help"), HEAVY | {"scipy", "numpy", "plotly", "jinja2"}),
    "rankwise simulate": (command("simulate"), HEAVY | {"plotly", "huggingface_hub"}),
    "rankwise inspect ADAPTER": (command("inspect", "adapter"), HEAVY | {"scipy", "plotly", "huggingface_hub"}),
}
"""What is run -> the code, and what must not have been loaded by it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small adapter in it."""
    path = tmp_path_factory.mktemp("layers")
    rng = np.random.default_rng(1)
    a, b = planted_factors(rng, (24, 16), [3.0, 2.0, 1.0, 0.5])
    write_adapter(path / "adapter", {"model.layers.0.self_attn.q_proj": (a.astype("f4"), b.astype("f4"))})
    return path


@pytest.mark.parametrize("name", LIGHT)
def test_light_commands_load_no_heavy_package(name: str, folder: Path) -> None:
    body, unwanted = LIGHT[name]
    assert loaded_by(body, folder) & unwanted == set()


def test_the_probe_sees_what_is_loaded(folder: Path) -> None:
    """The test above would pass on an empty answer; this one fails on it."""
    assert "numpy" in loaded_by("import numpy", folder)


def top_level_imports(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the packages imported when the module is imported: not in functions, not for the type checker."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If):
            guarded = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            yield from top_level_imports(node.orelse if guarded else [*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from top_level_imports(
                [*node.body, *node.orelse, *node.finalbody, *(s for handler in node.handlers for s in handler.body)]
            )
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from top_level_imports(node.body)


def test_heavy_packages_are_imported_inside_functions_only(root: Path) -> None:
    """.importlinter lets a few modules import torch; this holds those imports inside functions."""
    found = {
        f"{path.relative_to(root)}: {package}"
        for path in (root / "src" / "rankwise").rglob("*.py")
        if "tuning" not in path.parts
        for package in top_level_imports(ast.parse(path.read_text(encoding="utf-8")).body)
        if package in HEAVY
    }
    assert found == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch", ["torch"]),
        ("from torch.nn import Module", ["torch"]),
        ("try:\n    import torch\nexcept ImportError:\n    import peft", ["torch", "peft"]),
        ("class A:\n    import torch", ["torch"]),
        ("def f():\n    import torch", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", ["typing"]),
    ],
)
def test_the_import_scan_sees_through_blocks(text: str, expected: list[str]) -> None:
    assert list(top_level_imports(ast.parse(text).body)) == expected


def test_contracts_between_rooms_hold(root: Path) -> None:
    tool = shutil.which("lint-imports", path=Path(sys.executable).parent)
    if tool is None:
        pytest.skip("import-linter is not installed; it comes with the extra dev")
    done = subprocess.run([tool, "--no-cache"], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
