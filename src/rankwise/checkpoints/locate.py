"""From what a user typed to a place: local path, hub repository, or URL.

In: a source. Out: a store, and the file in it where the source names one. huggingface_hub and fsspec are
imported only for sources that need them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from rankwise.checkpoints.kinds import ADAPTERS, CHECKPOINTS, CONFIGS, complete
from rankwise.checkpoints.patience import TRIES, passing, patiently
from rankwise.checkpoints.sharded import INDEX, TORCH, WeightSet
from rankwise.checkpoints.stores import LocalStore, RemoteStore, Store, os_error, printable, remote_error
from rankwise.errors import AccessError, SourceNotFoundError, foreign, showable, without_secrets

_REPO: Final = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>refs/(?:pr|convert)/[^/@\s]+|[^/@\s]+))?(?:/(?P<inside>.+))?",
    re.ASCII,
)
_WEIGHTS: Final = (".safetensors", *TORCH, INDEX)
_BUCKETS: Final = ("s3", "s3a", "gs", "gcs")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a source lies.

    Attributes:
        store: its folder.
        file: the file that the source names, or None where it names the folder.
    """

    store: Store
    file: str | None


def locate(source: str) -> Place:
    """Return the place of a source. A local path wins over a hub id of the same spelling.

    Raises:
        SourceNotFoundError: there is nothing of that name.
        AccessError: it may not or cannot be looked at.
    """
    if not source.strip():
        raise SourceNotFoundError("the source is empty; wanted a path, a hub id (org/name) or a URL")
    scheme = source.partition("://")[0] if "://" in source else ""
    if scheme == "file":
        return _local(Path(unquote(urlsplit(source).path)), source)
    if scheme == "hf":
        return _hub(source, source.removeprefix("hf://").strip("/"))
    if scheme:
        return _url(source, scheme)
    try:
        path = Path(source).expanduser() if source.startswith("~") else Path(source)
        there = os.path.lexists(path)
    except ValueError as error:
        raise os_error(error, source) from error
    except RuntimeError as error:  # `~name` of a user that there is not
        raise SourceNotFoundError(f"{printable(source)!r} is not there: {error}") from error
    if there:
        return _local(path, source)
    if (match := _REPO.fullmatch(source)) and match["inside"] is None:
        return _hub(source, source)
    raise SourceNotFoundError(
        f"{printable(source)!r} is not there: no file or folder of that name. Hub ids are spelled org/name, URLs begin "
        "with s3://, gs://, https://, ..."
    )


def everywhere(source: str) -> str:
    """Return the spelling of a source that means the same in another folder and on another machine.

    A local path becomes absolute. A hub id gets the commit that its revision stands for now: caches of two machines may
    hold two states of a branch.

    Raises:
        AccessError: the hub cannot be asked for the commit.
    """
    if "://" in source and not source.startswith("hf://"):
        return source
    if not source.startswith("hf://"):
        path = Path(source).expanduser() if source.startswith("~") else Path(source)
        if os.path.lexists(path):
            return str(path.absolute())
    match = _REPO.fullmatch(source.removeprefix("hf://").strip("/"))
    if match is None:
        return source
    repo, revision, inside = match["repo"], match["revision"] or "main", match["inside"]
    place = locate(source)
    if isinstance(place.store, LocalStore):
        cached = _cached_snapshot(repo, revision)
        commit = revision if cached is None else cached.name
    else:
        commit = _asked(lambda: _commit_on_hub(repo, revision), source, known=True)  # `locate` has listed it
    return f"hf://{repo}@{commit}" + (f"/{inside}" if inside else "")


def _commit_on_hub(repo: str, revision: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().model_info(repo, revision=revision).sha)


def identity(source: str) -> list[Any]:
    """Return what tells whether a source is the same as before, as JSON: its files with their sizes, dates or tags.

    A web server that gives no entity tag leaves the sizes alone.

    Raises:
        RankwiseError: it cannot be looked at.
    """
    place = locate(source)
    store, listed = place.store, place.store.names()
    if place.file is None and listed is not None:
        files = [name for name in listed if name.endswith((*_WEIGHTS, ".json"))]
    else:
        known = CONFIGS if place.file is not None else (*ADAPTERS, *CHECKPOINTS, *CONFIGS)
        files = [name for name in known if store.has(name)]
        files += [] if place.file is None else [place.file]
        shards = (shard for name in files if name.endswith(INDEX) for shard in WeightSet(store, name).files())
        files = list(dict.fromkeys([*files, *shards]))
    return [without_secrets(store.where), [[without_secrets(n), store.size(n), store.stamp(n)] for n in files]]


