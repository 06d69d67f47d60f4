"""MODEL: what is loaded, what is refused and in which words, and the layers that take an adapter."""

import copy
import importlib
import json
import logging
import pickle
import re
import shutil

import pytest

from rankwise.errors import (
    AccessError,
    ConfigError,
    DeviceError,
    IncompleteModelError,
    MalformedFileError,
    MissingDependencyError,
    NotCausalError,
    QuantisedModelError,
    RankwiseError,
    RemoteCodeError,
    SourceNotFoundError,
    TargetModulesError,
    TokenizerError,
    UnknownFormatError,
    UnsafeFileError,
    UsageError,
    WrongKindError,
)
from rankwise.tuning.models import load_model
from rankwise.tuning.targets import matching_modules, target_modules

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tokenizers = pytest.importorskip("tokenizers")

from safetensors.torch import load_file, save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def small(config="LlamaConfig", model="LlamaForCausalLM", **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**(SMALL | more)))


def small_tokenizer(**more):
    vocabulary = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))} | {"</s>": 256}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **({"eos_token": "</s>"} | more))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a small Llama and a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "whole"
    small().save_pretrained(path)
    small_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(whole, tmp_path / "model")


def edit_config(folder, drop=(), **more):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | more
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return folder


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(model, kind=RankwiseError, **options):
    with pytest.raises(kind) as caught:
        load_model(model, device="cpu", **options)
    assert len(str(caught.value)) < 700
    return str(caught.value)


# --- what is loaded


def test_a_folder_is_loaded_in_float32_and_quietly(folder, capfd):
    edit_config(folder, dtype="bfloat16")
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    loaded = load_model(folder, device="cpu")
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == (level, bars)
    assert capfd.readouterr() == ("", "")
    assert loaded.name == str(folder)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert (loaded.model.dtype, loaded.model.device.type) == (torch.float32, "cpu")
    assert loaded.parameters == sum(p.numel() for p in small().parameters())
    assert loaded.context == 64
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.eos_token_id) == ("</s>", 256)
    assert loaded.model.get_input_embeddings().weight.shape[0] == 260
    for name, weight in small().named_parameters():
        assert torch.equal(weight, loaded.model.get_parameter(name)), name


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_another_dtype_is_taken(whole, dtype):
    assert load_model(whole, dtype=dtype, device="cpu").model.dtype == torch.bfloat16
    assert "dtype 'int8' is not one to train in" in refusal(whole, UsageError, dtype="int8")


def test_the_default_device_is_the_one_that_is_there(whole):
    assert load_model(whole).model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(DeviceError, match="device 'cuda:99' is not there"):
        load_model(whole, device="cuda:99")


def test_gpt2_tied_heads_shards_and_pickles_are_loaded(folder, tmp_path):
    tied = tmp_path / "tied"
    small(tie_word_embeddings=True).save_pretrained(tied, max_shard_size="8KB")
    assert (tied / "model.safetensors.index.json").exists()
    loaded = load_model(tied, tokenizer=folder, device="cpu")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.parameters == sum(p.numel() for p in loaded.model.parameters())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_model(folder, device="cpu").context == 64


def test_a_pad_token_that_is_there_stays(folder):
    small_tokenizer(pad_token="Ġ").save_pretrained(folder)
    assert load_model(folder, device="cpu").tokenizer.pad_token == "Ġ"


def test_a_live_tokenizer_is_taken_and_left_as_it_is(whole):
    given = small_tokenizer()
    loaded = load_model(whole, tokenizer=given, device="cpu")
    assert (given.pad_token, loaded.tokenizer.pad_token) == (None, "</s>")
    padded = small_tokenizer(pad_token="</s>")
    assert load_model(whole, tokenizer=padded, device="cpu").tokenizer is padded
    assert "tokenizer is of the type int" in refusal(whole, UsageError, tokenizer=7)
    assert "'none' is not there" in refusal(whole, SourceNotFoundError, tokenizer="none")


