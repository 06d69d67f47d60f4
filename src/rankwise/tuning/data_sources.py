"""Where DATA lies: a local file or folder, any fsspec filesystem, the hub, or a live dataset.

In: what a user typed or passed. Out: parts (one a file or table), whose rows come one at a time. fsspec, datasets and
huggingface_hub are imported only where they are needed.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final
from urllib.parse import unquote, urlsplit

from rankwise.checkpoints.patience import TRIES, passing, patiently
from rankwise.checkpoints.stores import os_error, printable, remote_error
from rankwise.errors import (
    AccessError,
    DataFormatError,
    RankwiseError,
    SourceNotFoundError,
    UsageError,
    foreign,
    showable,
)
from rankwise.tuning.data_files import BATCH, FIELDS, Part, kind_of, needed, part_of, wanted

_HUB_ID: Final = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>refs/(?:pr|convert)/[^/@\s]+|[^/@\s]+))?", re.ASCII
)
_SPLIT_WORDS: Final = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in a file's name -> the split it belongs to, as the hub reads them."""

_BESIDE: Final = re.compile(r"[._].*|.*\.(md|rst|ya?ml)|(readme|licen[cs]e|notice|changelog|citation)\b.*", re.I)
_BESIDE_JSON: Final = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the hub.

    Attributes:
        repo: `org/name`.
        revision: branch, tag or commit, or None for the default branch.
    """

    repo: str
    revision: str | None


def hub_id(text: str) -> HubId | None:
    """Return the repository that `org/name[@revision]` spells, or None where it spells none.

    >>> hub_id("org/name@v1.0")
    HubId(repo='org/name', revision='v1.0')
    """
    match = _HUB_ID.fullmatch(text)
    return HubId(match["repo"], match["revision"]) if match else None


def local_path(text: str) -> Path | None:
    """Return the path that a name stands for, or None where nothing of that name is there.

    Raises:
        RankwiseError: it is there, but may not be looked at, or the name cannot be a path.
    """
    try:
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
        if not os.path.lexists(path):
            return None
        path.stat()  # a broken link or a folder that may not be entered
    except (OSError, ValueError) as error:
        raise os_error(error, printable(text)) from error
    except RuntimeError as error:  # `~name` of a user that there is not
        raise SourceNotFoundError(f"{printable(text)!r} is not there: {error}") from error
    return path


def parts_of(name: str, split: str) -> Iterator[Part]:
    """Return the parts of DATA, in order.

    Raises:
        RankwiseError: there is nothing of that name, it cannot be read, or it is of no kind that is read.
    """
    if not name.strip():
        raise SourceNotFoundError("the name of the data is empty; wanted a path, a hub id (org/name) or a URL")
    if name.startswith("rankwise:"):
        raise UsageError(f"{printable(name)!r} is no data set that is read from a file, the hub or a URL")
    scheme, _, rest = name.partition("://")
    if scheme == "file" and rest:
        name = unquote(urlsplit(name).path)
    elif scheme == "hf" and rest:
        inside = rest.strip("/").removeprefix("datasets/")
        if not rest.startswith("datasets/"):
            raise UsageError(
                f"{printable(name)!r} names a model on the hub; data sets are spelled hf://datasets/org/name"
            )
        found = hub_id(inside)
        return iter([hub_part(name, found, split)]) if found else _url_parts(name, split)
    elif rest:
        return _url_parts(name, split)
    path = local_path(name)
    if path is not None:
        return _local_parts(path, split)
    if found := hub_id(name):
        return iter([hub_part(name, found, split)])
    raise SourceNotFoundError(
        f"{printable(name)!r} is not there: no file or folder of that name. Data sets on the hub are spelled org/name, "
        "URLs begin with s3://, gs://, https://, ..."
    )


def _local_parts(path: Path, split: str) -> Iterator[Part]:
    def opened(file: Path) -> IO[bytes]:
        try:
            return file.open("rb")
        except (OSError, ValueError) as error:
            raise os_error(error, printable(str(file))) from error

    if not path.is_dir():
        return iter([part_of(path.name, lambda: opened(path))])
    try:
        entries = sorted(path.iterdir())
        files = [entry for entry in entries if not entry.is_dir()]
    except OSError as error:
        raise os_error(error, printable(str(path))) from error
    folders = [entry.name for entry in entries if entry not in files]
    chosen = _chosen([file.name for file in files], folders, split, printable(str(path)))
    return (part_of(name, lambda name=name: opened(path / name)) for name in chosen)  # type: ignore[misc]


@dataclass(slots=True)
class _Asked:
    """A server that is asked for data, again where that may help, and whose errors are told without secrets.

    Attributes:
        label: how messages name what is asked for.
        answered: whether it ever did; a server that never has is not waited for.
    """

    label: str
    answered: bool = False

    def locate(self, url: str) -> tuple[Any, str]:
        """Return the filesystem of a URL and the path in it."""

        def located() -> Any:
            import fsspec

            return fsspec.core.url_to_fs(url)

        filesystem, path = self.patient(located)
        self.answered = False  # that was fsspec, and no server
        return filesystem, str(path)

    def patient(self, call: Callable[[], Any]) -> Any:
        """Make a request."""
        try:
            found = patiently(call, known=self.answered)
        except ValueError as error:  # fsspec: "Protocol not known: ..."
            words = printable(foreign(str(error)))[:300]
            raise SourceNotFoundError(f"{self.label!r} cannot be opened: {words}") from showable(error)
        except Exception as error:
            tries = TRIES if passing(error, known=self.answered) else 1
            raise remote_error(error, self.label, tries=tries) from showable(error)
        self.answered = True
        return found


def _url_parts(url: str, split: str) -> Iterator[Part]:
    """Read from any fsspec filesystem. A file is fetched as a whole: its rows end up in memory in any case."""
    asked = _Asked(printable(url.partition("?")[0]))  # a signed link has its secret behind the question mark
    filesystem, path = asked.locate(url)

    def opened(file: str) -> IO[bytes]:
        return io.BytesIO(asked.patient(lambda: filesystem.cat_file(file)))

    web = url.partition("://")[0] in ("http", "https")
    if web or asked.patient(lambda: filesystem.info(path)).get("type") == "file":
        name = PurePosixPath(unquote(urlsplit(path).path) if web else path).name
        return iter([part_of(name, lambda: opened(path))])
    entries = asked.patient(lambda: filesystem.ls(path, detail=True))
    paths = {str(e["name"]).rstrip("/").rsplit("/", 1)[-1]: e for e in entries}
    files = sorted(name for name, entry in paths.items() if entry.get("type") != "directory")
    folders = sorted(name for name in paths if name not in files)
    chosen = _chosen(files, folders, split, asked.label)
    return (part_of(name, lambda name=name: opened(str(paths[name]["name"]))) for name in chosen)  # type: ignore[misc]


def _chosen(files: Sequence[str], folders: Sequence[str], split: str, where: str) -> list[str]:
    """Return the data files of a folder that belong to the split.

    Where names tell splits (train.jsonl beside test.jsonl), only the files of the split are read: training on test
    data by accident spoils every figure after it. Where none does, the split is not asked for.
    """
    data = [name for name in files if not _BESIDE.fullmatch(name) and name not in _BESIDE_JSON]
    if not data:
        inside = (
            f" Its subfolders are not looked into; give one: {printable(', '.join(folders[:5]))}." if folders else ""
        )
        raise DataFormatError(f"{where} holds no data files; wanted {wanted()}.{inside}")
    for name in data:
        kind_of(name)
    splits = {name: _split_of(name) for name in data}
    known = sorted({found for found in splits.values() if found})
    if not known:
        return data
    unclear = next((name for name, found in splits.items() if found is None), None)
    if unclear is not None:
        other = next(name for name, found in splits.items() if found)
        raise DataFormatError(
            f"{where}: {printable(other)} is named after a split and {printable(unclear)} is not, so which rows are "
            "for training is unclear. Name all files after a split, or none, or give one file."
        )
    if split not in known:
        raise UsageError(f"{where} has no split {split!r}; its files are of: {', '.join(known)}")
    return [name for name in data if splits[name] == split]


def _split_of(name: str) -> str | None:
    words = re.split(r"[^a-z]+", PurePosixPath(name).stem.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def dataset_part(data: Any, label: str) -> Part:
    """Return the rows of a live `datasets.Dataset` or `IterableDataset`; only the columns that a form reads."""
    names = tuple(data.column_names) if data.column_names is not None else None
    plain = data.with_format(None) if hasattr(data, "iter") else data
    if names is not None:
        plain = plain.select_columns([name for name in names if name in FIELDS])

    def rows() -> Iterator[tuple[int, object]]:
        number = 0
        for batch in plain.iter(batch_size=BATCH):
            columns = list(batch)
            for number, values in enumerate(zip(*batch.values(), strict=True), start=number + 1):  # noqa: B020
                yield number, dict(zip(columns, values, strict=True))

    return Part(label, "row", rows(), names)


def hub_part(name: str, place: HubId, split: str) -> Part:
    """Load one split of a data set on the hub. `datasets` runs no code of a repository since its version 4."""
    datasets = needed("datasets", f"reading the data set {printable(name)}")
    with _quiet(datasets):
        try:
            found = datasets.load_dataset(place.repo, revision=place.revision, split=split)
        except ConnectionError as error:
            folder = _snapshot(place)
            if folder is None:
                raise _unreachable(error, name, place) from error
            try:
                found = datasets.load_dataset(str(folder), split=split)
            except Exception as inner:
                raise _hub_error(inner, datasets, name, place, split) from inner
        except Exception as error:
            raise _hub_error(error, datasets, name, place, split) from error
    return dataset_part(found, f"{printable(name)} ({split})")


def _snapshot(place: HubId) -> Path | None:
    """Return what `hf download` left in the hub's cache; `datasets` looks only into its own."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(place.repo, repo_type="dataset", revision=place.revision, local_files_only=True)
    except Exception:
        return None
    return Path(folder)


