"""What is shipped: the wheel holds the package and nothing else, and the core stays without torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    pytest.importorskip("hatchling", reason="hatchling is not installed; it comes with the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile, root: Path) -> None:
    here = {
        path.relative_to(root / "src").as_posix()
        for path in (root / "src" / "rankwise").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == here
    assert "rankwise/py.typed" in shipped
    assert any(name.startswith("rankwise/report/templates/") for name in shipped)


def test_the_wheel_names_its_licence_and_its_command(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert any(re.search(r"\.dist-info/licenses/LICENSE$", name) for name in names)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "rankwise = rankwise.cli.main:main" in wheel.read(entry_points).decode()


def test_the_core_asks_for_no_heavy_package(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = Parser().parsestr(wheel.read(name).decode())
    core = {
        re.match(r"[\w.-]+", wanted)[0].lower()  # type: ignore[index]
        for wanted in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in wanted
    }
    assert core & {"torch", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "ray"} == set()
    assert set(metadata.get_all("Provides-Extra", [])) == {"train", "cluster", "s3", "dev", "docs", "all"}
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_source_distribution_holds_what_the_tests_need_and_nothing_left_over(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml"} <= names
    assert {"src/rankwise/py.typed", "tests/conftest.py", "docs/conf.py"} <= names
    left_over = re.compile(r"(^|/)(__pycache__|\.venv|\.mypy_cache|\.git|_build|story)(/|$)")
    assert [name for name in names if left_over.search(name)] == []


def test_every_direct_dependency_is_pinned_in_the_constraints(root: Path) -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = {
        plain(line.partition("==")[0])
        for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    names = {plain(re.match(r"[\w.-]+", w)[0]) for w in wanted}  # type: ignore[index]
    assert names - pins - {"rankwise"} == set()


@pytest.mark.slow
def test_the_public_api_passes_mypy_strict(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed; it comes with the extra dev")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, "tests/typing/api.py"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
