"""`inspect` as a whole: bases of adapters, devices, what the record says of the call, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import rankwise
from rankwise import linalg
from rankwise.errors import ShapeMismatchError, WrongKindError


def write_adapter(folder: Path, rng: np.random.Generator, shapes: dict[str, tuple[int, int]], **config: object) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (out, width) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((2, width)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return folder


def test_the_base_of_an_adapter_gives_the_relative_norm(tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = write_adapter(tmp_path / "a", rng, {"l.0.q": (6, 8), "l.0.v": (4, 8)})
    weight = rng.standard_normal((6, 8)).astype(np.float32)
    save_file({"l.0.q.weight": weight, "l.0.v.weight": weight[:4]}, tmp_path / "base.safetensors")
    record = rankwise.inspect(adapter, base=tmp_path / "base.safetensors")
    for module, base in zip(record.modules, (weight, weight[:4]), strict=True):
        assert module.energy is not None
        # float32 in, float64 sums: the reference sums in float64 too
        expected = np.sqrt(module.energy) / np.linalg.norm(base.astype(np.float64))
        assert module.relative_norm == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 2), (3, 16), (48, 1)])
def test_a_base_of_another_shape_with_as_many_entries_is_refused(
    tmp_path: Path, rng: np.random.Generator, shape: tuple[int, int]
) -> None:
    adapter = write_adapter(tmp_path / "a", rng, {"q": (6, 8)})
    save_file({"q.weight": np.ones(shape, np.float32)}, tmp_path / "base.safetensors")
    with pytest.raises(ShapeMismatchError, match="q has shape"):
        rankwise.inspect(adapter, base=tmp_path / "base.safetensors")


def test_the_transposed_weight_of_gpt2_is_the_same_base(tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = write_adapter(tmp_path / "a", rng, {"h.0.c_attn": (24, 8)})
    save_file({"h.0.c_attn.weight": np.ones((8, 24), np.float32)}, tmp_path / "base.safetensors")
    (module,) = rankwise.inspect(adapter, base=tmp_path / "base.safetensors").modules
    assert module.relative_norm is not None


def test_a_base_without_any_of_the_modules_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    adapter = write_adapter(tmp_path / "a", rng, {"q": (6, 8)})
    save_file({"other.weight": np.ones((6, 8), np.float32)}, tmp_path / "base.safetensors")
    with pytest.raises(WrongKindError, match="not the model it was trained on"):
        rankwise.inspect(adapter, base=tmp_path / "base.safetensors")


def test_an_adapter_never_asks_for_a_gpu(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even on a machine with one: its factors are small, and torch would cost more than all the rest."""
    monkeypatch.setattr(linalg, "GPU_NODES", (str(tmp_path),))
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now fails
    assert rankwise.inspect(write_adapter(tmp_path / "a", rng, {"q": (6, 8)})).device == "cpu"


def test_the_record_spells_the_call(tmp_path: Path, rng: np.random.Generator) -> None:
    for name in ("base", "tuned"):
        save_file({"q.weight": rng.standard_normal((6, 8)).astype(np.float32)}, tmp_path / f"{name}.safetensors")
    tuned, base = str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors")
    record = rankwise.inspect(tuned, base=base, modules="q", values=2, device="cpu", seed=3)
    options = ["--modules", "q", "--values", "2", "--device", "cpu", "--seed", "3"]
    assert list(record.command) == ["rankwise", "inspect", tuned, "--base", base, *options]


PEAK = """
import sys
import numpy, scipy.linalg, ml_dtypes, rankwise.inspection, rankwise.checkpoints, rankwise.noise
def peak():  # of this process alone, in KiB
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
rankwise.inspection.inspect(sys.argv[2], base=sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("modules", [1, 6])
def test_one_module_is_in_memory_at_a_time(tmp_path: Path, rng: np.random.Generator, modules: int) -> None:
    """Under 6 times the float32 size of the largest tensor, whatever the checkpoint's size.

    2 MiB more are allowed: at 1280 x 1280 (6.25 MiB in float32) the interpreter's own growth is not small.
    """
    import ml_dtypes

    size = 1280
    for name in ("base", "tuned"):
        arrays = {f"l.{i}.q.weight": rng.standard_normal((size, size), np.float32) for i in range(modules)}
        save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in arrays.items()}, tmp_path / f"{name}.safetensors")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 6 * 4 * size * size / 1024 + 2048
