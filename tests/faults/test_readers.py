"""Damaged, hostile and huge files: refused in words, before they cost memory, and never half read."""

import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoints.making import checkpoint, peft, raw_file, write_shards
from rankwise.checkpoints import open_source
from rankwise.checkpoints.safetensors_file import BITS, NUMPY
from rankwise.errors import AccessError, MalformedFileError, RankwiseError, SourceNotFoundError, TensorError

safetensors = pytest.importorskip("safetensors")


def f32(**fields):
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}


ONE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = b"\0" * 4

# name -> (header, data, what the message says)
WRONG = {
    "empty object, data left": ({}, b"1", "should hold 0 bytes"),
    "null": (b"null", b"", "JSON NoneType"),
    "list": (b"[]", b"", "JSON list"),
    "number": (b"7", b"", "JSON int"),
    "not JSON": (b"{", b"", "not JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not JSON"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), b"", "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "not JSON"),
    "nested deep": (b'{"a":' * 100_000, b"", "nested too deep|not JSON"),
    "NaN": (b'{"__metadata__":NaN}', b"", "NaN is no JSON number"),
    "tensor twice": (ONE + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR, "'a' is there twice"),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR, "twice"),
    "half a surrogate pair": (b'{"a\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR, "not JSON"),
    "trailing zero byte": (ONE + b"}\0", FOUR, "not JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": f32()}, FOUR, "words to words"),
    "metadata a list": ({"__metadata__": []}, b"", "words to words"),
    "tensor a list": (b'{"a":["F32",[1],[0,4]]}', FOUR, "wanted an object"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR, "the dtype None"),
    "unknown dtype": ({"a": f32(dtype="F33")}, FOUR, "the dtype 'F33'"),
    "dtype in lower case": ({"a": f32(dtype="f32")}, FOUR, "the dtype 'f32'"),
    "dtype a number": ({"a": f32(dtype=32)}, FOUR, "the dtype 32"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR, "the shape None"),
    "negative shape": ({"a": f32(shape=[-1])}, FOUR, r"the shape \[-1\]"),
    "shape of floats": ({"a": f32(shape=[1.0])}, FOUR, r"the shape \[1\.0\]"),
    "shape of true": ({"a": f32(shape=[True])}, FOUR, r"the shape \[True\]"),
    "shape of minus zero": (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", r"the shape \[-0"),
    "shape a word": ({"a": f32(shape="1")}, FOUR, "the shape '1'"),
    "shape too large": ({"a": f32(shape=[2**63, 2**63])}, FOUR, "more bits than a file"),
    "overflow hidden by a zero": ({"a": f32(shape=[2**63, 2**63, 0], data_offsets=[0, 0])}, b"", "more bits"),
    "dimension past 64 bits": ({"a": f32(shape=[2**64])}, FOUR, "the shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, "data_offsets None"),
    "three offsets": ({"a": f32(data_offsets=[0, 4, 4])}, FOUR, "data_offsets"),
    "offsets backwards": ({"a": f32(data_offsets=[4, 0])}, FOUR, "hold -4"),
    "offsets too wide": (
        {"a": f32(data_offsets=[0, 8])},
        FOUR * 2,
        "takes 4 bytes, and its data_offsets 0 to 8 hold 8",
    ),
    "hole": ({"a": f32(), "b": f32(data_offsets=[8, 12])}, FOUR * 3, "leaves a hole"),
    "hole at the start": ({"a": f32(data_offsets=[4, 8])}, FOUR * 2, "leaves a hole"),
    "overlap": ({"a": f32(shape=[2], data_offsets=[0, 8]), "b": f32(data_offsets=[4, 8])}, FOUR * 2, "overlaps"),
    "two tensors in one place": ({"a": f32(), "b": f32()}, FOUR, "overlaps"),
    "data missing": ({"a": f32()}, b"\0" * 3, "should hold 4 bytes of data after its header, and holds 3"),
    "data left": ({"a": f32()}, b"\0" * 5, "should hold 4 bytes of data after its header, and holds 5"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, b"\0\0", r"takes 1\.5 bytes"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_headers_are_refused_naming_file_and_fault(name, tmp_path):
    header, data, words = WRONG[name]
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, data))
    with pytest.raises(MalformedFileError, match=rf"model\.safetensors.*({words})"):
        open_source(tmp_path)


RIGHT = {
    "trailing spaces": (ONE + b"}   ", FOUR),
    "metadata null": ({"__metadata__": None, "a": f32()}, FOUR),
    "unknown field": ({"a": f32(extra=[1])}, FOUR),
    "scalar": ({"a": f32(shape=[])}, FOUR),
    "empty tensor between": ({"a": f32(), "z": f32(shape=[0], data_offsets=[4, 4])}, FOUR),
    "no tensors": ({}, b""),
    "escaped name": (b'{"\\u00e9\\ud83d\\ude00":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
}


@pytest.mark.interop
@pytest.mark.parametrize("name", sorted({**WRONG, **RIGHT}))
def test_whatever_the_library_refuses_is_refused(name, tmp_path):
    """And whatever is accepted is read as the library reads it."""
    header, data = (RIGHT.get(name) or WRONG[name])[:2]
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw_file(header, data))
    try:
        with safetensors.safe_open(file, "np") as theirs:
            wanted = {key: theirs.get_tensor(key) for key in theirs.keys()}  # noqa: SIM118 - it is no dict
    except safetensors.SafetensorError:
        wanted = None
    if wanted is None or name in WRONG:
        with pytest.raises(RankwiseError):
            open_source(file)
        return
    with open_source(file) as opened:
        assert set(opened.names()) == set(wanted)
        for key, array in wanted.items():
            np.testing.assert_array_equal(opened.read(key), array)


def test_every_dtype_of_the_library_is_known(tmp_path):
    """The library lists its dtypes when it meets one that it does not know."""
    (tmp_path / "x.safetensors").write_bytes(raw_file({"a": f32(dtype="?")}, FOUR))
    with pytest.raises(safetensors.SafetensorError) as caught, safetensors.safe_open(tmp_path / "x.safetensors", "np"):
        pass
    listed = str(caught.value).partition("expected one of ")[2]
    theirs = {word.split("`")[1] for word in listed.split(", ") if word.count("`") >= 2}
    assert theirs
    assert theirs <= set(BITS)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_is_read_or_refused_by_name(dtype, tmp_path):
    size = BITS[dtype] * 8 // 8
    header = {"a": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}}
    (tmp_path / "model.safetensors").write_bytes(
        raw_file(header, bytes(range(size)) if dtype != "BOOL" else bytes(size))
    )
    with open_source(tmp_path) as opened:
        assert opened.info("a").dtype == dtype
        if dtype in NUMPY:
            assert opened.read("a").shape == (2, 4)
            assert opened.read("a").dtype.itemsize * 8 == BITS[dtype]
        else:
            with pytest.raises(TensorError, match=f"stored as {dtype}"):
                opened.read("a")


def test_bf16_comes_as_ml_dtypes(tmp_path):
    header = {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, np.array([1.5, -2], ml_dtypes.bfloat16).tobytes()))
    with open_source(tmp_path) as opened:
        assert opened.read("a").dtype == ml_dtypes.bfloat16
        assert opened.read("a").tolist() == [1.5, -2]


