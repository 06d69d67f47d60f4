"""What lint reads, by its content, and what it refuses: one message, and never a crash."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

import rankwise
from rankwise.errors import RankwiseError
from rankwise.linting import texts

AXOLOTL = "base_model: m\nadapter: {adapter}\nlora_r: 16\nlora_alpha: 16\n"


def write(tmp_path: Path, text: str | bytes, name: str = "config.yml") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ('{"peft_type": "LORA", "r": 4}', "anything.json", "peft-config"),
        ('{"r": 4, "target_modules": ["q_proj"]}', "adapter_config.json", "peft-config"),
        (AXOLOTL.format(adapter="qlora"), "a.yaml", "axolotl"),
        ("stage: sft\nmodel_name_or_path: m\nlora_rank: 8\nlora_alpha: 16\n", "b.yml", "llama-factory"),
        ('{"finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16}', "b.json", "llama-factory"),
        ("use_peft: true\nlora_r: 8\nlora_alpha: 16\n", "c.yaml", "trl"),
        (
            "#!/bin/sh\n# trl sft\nexport A=1\ntrl sft \\\n  --use_peft \\\n  --lora_r 8 --lora_alpha=16\n",
            "go.sh",
            "trl",
        ),
        ("llamafactory-cli train --finetuning_type lora --lora_rank 8 --lora_alpha 16\n", "x.sh", "llama-factory"),
    ],
)
def test_kinds_are_told_by_content(tmp_path: Path, text: str, name: str, kind: str) -> None:
    record = rankwise.lint(write(tmp_path, text, name))
    assert [s.kind for s in record.sources] == [kind]
    assert len(record.scales) == 1
    assert record.errors == 0


def test_a_command_line_is_read_as_it_is_typed() -> None:
    line = "trl sft --use_peft --lora-r 8 --lora_alpha '32' --lora_target_modules q_proj v_proj --learning_rate 2e-4"
    record = rankwise.lint(line)
    assert (record.scales[0].r, record.scales[0].lora_alpha, record.scales[0].scaling) == (8, 32.0, 4.0)
    assert record.findings == ()


def test_a_command_with_a_config_reads_both(tmp_path: Path) -> None:
    """Flags win over the file, as they do in TRL."""
    write(tmp_path, "use_peft: true\nlora_r: 8\nlora_alpha: 8\nlearning_rate: 1.0e-4\n", "sft.yml")
    script = write(tmp_path, "trl sft --config sft.yml --lora_alpha 16\n", "go.sh")
    record = rankwise.lint(script)
    assert [(s.r, s.lora_alpha) for s in record.scales] == [(8, 16.0)]
    assert record.findings == ()
    with pytest.raises(RankwiseError, match=r"--config absent\.yml, and there is no such file"):
        rankwise.lint("trl sft --config absent.yml --lora_r 8")


def test_yaml_numbers_that_yaml_reads_as_words(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-5 for a word; trainers turn it into the number that was meant."""
    record = rankwise.lint(write(tmp_path, AXOLOTL.format(adapter="lora") + "learning_rate: 2e-5\n"))
    assert [(f.code, f.value) for f in record.findings] == [("low-learning-rate", 2e-5)]


@pytest.mark.parametrize("adapter", ["llama-adapter", "null", "''"])
def test_a_config_without_lora_is_no_failure(tmp_path: Path, adapter: str) -> None:
    record = rankwise.lint(write(tmp_path, AXOLOTL.format(adapter=adapter)))
    assert [(f.code, f.level) for f in record.findings] == [("no-lora", "info")]
    assert record.scales == ()


