"""The place beside OUT: killed anywhere it leaves nothing that loads, and the same job goes on."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from rankwise.adapters import staging as staging_module
from rankwise.adapters.parts import write_part
from rankwise.adapters.staging import OURS, Staging, check_out
from rankwise.errors import OutputError, OutputExistsError

JOB = {"source": "a", "rank": 3}
KEYS = ("one", "two", "three")


def array(index):
    return {f"t{index}": np.full((2, 3), index, np.float32)}


def build(out: Path, *, job=JOB, force=False, folder=True):
    """Do a whole job, doing again only what is not there."""
    done = []
    with Staging(out, job, force=force, folder=folder) as staging:
        for index, key in enumerate(KEYS):
            if staging.facts(key) is None:
                staging.put(key, array(index), {"index": index})
                done.append(key)
        staging.join("adapter_model.safetensors" if folder else out.name, KEYS)
        if folder:
            staging.write("adapter_config.json", "{}\n")
        staging.finish()
    return done


def whole(file: Path) -> bool:
    held = load_file(file)
    return all(np.array_equal(held[f"t{i}"], array(i)[f"t{i}"]) for i in range(3)) and len(held) == 3


def test_a_folder_grows_beside_out_and_is_renamed(tmp_path) -> None:
    assert build(tmp_path / "out") == list(KEYS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert whole(tmp_path / "out" / "adapter_model.safetensors")


def test_a_file_too(tmp_path) -> None:
    build(tmp_path / "out.safetensors", folder=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors"]
    assert whole(tmp_path / "out.safetensors")


def test_an_empty_folder_is_taken(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    build(tmp_path / "out")
    assert whole(tmp_path / "out" / "adapter_model.safetensors")


def interrupt(out, count, *, job=JOB):
    with Staging(out, job) as staging:
        for index, key in enumerate(KEYS[:count]):
            staging.put(key, array(index), {"index": index})


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_same_job_goes_on_where_it_stopped(tmp_path, count) -> None:
    interrupt(tmp_path / "out", count)
    assert not (tmp_path / "out").exists()
    with Staging(tmp_path / "out", JOB) as staging:
        assert list(staging.resumed) == list(KEYS[:count])
        assert all(staging.facts(key) == {"index": index} for index, key in enumerate(KEYS[:count]))
    assert build(tmp_path / "out") == list(KEYS[count:])
    assert whole(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_another_job_starts_anew(tmp_path) -> None:
    interrupt(tmp_path / "out", 2)
    assert build(tmp_path / "out", job=JOB | {"rank": 4}) == list(KEYS)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 16, None])
def test_a_broken_part_is_dropped_with_what_comes_after_it(tmp_path, damage) -> None:
    interrupt(tmp_path / "out", 3)
    part = tmp_path / ".out.partial" / "parts" / "000001.part"
    if damage is None:
        part.unlink()
    else:
        part.write_bytes(damage)
    assert build(tmp_path / "out") == ["two", "three"]
    assert whole(tmp_path / "out" / "adapter_model.safetensors")


def test_a_part_cut_short_is_not_taken_for_whole(tmp_path) -> None:
    """The header is there, the data are not all: renaming after fsync keeps this from happening, a disk may not."""
    interrupt(tmp_path / "out", 3)
    part = tmp_path / ".out.partial" / "parts" / "000002.part"
    part.write_bytes(part.read_bytes()[:-5])
    assert build(tmp_path / "out") == ["three"]
    assert whole(tmp_path / "out" / "adapter_model.safetensors")


KILL = textwrap.dedent(
    """
    import os, sys
    sys.path[:0] = [sys.argv[1]]
    import test_staging as t
    from pathlib import Path
    out, folder, force, at = Path(sys.argv[2]), sys.argv[3] == "folder", sys.argv[4] == "force", int(sys.argv[5])
    seen = 0
    def event(name, arguments):
        global seen
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            if any(".partial" in str(a) or str(out) in str(a) for a in arguments):
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), 9)
    sys.addaudithook(event)
    t.build(out, force=force, folder=folder)
    print("ended")
    """
)


def killed_at(out, at, *, folder, force):
    """Run a job in another process, which kills itself before its at-th touch of the disk; return whether it did."""
    words = [sys.executable, "-c", KILL, str(Path(__file__).parent), str(out)]
    words += ["folder" if folder else "file", "force" if force else "-", str(at)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_killed_at_any_touch_of_the_disk_nothing_half_is_left_and_it_goes_on(tmp_path, kind) -> None:
    at, step = 1, 3  # every third touch: the others lie between the same two
    while True:
        out = tmp_path / f"{at}" / ("out" if kind == "folder" else "out.safetensors")
        out.parent.mkdir()
        if not killed_at(out, at, folder=kind == "folder", force=False):
            break
        if out.exists():  # then it is the whole
            assert whole(out / "adapter_model.safetensors" if kind == "folder" else out)
        else:
            build(out, folder=kind == "folder")
            assert whole(out / "adapter_model.safetensors" if kind == "folder" else out)
            assert [p.name for p in out.parent.iterdir()] == [out.name]
        at += step
    assert at > 15


def test_killed_while_it_replaces_an_adapter_the_old_one_or_the_new_one_is_there(tmp_path) -> None:
    """Only the renamings at the end matter; they come after touch 20."""
    outcomes = set()
    for at in range(18, 60):
        out = tmp_path / f"{at}" / "out"
        out.mkdir(parents=True)
        (out / "adapter_config.json").write_text("old")
        killed = killed_at(out, at, folder=True, force=True)
        if out.exists():
            old = (out / "adapter_config.json").read_text() == "old"
            assert old or whole(out / "adapter_model.safetensors")
            outcomes.add("old" if old else "new")
        else:  # between the two renamings: the next start puts it back or replaces it
            outcomes.add("neither")
            with Staging(out, JOB, force=True):
                assert (out / "adapter_config.json").read_text() == "old"
        if not killed:
            break
    assert {"old", "new"} <= outcomes
    assert "neither" in outcomes


def test_two_processes_do_not_write_one_place(tmp_path) -> None:
    with Staging(tmp_path / "out", JOB) as staging:
        staging.put("one", array(0), {})
        with pytest.raises(OutputError, match="another process is writing"):
            Staging(tmp_path / "out", JOB)
    build(tmp_path / "out")


def test_what_came_to_out_meanwhile_is_not_replaced_without_force(tmp_path) -> None:
    """Another program may write OUT while the parts grow."""
    out = tmp_path / "out"
    with Staging(out, JOB) as staging:
        staging.put("one", array(0), {})
        staging.join("adapter_model.safetensors", ["one"])
        out.mkdir()
        (out / "adapter_model.safetensors").write_text("mine")
        with pytest.raises(OutputExistsError):
            staging.finish()
    assert (out / "adapter_model.safetensors").read_text() == "mine"


def test_an_out_that_another_process_finishes_before_the_lock_is_kept(tmp_path, monkeypatch) -> None:
    """The second process looked at OUT before the first renamed it, and gets the lock after."""
    out, real = tmp_path / "out", staging_module._lock
    build(tmp_path / "other")

    def late(path, target):
        (tmp_path / "other").rename(out)
        return real(path, target)

    monkeypatch.setattr(staging_module, "_lock", late)
    with pytest.raises(OutputExistsError):
        Staging(out, JOB)
    assert whole(out / "adapter_model.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_a_lock_file_that_was_taken_away_is_no_lock(tmp_path, monkeypatch) -> None:
    """The first process takes the place away between the second's opening of the file and its lock."""
    import fcntl

    path, real = tmp_path / "lock", fcntl.flock

    def finished(handle, how):
        path.unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", finished)
    with pytest.raises(OutputError, match="has just written"):
        staging_module._lock(path, tmp_path / "out")


