"""`inspect`, `extract` and `convert` on a cluster: the same record to the last digit, the same files."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from range_server import RangeServer
from safetensors.numpy import save_file

import rankwise
from planting import planted_factors, write_adapter
from rankwise import inspection
from rankwise.adapters import conversion_job, extraction
from rankwise.adapters.staging import Staging
from rankwise.checkpoints.patience import TRIES
from rankwise.cli.main import run
from rankwise.errors import AccessError, ClusterError, RankwiseError, SourceNotFoundError, UsageError
from rankwise.spreading import Here

TIMES = ("created", "command", "out")
"""Fields of a record that tell of the run and not of the result."""


def plain(record: Any) -> str:
    """Return the text of a record, byte for byte but for the fields of the run."""
    text: str = record.to_json()
    for name, value in json.loads(text).items():
        if name in TIMES:
            spelled = json.dumps(value, indent=1, ensure_ascii=False).replace("\n", "\n ")
            whole = f' "{name}": {spelled}'
            assert whole in text, f"{name} is spelled in another way"
            text = text.replace(whole, f' "{name}": ...', 1)
    return text


def files(folder: Path) -> dict[str, Any]:
    """Return the contents of all files; of a record without the fields of the run."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("extraction.json", "conversion.json"):
        if name in found:
            found[name] = {k: v for k, v in json.loads(found[name]).items() if k not in TIMES}
    return found


def write_pair(folder: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Write a small model before and after: two shards, norms, tables, a stack of experts, weights of three shapes."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (80, 96), "lm_head.weight": (80, 96)}
    for layer in range(3):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (96, 96),
            f"{at}.self_attn.k_proj.weight": (32, 96),
            f"{at}.mlp.experts.down_proj": (3, 96, 48),
            f"{at}.mlp.up_proj.weight": (300, 96),  # beyond 256 columns the randomised route is taken
            f"{at}.mlp.down_proj.weight": (96, 300),
            f"{at}.input_layernorm.weight": (96,),
        }
    base = {name: 0.05 * rng.standard_normal(shape) for name, shape in shapes.items()}
    tuned = {}
    for name, weight in base.items():
        noise = 1e-3 * rng.standard_normal(weight.shape)
        if weight.ndim == 2 and "embed" not in name:
            noise = noise * 0.1 + 0.02 * rng.standard_normal((weight.shape[0], 3)) @ rng.standard_normal(
                (3, weight.shape[1])
            )
        tuned[name] = weight if name == "lm_head.weight" else weight + noise
    made = folder / "base", folder / "tuned"
    for path, tensors in zip(made, (base, tuned), strict=True):
        path.mkdir(parents=True)
        shards: list[dict[str, Any]] = [{}, {}]
        for index, (name, tensor) in enumerate(tensors.items()):
            shards[index % 2][name] = np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16))
        for index, shard in enumerate(shards):
            save_file(shard, path / f"model-{index}.safetensors", metadata={"format": "pt"})
        weight_map = {name: f"model-{index}.safetensors" for index, shard in enumerate(shards) for name in shard}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return made


def write_factors(folder: Path, rng: np.random.Generator, modules: int = 21, r: int = 6) -> Path:
    factors = {}
    for index in range(modules):
        shape = ((64, 48), (48, 64), (40, 40))[index % 3]
        a, b = planted_factors(rng, shape, [2.0**-k for k in range(r)])
        factors[f"model.layers.{index // 3}.mlp.part{index % 3}_proj"] = (a.astype("f4"), b.astype("f4"))
    return write_adapter(folder, factors, lora_alpha=12)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"), np.random.default_rng(7))


@pytest.mark.parametrize("options", [{}, {"values": 5, "seed": 3}, {"modules": r"experts.*\[1\]|lm_head"}])
def test_inspect_of_a_pair(ray_here: Any, pair: tuple[Path, Path], options: dict[str, Any]) -> None:
    base, tuned = pair
    seen: dict[str | None, list[tuple[str, int, int]]] = {}
    records = {}
    for cluster in (None, "auto"):
        seen[cluster] = []
        tell: Callable[..., None] = lambda *words, to=seen[cluster]: to.append(words)  # noqa: E731
        records[cluster] = rankwise.inspect(tuned, base=base, cluster=cluster, progress=tell, **options)
    assert plain(records["auto"]) == plain(records[None])
    assert seen["auto"] == seen[None]
    assert [name for name, _, _ in seen["auto"]] == [m.module for m in records["auto"].modules]
    assert records["auto"].command[-2:] == ("--cluster", "auto")


