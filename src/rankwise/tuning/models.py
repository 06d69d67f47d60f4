"""MODEL -> a causal language model and its tokenizer, whole or not at all.

In: a folder, hub id, `rankwise:tiny` or live module. Out: `Loaded`, or one message. Code that a model brings along is
never run, and pickled weights are read as tensors only. Which of its layers take an adapter is for `targets` to say.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from rankwise.checkpoints import open_source
from rankwise.checkpoints.stores import os_error, printable
from rankwise.checkpoints.strict_json import parse_config
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
    TokenizerError,
    UnknownFormatError,
    UsageError,
    WrongKindError,
)
from rankwise.linalg import checked_device, default_device
from rankwise.tuning.data_files import needed
from rankwise.tuning.model_places import ModelPlace, place_of

_TOKENIZER_FILES: Final = re.compile(
    r"(tokenizer|tokenizer_config|vocab|special_tokens_map)\.(json|txt|model)|merges\.txt|spiece\.model|"
    r"sentencepiece.*\.model|tekken\.json|.*\.tiktoken"
)
_WEIGHT_FILES: Final = re.compile(r".*\.safetensors|pytorch_model.*\.bin|.*\.index\.json")
_CAUSAL_NAMES: Final = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A model that is ready to be adapted.

    Attributes:
        name: the model as it was given; of a live one, its own name or that of its class.
        model: as `transformers.AutoModelForCausalLM` loads it.
        tokenizer: with a pad token; where it had none, its end-of-sequence token stands in.
        parameters: numbers in the model, each counted once.
        context: the longest sequence that the config allows, or None where it names none.
    """

    name: str
    model: Any
    tokenizer: Any
    parameters: int
    context: int | None


