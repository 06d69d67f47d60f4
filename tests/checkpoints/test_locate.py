"""From what a user types to what is opened: local paths, choices within a folder, and refusals in words."""

import json
import os
from pathlib import Path

import pytest

from checkpoints.making import MAKERS, checkpoint, normal, peft, raw_file, write_shards
from rankwise.checkpoints import open_source
from rankwise.checkpoints.locate import everywhere, identity
from rankwise.errors import (
    AccessError,
    MalformedFileError,
    RankwiseError,
    SourceNotFoundError,
    UnknownFormatError,
)


def test_folder_file_path_object_and_file_url(tmp_path, rng):
    made = checkpoint(tmp_path, rng)
    for source in (made.source, str(made.source), made.weights, f"file://{made.weights}", f"{made.source}/"):
        with open_source(source) as opened:
            assert opened.config == {"model_type": "tiny"}
            assert opened.source == os.fspath(source)


def test_relative_paths_and_a_local_path_that_looks_like_a_hub_id(tmp_path, rng, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    checkpoint(tmp_path / "org" / "name", rng)
    monkeypatch.chdir(tmp_path)
    for source in ("org/name", "./org/name", Path("org/name"), "org/name/model.safetensors"):
        open_source(source).close()
    monkeypatch.chdir(tmp_path / "org" / "name")
    open_source(".").close()
    open_source("model.safetensors").close()


@pytest.mark.parametrize("form", sorted(MAKERS))
@pytest.mark.parametrize("name", ["renamed.safetensors", "model.safetensors", "adapter_model.safetensors"])
def test_the_kind_is_told_from_the_content_not_from_the_name(form, name, tmp_path, rng):
    made = MAKERS[form](tmp_path, rng)
    made.weights.rename(tmp_path / name)
    if form == "checkpoint" and name.startswith("adapter"):
        with pytest.raises(UnknownFormatError, match="none is a LoRA factor"):
            open_source(tmp_path / name)
        return
    with open_source(tmp_path / name) as opened:
        assert getattr(opened, "format", "checkpoint") == form


def test_a_folder_with_both_kinds_wants_a_choice(tmp_path, rng):
    checkpoint(tmp_path, rng)
    peft(tmp_path, rng)
    with pytest.raises(UnknownFormatError, match=r"adapter_model\.safetensors.*model\.safetensors.*give the path"):
        open_source(tmp_path)
    with open_source(tmp_path, want="adapter") as adapter:
        assert adapter.format == "peft"
    with open_source(tmp_path, want="checkpoint") as opened:
        assert len(opened.names()) == 7
    open_source(tmp_path / "model.safetensors").close()


def test_merged_model_beside_a_left_over_adapter_config(tmp_path, rng):
    checkpoint(tmp_path, rng)
    (tmp_path / "adapter_config.json").write_text("not even JSON")
    open_source(tmp_path).close()


def test_two_loose_files_want_a_choice_and_one_does_not(tmp_path, rng):
    made = checkpoint(tmp_path, rng)
    made.weights.rename(tmp_path / "base.safetensors")
    open_source(tmp_path).close()
    (tmp_path / "tuned.safetensors").write_bytes((tmp_path / "base.safetensors").read_bytes())
    with pytest.raises(UnknownFormatError, match=r"2 weight files \(base.*tuned.*give the path"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("adapter_config.json", "its weights"),
        ("model_index.json", "diffusers pipeline"),
        ("model-q4.gguf", "GGUF"),
        ("notes.txt", r"it holds notes\.txt"),
    ],
)
def test_folders_without_weights_say_what_they_hold(file, hint, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(UnknownFormatError, match=hint):
        open_source(tmp_path)


def test_empty_folder(tmp_path):
    with pytest.raises(UnknownFormatError, match="holds no files"):
        open_source(tmp_path)


def test_training_state_is_not_taken_for_weights(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(UnknownFormatError):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "source", ["", " ", "no-such-file", "./no/such", "/no/such/folder", "a/b/c", "x" * 5000, "nul\0"]
)
def test_nothing_there(source):
    with pytest.raises(SourceNotFoundError):
        open_source(source)


@pytest.mark.parametrize("source", ["nosuch://bucket/x", "hf://", "hf://only-one-part", "hf://a b/c"])
def test_urls_that_lead_nowhere(source):
    with pytest.raises(SourceNotFoundError):
        open_source(source)


def test_a_config_is_no_weight_file(tmp_path, rng):
    peft(tmp_path, rng)
    with pytest.raises(UnknownFormatError, match="give its folder"):
        open_source(tmp_path / "adapter_config.json")


def test_broken_link_fifo_and_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(SourceNotFoundError, match=r"model\.safetensors"):
            open_source(source)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(RankwiseError):
            open_source(source)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AccessError, match="not a regular file"):
        open_source(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UnknownFormatError):
        open_source(tmp_path / "folder.safetensors")


