"""Sharded checkpoints: names from the index alone, one header and one tensor at a time, honest refusals."""

import json

import numpy as np
import pytest

from checkpoints.contract import counted
from checkpoints.making import normal, write_shards
from rankwise.checkpoints import open_source
from rankwise.errors import MalformedFileError, UnknownFormatError


@pytest.fixture
def shards(rng):
    return [{f"layers.{i}.w": normal(rng, 4, 4), f"layers.{i}.b": normal(rng, 4)} for i in range(3)]


def test_reads_every_tensor(tmp_path, shards):
    write_shards(tmp_path, shards)
    with open_source(tmp_path) as opened:
        assert opened.names() == tuple(name for shard in shards for name in shard)
        for shard in shards:
            for name, array in shard.items():
                np.testing.assert_array_equal(opened.read(name), array)


def test_opening_reads_the_index_alone_and_one_tensor_one_header(tmp_path, shards, monkeypatch):
    index = write_shards(tmp_path, shards)
    with counted(monkeypatch) as reads, open_source(tmp_path) as opened:
        assert {name for name, _, _ in reads} == {index.name}
        assert opened.info("layers.1.w").shape == (4, 4)
        opened.read("layers.1.w")
        opened.read("layers.1.b")
        files = [name for name, _, _ in reads if name != index.name]
        # 8 bytes and the header, once; then each tensor
        assert files == ["model-00002-of-00003.safetensors"] * 4
        assert [n for _, _, n in reads[-2:]] == [64, 16]


def test_the_index_itself_is_a_source(tmp_path, shards):
    index = write_shards(tmp_path, shards, name="other")
    with open_source(index) as opened:
        assert len(opened.names()) == 6


def test_missing_shard_is_named_at_once(tmp_path, shards):
    write_shards(tmp_path, shards)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MalformedFileError, match=r"model-00002-of-00003\.safetensors.*not beside it"):
        open_source(tmp_path)


def test_tensor_that_the_shard_lacks_is_named(tmp_path, shards):
    index = write_shards(tmp_path, shards)
    written = json.loads(index.read_text())
    written["weight_map"]["layers.9.w"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(written))
    with open_source(tmp_path) as opened:
        opened.read("layers.1.w")  # another shard is none the worse
        for name in ("layers.9.w", "layers.0.w"):
            with pytest.raises(MalformedFileError, match=r"'layers\.9\.w' in model-00001-of-00003"):
                opened.read(name)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "", "s3://x", 7, None, "n\0l"]
)
def test_paths_outside_the_folder_are_never_opened(tmp_path, shard, monkeypatch):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    with counted(monkeypatch) as reads, pytest.raises(MalformedFileError, match="It was not opened"):
        open_source(tmp_path)
    assert {name for name, _, _ in reads} == {"model.safetensors.index.json"}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff", '{"weight_map": {"a": NaN}}',
     '{"weight_map": {"a": "x", "a": "y"}}', "[" * 100_000, '{"weight_map": {"\\ud800": "x"}}'],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedFileError, match=r"model\.safetensors\.index\.json"):
        open_source(tmp_path)


def test_an_index_that_names_an_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(MalformedFileError, match="an index itself"):
        open_source(tmp_path)


def test_shards_without_their_index(tmp_path, shards):
    write_shards(tmp_path, shards).unlink()
    with pytest.raises(UnknownFormatError, match="no index"):
        open_source(tmp_path)