def load_model(
    model: object,
    *,
    dtype: object = None,
    device: str | None = None,
    tokenizer: object = None,
    adapted: bool = False,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Args:
        model: a folder, hub id `org/name[@revision]`, `rankwise:tiny`, or a live model of transformers. A live one is
            moved to `device` where that is given, and is otherwise left as it is.
        dtype: "float32", "bfloat16", "float16" or the torch dtype. None means float32; on a GPU bfloat16 where the
            config says so.
        device: None means cuda where there is one, else cpu.
        tokenizer: a folder, hub id or live tokenizer in place of the one beside the model.
        adapted: whether a live model may carry an adapter.

    Raises:
        RankwiseError: there is no such model, it is no causal language model, it brings code, its weights are not
            whole, or it has no tokenizer that fits.
    """
    torch = needed("torch", "loading a model")
    needed("transformers", "loading a model")
    wanted = _dtype(torch, dtype)
    with _quiet():
        if not isinstance(model, str | os.PathLike):
            if dtype is not None and wanted != getattr(model, "dtype", None):
                raise UsageError("dtype is for models that are loaded; convert a live one yourself: model.to(dtype)")
            return _live(model, checked_device(device) if device is not None else None, tokenizer, adapted)
        place = place_of(os.fsdecode(model))
        raw, config = _config(place)
        beside = _tokenizer(place if tokenizer is None else tokenizer)
        on = checked_device(device) if device is not None else default_device()
        if wanted is None:
            half = on.startswith("cuda") and str(raw.get("dtype", raw.get("torch_dtype"))) == "bfloat16"
            wanted = torch.bfloat16 if half else torch.float32
        return _loaded(place.name, _weights(place, raw, config, wanted, on), beside)


def _dtype(torch: Any, dtype: object) -> Any:
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
    if dtype is None or dtype in known.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in known:
        return known[dtype.removeprefix("torch.")]
    raise UsageError(f"dtype {dtype!r} is not one to train in; wanted one of: {', '.join(known)}")


def _loaded(name: str, model: Any, tokenizer: Any) -> Loaded:
    if tokenizer.eos_token is None:
        raise TokenizerError(
            f"the tokenizer of {printable(name)} has no end-of-sequence token, so a model could not learn where to "
            "stop. Set tokenizer.eos_token to the one the model was trained with, and save it again."
        )
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        rows = None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if rows is not None and highest >= rows:
        raise TokenizerError(
            f"the tokenizer of {printable(name)} has tokens up to number {highest:,}, and the model has {rows:,} "
            "embeddings; they are not of the same model, or tokens were added without model.resize_token_embeddings."
        )
    if tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)  # the caller's own stays as it is
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return Loaded(
        name=name,
        model=model,
        tokenizer=tokenizer,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        context=context if isinstance(context, int) and context > 0 else None,
    )


def _config(place: ModelPlace) -> tuple[Mapping[str, Any], Any]:
    """Return the config as it stands in the file, and as transformers reads it."""
    transformers = needed("transformers", "loading a model")
    label = printable(place.name)
    if (place.folder / "adapter_config.json").is_file():
        raise _is_adapter(place)
    try:
        raw = parse_config((place.folder / "config.json").read_bytes(), f"{label}/config.json")
    except FileNotFoundError as error:
        found = ", ".join(_names(place.folder)[:6]) or "nothing"
        raise UnknownFormatError(
            f"{label} has no config.json, so it is no model of transformers; found: {printable(found)}. Give the "
            "folder that save_pretrained wrote."
        ) from error
    except OSError as error:
        raise os_error(error, f"{label}/config.json") from error
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f"{label}/config.json has no model_type; wanted the config that transformers wrote.")
    own_code = bool(raw.get("auto_map"))
    if kind not in transformers.CONFIG_MAPPING:
        if own_code:
            raise _needs_code(label, kind)
        raise UnknownFormatError(
            f"{label} has the model_type {printable(kind)!r}, which transformers {transformers.__version__} does not "
            "know. Update transformers if the model is new."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(place.source, revision=place.revision, trust_remote_code=False)
    except Exception as error:  # a validator of any of 400 configs
        raise ConfigError(
            f"{label}/config.json cannot be read as a {printable(kind)} config: {_said(error)}"
        ) from error
    _check_causal(label, raw, config, own_code)
    return raw, config


def _is_adapter(place: ModelPlace) -> WrongKindError:
    """Return the error for an adapter. transformers would load the base it names, from wherever that is."""
    try:
        found = parse_config((place.folder / "adapter_config.json").read_bytes(), "").get("base_model_name_or_path")
    except (OSError, RankwiseError):
        found = None
    base = f" ({printable(found)!r})" if isinstance(found, str) and found else ""
    return WrongKindError(
        f"{printable(place.name)} holds a PEFT adapter (adapter_config.json); wanted the base{base} as MODEL. To go on "
        "from an adapter, merge it first: PeftModel.merge_and_unload() and save_pretrained."
    )


def _needs_code(label: str, kind: str) -> RemoteCodeError:
    return RemoteCodeError(
        f"{label} brings its own code for its model_type {printable(kind)!r} (auto_map in config.json), and rankwise "
        "runs no code of a model. Update transformers if it has this architecture by now, or take another model."
    )


def _check_causal(label: str, raw: Mapping[str, Any], config: Any, own_code: bool) -> None:
    auto = needed("transformers.models.auto.modeling_auto", "loading a model")
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    given = raw.get("architectures")
    named = [str(name) for name in given] if isinstance(given, list) else []
    known = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    fits = not named or any(name in known or name.endswith(_CAUSAL_NAMES) for name in named)
    if type(config) in causal and fits and getattr(config, "is_decoder", True) is not False:
        return
    if own_code and fits and type(config) not in causal:
        raise _needs_code(label, config.model_type)
    raise _not_causal(label, ", ".join(named) or f"the model_type {config.model_type!r}")


def _not_causal(label: str, found: str) -> NotCausalError:
    return NotCausalError(
        f"{label} is no causal language model: its architecture is {printable(found)}. Wanted one that "
        "AutoModelForCausalLM loads, such as LlamaForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel."
    )


# --- its weights


def _weights(place: ModelPlace, raw: Mapping[str, Any], config: Any, dtype: Any, device: str) -> Any:
    """Load the weights, and refuse a model of which some would be random numbers."""
    torch, transformers = needed("torch", "loading a model"), needed("transformers", "loading a model")
    label = printable(place.name)
    quantised = raw.get("quantization_config") is not None
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            place.source,
            config=config,
            revision=place.revision,
            dtype=dtype,
            device_map={"": device} if quantised else None,  # quantised weights cannot be moved afterwards
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
    except Exception as error:
        _refuse_weights(error, place, quantised)
    _refuse_holes(label, report)
    if not quantised:
        try:
            model.to(device)
        except torch.OutOfMemoryError as error:
            count = sum(parameter.numel() for parameter in model.parameters())
            raise DeviceError(
                f"{device} has not enough free memory for the {count:,} parameters of {label} in {dtype}; wanted a "
                "smaller model, dtype bfloat16, or --device cpu"
            ) from error
    return model


def _refuse_weights(error: Exception, place: ModelPlace, quantised: bool) -> NoReturn:
    label = printable(place.name)
    if isinstance(error, ImportError):
        if quantised:
            raise QuantisedModelError(f"{label} is quantised: {_said(error)}") from error
        raise MissingDependencyError(
            getattr(error, "name", None) or "a package", "train", f"loading {label}"
        ) from error
    if place.revision is None and not any(_WEIGHT_FILES.fullmatch(name) for name in _names(place.folder)):
        raise IncompleteModelError(
            f"{label} has a config.json and no weights; wanted model.safetensors or pytorch_model.bin, or shards with "
            "their index. Look at how it was saved or copied."
        ) from error
    try:  # the reader of checkpoints has words for every way in which a file is broken
        open_source(place.folder, want="checkpoint").close()
    except RankwiseError as found:
        unreached = isinstance(found, UnknownFormatError) and place.revision is not None
        if not unreached:
            raise found from error
    if quantised:
        raise QuantisedModelError(f"{label} is quantised, and cannot be loaded: {_said(error)}") from error
    if place.revision is not None and isinstance(error, OSError):
        raise AccessError(f"the weights of {label} cannot be fetched from the hub: {_said(error)}") from error
    raise MalformedFileError(
        f"the weights of {label} cannot be loaded ({type(error).__name__}): {_said(error)}"
    ) from error


def _refuse_holes(label: str, report: Mapping[str, Any]) -> None:
    """Refuse a load that left weights at random; tied heads are not among the missing."""
    shapes = sorted((str(name), tuple(got), tuple(wanted)) for name, got, wanted in report["mismatched_keys"])
    if shapes:
        name, got, wanted = shapes[0]
        more = f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else ""
        raise IncompleteModelError(
            f"{label}: {printable(name)} has shape {got} in the weights, and the config asks for {wanted}{more}. "
            "Config and weights are not of the same model; download both again."
        )
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        extra = sorted(map(str, report["unexpected_keys"]))
        unread = (
            f" The weights have {len(extra)} that it does not ask for, such as {printable(extra[0])}." if extra else ""
        )
        raise IncompleteModelError(
            f"{label}: weights that the config asks for are not there: {_few(missing)}. They would be random numbers."
            f"{unread} Download it again, or look at how it was saved."
        )
    if report["error_msgs"]:
        raise MalformedFileError(
            f"the weights of {label} cannot be loaded: {printable(str(report['error_msgs'][0]))[:300]}"
        )


def _few(names: Iterable[str], count: int = 4) -> str:
    listed = list(names)
    more = f" (and {len(listed) - count} more)" if len(listed) > count else ""
    return printable(", ".join(listed[:count])) + more


def _said(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:400].rstrip(".") + "."


# --- its tokenizer, and live models


def _tokenizer(wanted: object) -> Any:
    """Return the tokenizer at a place, or the live one."""
    transformers = needed("transformers", "loading a tokenizer")
    if not isinstance(wanted, str | os.PathLike | ModelPlace):
        if not (callable(wanted) and hasattr(wanted, "get_vocab") and hasattr(wanted, "eos_token")):
            raise UsageError(
                f"tokenizer is of the type {type(wanted).__name__}; wanted a folder, a hub id or one of transformers"
            )
        return wanted
    place = wanted if isinstance(wanted, ModelPlace) else place_of(os.fsdecode(wanted))
    label = printable(place.name)
    missing = (
        f"{label} has no tokenizer. Save the one of the model there (tokenizer.save_pretrained), or pass tokenizer=."
    )
    if place.revision is None and not _has_tokenizer(place.folder):  # transformers may make up an empty one
        raise TokenizerError(missing)
    try:
        found = transformers.AutoTokenizer.from_pretrained(
            place.source, revision=place.revision, trust_remote_code=False
        )
    except ImportError as error:
        raise TokenizerError(f"the tokenizer of {label} needs a package: {_said(error)}") from error
    except Exception as error:  # the Rust half raises plain Exception
        if not _has_tokenizer(place.folder):
            raise TokenizerError(missing) from error
        code = "custom code" in str(error)
        raise (
            RemoteCodeError(f"the tokenizer of {label} brings its own code, and rankwise runs no code of a model.")
            if code
            else TokenizerError(f"the tokenizer of {label} cannot be loaded ({type(error).__name__}): {_said(error)}")
        ) from error
    if not _has_tokenizer(place.folder):
        raise TokenizerError(missing)
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any(_TOKENIZER_FILES.fullmatch(name) for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names, not paths
    except OSError as error:
        raise os_error(error, printable(str(folder))) from error


def _live(model: Any, device: str | None, tokenizer: object, adapted: bool) -> Loaded:
    transformers = needed("transformers", "adapting a model")
    auto = needed("transformers.models.auto.modeling_auto", "adapting a model")
    kind = type(model).__name__
    if hasattr(model, "peft_config") and not adapted:
        raise WrongKindError(
            f"the {kind} carries an adapter already; wanted the base alone. Merge it (model.merge_and_unload()) or "
            "take it off (model.unload())."
        )
    if not isinstance(model, transformers.PreTrainedModel):
        hint = " Unwrap it first." if hasattr(model, "module") or hasattr(model, "_orig_mod") else ""
        raise UsageError(f"model is of the type {kind}; wanted a folder, a hub id or a model of transformers.{hint}")
    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    names = [base.__name__ for base in type(model).__mro__]
    fits = any(name in causal or name.endswith(_CAUSAL_NAMES) for name in names)
    if not fits or getattr(model.config, "is_decoder", True) is False:
        raise _not_causal("the live model", kind)
    name = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None and not name:
        raise UsageError(
            f"the {kind} does not say where it was loaded from, so its tokenizer is unknown; give tokenizer="
        )
    try:
        found = _tokenizer(name if tokenizer is None else tokenizer)
    except (SourceNotFoundError, AccessError, UnknownFormatError) as error:
        if tokenizer is not None:
            raise
        raise TokenizerError(
            f"the {kind} says that it was loaded from {printable(name)!r}, and no tokenizer can be read from there "
            f"({str(error).rstrip('.')}). Give tokenizer=."
        ) from error
    return _loaded(name or kind, model if device is None else model.to(device), found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the load reports, warnings and bars of transformers off stderr for a while; downloads may show theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logging = needed("transformers.utils.logging", "loading a model")
    level, bars, downloads = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )
    logging.set_verbosity(logging.CRITICAL)
    if bars:
        logging.disable_progress_bar()  # and those of downloads with it
        if downloads:
            enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            with warnings.catch_warnings():  # the environment may forbid bars of downloads
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()
            if not downloads:
                disable_progress_bars()