def test_an_adapter_is_read_from_its_config_too(samples: Path) -> None:
    folder = samples / "adapters" / "law-llm"
    by_folder, by_config = rankwise.lint(folder), rankwise.lint(folder / "adapter_config.json")
    assert by_folder.sources[0].kind == by_config.sources[0].kind == "adapter"
    assert by_folder.scales[0].modules == by_config.scales[0].modules == 72


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds nothing"),
        ("- a\n- b\n", "a YAML list"),
        ("just words\n", "a YAML str"),
        ("a: [1, 2\n", "neither JSON nor YAML"),
        ("lora_r: !!python/object/apply:os.system ['true']\nadapter: lora\n", "neither JSON nor YAML"),
        ('{"r": 4', "is not JSON"),
        ("base_model: m\nmerge_method: ties\n", "no config that lint knows: its keys are base_model, merge_method"),
        ("title: a page\nlayout: default\n", "no config that lint knows: its keys are layout, title"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "no text"),
        (b"adapter: lora\x00\n", "no text"),
        (b"\xff\xfea\x00", "no text"),
        (BOMB + "adapter: lora\n", "more than 200,000 values"),
        ("adapter: lora\nx: &x [*x]\n", "leads back to itself"),
        ("x: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ('{"peft_type": "LORA", "r": "8"}', "`r` is '8'"),
        ('{"peft_type": "LORA", "r": 0}', "wanted an integer of 1 or more"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "`lora_alpha` is nan"),
        ('{"peft_type": "LORA", "rank_pattern": {"(": 4}}', "no regular expression"),
        ('{"peft_type": "IA3", "target_modules": ["k_proj"]}', "lint knows LoRA only"),
        ("base_model: m\nadapter: lora\nlora_r: many\nlora_alpha: 1\n", "`lora_r` is 'many'; wanted a number"),
        ("base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: -1\n", "`lora_alpha` is -1"),
        ("base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_rank_pattern: 4\n", "`lora_rank_pattern` is"),
        ("use_peft: maybe\nlora_r: [1]\n", "`lora_r` is a list"),
        ("trl sft --use_peft --lora_r 'eight\n", "cannot be split into words"),
        ("trl sft --use_peft\ntrl dpo --use_peft\n", "2 commands"),
    ],
)
def test_bad_input_is_one_message(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(RankwiseError) as caught:
        rankwise.lint(write(tmp_path, text))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.yml"
    with path.open("wb") as file:
        file.truncate(texts.LARGEST + 1)
    with pytest.raises(RankwiseError, match="a config has at most"):
        rankwise.lint(path)


def test_places_without_anything(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source, words in (("empty", "holds no files"), ("absent.yml", "no file or folder of that name")):
        with pytest.raises(RankwiseError, match=words):
            rankwise.lint(tmp_path / source)
    with pytest.raises(RankwiseError, match="no weights and no index"):
        rankwise.lint(write(tmp_path, '{"peft_type": "LORA"}', "adapter_config.json"), model=tmp_path / "empty")


def test_aliases_that_stay_small_are_read(tmp_path: Path) -> None:
    text = "base_model: m\nadapter: lora\nlora_r: &r 16\nlora_alpha: *r\nlora_target_modules: [q_proj]\n"
    assert rankwise.lint(write(tmp_path, text)).scales[0].scaling == 1.0


def test_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    """300 damaged configs: a record, or an error of ours."""
    source = random.Random(5)
    sound = AXOLOTL.format(adapter="lora") + 'lora_rank_pattern: {"q_proj": 8}\n' + json.dumps({"peft_type": "LORA"})
    path = tmp_path / "damaged.yml"
    kept = 0
    for _ in range(300):
        text = list(sound)
        for _ in range(source.randrange(1, 6)):
            at = source.randrange(len(text))
            text[at] = source.choice((*string.printable, "", "\x00", "é"))
        path.write_text("".join(text[: source.randrange(1, len(text))]), encoding="utf-8")
        try:
            rankwise.lint(path)
            kept += 1
        except RankwiseError:
            pass
    assert kept > 10  # or the damage was so heavy that nothing past the reader was tried


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"peft_type": "LORA", "rank_pattern": {"(a+)+b": 4}}', "may take forever .* it repeats a repeat"),
        ('{"peft_type": "LORA", "alpha_pattern": {"(\\\\w+.?)*x": 4}}', "may take forever"),
        ("adapter: lora\nlora_r: 8\nlora_alpha: 8\nlora_rank_pattern: {1: 8}\n", "the key 1 of .* is no text"),
    ],
)
def test_keys_that_cannot_be_compared(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RankwiseError, match=words):
        rankwise.lint(write(tmp_path, text))


def test_a_target_that_may_take_forever(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"model." + "a" * 60 + ".weight": "x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    path = write(tmp_path, '{"peft_type": "LORA", "target_modules": "model.(a+)+b"}')
    with pytest.raises(RankwiseError, match="may take forever"):
        rankwise.lint(path, model=folder)


def test_names_that_only_a_command_has_are_dropped_from_a_file(tmp_path: Path) -> None:
    text = "_command: 5\n_flags: 6\n_twice: 7\nuse_peft: true\nlora_r: 8\nlora_alpha: 11.5\nlearning_rate: 1.0e-4\n"
    assert [f.code for f in rankwise.lint(write(tmp_path, text)).findings] == ["integer-alpha"]
    with pytest.raises(RankwiseError, match="its keys are none"):
        rankwise.lint(write(tmp_path, "{}", "a.json"))


def test_many_keys_are_compared_in_one_pass(tmp_path: Path) -> None:
    """6,000 plain keys on 6,000 names: each with each would be 36 million comparisons a table."""
    keys = {f"layers.{i}.q_proj": 8 for i in range(6000)}
    path = write(tmp_path, json.dumps({"peft_type": "LORA", "rank_pattern": keys, "alpha_pattern": keys}))
    assert [(s.r, s.scaling) for s in rankwise.lint(path).scales] == [(8, 1.0)]
