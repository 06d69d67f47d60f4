"""Files of torch.save: the same tensors, and nothing executed."""

import json
import os
import pickle
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rankwise.checkpoints import open_source
from rankwise.errors import MalformedFileError, MissingDependencyError, TensorError, UnsafeFileError

torch = pytest.importorskip("torch")


def state():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "b.weight": torch.randn(4, 2).to(torch.bfloat16),
        "c.weight": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "d": torch.arange(3),
        "e": torch.randn(4, 6).T,  # not contiguous
        "f": torch.randn(4, 6)[1:3],  # a view into a larger storage
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saved(tmp_path, zipped):
    tensors = state()
    if not zipped:
        tensors["c.weight"] = tensors["c.weight"].float()  # the old format knows no float8
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with open_source(tmp_path) as opened:
        assert list(opened.names()) == list(tensors)
        assert [opened.info(n).dtype for n in tensors] == [
            "F32", "BF16", "F8_E4M3" if zipped else "F32", "I64", "F32", "F32",
        ]  # fmt: skip
        for name, tensor in tensors.items():
            found = opened.read(name)
            assert found.shape == tuple(tensor.shape) == opened.info(name).shape
            np.testing.assert_array_equal(found.astype(np.float64), tensor.to(torch.float64).numpy())
        assert opened.read("b.weight").dtype == ml_dtypes.bfloat16


def test_sharded_bin_holds_one_shard_at_a_time(tmp_path):
    for i in (1, 2):
        torch.save({f"w{i}": torch.full((2,), float(i))}, tmp_path / f"pytorch_model-{i}.bin")
    index = {"weight_map": {"w1": "pytorch_model-1.bin", "w2": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with open_source(tmp_path) as opened:
        for name in ("w1", "w2", "w1"):
            assert opened.read(name).tolist() == [float(name[1])] * 2
            held = [f for f in opened._weights._files.values() if f._loaded is not None]
            assert len(held) == 1
    assert not [f for f in opened._weights._files.values() if f._loaded is not None]


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_state_dict_wrapped_once(tmp_path, key):
    torch.save({key: {"a.weight": torch.ones(2)}, "epoch": 3}, tmp_path / "last.ckpt")
    with open_source(tmp_path / "last.ckpt") as opened:
        assert opened.names() == ("a.weight",)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "pickle2"])
def test_a_payload_is_refused_and_not_executed(tmp_path, how):
    trap, file = str(tmp_path / "executed"), tmp_path / "pytorch_model.bin"
    if how in ("zip", "legacy"):
        held = {"w": torch.ones(2), "x": Payload(trap)}
        torch.save(held, file, _use_new_zipfile_serialization=how == "zip")
    else:
        file.write_bytes(pickle.dumps(Payload(trap), protocol=2 if how == "pickle2" else 5))
    # a pickle of a later protocol is refused before torch tells what it calls
    with pytest.raises(UnsafeFileError if how != "pickle" else (UnsafeFileError, MalformedFileError)) as caught:
        open_source(tmp_path)
    assert not Path(trap).exists()
    assert "pytorch_model.bin" in str(caught.value)


def test_a_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_source(tmp_path)


@pytest.mark.parametrize("held", [[1, 2], {"a": 1}, {}, 7, {"state_dict": {"a": 1}}])
def test_what_is_no_dict_of_tensors(tmp_path, held):
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(MalformedFileError, match="wanted a dict of tensors"):
        open_source(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_or_garbled(tmp_path, zipped):
    file = tmp_path / "pytorch_model.bin"
    torch.save(state(), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for cut in (0, 1, 2, 4, 10, len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:cut])
        with pytest.raises(MalformedFileError, match=r"pytorch_model\.bin is damaged"):
            open_source(tmp_path)
    file.write_bytes(b"garbage" * 10)
    with pytest.raises(MalformedFileError):
        open_source(tmp_path)


def test_sparse_tensors_are_refused_when_read(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "pytorch_model.bin")
    with open_source(tmp_path) as opened, pytest.raises(TensorError, match="sparse"):
        opened.read("w")


def test_without_torch_the_message_says_what_to_install(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"rankwise\[train\]"):
        open_source(tmp_path)


def test_an_expanded_view_is_refused_before_it_costs_its_memory(tmp_path: Path) -> None:
    """A file of 1.5 kB that claims 1.6 GB."""
    torch = pytest.importorskip("torch")
    torch.save({"l.0.q.weight": torch.zeros(1).expand(20000, 20000)}, tmp_path / "pytorch_model.bin")
    with (
        pytest.raises(MalformedFileError, match=r"claims the shape \(20000, 20000\).*an expanded view"),
        open_source(tmp_path) as opened,
    ):
        opened.names()
