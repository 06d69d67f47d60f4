"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import OutputError, OutputExistsError
from rankwise.files import check_writable, write_text, write_texts

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX semantics")
as_root = pytest.mark.skipif(
    hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write into read-only folders"
)


@pytest.fixture
def umask() -> Iterator[Any]:
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "one\ntwo \u03bb\n", force=False)
    assert (tmp_path / "a.json").read_bytes() == "one\ntwo \u03bb\n".encode()  # \n on every system
    assert left_in(tmp_path) == ["a.json"]


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OutputExistsError, match=r"a\.json exists already; nothing was written.*--force"):
        write_text(path, "new", force=False)
    assert path.read_text() == "old"
    assert left_in(tmp_path) == ["a.json"]
    write_text(path, "new", force=True)
    assert path.read_text() == "new"
    assert left_in(tmp_path) == ["a.json"]


@pytest.mark.parametrize("force", [True, False])
def test_impossible_places_are_refused_before_the_work(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("x")
    places = {
        tmp_path: "is a folder",
        tmp_path / "none" / "a.json": "there is no folder",
        tmp_path / "file" / "a.json": "there is no folder",
        tmp_path / ("n" * 300): "File name too long",
    }
    for path, words in places.items():
        for refuse in (lambda p: check_writable(p, force=force), lambda p: write_text(p, "x", force=force)):
            with pytest.raises(OutputError, match=words):
                refuse(path)
    assert left_in(tmp_path) == ["file"]


@as_root
@posix
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="no permission to write into"):
            check_writable(folder / "a.json", force=False)
    finally:
        folder.chmod(0o700)


def test_a_folder_that_turns_out_read_only_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system mounted read-only, where root is told only on writing."""

    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(OutputError, match=r"a\.json cannot be written: Read-only file system"):
        write_text(tmp_path / "a.json", "x", force=False)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: str | None
) -> None:
    path = tmp_path / "a.json"
    if old is not None:
        path.write_text(old)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left on device"):
        write_text(path, "new", force=True)
    monkeypatch.undo()
    assert left_in(tmp_path) == ([] if old is None else ["a.json"])
    assert old is None or path.read_text() == old


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_the_kernel_calls_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real error of a real write, on a device that is always full."""

    def on_full(**options: object) -> tuple[int, str]:
        (tmp_path / ".a.part").touch()
        return os.open("/dev/full", os.O_WRONLY), str(tmp_path / ".a.part")

    monkeypatch.setattr(tempfile, "mkstemp", on_full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_text(tmp_path / "a.json", "x" * 100_000, force=False)
    assert left_in(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.json", "x", force=False)
    assert left_in(tmp_path) == []


@posix
def test_a_killed_run_leaves_no_target(tmp_path: Path) -> None:
    """SIGKILL between writing and renaming: what is left must not be taken for a whole file."""
    code = (
        "import os, signal, sys; from pathlib import Path; from rankwise.files import write_text\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_text(Path(sys.argv[1]), 'x' * 1_000_000, force=True)\n"
    )
    for name, old in (("a.json", None), ("b.json", "old")):
        path = tmp_path / name
        if old is not None:
            path.write_text(old)
        ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
        assert ended.returncode == -signal.SIGKILL
        assert (path.read_text() if path.exists() else None) == old
    assert all(name == "b.json" or name.endswith(".part") for name in left_in(tmp_path))


@posix
def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "a.json")
    with pytest.raises(OutputExistsError):
        write_text(link, "new", force=False)
    write_text(link, "new", force=True)
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.json").read_text() == "new"
    assert left_in(tmp_path / "real") == ["a.json"]


@posix
def test_a_link_into_nowhere_and_a_loop_are_refused(tmp_path: Path) -> None:
    dangling, loop = tmp_path / "dangling", tmp_path / "loop"
    dangling.symlink_to(tmp_path / "none" / "a.json")
    loop.symlink_to(loop)
    for path in (dangling, loop):
        with pytest.raises(OutputExistsError):
            write_text(path, "x", force=False)
        with pytest.raises(OutputError, match="cannot be written"):
            write_text(path, "x", force=True)
    assert left_in(tmp_path) == ["dangling", "loop"]
    assert dangling.is_symlink()
    assert loop.is_symlink()


@posix
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """Renaming into /dev/null would destroy it for the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match="is a device or a pipe"):
        write_text(pipe, "x", force=True)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@posix
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, umask: Any, mask: int, mode: int) -> None:
    umask(mask)
    write_text(tmp_path / "a.json", "x", force=False)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode
    assert umask(mask) == mask, "the mask itself was put back"


def test_a_long_name_still_has_room_for_the_part_beside_it(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".json")  # 255 bytes: the most that common file systems take
    write_text(path, "x", force=False)
    assert left_in(tmp_path) == [path.name]


def test_several_files_are_written_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second of two: the first is not left behind, and an old one keeps its contents."""
    first, second = tmp_path / "page.html", tmp_path / "record.json"
    first.write_text("old")
    synced: list[int] = []

    def full_at_the_second(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OutputError, match=r"record\.json cannot be written: No space left .* Nothing was written"):
        write_texts({first: "new", second: "new"}, force=True)
    assert len(synced) == 2
    assert first.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html"]