def _unreachable(error: Exception, name: str, place: HubId) -> RankwiseError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or "OfflineMode" in str(error):
        return SourceNotFoundError(
            f"{printable(name)!r} is no local path, and as a data set on the hub it is not in the local cache, while "
            "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set. Download it where there is a network: "
            f"hf download --repo-type dataset {place.repo}"
        )
    words = printable(" ".join(str(error).split()))[:300]
    return AccessError(f"{printable(name)!r} is no local path, and the hub cannot be reached: {words}")


def _hub_error(error: Exception, datasets: Any, name: str, place: HubId, split: str) -> RankwiseError:
    kinds = datasets.exceptions
    label = printable(name)
    words = printable(" ".join(str(error.__cause__ or error).split()))[:400]
    if isinstance(error, RankwiseError):
        return error
    if isinstance(error, kinds.DatasetNotFoundError):
        return SourceNotFoundError(
            f"{label!r} is no local path, and the hub has no such data set or revision (or it is private or gated: "
            f"hf auth login). The hub says: {words}"
        )
    if isinstance(error, ValueError) and "split" in str(error):
        return UsageError(f"{label} has no split {split!r}: {words}")
    if isinstance(error, ValueError) and "Config name is missing" in str(error):
        return UsageError(
            f"{label} has several configurations, and one has to be chosen: {words.partition('Example of usage')[0]}"
            f"Give its files, such as hf://datasets/{place.repo}/PATH.parquet, or pass "
            "datasets.load_dataset(...) from Python."
        )
    if isinstance(error, kinds.DatasetsError) or (isinstance(error, RuntimeError) and "script" in str(error)):
        return DataFormatError(f"{label} cannot be read as a data set ({type(error).__name__}): {words}")
    return AccessError(f"{label} cannot be read ({type(error).__name__}): {words}")


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep progress bars and warnings of `datasets` off stderr for a while."""
    level, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()