def test_a_live_model_is_taken_as_it_is(whole):
    model = small()
    loaded = load_model(model, tokenizer=small_tokenizer())
    assert loaded.model is model
    assert loaded.name == "LlamaForCausalLM"
    named = transformers.AutoModelForCausalLM.from_pretrained(whole)
    found = load_model(named, device="cpu")
    assert (found.name, found.tokenizer.eos_token) == (str(whole), "</s>")
    assert load_model(named, dtype="float32").model.dtype == torch.float32
    assert "convert a live one yourself" in refusal(named, UsageError, dtype="bfloat16")


def test_the_tiny_model_is_loaded_by_its_name(whole, monkeypatch):
    tiny = importlib.import_module("rankwise.tuning.tiny")
    monkeypatch.setattr(tiny, "folder", lambda: whole)
    assert load_model("rankwise:tiny", device="cpu").name == "rankwise:tiny"
    assert "'rankwise:big' is no model that ships with rankwise" in refusal("rankwise:big", UsageError)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; returns a function that puts a folder into it."""
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(repo, folder, revision="main"):
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder, root / "snapshots" / COMMIT)
        (root / "refs").mkdir()
        (root / "refs" / revision).write_text(COMMIT)
        return root / "snapshots" / COMMIT

    return add


def test_a_model_in_the_hubs_cache_is_loaded_offline(cache, whole, tmp_path, monkeypatch):
    cache("org/name", whole)
    for spelled in ("org/name", "org/name@main", f"org/name@{COMMIT}", "hf://org/name"):
        assert load_model(spelled, device="cpu").name == spelled
    assert "hf download org/name" in refusal("org/name@v2", SourceNotFoundError)
    (tmp_path / "org" / "name").mkdir(parents=True)  # a local path wins
    monkeypatch.chdir(tmp_path)
    assert "has no config.json" in refusal("org/name", UnknownFormatError)


def test_broken_models_in_the_hubs_cache_are_refused(cache, folder):
    assert "hf download org/none" in refusal("org/none", SourceNotFoundError)
    at = cache("org/name", folder)
    for file in at.glob("tokenizer*"):
        file.unlink()
    assert "org/name has no tokenizer" in refusal("org/name", TokenizerError)
    (at / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    assert "model.safetensors" in refusal("org/name", MalformedFileError, tokenizer=folder)
    (at / "model.safetensors").unlink()
    assert "the weights of org/name cannot be fetched" in refusal("org/name", AccessError, tokenizer=folder)
    (at / "config.json").unlink()
    (at / "adapter_config.json").write_text("{}")
    assert "holds a PEFT adapter" in refusal("org/name", WrongKindError)


def test_answers_of_the_hub_become_errors_of_ours(monkeypatch):
    hub = importlib.import_module("huggingface_hub")
    httpx = pytest.importorskip(hub.errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answer = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
    failures = {
        hub.errors.GatedRepoError("gated", response=answer): (AccessError, "it is gated: ask for access"),
        hub.errors.RepositoryNotFoundError("none", response=answer): (SourceNotFoundError, "no such model or revision"),
        hub.errors.RevisionNotFoundError("none", response=answer): (SourceNotFoundError, "no such model or revision"),
        hub.errors.RemoteEntryNotFoundError("none", response=answer): (UnknownFormatError, "has no config.json"),
        ConnectionError("timed out"): (AccessError, "cannot be read (ConnectionError): timed out"),
    }
    for failure, (kind, words) in failures.items():

        def fail(*args, failure=failure, **options):
            raise failure

        monkeypatch.setattr(hub, "hf_hub_download", fail)
        assert words in refusal("org/name", kind)


# --- refusals


def test_names_that_are_no_model(tmp_path):
    assert "the name of the model is empty" in refusal(" ", SourceNotFoundError)
    assert "'nope' is not there: no folder of that name" in refusal("nope", SourceNotFoundError)
    assert "Copy it here first" in refusal("s3://bucket/model", UsageError)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file; a MODEL is the folder" in refusal(tmp_path / "model.safetensors", UsageError)
    assert "has no config.json, so it is no model of transformers; found: model.safetensors." in refusal(
        tmp_path, UnknownFormatError
    )


GPTQ = {"quant_method": "gptq", "bits": 4}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"drop": ["model_type"]}, ConfigError, "config.json has no model_type"),
        ({"model_type": "weird"}, UnknownFormatError, "has the model_type 'weird', which transformers"),
        ({"model_type": "weird", "auto_map": {"AutoConfig": "a.B"}}, RemoteCodeError, "brings its own code for its"),
        ({"hidden_size": "many"}, ConfigError, "cannot be read as a llama config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, NotCausalError, "is LlamaForSequenceClassification."),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, NotCausalError, "is BertForMaskedLM. Wanted"),
        ({"model_type": "bert", "drop": ["architectures"]}, NotCausalError, "is the model_type 'bert'. Wanted"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, NotCausalError, "is T5ForCond"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, NotCausalError, "is ViTForImage"),
        ({"model_type": "t5", "architectures": ["XForCausalLM"], "auto_map": {"a": "b"}}, RemoteCodeError, "own code"),
        ({"hidden_size": 32}, IncompleteModelError, "in the weights, and the config asks for"),
        ({"num_hidden_layers": 3}, IncompleteModelError, "(and 5 more). They would be random numbers."),
        ({"quantization_config": GPTQ}, QuantisedModelError, "is quantised: "),
        ({"quantization_config": BITSANDBYTES}, QuantisedModelError, "pip install -U bitsandbytes"),
    ],
)
def test_configs_that_are_refused(folder, change, kind, words):
    assert words in refusal(edit_config(folder, **change), kind)


def test_code_beside_a_known_architecture_is_not_run(folder):
    (folder / "own.py").write_text("raise SystemExit('ran')")
    edit_config(folder, auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    assert type(load_model(folder, device="cpu").model).__module__.startswith("transformers.")


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(folder, ConfigError)


@pytest.mark.parametrize("both", [False, True])
def test_an_adapter_is_told_from_a_base(folder, both):
    base = {} if both else {"base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    if not both:
        (folder / "config.json").unlink()
    words = refusal(folder, WrongKindError)
    assert "holds a PEFT adapter (adapter_config.json); wanted the base" in words
    assert ("('org/base')" in words) is not both


def drop(*names):
    return lambda weights: [weights.pop(name) for name in names]


def rename(weights):
    for name in list(weights):
        weights[f"x.{name}"] = weights.pop(name)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(Q_PROJ), f"weights that the config asks for are not there: {Q_PROJ}. They would be random numbers."),
        (drop("lm_head.weight"), "not there: lm_head.weight. They would be random numbers. Download it again"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}),
            "model.norm.weight has shape (3,) in the weights, and the config asks for (16,). Config and weights are",
        ),
        (rename, "not there: lm_head.weight, model.embed_tokens.weight, "),
        (rename, "The weights have 21 that it does not ask for, such as x.lm_head.weight."),
    ],
)
def test_holes_in_the_weights_are_refused(folder, change, words):
    assert words in refusal(edit_weights(folder, change), IncompleteModelError)


def test_broken_weight_files_are_refused(folder, tmp_path):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert "model.safetensors" in refusal(folder, MalformedFileError)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(folder, MalformedFileError)
    path.unlink()
    assert "has a config.json and no weights; wanted model.safetensors" in refusal(folder, IncompleteModelError)
    (folder / "pytorch_model.bin").write_bytes(b"no zip")
    refusal(folder, MalformedFileError)
    sharded = tmp_path / "sharded"
    small().save_pretrained(sharded, max_shard_size="8KB")
    next(sharded.glob("model-00002-*")).unlink()
    assert "model-00002-of-" in refusal(sharded, tokenizer=folder)


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_pickles_with_code_are_refused_and_not_run(folder, capfd):
    (folder / "model.safetensors").unlink()
    torch.save({"a": Harmful()}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(folder, UnsafeFileError)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    refusal(folder)
    assert "ran" not in capfd.readouterr().out


def test_tokenizers_that_do_not_fit_are_refused(folder):
    small_tokenizer(additional_special_tokens=[f"<{i}>" for i in range(9)]).save_pretrained(folder)
    assert "has tokens up to number 265, and the model has 260 embeddings" in refusal(folder, TokenizerError)
    small_tokenizer(eos_token=None).save_pretrained(folder)
    assert "has no end-of-sequence token" in refusal(folder, TokenizerError)
    (folder / "tokenizer.json").write_text("{")
    assert "the tokenizer of " in refusal(folder, TokenizerError)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer. Save the one of the model there" in refusal(folder, TokenizerError)


def test_no_empty_tokenizer_is_made_up(tmp_path):
    """transformers makes an empty one for some types, such as GPT-2's."""
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2))
    gpt2.save_pretrained(tmp_path)
    assert "has no tokenizer" in refusal(tmp_path, TokenizerError)


