"""Every rule on its bad and its good example, as the documentation shows them, and the figures they state."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import rankwise
from planting import planted_factors, write_adapter
from rankwise.errors import ConfigError, UsageError
from rankwise.linting.rules.patterns import _misses
from rankwise.linting.table import LINTS
from rankwise.runtimes import RUNTIMES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "lints.md"

BY_FILE = {"rank-above-shape", "target-unmatched", "untrained", "runtime-needs-config"}
"""Codes whose examples need weights; they have tests of their own below."""


@dataclass(frozen=True)
class Example:
    code: str
    bad: str
    good: str
    runtime: str


def examples() -> list[Example]:
    found = []
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        code = section.partition("\n")[0].strip()
        blocks = re.findall(r"^(Bad|Good):\n\n```\w+\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        runtime = re.search(r"<!-- lint: --for (\S+) -->", section)
        if blocks:
            by = dict(blocks)
            found.append(Example(code, by["Bad"], by["Good"], runtime[1] if runtime else ""))
    return found


EXAMPLES = examples()


def config(tmp_path: Path, **fields: object) -> Path:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", **fields}), encoding="utf-8")
    return path


def yaml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


def found(record: rankwise.LintRecord, code: str) -> list[rankwise.records.LintFinding]:
    return [f for f in record.findings if f.code == code]


def one(record: rankwise.LintRecord, code: str) -> rankwise.records.LintFinding:
    hits = found(record, code)
    assert len(hits) == 1, [f.code for f in record.findings]
    return hits[0]


def test_every_rule_has_a_section_and_every_section_a_rule() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = re.findall(r"^### (\S+)$", text, re.MULTILINE)
    assert sorted(sections) == sorted(LINTS)
    assert {e.code for e in EXAMPLES} == set(LINTS) - BY_FILE


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.code)
def test_examples_of_the_docs(example: Example, tmp_path: Path) -> None:
    for name, text in (("bad", example.bad), ("good", example.good)):
        path = tmp_path / ("adapter_config.json" if text.startswith("{") else f"{name}.yml")
        path.write_text(text, encoding="utf-8")
        record = rankwise.lint(path, runtime=example.runtime)
        assert bool(found(record, example.code)) == (name == "bad"), (name, [f.code for f in record.findings])
        if name == "good":
            assert record.errors == 0


def test_levels_of_the_docs_are_those_of_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for code, rule in LINTS.items():
        words = re.search(rf"^### {code}\n\n([^\n]*)", text, re.MULTILINE)
        assert words is not None
        assert rule.level in words[1].lower(), code


def test_a_runtime_row_of_the_docs_is_a_row_of_the_table() -> None:
    rows = re.findall(r"^\| ([a-z.\-]+) \| (\S+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    shown = {name: word for name, word in rows if name in RUNTIMES}
    assert set(shown) == set(RUNTIMES)
    for name in ("peft", "vllm", "sglang", "llama.cpp", "ollama", "tensorrt-llm"):
        assert shown[name].rstrip(":") == ("yes" if RUNTIMES[name].uses_rslora else "no")


# --- figures, against arithmetic of our own -------------------------------------------------------------------


@pytest.mark.parametrize("r", [16, 64, 256])
def test_scale_of_the_default_alpha(tmp_path: Path, r: int) -> None:
    finding = one(rankwise.lint(config(tmp_path, r=r)), "alpha-left-at-default")
    assert finding.value == 8 / r
    assert finding.key == "r"
    assert f"{8 / r:.3g}" in finding.text


def test_silent_2r_at_512_is_45(tmp_path: Path) -> None:
    text = "model_name_or_path: m\nfinetuning_type: lora\nlora_rank: 512\nuse_rslora: true\n"
    record = rankwise.lint(yaml(tmp_path, text))
    assert one(record, "silent-2r").value == pytest.approx(1024 / math.sqrt(512))
    assert one(record, "silent-2r").level == "warning"
    assert record.scales[0].lora_alpha == 1024
    assert record.scales[0].scaling == pytest.approx(45.2548, abs=1e-4)
    assert found(record, "large-scale") == []  # one finding for one cause


def test_silent_2r_without_rslora_is_only_said(tmp_path: Path) -> None:
    record = rankwise.lint(yaml(tmp_path, "model_name_or_path: m\nfinetuning_type: lora\nlora_rank: 16\n"))
    assert one(record, "silent-2r").level == "info"
    assert (record.errors, record.warnings) == (0, 0)


def test_alpha_2r_and_alpha_at_default_are_kept_apart(tmp_path: Path) -> None:
    """alpha fixed, alpha = 2 r and a low rate look alike to users: each has its own code."""
    assert found(rankwise.lint(config(tmp_path, r=256, lora_alpha=512)), "small-scale") == []
    assert one(rankwise.lint(config(tmp_path, r=256, lora_alpha=16)), "small-scale").value == 1 / 16
    for alpha, hits in ((128, 1), (192, 0), (64, 0)):
        record = rankwise.lint(config(tmp_path, r=64, lora_alpha=alpha, use_rslora=True))
        assert len(found(record, "alpha-2r-with-rslora")) == hits
    record = rankwise.lint("trl sft --use_peft --lora_r 64 --lora_alpha 128 --learning_rate 1e-5")
    assert [f.code for f in record.findings] == ["low-learning-rate"]


def test_rank_pattern_alone_states_the_spread(tmp_path: Path) -> None:
    for rslora, spread in ((False, 8.0), (True, math.sqrt(8))):
        path = config(tmp_path, r=16, lora_alpha=16, use_rslora=rslora, rank_pattern={"q_proj": 128, "k_proj": 16})
        assert one(rankwise.lint(path), "rank-pattern-alone").value == pytest.approx(spread)


def test_integer_alpha_states_the_error(tmp_path: Path) -> None:
    text = "base_model: m\nadapter: lora\nlora_r: 32\nlora_alpha: 11.3\npeft_use_rslora: true\n"
    finding = one(rankwise.lint(yaml(tmp_path, text)), "integer-alpha")
    assert finding.value == pytest.approx(11 / 11.3 - 1)
    assert finding.line == 4


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        (["q_proj", "a.q_proj"], "pattern-order"),  # sorted, "a.q_proj" comes first
        (["q_proj", "self_attn.q_proj"], "pattern-shadowed"),  # sorted, "q_proj" stays first
    ],
)
def test_what_sorting_does_to_overlapping_keys(tmp_path: Path, keys: list[str], code: str) -> None:
    path = config(tmp_path, alpha_pattern={keys[0]: 8, keys[1]: 64})
    codes = {f.code for f in rankwise.lint(path).findings}
    assert "pattern-shadowed" in codes
    assert ("pattern-order" in codes) == (code == "pattern-order")


@pytest.mark.parametrize(("r", "alpha", "off"), [(7, 14, math.sqrt(7 / 4)), (3, 6, math.sqrt(3 / 4)), (4, 8, None)])
def test_an_eva_adapter_states_how_far_its_scales_are_off(
    tmp_path: Path, r: int, alpha: int, off: float | None
) -> None:
    """What EVA left in the config: alpha times new r / r. The scales are those of lab/peft_scaling_defects.py."""
    fields = {"r": 4, "lora_alpha": 8, "use_rslora": True, "init_lora_weights": "eva"}
    path = config(tmp_path, **fields, rank_pattern={"o_proj": r}, alpha_pattern={"o_proj": alpha})
    hits = found(rankwise.lint(path), "eva-with-rslora")
    assert [h.value for h in hits] == ([] if off is None else [pytest.approx(off)])


def test_eva_without_adjusting_is_left_alone(tmp_path: Path) -> None:
    fields = {"r": 4, "lora_alpha": 8, "use_rslora": True, "init_lora_weights": "eva"}
    path = config(tmp_path, **fields, eva_config={"adjust_scaling_factors": False}, rank_pattern={"^o_proj": 8})
    assert not {f.code for f in rankwise.lint(path).findings} & {"eva-with-rslora", "eva-anchored-key"}


# --- with names: adapters and --model -------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Rank 4 on two of three projections, of two layers."""
    modules = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            modules[f"model.layers.{layer}.self_attn.{name}"] = planted_factors(rng, (8, 6), [4.0, 3.0, 2.0, 1.0])
    return write_adapter(tmp_path / "adapter", modules)


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


