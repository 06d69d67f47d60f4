"""Our writer of safetensors, held to the library's reader; and joining without a tensor in memory."""

import json
import os
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rankwise.adapters import parts
from rankwise.adapters.parts import DTYPES, join_parts, read_facts, write_part
from rankwise.checkpoints import open_source
from rankwise.errors import MalformedFileError, OutputError


def read(path):
    return load_file(path)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_the_library_reads_every_dtype_that_we_write(tmp_path, rng, dtype) -> None:
    array = rng.integers(0, 2, (3, 5)).astype(dtype)
    write_part(tmp_path / "p", {"x": array, "scalar": array[0, 0].reshape(())}, {})
    with safe_open(tmp_path / "p", framework="np") as opened:
        entry = opened.get_slice("x")
        assert (entry.get_dtype(), entry.get_shape()) == (DTYPES[dtype], [3, 5])
    if not DTYPES[dtype].startswith("F8"):  # the library's numpy half knows no float8
        got = read(tmp_path / "p")
        assert got["x"].dtype == dtype
        assert np.array_equal(got["x"].astype(np.float64), array.astype(np.float64))
        assert got["scalar"].shape == ()


def test_every_dtype_that_is_written_is_read_by_ours(tmp_path) -> None:
    held = {f"x{index}": np.ones((2, 3), dtype) for index, dtype in enumerate(DTYPES)}
    write_part(tmp_path / "model.safetensors", held, {})
    with open_source(tmp_path / "model.safetensors") as checkpoint:
        for name, array in held.items():
            assert np.array_equal(checkpoint.read(name).view(np.uint8), array.view(np.uint8))


def test_layout_is_the_arrays_own_order_whatever_their_strides(tmp_path, rng) -> None:
    whole = rng.standard_normal((6, 8)).astype(np.float32)
    held = {"turned": whole.T, "cut": whole[::2, 1:5], "empty": np.zeros((0, 4), np.float32)}
    write_part(tmp_path / "p", held, {})
    got = read(tmp_path / "p")
    assert all(np.array_equal(got[name], array) for name, array in held.items())


def test_facts_come_back(tmp_path) -> None:
    facts = {"r": 3, "scaling": 0.1, "text": "ä\n", "none": None, "list": [1.5e-300]}
    write_part(tmp_path / "p", {}, facts)
    assert read_facts(tmp_path / "p") == facts


@pytest.mark.parametrize(
    "bytes_", [b"", b"\x00" * 4, b"\xff" * 8, b"\x02" + b"\x00" * 7 + b"{}", b"\x10" + b"\x00" * 7]
)
def test_what_is_no_part_is_said_to_be_none(tmp_path, bytes_) -> None:
    (tmp_path / "p").write_bytes(bytes_)
    with pytest.raises(MalformedFileError, match="is no part"):
        read_facts(tmp_path / "p")


def test_joined_parts_hold_all_tensors_in_order_with_the_metadata(tmp_path, rng) -> None:
    held = {}
    for index, dtype in enumerate((np.float32, ml_dtypes.bfloat16, np.uint8, np.float64)):
        own = {f"t{index}.{k}": rng.integers(0, 9, (index + 1, k)).astype(dtype) for k in (1, 3)}
        write_part(tmp_path / f"{index}", own, {"index": index})
        held |= own
    write_part(tmp_path / "none", {}, {})
    order = [tmp_path / name for name in ("0", "1", "none", "2", "3")]
    join_parts(order, tmp_path / "whole.safetensors", {"format": "pt", "note": "ü"})
    got = read(tmp_path / "whole.safetensors")
    assert all(np.array_equal(got[name].astype(float), array.astype(float)) for name, array in held.items())
    with safe_open(tmp_path / "whole.safetensors", framework="np") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ü"}
    length = int.from_bytes((tmp_path / "whole.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0  # the data are aligned
    text = (tmp_path / "whole.safetensors").read_bytes()[8 : 8 + length]
    assert [k for k in json.loads(text) if k != "__metadata__"] == list(held)


def test_joining_takes_the_memory_of_a_block_not_of_the_tensors(tmp_path) -> None:
    for index in range(4):
        write_part(tmp_path / f"{index}", {f"t{index}": np.zeros(3 << 20, np.float32)}, {})  # 12 MiB each
    tracemalloc.start()
    join_parts([tmp_path / f"{index}" for index in range(4)], tmp_path / "whole", {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * parts.COPY  # 12 MiB, of 48 MiB


def test_two_parts_with_one_name_are_refused(tmp_path) -> None:
    for name in "ab":
        write_part(tmp_path / name, {"same": np.ones(2, np.float32)}, {})
    with pytest.raises(MalformedFileError, match="named same"):
        join_parts([tmp_path / "a", tmp_path / "b"], tmp_path / "whole", {})


@pytest.fixture
def small_disk():
    """Let no file grow past 4 KiB: write() then fails as it does on a full disk, with another word."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_disk_that_takes_no_more_gets_one_message_and_keeps_no_part(tmp_path) -> None:
    with pytest.raises(OutputError, match="cannot be written to"):
        write_part(tmp_path / "p", {"x": np.zeros(9000, np.float32)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_was_there_outlives_a_failed_write(tmp_path, monkeypatch) -> None:
    write_part(tmp_path / "p", {"x": np.ones(3, np.float32)}, {"old": True})

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_part(tmp_path / "p", {"x": np.zeros(3, np.float32)}, {})
    with pytest.raises(OutputError, match="No space left"):
        join_parts([tmp_path / "p"], tmp_path / "whole", {})
    assert read_facts(tmp_path / "p") == {"old": True}