def test_live_objects_that_are_no_base_are_refused():
    assert "does not say where it was loaded from" in refusal(small(), UsageError)
    wrapped = torch.nn.DataParallel(small())
    assert "model is of the type DataParallel; wanted a folder" in refusal(wrapped, UsageError)
    assert "Unwrap it first." in refusal(wrapped, UsageError)
    assert "model is of the type int; wanted" in refusal(7, UsageError)
    bert = small("BertConfig", "BertForMaskedLM")
    assert "the live model is no causal language model: its architecture is BertForMaskedLM" in refusal(
        bert, NotCausalError
    )
    adapted = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["q_proj"]))
    assert "carries an adapter already" in refusal(adapted, WrongKindError, tokenizer=small_tokenizer())
    moved = small()
    moved.config._name_or_path = moved.name_or_path = "org/gone"
    assert "says that it was loaded from 'org/gone', and no tokenizer" in refusal(moved, TokenizerError)


def test_missing_packages_name_the_extra(whole, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        MissingDependencyError, match=r"loading a model needs transformers.*pip install 'rankwise\[train\]'"
    ):
        load_model(whole)


def test_the_quiet_is_over_after_a_refusal(folder):
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    refusal(edit_config(folder, num_hidden_layers=3), IncompleteModelError)
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == (level, bars)
    transformers.logging.disable_progress_bar()
    try:
        refusal(folder, IncompleteModelError)
        assert not transformers.logging.is_progress_bar_enabled()
    finally:
        if bars:
            transformers.logging.enable_progress_bar()
    assert logging.getLogger("transformers").level == level