def test_a_sound_adapter_is_quiet(adapter: Path) -> None:
    edit(adapter, target_modules=["q_proj", "v_proj"])
    record = rankwise.lint(adapter)
    assert record.findings == ()
    assert [(s.group, s.modules, s.r) for s in record.scales] == [("q_proj, v_proj", 4, 4)]


def test_target_without_tensors(adapter: Path) -> None:
    edit(adapter, target_modules=["q_proj", "v_proj", "o_proj"])
    finding = one(rankwise.lint(adapter), "target-unmatched")
    assert "o_proj" in finding.text
    assert "q_proj" not in finding.text


def test_untrained_adapter_is_said(tmp_path: Path, rng: np.random.Generator) -> None:
    a = rng.standard_normal((4, 6))
    folder = write_adapter(tmp_path / "new", {f"l.{i}.q_proj": (a, np.zeros((8, 4))) for i in range(3)})
    finding = one(rankwise.lint(folder), "untrained")
    assert (finding.level, finding.value) == ("info", 3.0)


def test_rank_above_shape(tmp_path: Path, rng: np.random.Generator) -> None:
    factors = rng.standard_normal((6, 7)), rng.standard_normal((5, 6))  # r 6 on 5 x 7
    finding = one(rankwise.lint(write_adapter(tmp_path / "wide", {"l.0.q_proj": factors})), "rank-above-shape")
    assert (finding.value, finding.modules) == (5.0, ("l.0.q_proj",))