def test_no_permission(tmp_path, rng, monkeypatch):
    """As root nothing is forbidden, so the refusal of the system is played."""
    made = checkpoint(tmp_path, rng)
    real = Path.open

    def refuse(self, *args, **kwargs):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AccessError, match=r"model\.safetensors may not be read: Permission denied"):
        open_source(made.source)


def test_file_in_an_unlisted_folder(tmp_path, rng, monkeypatch):
    """A folder with x but without r: its files can be read by name."""
    made = checkpoint(tmp_path, rng)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    open_source(made.weights).close()
    with pytest.raises(AccessError):
        open_source(made.source)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0", "GGUF"),
        (b"PK\x03\x04" + b"\0" * 30, "torch.save"),
        (b"\x80\x02}q\0.........", "pickle"),
    ],
)
def test_other_things_under_the_name_of_weights(content, word, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(MalformedFileError, match=word):
        open_source(tmp_path)


def test_names_that_no_terminal_prints(tmp_path):
    name = os.fsdecode(b"bad\xff.safetensors")
    (tmp_path / name).write_bytes(raw_file(b"{"))
    with pytest.raises(MalformedFileError) as caught:
        open_source(tmp_path / name)
    str(caught.value).encode()


def test_a_config_json_that_is_broken_is_named(tmp_path, rng):
    made = checkpoint(tmp_path, rng)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RankwiseError, match=r"config\.json is not JSON"):
        open_source(made.source)
    (tmp_path / "config.json").write_text(json.dumps({"time_step_limit": [0.0, float("inf")]}))
    open_source(made.source).close()


def test_a_local_path_is_sent_to_other_machines_whole(tmp_path, rng, monkeypatch):
    made = MAKERS["peft"](tmp_path, rng)
    monkeypatch.chdir(tmp_path.parent)
    assert everywhere(tmp_path.name) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert everywhere(f"~/{tmp_path.name}/{made.weights.name}") == str(made.weights)


@pytest.mark.parametrize("by", ["folder", "file"])
def test_another_date_or_size_of_any_file_is_another_source(tmp_path, rng, by):
    made = MAKERS["peft"](tmp_path, rng)
    source = str(tmp_path if by == "folder" else made.weights)
    before = identity(source)
    assert identity(source) == before
    (tmp_path / "README.md").write_text("no weights")
    assert identity(source) == before
    seen = [before]
    for file in (made.weights, tmp_path / "adapter_config.json"):  # the config holds alpha
        os.utime(file, ns=(1, 1))
        seen.append(identity(source))
    assert all(one not in seen[:i] for i, one in enumerate(seen))


def test_a_shard_that_is_replaced_is_another_source_by_its_index_too(tmp_path, rng):
    index = write_shards(tmp_path, [{"a": normal(rng, 2)}, {"b": normal(rng, 2)}])
    before = identity(str(index))
    os.utime(tmp_path / "model-00002-of-00002.safetensors", ns=(1, 1))
    assert identity(str(index)) != before