# --- layers that take an adapter

gpt2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
moe = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", gpt2),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", moe),
    "qwen3_moe mixed": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", moe | {"decoder_sparse_step": 2}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
}


@pytest.fixture(scope="module")
def models():
    return {name: small(config, model, **more) for name, (config, model, more) in MODELS.items()}


def wrapped(model, wanted):
    """Return what PEFT itself adapts."""
    conv1d = "GPT2" in type(model).__name__
    config = peft.LoraConfig(target_modules=wanted, task_type="CAUSAL_LM", fan_in_fan_out=conv1d, r=2)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    names = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return tuple(name.removeprefix("base_model.model.") for name in names)


@pytest.mark.interop
@pytest.mark.parametrize("name", MODELS)
def test_the_names_are_those_that_peft_wraps(name, models):
    found = target_modules(models[name])
    assert found
    assert wrapped(models[name], list(found)) == found
    if "moe" not in name and name != "mixtral":
        assert wrapped(models[name], "all-linear") == found
    for spelled in ("all-linear", "All-Linear", ["all-linear"]):
        assert matching_modules(models[name], spelled) == found


def test_stacked_experts_are_no_layers(models):
    """PEFT takes the names of their projections for the stack, also where a dense layer has them."""
    leaves = {name.rsplit(".", 1)[-1] for name in target_modules(models["qwen3_moe mixed"])}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(
        TargetModulesError, match=r"'down_proj' matches model\.layers\.0\.mlp\.down_proj, and in a model of"
    ):
        matching_modules(models["qwen3_moe mixed"], ["q_proj", "down_proj"])
    with pytest.raises(
        TargetModulesError, match=r"no layer is named 'w1'.* Linear layers are: q_proj, k_proj, v_proj, o_pr"
    ):
        matching_modules(models["mixtral"], ["w1"])