def _local(path: Path, source: str) -> Place:
    try:
        folder = path.is_dir()
        path.stat()  # a broken link or a folder that may not be entered
    except (OSError, ValueError, RuntimeError) as error:
        raise os_error(error, printable(source)) from error
    return Place(LocalStore(path), None) if folder else Place(LocalStore(path.parent), path.name)


def _url(source: str, scheme: str) -> Place:
    """Return a place of any fsspec filesystem. Web servers have no listing, so their folders are probed."""
    bucket = source.partition("://")[2].partition("/")[0]
    if scheme in _BUCKETS and ":" in bucket and not bucket.startswith("arn:"):
        raise SourceNotFoundError(
            f"a {scheme}:// address has no ':' in its bucket's name, and no login: keys are found where the client of "
            "the store looks for them (environment, profile, role). The address is not repeated here: it may hold one."
        )

    def open_url() -> tuple[Any, str]:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(source)
        return filesystem, str(path)

    filesystem, path = _guarded(open_url, source)
    web = scheme in ("http", "https")
    bare = urlsplit(path).path if web else path  # a signed link ends in a query
    if bare.lower().endswith(_WEIGHTS):
        cut = path.index(bare) + bare.rindex("/") if bare in path else path.rindex("/")
        folder, file = path[:cut], path[cut + 1 :]
        where = source.partition("?")[0].rpartition("/")[0] if web else source.rpartition("/")[0]
        return Place(RemoteStore(filesystem, folder, where, can_list=not web), file)
    if not web:
        kind = _asked(lambda: filesystem.info(path), source, known=False).get("type")
        if kind == "file":
            folder, _, file = path.rpartition("/")
            return Place(RemoteStore(filesystem, folder, source.rpartition("/")[0]), file)
    return Place(RemoteStore(filesystem, path, source, can_list=not web), None)


def _asked(request: Callable[[], Any], source: str, *, known: bool) -> Any:
    """Make a request, again where that may help; `known`: whether its server has answered before."""
    return _guarded(lambda: patiently(request, known=known), source, lambda error: passing(error, known=known))


def _guarded(call: Callable[[], Any], source: str, again: Callable[[Exception], bool] = lambda _: False) -> Any:
    """Return what a call does, or its error as one of ours; `again`: whether that was the last of several tries."""
    try:
        return call()
    except ValueError as error:  # fsspec: "Protocol not known: ..."
        words = printable(foreign(str(error)))[:300]
        raise SourceNotFoundError(f"{printable(source)!r} cannot be opened: {words}") from showable(error)
    except Exception as error:
        raise remote_error(error, source, tries=TRIES if again(error) else 1) from showable(error)


def _hub(source: str, spelled: str) -> Place:
    match = _REPO.fullmatch(spelled)
    if match is None:
        raise SourceNotFoundError(f"{printable(source)!r} is no hub repository; wanted org/name or org/name@revision")
    repo, revision, inside = match["repo"], match["revision"] or "main", match["inside"]
    folder, _, file = (inside or "").rpartition("/") if (inside or "").endswith(_WEIGHTS) else (inside or "", "", "")
    cached = _guarded(lambda: _cached_snapshot(repo, revision), source)
    if cached is not None:
        store = LocalStore(cached / folder)
        if (cached / folder / file).exists() if file else ((cached / folder).is_dir() and complete(store)):
            return Place(store, file or None)
    return _on_hub(source, f"{repo}@{revision.replace('/', '%2F')}", folder, file, cached is not None)


def _cached_snapshot(repo: str, revision: str) -> Path | None:
    """Return the folder of a revision in the hub's cache, from its documented layout."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    reference = root / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = root / "snapshots" / commit
    return folder if folder.is_dir() else None


def _on_hub(source: str, repository: str, folder: str, file: str, partly_cached: bool) -> Place:
    from huggingface_hub import HfFileSystem, constants

    name = repository.partition("@")[0]
    if constants.HF_HUB_OFFLINE:
        what = "only a part of it is in the local cache" if partly_cached else "it is not in the local cache"
        raise SourceNotFoundError(
            f"{printable(source)!r} is no local path, and as a hub repository {what}, while HF_HUB_OFFLINE is set. "
            f"Download it where there is a network: hf download {name}"
        )
    root = f"{repository}/{folder}".rstrip("/")
    filesystem = HfFileSystem()
    store = RemoteStore(filesystem, root, f"hf://{root}")
    try:
        store.names()
    except SourceNotFoundError as error:
        raise SourceNotFoundError(
            f"{printable(source)!r} is no local path, and the hub has no such repository, revision or folder (or it is "
            "private: hf auth login)."
        ) from error
    except AccessError as error:
        raise AccessError(f"{printable(source)!r} is no local path, and as a hub repository: {error}") from error
    return Place(store, file or None)