def test_readers_findings_come_along(adapter: Path) -> None:
    edit(adapter, r=16)
    record = rankwise.lint(adapter)
    finding = one(record, "rank-contradicts-config")
    assert finding.level == "error"
    assert finding.docs.endswith("findings.html#rank-contradicts-config")


def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    names = [f"model.layers.{i}.self_attn.{n}.weight" for i in range(2) for n in ("q_proj", "v_proj")]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_patterns_and_targets_are_tried_on_a_models_names(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 16, "proj": 64, "v_proj": 32},
        alpha_pattern={"layers.1.self_attn.q_proj": 16},
    )
    record = rankwise.lint(path, model=model(tmp_path))
    assert "rank_pattern['proj'], rank_pattern['v_proj']" in one(record, "pattern-unmatched").text
    assert "o_proj" in one(record, "target-unmatched").text
    assert {(s.modules, s.r, s.scaling) for s in record.scales} == {(1, 8, 1.0), (1, 16, 1.0)}


def test_no_target_at_all_is_an_error(tmp_path: Path) -> None:
    record = rankwise.lint(config(tmp_path, r=8, lora_alpha=8, target_modules=["c_attn"]), model=model(tmp_path))
    assert one(record, "target-unmatched").level == "error"


def test_a_target_covers_the_end_of_a_name_from_a_dot_on(tmp_path: Path) -> None:
    path = config(tmp_path, r=8, lora_alpha=8, target_modules=["q_proj", "proj"])
    record = rankwise.lint(path, model=model(tmp_path))
    assert one(record, "target-unmatched").value == 1
    assert [s.modules for s in record.scales] == [2]


def test_a_mixture_is_told_by_the_models_config(tmp_path: Path) -> None:
    fields = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "gate_proj", "up_proj"]}
    path = config(tmp_path, **fields)
    folder = model(tmp_path)
    assert found(rankwise.lint(path, model=folder), "moe-with-rslora") == []
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    assert one(rankwise.lint(path, model=folder), "moe-with-rslora").value == pytest.approx(math.sqrt(2))


def test_experts_are_told_by_the_names_of_an_adapter(tmp_path: Path, rng: np.random.Generator) -> None:
    modules = {f"m.experts.{e}.{n}": planted_factors(rng, (6, 6), [1.0]) for e in range(2) for n in ("w1", "w3")}
    modules["m.q_proj"] = planted_factors(rng, (6, 6), [1.0])
    folder = write_adapter(tmp_path / "moe", modules)
    edit(folder, use_rslora=True, lora_alpha=2)
    finding = one(rankwise.lint(folder), "moe-with-rslora")
    assert len(finding.modules) == 4


