"""Random damage to weights, index and config: a RankwiseError, or exactly what the safetensors library reads."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.making import MAKERS, write_shards
from rankwise.checkpoints import open_source
from rankwise.checkpoints.model import Adapter
from rankwise.errors import RankwiseError

safetensors = pytest.importorskip("safetensors")

import ml_dtypes  # noqa: F401 - teaches the safetensors library bfloat16

FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# what a mutation does to bytes: (kind, where as a share, value)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "cut", "insert", "delete", "repeat", "swap"]),
        st.floats(0, 1, allow_nan=False),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, mutations, focus: int | None = None) -> bytes:
    """Apply the mutations; within the first `focus` bytes, where most readers are decided."""
    out = bytearray(data)
    for kind, share, value in mutations:
        at = int(share * (min(len(out), focus or len(out)) - 1)) if out else 0
        if kind == "set" and out:
            out[at] = value
        elif kind == "flip" and out:
            out[at] ^= 1 << (value % 8)
        elif kind == "cut":
            del out[at:]
        elif kind == "insert":
            out[at:at] = bytes([value])
        elif kind == "delete":
            del out[at : at + 1 + value % 8]
        elif kind == "repeat":
            out[at:at] = out[at : at + 1 + value % 32]
        elif kind == "swap" and len(out) > at + 1:
            out[at], out[at + 1] = out[at + 1], out[at]
    return bytes(out)


def read_all(source):
    """Read everything; returns name -> bytes of a checkpoint, or None for an adapter."""
    with open_source(source) as opened:
        if isinstance(opened, Adapter):
            for module in opened.modules:
                a, b = opened.read_factors(module)
                assert (a.shape, b.shape) == ((module.r, module.shape[1]), (module.shape[0], module.r))
                assert module.scaling is None or 0 < module.scaling < float("inf")
            return None
        return {name: opened.read(name) for name in opened.names()}


def library(file):
    """What the safetensors library reads, or None where it refuses."""
    try:
        with safetensors.safe_open(file, "np") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    except safetensors.SafetensorError:
        return None


@pytest.mark.parametrize("form", sorted(MAKERS))
@FUZZ
@given(mutations=MUTATIONS, whole=st.booleans())
def test_damaged_weights(form, mutations, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp(form)
    made = MAKERS[form](folder, np.random.default_rng(0))
    data = made.weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    made.weights.write_bytes(mutate(data, mutations, None if whole else header))
    try:
        found = read_all(made.weights)
    except RankwiseError as error:
        str(error).encode()
        return
    try:
        theirs = library(made.weights)
    except (TypeError, ValueError, KeyError, AttributeError):
        return  # dtypes that the library's numpy half does not know
    assert theirs is not None, "we read what the library refuses"
    if found is not None:
        assert set(found) == set(theirs)
        for name, array in theirs.items():
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()


@FUZZ
@given(mutations=MUTATIONS)
def test_damaged_index(mutations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    tensors = [{"a.w": np.ones((2, 2), np.float32)}, {"b.w": np.zeros(3, np.float32)}]
    index = write_shards(folder, tensors)
    index.write_bytes(mutate(index.read_bytes(), mutations))
    try:
        found = read_all(index)
    except RankwiseError as error:
        str(error).encode()
        return
    held = {name: array for shard in tensors for name, array in shard.items()}
    assert found is not None
    for name, array in found.items():  # what is still named is read right
        np.testing.assert_array_equal(array, held[name])


@pytest.mark.parametrize("form", ["peft", "mlx"])
@FUZZ
@given(mutations=MUTATIONS)
def test_damaged_config(form, mutations, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    made = MAKERS[form](folder, np.random.default_rng(0))
    file = folder / "adapter_config.json"
    file.write_bytes(mutate(file.read_bytes(), mutations))
    try:
        read_all(made.source)
    except RankwiseError as error:
        str(error).encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "init_lora_weights",
          "peft_type", "lora_bias", "use_dora", "lora_parameters", "modules_to_save"]  # fmt: skip


@pytest.mark.parametrize("form", ["peft", "mlx", "kohya"])
@FUZZ
@given(config=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
def test_any_json_as_config(form, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    made = MAKERS[form](folder, np.random.default_rng(0))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        read_all(made.weights)
    except RankwiseError as error:
        str(error).encode()


HEADERS = st.dictionaries(
    st.text(max_size=6) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "X"]),
            "shape": st.lists(st.integers(0, 5) | st.just(2**63), max_size=3),
            "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
        },
    )
    | VALUES,
    max_size=3,
)


@FUZZ
@given(header=HEADERS, size=st.integers(0, 40))
def test_any_json_as_header(header, size, tmp_path_factory):
    file = tmp_path_factory.mktemp("header") / "x.safetensors"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    try:
        found = read_all(file)
    except RankwiseError:
        return
    theirs = library(file)
    assert theirs is not None
    assert set(found) == set(theirs)


@FUZZ
@given(data=st.binary(max_size=80))
def test_any_bytes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("x.safetensors", "model.safetensors.index.json", "no-suffix"):
        (folder / name).write_bytes(data)
        try:
            read_all(folder / name)
        except RankwiseError:
            continue
        assert library(folder / name) is not None


@settings(FUZZ, max_examples=60)
@given(mutations=MUTATIONS)
def test_damaged_torch_files(mutations, tmp_path_factory):
    torch = pytest.importorskip("torch")
    file = tmp_path_factory.mktemp("torch") / "pytorch_model.bin"
    torch.save({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}, file)
    file.write_bytes(mutate(file.read_bytes(), mutations))
    try:
        read_all(file)
    except RankwiseError as error:
        str(error).encode()