def test_the_folder_that_one_stands_in_is_refused(tmp_path, monkeypatch) -> None:
    """A folder is put in its place as a whole: the shell would be left in a deleted one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="that you are in"):
        check_out(Path(), force=False, folder=True)


def test_a_killed_process_gives_the_lock_back(tmp_path) -> None:
    assert killed_at(tmp_path / "out", 9, folder=True, force=False)
    build(tmp_path / "out")


def test_what_is_there_stays_without_force(tmp_path) -> None:
    build(tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputExistsError):
        build(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == before
    build(tmp_path / "out", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_strangers_in_out_are_never_deleted(tmp_path, force) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises((OutputError, OutputExistsError)):
        build(tmp_path / "out", force=force)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_only_names_that_adapters_have_are_replaced() -> None:
    assert "adapter_model.safetensors" in OURS
    assert not {name for name in OURS if "tokenizer" in name or name == "config.json"}


@pytest.mark.parametrize("folder", [False, True])
def test_the_other_kind_is_refused(tmp_path, folder) -> None:
    out = tmp_path / "out"
    out.write_text("x") if folder else out.mkdir()
    with pytest.raises(OutputError, match="was meant"):
        check_out(out, force=True, folder=folder)


def test_no_folder_to_write_into_is_said(tmp_path) -> None:
    with pytest.raises(OutputError, match="Make it first"):
        check_out(tmp_path / "no" / "out", force=False, folder=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_said(tmp_path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        check_out(tmp_path / "out", force=False, folder=True)


def test_a_read_only_file_system_gets_one_message(tmp_path, monkeypatch) -> None:
    def refuse(*_arguments, **_keywords):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        Staging(tmp_path / "out", JOB)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch) -> None:
    from rankwise.adapters import staging

    calls = []

    def full_at_two(path, tensors, facts):
        calls.append(path)
        if len(calls) == 2:
            raise OutputError("the disk is full")
        write_part(path, tensors, facts)

    monkeypatch.setattr(staging, "write_part", full_at_two)
    with pytest.raises(OutputError, match="full"):
        build(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert build(tmp_path / "out") == ["two", "three"]


def test_a_place_that_is_discarded_leaves_nothing(tmp_path) -> None:
    with Staging(tmp_path / "out", JOB) as staging:
        staging.put("one", array(0), {})
        staging.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_is_followed(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    build(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert whole(tmp_path / "real" / "adapter_model.safetensors")


def test_keys_may_be_any_names(tmp_path) -> None:
    with Staging(tmp_path / "out", JOB) as staging:
        for key in ("a/b", "..", "x" * 300, "ü[3]"):
            staging.put(key, {f"t.{key}": np.ones(1, np.float32)}, {})
    with Staging(tmp_path / "out", JOB) as staging:
        assert len(staging.resumed) == 4
        assert staging.facts("..") == {}
        staging.discard()