# --- runtimes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_applied_is_compared_with_the_trained_scale(adapter: Path, name: str) -> None:
    """r 4 for all by the tensors; alpha 4 for q and 8 for v, rsLoRA: each runtime by its own words."""
    edit(adapter, r=4, lora_alpha=4, use_rslora=True, alpha_pattern={"v_proj": 8}, target_modules=["q_proj", "v_proj"])
    want = {
        "peft": (2.0, 4.0),
        "vllm": (2.0, 2.0),  # 4 / sqrt(4) for all
        "sglang": (1.0, 1.0),  # 4 / 4
        "llama.cpp": (1.0, 1.0),
        "ollama": (1.0, 1.0),
        "tensorrt-llm": (2.0, 2.0),
        "comfyui": (1.0, 1.0),
        "diffusers": (1.0, 1.0),
    }[name]
    record = rankwise.lint(adapter, runtime=name)
    by_group = {s.group: (s.scaling, s.applied[name]) for s in record.scales}
    assert by_group == {"q_proj": (2.0, want[0]), "v_proj": (4.0, want[1])}
    wrong = [q / t for q, t in zip(want, (2.0, 4.0), strict=True) if q != t]
    hits = found(record, "runtime-scale")
    assert [h.value for h in hits] == ([min(wrong)] if wrong else [])


def test_ranks_of_a_plan_in_vllm_and_llama_cpp(tmp_path: Path) -> None:
    """alpha_m = r_m is right in vLLM, which has one ratio, and wrong in llama.cpp, which has one alpha."""
    fields = {"rank_pattern": {"q_proj": 32}, "alpha_pattern": {"q_proj": 32}}
    record = rankwise.lint(config(tmp_path, r=8, lora_alpha=8, **fields), runtime=["vllm", "llama.cpp"])
    hits = found(record, "runtime-scale")
    assert [(h.runtime, h.value) for h in hits] == [("llama.cpp", 0.25)]


@pytest.mark.parametrize(
    ("r", "level", "value"), [(16, None, None), (17, "warning", 32), (300, "warning", 320), (600, "error", 600)]
)
def test_cap_of_vllm(tmp_path: Path, r: int, level: str | None, value: int | None) -> None:
    hits = found(rankwise.lint(config(tmp_path, r=r, lora_alpha=r), runtime="vllm"), "runtime-rank-cap")
    assert [(h.level, h.value) for h in hits] == ([] if level is None else [(level, float(value or 0))])


def test_a_file_without_config_is_told_to_a_runtime_that_reads_one(samples: Path) -> None:
    folder = samples / "adapters" / "cloneofsimo-lora_disney"
    assert one(rankwise.lint(folder, runtime="vllm"), "runtime-needs-config").level == "error"
    record = rankwise.lint(folder, runtime="comfyui")
    assert "does not know the names" in one(record, "runtime-needs-config").text
    assert {s.applied["comfyui"] for s in record.scales} == {None}


# --- arguments ------------------------------------------------------------------------------------------------


def test_several_sources_and_ignored_codes(tmp_path: Path) -> None:
    path = config(tmp_path, r=64)
    record = rankwise.lint([path, "trl sft --use_peft --learning_rate 1e-4"], ignore="alpha-left-at-default")
    assert [s.kind for s in record.sources] == ["peft-config", "trl"]
    assert record.findings == ()
    assert record.ignored == ("alpha-left-at-default",)
    assert rankwise.LintRecord.from_json(record.to_json()) == record


def test_slips_are_refused(tmp_path: Path) -> None:
    path = config(tmp_path)
    with pytest.raises(UsageError, match="did you mean gaussian-init"):
        rankwise.lint(path, ignore="gausian-init")
    with pytest.raises(UsageError, match=r"no runtime is called 'vlm'; known are: .*vllm"):
        rankwise.lint(path, runtime="vlm")
    with pytest.raises(UsageError, match="nothing to lint"):
        rankwise.lint([])