@pytest.mark.parametrize("shape", [[1] * 65, [2**58, 0]])
def test_shapes_that_numpy_has_no_room_for(shape, tmp_path):
    size = 0 if 0 in shape else 4
    (tmp_path / "model.safetensors").write_bytes(
        raw_file({"a": f32(shape=shape, data_offsets=[0, size])}, b"\0" * size)
    )
    with open_source(tmp_path) as opened:
        try:
            assert list(opened.read("a").shape) == shape
        except TensorError as error:
            assert "a in" in str(error)  # noqa: PT017 - either is right, by numpy's version


@pytest.mark.parametrize("claim", [2**31, 2**40, 2**63, 2**64 - 1, 100_000_001])
def test_a_header_that_claims_gigabytes_costs_no_memory(claim, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(claim.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFileError, match=rf"claim a header of {claim:,} bytes, and the file has 10"):
            open_source(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_sparse_file_with_a_header_over_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((150_000_000).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole on disk
    tracemalloc.start()
    try:
        with pytest.raises(MalformedFileError, match="at most 100,000,000"):
            open_source(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_huge_config_is_refused_unread(tmp_path, rng):
    made = peft(tmp_path, rng)
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(MalformedFileError, match="at most"):
        open_source(made.source)


def test_file_that_vanishes_or_shrinks_after_opening(tmp_path, rng):
    made = checkpoint(tmp_path, rng)
    with open_source(made.source) as opened:
        whole = made.weights.read_bytes()
        made.weights.write_bytes(whole[:-10])
        for name in opened.names():
            try:
                assert opened.read(name).tobytes() == made.tensors[name].tobytes()
            except MalformedFileError as error:
                assert "cut short" in str(error)  # noqa: PT017 - tensors before the cut are whole
        made.weights.unlink()
        with pytest.raises(SourceNotFoundError, match=r"model\.safetensors is not there"):
            opened.read(opened.names()[0])


@pytest.mark.parametrize("number", [5, 28, 24, 116])
def test_errors_of_the_device(number, tmp_path, rng, monkeypatch):
    made = checkpoint(tmp_path, rng)
    with open_source(made.source) as opened:

        def fail(*args, **kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(Path, "open", fail)
        with pytest.raises(AccessError, match=r"model\.safetensors cannot be read: \w"):
            opened.read(opened.names()[0])


def test_shard_that_vanishes_after_opening(tmp_path):
    write_shards(tmp_path, [{"a": np.ones(2, np.float32)}, {"b": np.ones(2, np.float32)}])
    with open_source(tmp_path) as opened:
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        assert opened.read("a").tolist() == [1, 1]
        with pytest.raises(MalformedFileError, match="model-00002-of-00002"):
            opened.read("b")


def test_a_folder_where_a_shard_should_be(tmp_path):
    index = {"weight_map": {"a": "shard"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "shard").mkdir()
    with pytest.raises(MalformedFileError, match="names the shard shard, which is not beside it"):
        open_source(tmp_path)


def test_nan_and_inf_are_read_as_they_are(tmp_path):
    held = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    header = {"a": f32(shape=[4], data_offsets=[0, 16])}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, held.tobytes()))
    with open_source(tmp_path) as opened:
        np.testing.assert_array_equal(opened.read("a"), held)
