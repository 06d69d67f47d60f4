"""What every reader must do, whatever its format. `test_contract.py` holds each reader to each of these.

A new format adds a maker to `making.MAKERS` and passes.
"""

import contextlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter, LoraModule
from rankwise.checkpoints.stores import LocalStore
from rankwise.errors import RankwiseError, TensorError, WrongKindError


@contextlib.contextmanager
def counted(monkeypatch):
    """Yield the list of (file, start, length) of every read from disk."""
    reads = []
    real = LocalStore.read

    def read(self, name, start, length):
        reads.append((name, start, length))
        return real(self, name, start, length)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read", read)
        yield reads


def reads_the_truth(made):
    """Names, shapes, dtypes and values, and for adapters scaling and delta, are those that were written."""
    with open_source(made.source) as opened:
        if not isinstance(opened, Adapter):
            assert set(opened.names()) == set(made.tensors) == set(opened.tensors)
            for name, array in made.tensors.items():
                info, found = opened.info(name), opened.read(name)
                assert info.shape == array.shape == found.shape
                assert info == opened.tensors[name]
                assert found.dtype == array.dtype
                assert found.tobytes() == array.tobytes()
            return
        assert {m.module for m in opened.modules} == set(made.deltas)
        for module in opened.modules:
            a, b = opened.read_factors(module)
            assert (a.shape, b.shape) == ((module.r, module.shape[1]), (module.shape[0], module.r))
            assert a.dtype == b.dtype == np.float32
            assert module.lora_alpha == made.alphas[module.module]
            assert module.scaling == pytest.approx(made.scalings[module.module], rel=1e-12)
            # float32 products of rank 3
            np.testing.assert_allclose(module.scaling * b @ a, made.deltas[module.module], rtol=1e-5, atol=1e-6)


def is_lazy(made, monkeypatch):
    """Opening reads no factor or weight; reading one thing reads its bytes alone."""
    size = made.weights.stat().st_size
    header = 8 + int.from_bytes(made.weights.read_bytes()[:8], "little")
    with counted(monkeypatch) as reads, open_source(made.source) as opened:
        in_file = [n for name, _, n in reads if name == made.weights.name]
        alphas = 2 * sum(a is not None for a in made.alphas.values())
        assert header <= sum(in_file) <= header + alphas < size
        reads.clear()
        if isinstance(opened, Adapter):
            opened.read_factors(opened.modules[0])
            assert len(reads) == 2
        else:
            name = opened.names()[0]
            assert len(opened.read(name).tobytes()) == sum(n for _, _, n in reads)


def holds_no_file_open(made):
    """Between two reads nothing is open: the file may be moved or its folder removed."""
    opened = open_source(made.source)
    kept = made.weights.read_bytes()
    made.weights.unlink()
    thing = opened.modules[0] if isinstance(opened, Adapter) else opened.names()[0]
    read = opened.read_factors if isinstance(opened, Adapter) else opened.read
    with pytest.raises(RankwiseError, match=made.weights.name):
        read(thing)
    made.weights.write_bytes(kept)
    read(thing)
    opened.close()
    opened.close()


def refuses_what_is_not_there(made):
    """A module or tensor of another source is refused in words."""
    with open_source(made.source) as opened:
        if isinstance(opened, Adapter):
            stranger = LoraModule("no.such.module", (1, 1), "linear", 1, None, None, None, "F32")
            with pytest.raises(TensorError, match=r"no\.such\.module"):
                opened.read_factors(stranger)
        else:
            for look in (opened.info, opened.read):
                with pytest.raises(TensorError, match=r"no\.such\.tensor"):
                    look("no.such.tensor")
            assert "no.such.tensor" not in opened.tensors
            with pytest.raises(KeyError):
                opened.tensors["no.such.tensor"]


def refuses_the_other_kind(made):
    with open_source(made.source) as opened:
        other = "checkpoint" if isinstance(opened, Adapter) else "adapter"
    with pytest.raises(WrongKindError, match="wanted"):
        open_source(made.source, want=other)


def imports_little(made):
    """A local safetensors source needs numpy, ml_dtypes, msgspec and nothing heavier."""
    code = (
        "import sys; from rankwise.checkpoints import open_source\n"
        f"o = open_source({str(made.source)!r}); [o.read_factors(m) for m in getattr(o, 'modules', [])]\n"
        "heavy = {'torch', 'transformers', 'peft', 'scipy', 'huggingface_hub', 'fsspec', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def executes_nothing(made, tmp_path, monkeypatch):
    """A pickle under the name of the weights is refused, and what it calls is not called."""
    trap = tmp_path / "executed"
    made.weights.write_bytes(pickle.dumps(_Trap(str(trap))))
    monkeypatch.setattr(pickle, "loads", lambda *a, **k: pytest.fail("pickle.loads was called"))
    with pytest.raises(RankwiseError):
        open_source(made.source)
    assert not trap.exists()


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def refuses_every_truncation(made):
    """Cut anywhere in the header or the data, the file is refused, naming it."""
    whole = made.weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [*range(0, 9), *range(9, header, max(1, header // 60)), *range(header - 2, header + 3), len(whole) - 1]
    for cut in cuts:
        made.weights.write_bytes(whole[:cut])
        with pytest.raises(RankwiseError, match=made.weights.name):
            open_source(made.source)
    made.weights.write_bytes(whole + b"\0")
    with pytest.raises(RankwiseError, match=made.weights.name):
        open_source(made.source)