@pytest.mark.parametrize(("stored", "applied"), [("tensor", 0.5), ("header", 1.0), ("nowhere", 1.0)])
def test_a_file_without_config_in_comfyui(
    tmp_path: Path, rng: np.random.Generator, stored: str, applied: float
) -> None:
    """alpha 2 at rank 4: ComfyUI divides where alpha is a tensor, and takes 1 where it is not."""
    down, up = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((8, 4)).astype(np.float32)
    if stored == "header":  # diffusers' layout, the one whose header is read
        tensors = {"unet.mid.to_q.lora_A.weight": down, "unet.mid.to_q.lora_B.weight": up}
    else:
        tensors = {"lora_unet_mid_to_q.lora_down.weight": down, "lora_unet_mid_to_q.lora_up.weight": up}
    if stored == "tensor":
        tensors["lora_unet_mid_to_q.alpha"] = np.array(2.0, dtype=np.float32)
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, metadata={"network_alpha": "2"} if stored == "header" else None)
    record = rankwise.lint(path, runtime="comfyui")
    assert [s.applied["comfyui"] for s in record.scales] == [applied]
    trained = 0.5 if stored != "nowhere" else 1.0
    assert [s.scaling for s in record.scales] == [trained]
    assert [f.value for f in found(record, "runtime-scale")] == ([applied / trained] if applied != trained else [])


# --- what a reading with fresh eyes found ----------------------------------------------------------------------


def test_a_mixture_by_its_name_alone_is_an_info_and_a_dense_w1_w3_nothing(tmp_path: Path) -> None:
    """InternLM2's dense layers are called w1 and w3, too."""
    fields = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["w1", "w2", "w3"]}
    assert found(rankwise.lint(config(tmp_path, **fields)), "moe-with-rslora") == []
    named = config(tmp_path, **fields, base_model_name_or_path="mistralai/Mixtral-8x7B-v0.1")
    assert one(rankwise.lint(named), "moe-with-rslora").level == "info"


@pytest.mark.parametrize(
    ("key", "idle"),
    [
        ("proj", True),
        ("layers.0", True),
        ("x.up", True),
        ("^model\\.layers\\.0\\.v_proj", True),
        ("q_proj", False),
        ("layers.0.q_proj", False),
        ("^model\\.layers\\.0\\.q_proj", False),
        ("q.proj", False),
        (".*up", False),
    ],
)
def test_a_key_that_no_listed_target_can_meet(tmp_path: Path, key: str, idle: bool) -> None:
    """Without a model: `q.proj` may match q_proj by its dot, and `.*up` is a true expression."""
    path = config(tmp_path, target_modules=["q_proj", "mlp.up"], rank_pattern={key: 8}, alpha_pattern={key: 8})
    assert [f.level for f in found(rankwise.lint(path), "pattern-unmatched")] == (["error"] if idle else [])


def test_a_key_is_said_to_miss_only_where_it_does() -> None:
    """Against every name of up to three parts: what is called idle matches none that a target names."""
    rng, parts = random.Random(0), ["a", "b", "q_p", "a_b", "p"]
    names = [".".join(words) for n in (1, 2, 3) for words in itertools.product(parts, repeat=n)]
    said = 0
    for _ in range(1500):
        key = rng.choice(["", "^"]) + rng.choice([".", "\\."]).join(rng.choices(parts, k=rng.randint(1, 3)))
        targets = tuple(".".join(rng.choices(parts, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 2)))
        if _misses(key, targets):
            said += 1
            hit = [n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)]
            assert not [n for n in hit if re.match(rf"(.*\.)?({key})$", n)], (key, targets)
    assert said > 300


def test_rank_pattern_over_all_targets_still_changes_the_scale(tmp_path: Path) -> None:
    fields = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 64}}
    finding = one(rankwise.lint(config(tmp_path, **fields), model=model(tmp_path)), "rank-pattern-alone")
    assert finding.value == 4.0
    assert "alpha = r under" in finding.text