@pytest.mark.interop
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["mlp.down_proj"]),
        ("llama", ["model.layers.1.self_attn.q_proj"]),
        ("llama", ["1.self_attn.q_proj", "embed_tokens"]),
        ("llama", r".*\.[qk]_proj"),
        ("llama", r"model\.layers\.0\..*(up|gate)_proj"),
        ("gpt2", ["c_attn"]),
        ("gpt2", ["c_proj", "c_fc"]),
        ("qwen2", ["q_proj", "k_proj"]),
        ("neox", ["query_key_value"]),
        ("qwen3_moe", ["q_proj"]),
    ],
)
def test_what_matches_is_what_peft_wraps(name, wanted, models):
    found = matching_modules(models[name], wanted)
    assert found
    assert wrapped(models[name], list(wanted) if isinstance(wanted, list) else wanted) == found


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["q_proj", "v_prj"], "no layer is named 'v_prj', so it would be passed over. Did you mean 'v_proj'?"),
        (["c_attn"], "Linear layers are: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."),
        (["proj"], "no layer is named 'proj'"),
        (["self_attn"], "'self_attn' matches model.layers.0.self_attn, a LlamaAttention, which takes no adapter."),
        (["norm"], "'norm' matches model.norm, a LlamaRMSNorm"),
        (["q_proj", "lm_head"], "'lm_head' matches lm_head, the output embedding, which takes no adapter"),
        (
            "q_proj",
            "the regular expression 'q_proj' matches no layer; it has to match a full name such as model.layers.0",
        ),
        ("q_proj", "For layers whose name ends in it, give a list: ['q_proj']."),
        (r".*\.query", "matches no layer"),
        (r".*(", "is no regular expression: missing )"),
        (r".*_proj|lm_head", "matches lm_head, the output embedding"),
        (r"model\.layers.*", "matches model.layers, a ModuleList, which takes no adapter"),
        ([], "target modules are []; wanted names of layers, or all-linear"),
        (["q_proj", ""], "target modules are ['q_proj', '']"),
        (["q_proj", 3], "target modules are ['q_proj', 3]"),
    ],
)
def test_wishes_that_match_nothing_useful_are_refused(wanted, words, models):
    with pytest.raises(TargetModulesError) as caught:
        matching_modules(models["llama"], wanted)
    assert words in str(caught.value)


def test_layers_of_a_mamba_kernel_are_left_out():
    mamba = small("MambaConfig", "MambaForCausalLM", state_size=4)
    leaves = {name.rsplit(".", 1)[-1] for name in target_modules(mamba)}
    assert leaves == {"in_proj", "x_proj", "dt_proj"}
    assert wrapped(mamba, list(target_modules(mamba))) == target_modules(mamba)
    with pytest.raises(TargetModulesError, match=r"out_proj, a Linear, which takes no adapter"):
        matching_modules(mamba, ["in_proj", "out_proj"])
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        wrapped(mamba, ["out_proj"])


def test_errors_of_this_room_are_documented(root):
    page = (root / "docs" / "reference" / "messages.md").read_text(encoding="utf-8")
    for kind in (TokenizerError, NotCausalError, RemoteCodeError, IncompleteModelError, QuantisedModelError):
        assert re.search(rf"^## {kind.slug}$", page, re.M)