@pytest.mark.parametrize("with_base", [False, True])
def test_inspect_of_an_adapter(ray_here: Any, tmp_path: Path, rng: np.random.Generator, with_base: bool) -> None:
    adapter = write_factors(tmp_path / "a", rng)
    base = None
    if with_base:
        base = tmp_path / "base.safetensors"
        weights = {f"model.layers.{i // 3}.mlp.part{i % 3}_proj.weight": (64, 48) for i in range(0, 21, 3)}
        save_file({n: rng.standard_normal(s).astype(np.float32) for n, s in weights.items()}, base)
    here, there = (rankwise.inspect(adapter, base=base, cluster=cluster) for cluster in (None, "auto"))
    assert plain(there) == plain(here)
    assert sum(m.relative_norm is not None for m in there.modules) == (7 if with_base else 0)


def test_inspect_of_experts_that_share_a_pair_of_factors(
    ray_here: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    experts, r = 3, 2
    at = "base_model.model.model.layers.0.mlp.experts"
    shapes = {f"{at}.lora_A.weight": (experts * r, 24), f"{at}.lora_B.weight": (32, r * experts)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    here, there = (rankwise.inspect(tmp_path, cluster=cluster) for cluster in (None, "auto"))
    assert plain(there) == plain(here)
    assert [m.module[-3:] for m in there.modules] == ["[0]", "[1]", "[2]"]


def test_inspect_of_a_real_adapter(ray_here: Any, samples: Path) -> None:
    adapter = samples / "adapters" / "law-llm"
    if not adapter.is_dir():
        pytest.skip("the sample data have no adapters/law-llm")
    here, there = (rankwise.inspect(adapter, cluster=cluster) for cluster in (None, "auto"))
    assert plain(there) == plain(here)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "embeddings": True},
        {"energy": 0.9, "save_whole": True, "dtype": "float32"},
        {"signal": True, "scaling": "rslora", "lora_head": False},
    ],
)
def test_extract(ray_here: Any, pair: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    base, tuned = pair
    options.pop("lora_head", None)
    records = [
        rankwise.extract(base, tuned, tmp_path / str(cluster), cluster=cluster, **options) for cluster in (None, "auto")
    ]
    assert plain(records[0]) == plain(records[1])
    assert len(records[0].modules) >= 9
    assert files(tmp_path / "None") == files(tmp_path / "auto")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["None", "auto"]


@pytest.mark.parametrize(
    "options",
    [{"rank": 3}, {"energy": 0.9}, {"relative_error": 0.2, "runtime": "vllm"}, {"rank": 2, "format": "kohya"}],
)
def test_convert(ray_here: Any, tmp_path: Path, rng: np.random.Generator, options: dict[str, Any]) -> None:
    adapter = write_factors(tmp_path / "a", rng)
    other = write_factors(tmp_path / "b", rng)
    add = [(other, 0.5)] if "energy" in options else []
    end = ".safetensors" if options.get("format") == "kohya" else ""
    outs = [tmp_path / f"{cluster}{end}" for cluster in (None, "auto")]
    seen: list[list[str]] = [[], []]
    records = [
        rankwise.convert(adapter, out, cluster=cluster, add=add, progress=lambda n, *_, to=to: to.append(n), **options)
        for out, cluster, to in zip(outs, (None, "auto"), seen, strict=True)
    ]
    assert plain(records[0]) == plain(records[1])
    assert seen[0] == seen[1]
    assert len(records[0].modules) == 21
    if end:
        assert outs[0].read_bytes() == outs[1].read_bytes()
    else:
        assert files(outs[0]) == files(outs[1])


def test_extract_goes_on_where_a_run_on_this_machine_was_cut_short(
    ray_here: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair
    whole, out = tmp_path / "whole", tmp_path / "out"
    rankwise.extract(base, tuned, whole, rank=4)
    done: list[str] = []

    def interrupted(module: str, *_: int) -> None:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(module)

    with pytest.raises(KeyboardInterrupt):
        rankwise.extract(base, tuned, out, rank=4, progress=interrupted)
    assert not out.exists()
    again: list[str] = []
    rankwise.extract(base, tuned, out, rank=4, cluster="auto", progress=lambda name, *_: again.append(name))
    assert again
    assert not set(again) & set(done)
    assert files(out) == files(whole)


def test_an_interrupted_run_leaves_nothing_that_loads_and_ray_as_it_was(
    ray_here: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = pair

    def interrupted(_: str, done: int, __: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        rankwise.extract(base, tuned, out, rank=4, cluster="auto", progress=interrupted)
    assert not out.exists()
    assert ray_here.is_initialized()
    assert len(rankwise.inspect(tuned, base=base, cluster="auto", modules="q_proj").modules) == 3


def test_a_lost_cluster_keeps_what_convert_had_done(
    ray_here: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out = write_factors(tmp_path / "a", rng), tmp_path / "out"
    real = conversion_job.Job._made

    def lost(self: Any, *words: Any) -> Any:
        results = real(self, *words)
        for _ in range(4):
            yield next(results)
        raise ClusterError("the cluster is gone.")

    with monkeypatch.context() as patch:
        patch.setattr(conversion_job.Job, "_made", lost)
        with pytest.raises(ClusterError, match=r"gone\. What was done is kept in .*\.out\.partial: the same command"):
            rankwise.convert(adapter, out, rank=2, cluster="auto")
    assert not out.exists()
    rankwise.convert(adapter, out, rank=2)
    assert files(out) == files_of_plain(adapter, tmp_path / "plain")


def test_a_lost_cluster_keeps_what_extract_had_done(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost:
        def __init__(self, after: int) -> None:
            self.after = after

        def flat_map(self, work: Any, tasks: Any, **_: Any) -> Any:
            for task in tasks[: self.after]:
                yield from work.do(work.here, task)
            raise ClusterError("the cluster is gone.")

    base, tuned = pair
    for after, told in ((0, r"^the cluster is gone\.$"), (4, r"gone\. What was done is kept in .*\.out\.partial: the")):
        monkeypatch.setattr(extraction, "spread", lambda *_, n=after: contextlib.nullcontext(Lost(n)))
        with pytest.raises(ClusterError, match=told):
            rankwise.extract(base, tuned, tmp_path / "out", rank=2, cluster="auto")
        left = [path.name for path in tmp_path.iterdir()]
        assert left == ([".out.partial"] if after else []), "without a part there is nothing to go on with"


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("how", ["busy", "gone"])
@pytest.mark.parametrize("command", ["extract", "convert"])
def test_a_source_that_fails_in_the_middle_keeps_what_was_done(
    web: RangeServer,
    tmp_path: Path,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    how: str,
) -> None:
    """A server that stays away over all tries, and a file that is not there for a while."""
    if command == "extract":
        sources, weights = write_pair(web.folder, rng), "model-1.safetensors"
    else:
        sources, weights = (write_factors(web.folder / "a", rng),), "adapter_model.safetensors"
    away = sources[-1] / weights
    call = getattr(rankwise, command)
    call(*sources, tmp_path / "whole", rank=2)
    given = [f"{web.url}/{path.name}" if how == "busy" else str(path) for path in sources]
    done: list[str] = []

    def fails(module: str, *_: int) -> None:
        done.append(module)
        if len(done) == 5 and how == "busy":
            web.busy = weights
        elif len(done) == 5:
            away.rename(tmp_path / "away")

    error, told = (AccessError, f"tried {TRIES} times") if how == "busy" else (SourceNotFoundError, "is not there")
    with pytest.raises(error, match=rf"{told}.* What was done is kept in .*\.out\.partial: the same command goes on"):
        call(*given, tmp_path / "out", rank=2, progress=fails)
    assert not (tmp_path / "out").exists()
    web.busy = None
    if how == "gone":
        (tmp_path / "away").rename(away)
    again: list[str] = []
    real = Staging.put
    monkeypatch.setattr(Staging, "put", lambda self, key, *rest: (again.append(key), real(self, key, *rest)))
    call(*given, tmp_path / "out", rank=2)
    assert again
    assert not set(again) & set(done[:4]), "what was done is not done again"
    held, whole = files(tmp_path / "out"), files(tmp_path / "whole")
    assert held["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


def files_of_plain(adapter: Path, out: Path) -> dict[str, Any]:
    rankwise.convert(adapter, out, rank=2)
    return files(out)


def test_workers_read_the_web_by_themselves_and_leave_the_rest(
    ray_here: Any, web: RangeServer, rng: np.random.Generator
) -> None:
    base, tuned = write_pair(web.folder, rng)
    web.login = "ann:planted"
    url = f"http://ann:planted@{web.host}"
    pattern = r"layers\.1\.self_attn\.q_proj"
    here = rankwise.inspect(tuned, base=base, modules=pattern)
    there = rankwise.inspect(f"{url}/tuned", base=f"{url}/base", modules=pattern, cluster="auto")
    assert there.modules == here.modules
    assert "planted" not in there.to_json()
    tensor = 96 * 96 * 2
    bodies = [n for name, _, n in web.sent if name.endswith(".safetensors") and n >= tensor]
    assert bodies == [tensor, tensor], "this process reads headers, and a worker one tensor of each"
    shards = [path for folder in (base, tuned) for path in folder.glob("*.safetensors")]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)
    texts = sum(path.stat().st_size for folder in (base, tuned) for path in folder.glob("*.json"))
    # the headers and the index once here and once in the worker
    assert web.bytes_of() <= 2 * tensor + 2 * (headers + texts)


def test_answers_cut_short_on_a_worker(ray_here: Any, web: RangeServer, rng: np.random.Generator) -> None:
    base, tuned = write_pair(web.folder, rng)
    here = rankwise.inspect(tuned, base=base, modules="q_proj")
    web.cuts = 3
    assert rankwise.inspect(f"{web.url}/tuned", base=f"{web.url}/base", modules="q_proj", cluster="auto").modules == (
        here.modules
    )
    assert web.cuts == 0


def test_a_file_that_goes_away_names_module_tensor_file_and_worker(
    ray_here: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = write_pair(tmp_path, np.random.default_rng(1))
    real = extraction.spread

    def spread(*words: Any) -> Any:
        (tuned / "model-1.safetensors").unlink()  # after the headers were read here
        return real(*words)

    monkeypatch.setattr(extraction, "spread", spread)
    with pytest.raises(RankwiseError) as raised:
        rankwise.extract(base, tuned, tmp_path / "out", rank=2, cluster="auto")
    assert isinstance(raised.value, (SourceNotFoundError, AccessError)) or "model-1" in str(raised.value)
    for part in ("model-1.safetensors", str(tuned), "while a worker at"):
        assert part in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_relative_paths_mean_the_same_on_a_worker(
    ray_here: Any, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_factors(tmp_path / "a", rng, modules=3)
    monkeypatch.chdir(tmp_path)
    record = rankwise.inspect("a", cluster="auto")
    assert (record.source, len(record.modules)) == ("a", 3)


def test_a_gpu_of_this_machine_is_no_default_for_the_workers(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair
    asked: list[bool] = []

    class Workers:
        def flat_map(self, work: Any, tasks: Any, **more: Any) -> Any:
            asked.append(work.gpu)
            return Here().flat_map(work, tasks, **more)

    for module in (inspection, extraction):
        monkeypatch.setattr(module, "default_device", lambda: "cuda")
        monkeypatch.setattr(module, "spread", lambda *_: contextlib.nullcontext(Workers()))
    record = rankwise.inspect(tuned, base=base, modules="k_proj", cluster="auto")
    assert record.device == "cpu"
    assert rankwise.extract(base, tuned, tmp_path / "out", rank=1, modules="k_proj", cluster="auto").device == "cpu"
    assert asked
    assert not any(asked)


def test_calibration_is_not_spread(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    with pytest.raises(UsageError, match="--calibration runs the base model on this machine"):
        rankwise.extract(base, tuned, tmp_path / "out", rank=2, calibration="texts.txt", cluster="auto")


def words_of(command: str, pair: tuple[Path, Path], folder: Path) -> list[str]:
    """Return a command line; what it writes is in the folder."""
    base, tuned = (str(path) for path in pair)
    adapter = write_factors(folder / "a", np.random.default_rng(3))
    return {
        "inspect": ["inspect", tuned, "--base", base, "--modules", "q_proj"],
        "extract": ["extract", base, tuned, str(folder / "out"), "--rank", "2"],
        "convert": ["convert", str(adapter), str(folder / "out"), "--rank", "2"],
    }[command]


@pytest.mark.parametrize("command", ["inspect", "extract", "convert"])
def test_from_the_command_line(
    ray_here: Any, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    words = words_of(command, pair, tmp_path)
    assert run([*words, "--cluster", "auto", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["modules"]) >= 3


@pytest.mark.parametrize("command", ["inspect", "extract", "convert"])
def test_without_ray_it_is_one_message_and_code_2(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it now fails
    words = words_of(command, pair, tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run([*words, "--cluster", "local"]) == 2
    out, told = capsys.readouterr()
    assert out == ""
    assert told.startswith(
        "rankwise: error: --cluster needs ray, which is not installed; run: pip install 'rankwise[cluster]'\n"
    )
    assert told.count("\n") == 2, "the message, and where to read more"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["inspect", "extract", "convert"])
def test_no_cluster_is_one_message_and_code_2(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    ray = pytest.importorskip("ray", reason="ray comes with the cluster extra")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    words = words_of(command, pair, tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run([*words, "--cluster", "127.0.0.1:1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("rankwise: error: no Ray cluster answers at '127.0.0.1:1'")
    assert told.count("\n") == 2, "the message, and where to read more"
    assert sorted(tmp_path.iterdir()) == before