@pytest.mark.parametrize(
    ("fields", "words", "not_words"),
    [
        ({"init_lora_weights": "pissa"}, "doubles the rank", "refuses"),
        ({"init_lora_weights": "loftq"}, "is another model.", "converted"),
        (
            {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q": 4}},
            "PEFT refuses to convert it",
            "doubles",
        ),
    ],
)
def test_what_becomes_of_a_changed_base(tmp_path: Path, fields: dict[str, object], words: str, not_words: str) -> None:
    """PEFT 0.21.2 converts PiSSA, CorDA, OLoRA and LoRA-GA, and refuses rsLoRA and patterns together."""
    text = one(rankwise.lint(config(tmp_path, **fields)), "init-changes-base").text
    assert words in text
    assert not_words not in text


def test_a_yaml_of_trl_passes_a_fraction_on(tmp_path: Path) -> None:
    """TRL 1.16 converts the words of a command line and leaves the values of a YAML as they are."""
    text = "use_peft: true\nlora_r: 32\nlora_alpha: 11.3\nlearning_rate: 1.0e-4\n"
    assert one(rankwise.lint(yaml(tmp_path, text)), "integer-alpha").level == "info"
    line = "trl sft --use_peft --lora_r 32 --lora_alpha 11.3 --learning_rate 1e-4"
    assert one(rankwise.lint(line), "integer-alpha").level == "error"


def test_alpha_0_is_a_default_for_llama_factory_alone(tmp_path: Path) -> None:
    text = one(rankwise.lint(yaml(tmp_path, "stage: sft\nlora_rank: 8\nlora_alpha: 0\n")), "silent-2r").text
    assert "`lora_alpha` is 0," in text
    with pytest.raises(ConfigError, match="`lora_alpha` is 0"):
        rankwise.lint(yaml(tmp_path, "adapter: lora\nlora_r: 8\nlora_alpha: 0\n"))
    with pytest.raises(ConfigError, match="`lora_alpha` is 0"):
        rankwise.lint("trl sft --use_peft --lora_alpha 0")


@pytest.mark.parametrize("word", ["1", "yes", "True", "t"])
def test_switches_of_a_command_line(word: str) -> None:
    record = rankwise.lint(f"trl sft --use_peft {word} --lora_r 16 --use_rslora {word} --learning_rate 1e-4")
    assert [s.scaling for s in record.scales] == [32 / 4]


def test_no_word_of_python_in_a_message(tmp_path: Path) -> None:
    text = one(rankwise.lint(yaml(tmp_path, "base_model: m\nmicro_batch_size: 2\n")), "no-lora").text
    assert text.startswith("`adapter` is not set")


@pytest.mark.parametrize("text", ['{"peft_type": "LORA", "r": 8, "r": 64}', "adapter: lora\nlora_r: 8\nlora_r: 64\n"])
def test_a_key_that_stands_twice(tmp_path: Path, text: str) -> None:
    finding = one(rankwise.lint(yaml(tmp_path, text)), "key-given-twice")
    assert finding.key in ("r", "lora_r")


def test_config_and_tensors_that_disagree_have_no_trained_scale(adapter: Path) -> None:
    """What was trained with is not known, and PEFT refuses it: no runtime is told to be wrong or right."""
    edit(adapter, r=5)
    record = rankwise.lint(adapter, runtime=["peft", "sglang", "tensorrt-llm"])
    assert found(record, "rank-contradicts-config")
    assert found(record, "runtime-scale") == []
    assert {s.applied["peft"] for s in record.scales} == {None}


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"use_dora": True}])
def test_convert_is_named_only_where_it_converts(adapter: Path, fields: dict[str, object]) -> None:
    edit(adapter, use_rslora=True, **fields)
    assert "rankwise convert" not in one(rankwise.lint(adapter, runtime="llama.cpp"), "runtime-scale").text


def test_a_copy_that_is_older_is_said(adapter: Path) -> None:
    edit(adapter, use_rslora=True)
    assert "not confirmed" in one(rankwise.lint(adapter, runtime="sglang"), "runtime-scale").text


@pytest.mark.parametrize("rslora", [False, True])
def test_the_config_in_a_diffusers_header(tmp_path: Path, rng: np.random.Generator, rslora: bool) -> None:
    """diffusers reads it, with its rule; ComfyUI sees tensors alone, and takes 1."""
    down, up = rng.standard_normal((4, 6)).astype(np.float32), rng.standard_normal((8, 4)).astype(np.float32)
    tensors = {"unet.mid.to_q.lora_A.weight": down, "unet.mid.to_q.lora_B.weight": up}
    head = {"unet.r": 4, "unet.lora_alpha": 2, "unet.use_rslora": rslora, "unet.target_modules": ["to_q"]}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(head)})
    record = rankwise.lint(path, runtime=["comfyui", "diffusers"])
    trained = 1.0 if rslora else 0.5
    assert [(s.scaling, s.applied) for s in record.scales] == [(trained, {"comfyui": 1.0, "diffusers": trained})]
    assert {f.runtime for f in found(record, "runtime-scale")} == (set() if rslora else {"comfyui"})
