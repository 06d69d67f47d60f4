"""What can go wrong for a user: one root class, and one class per thing a user can do about it.

In: the facts of a failure (file, module, got, expected). Out: an exception whose message says what
happened, where, and what to do. `slug` is the anchor of the error in `docs/reference/messages.md`.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

_USER: Final = re.compile(
    r"(?:(?<=://)(?<!github://)|(?<=[a-z]{2}:/)(?!/))"  # github://org:repo@branch names a branch; a Path drops a slash
    r"(?:[^/?#\s'\"<>]*@"
    r"|(?!arn:|\[)[^/?#\s'\"<>:@]+:(?!\d+(?:[/?#\s'\"<>,;)]|$))[^\s'\"<>]*@)"  # or a password with a slash
)
_LOGIN: Final = re.compile(r"[^\s/:@'\"<>=(]+:[^\s/@'\"<>]+@(?=[\w\[])")
_QUERY: Final = re.compile(
    r"(https?://[^\s?#'\"<>]*|\.(?:safetensors|bin|pth?|ckpt|json))"
    r"\?(?!(?:versionId|version_id|generation|download|revision)=[\w.-]*(?![^\s'\"<>,;)\]]))[^\s'\"<>]+"
)


def without_secrets(text: str) -> str:
    """Return text whose URLs have lost what may give access: user and password, and the query of a signed link.

    >>> without_secrets("https://ann:pw@host/model.safetensors?X-Amz-Signature=1f cannot be read")
    'https://***@host/model.safetensors?*** cannot be read'
    >>> without_secrets("s3://bucket/model.safetensors?versionId=3a, hf://org/name@main")
    's3://bucket/model.safetensors?versionId=3a, hf://org/name@main'
    """
    if ":/" not in text and "?" not in text:
        return text
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


def foreign(text: str) -> str:
    """Return the words of another library without secrets: it may have taken the URL apart that it quotes.

    >>> foreign('Invalid bucket name "AKID:secret@bucket"')
    'Invalid bucket name "***@bucket"'
    """
    return _LOGIN.sub("***@", without_secrets(text))


def showable(error: BaseException) -> BaseException | None:
    """Return the cause to give to an error of ours: None where its traceback would show the secrets of a URL."""
    link: BaseException | None = error
    while link is not None:
        if any(foreign(text) != text for text in (str(link), repr(link))):
            return None
        link = link.__cause__ or link.__context__
    return error


class RankwiseError(Exception):
    """The root of every error that is the user's to mend. The command line turns it into exit code 2.

    No message holds the secrets of a URL, whoever wrote it.
    """

    slug: ClassVar[str] = "error"

    def __init__(self, *words: object) -> None:
        super().__init__(*(without_secrets(word) if isinstance(word, str) else word for word in words))


class UsageError(RankwiseError):
    """An argument is out of its range, or two arguments do not go together."""

    slug = "usage"


class ScalingError(RankwiseError):
    """A scaling rule is unknown, or its rank or alpha is not a positive finite number."""

    slug = "scaling"


class CriterionError(RankwiseError):
    """A rank criterion got a parameter outside its range, or a spectrum too short to answer."""

    slug = "criterion"


class OutOfReachError(RankwiseError):
    """A budget, a share or an error cannot be met with the ranks that the other options allow."""

    slug = "out-of-reach"


class SpectrumSpecError(RankwiseError):
    """A planted spectrum (`--spectrum`) cannot be read or has values that are no spectrum."""

    slug = "spectrum-spec"


class SourceNotFoundError(RankwiseError):
    """No local path, hub repository or URL of that name can be read."""

    slug = "source-not-found"


class AccessError(RankwiseError):
    """The source exists but may not or cannot be read (permissions, network, I/O)."""

    slug = "cannot-read"


class UnknownFormatError(RankwiseError):
    """The source is there, but is neither a checkpoint nor an adapter that rankwise reads."""

    slug = "unknown-format"


class MalformedFileError(RankwiseError):
    """A weight file or its index is truncated, contradicts itself, or is not what its name says."""

    slug = "malformed-file"


class UnsafeFileError(RankwiseError):
    """A pickle holds more than tensors; it is refused without being executed."""

    slug = "unsafe-file"


class ConfigError(RankwiseError):
    """A config file is not JSON, not an object, or has a value of the wrong type."""

    slug = "bad-config"


class UnsupportedAdapterError(RankwiseError):
    """The adapter is of a kind whose update is not scaling * B @ A (LoHa, LoKr, IA3, ...)."""

    slug = "unsupported-adapter"


class TensorError(RankwiseError):
    """A tensor has a shape or dtype that no weight of its kind can have (zero-sized, 5-D, int8, ...)."""

    slug = "bad-tensor"


class ShapeMismatchError(RankwiseError):
    """The base and the tuned tensor of one module differ in shape."""

    slug = "shape-mismatch"

    def __init__(self, name: str, base: tuple[int, ...], tuned: tuple[int, ...]) -> None:
        super().__init__(
            f"{name} has shape {base} in the base and {tuned} in the update; a delta and its base need the same "
            f"shape. If this module was replaced or resized on purpose, leave it out with --skip '{name}'; "
            "otherwise the two are not of the same model."
        )


class NothingToMeasureError(RankwiseError):
    """The source was read, but no module is left to measure."""

    slug = "nothing-to-measure"


class WrongKindError(RankwiseError):
    """The source is a checkpoint where an adapter is meant, or the other way round."""

    slug = "wrong-kind"


class MissingDependencyError(RankwiseError):
    """The job needs a package of one of the extras."""

    slug = "missing-dependency"

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs {package}, which is not installed; run: pip install 'rankwise[{extra}]'")


class DeviceError(RankwiseError):
    """The device asked for is not there."""

    slug = "device"


class RecordError(RankwiseError):
    """A record file is not one that this version of rankwise can read."""

    slug = "bad-record"


class OutputExistsError(RankwiseError):
    """The output path is taken, and --force was not given."""

    slug = "output-exists"

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} exists already; nothing was written. Choose another path or pass --force.")


class OutputError(RankwiseError):
    """The output cannot be written (no folder, no permission, no space)."""

    slug = "cannot-write"


class DataFormatError(RankwiseError):
    """DATA is of no kind that is read, or its columns are none of the three forms, or two of them."""

    slug = "data-format"


class DataRowError(RankwiseError):
    """One row of DATA is broken, or holds nothing to learn."""

    slug = "bad-row"


class NoDataError(RankwiseError):
    """DATA was read, and there is no row in it."""

    slug = "no-data"


class TooLongError(RankwiseError):
    """A prompt fills the context, so that nothing of its completion would be trained on."""

    slug = "too-long"


class ChatTemplateError(RankwiseError):
    """DATA has messages, and the tokenizer has no chat template, or one that fails on them."""

    slug = "chat-template"


class TokenizerError(RankwiseError):
    """The tokenizer is missing, broken, or does not go with the model."""

    slug = "tokenizer"


class NotCausalError(RankwiseError):
    """MODEL is no causal language model."""

    slug = "no-causal-lm"


class RemoteCodeError(RankwiseError):
    """MODEL brings code of its own, which is not run."""

    slug = "remote-code"


class IncompleteModelError(RankwiseError):
    """The weights of MODEL lack tensors that its config asks for, or have them in another shape."""

    slug = "incomplete-model"


class QuantisedModelError(RankwiseError):
    """The weights of MODEL are quantised, and the package that reads them is missing or refuses."""

    slug = "quantised-model"


class TargetModulesError(RankwiseError):
    """--target-modules names layers that the model does not have, or that take no adapter."""

    slug = "target-modules"


class CannotCarryError(RankwiseError):
    """A trainer's config cannot say what the plan asks for."""

    slug = "cannot-carry"


class ReadBackError(RankwiseError):
    """A config that was written would not give every module what the plan asks for."""

    slug = "read-back"


class ClusterError(RankwiseError):
    """A Ray cluster cannot be reached, or lost the nodes that could do the work."""

    slug = "cluster"


class BrowserError(RankwiseError):
    """Pictures of figures need a browser that is not there, or that did not draw."""

    slug = "browser"


class AllRunsFailedError(RankwiseError):
    """No run of a sweep came to its end."""

    slug = "all-runs-failed"
