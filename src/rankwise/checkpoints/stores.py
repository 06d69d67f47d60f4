"""Where the files of a source lie: a local folder, or a folder of any fsspec filesystem.

In: a place. Out: the names and sizes of its files, and ranges of their bytes. No file stays open between
two reads, and every failure leaves as an error of `rankwise.errors`.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import http
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.checkpoints.model import Array
from rankwise.checkpoints.patience import TRIES, passing, patiently
from rankwise.errors import (
    AccessError,
    MalformedFileError,
    MissingDependencyError,
    RankwiseError,
    SourceNotFoundError,
    foreign,
    showable,
    without_secrets,
)

log = logging.getLogger(__name__)

TEXT_LIMIT = 256 * 2**20
"""Largest JSON file that is read, in bytes: an index of a million tensors takes a tenth of it."""


class Store(abc.ABC):
    """The files of one folder. All names are names of files in it, without a path.

    Attributes:
        where: the folder, as messages name it.
        refused: how the server refused a file that was looked for; a wrong login looks like a file that is not there.
    """

    where: str
    refused: str | None = None

    @abc.abstractmethod
    def names(self) -> Sequence[str] | None:
        """Return the names of the files in order, or None where the place cannot be listed."""

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Return the size of one file in bytes."""

    @abc.abstractmethod
    def read(self, name: str, start: int, length: int) -> Array:
        """Return exactly `length` bytes from `start` as uint8.

        Raises:
            MalformedFileError: the file ends before that.
        """

    def stamp(self, name: str) -> str:  # noqa: ARG002 - for stores that know one
        """Return what changes when a file is written anew: a date or an entity tag; empty where nothing is known."""
        return ""

    def path(self, name: str) -> Path | None:  # noqa: ARG002 - for local stores
        """Return the local path of a file, or None where it is remote."""
        return None

    def read_many(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Array]:
        """Read several (start, length) ranges of one file."""
        return [self.read(name, start, length) for start, length in ranges]

    def has(self, name: str) -> bool:
        """Tell whether a file is there."""
        listed = self.names()
        if listed is not None:
            return name in listed
        try:
            self.size(name)
        except SourceNotFoundError:
            return False
        return True

    def text(self, name: str) -> bytes:
        """Return a whole small file, such as a config.

        Raises:
            MalformedFileError: it is larger than any such file.
        """
        size = self.size(name)
        if size > TEXT_LIMIT:
            raise MalformedFileError(
                f"{self.label(name)} is {size:,} bytes; a JSON file beside weights is at most {TEXT_LIMIT:,}. "
                "Look at what was saved under that name."
            )
        return self.read(name, 0, size).tobytes()

    def label(self, name: str) -> str:
        """Return how messages name a file: of a URL without its secrets."""
        return printable(without_secrets(f"{self.where.rstrip('/')}/{name}" if self.where else name))

    def cut_short(self, name: str, start: int, wanted: int, got: int) -> MalformedFileError:
        """Return the error for a file that ends too early."""
        return MalformedFileError(
            f"{self.label(name)} is cut short: wanted {wanted:,} bytes from byte {start:,}, got {got:,}. "
            "Copy or download it again."
        )


def printable(text: str) -> str:
    """Return text that any terminal takes: names on disk may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class LocalStore(Store):
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = "" if str(folder) == "." else str(folder)
        self._names: tuple[str, ...] | None = None

    def names(self) -> Sequence[str]:
        """Return the names of all entries that are no folders."""
        if self._names is None:
            try:
                with os.scandir(self._folder) as entries:
                    self._names = tuple(sorted(e.name for e in entries if not _is_folder(e)))
            except OSError as error:
                raise os_error(error, printable(self.where or ".")) from error
        return self._names

    def has(self, name: str) -> bool:
        """Tell whether a file is there, also in a folder that may not be listed."""
        return os.path.lexists(self.path(name))  # a pipe or a folder of that name is refused by `size`

    def stamp(self, name: str) -> str:
        """Return the time of the last change in nanoseconds."""
        try:
            return str(self.path(name).stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            raise os_error(error, self.label(name)) from error

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return self._folder / name

    def size(self, name: str) -> int:
        """Return the size of a regular file."""
        try:
            found = self.path(name).stat()
        except (OSError, ValueError) as error:
            raise os_error(error, self.label(name)) from error
        if not stat.S_ISREG(found.st_mode):
            raise AccessError(f"{self.label(name)} is not a regular file, so its bytes cannot be read as weights.")
        return found.st_size

    def read(self, name: str, start: int, length: int) -> Array:
        """Read one range, opening the file for it alone."""
        size = self.size(name)  # before the buffer is made: a range past the end must not cost its memory
        if start + length > size:
            raise self.cut_short(name, start, length, max(0, size - start))
        buffer = np.empty(length, dtype=np.uint8)
        view = buffer.data
        got = 0
        try:
            with self.path(name).open("rb", buffering=0) as file:
                file.seek(start)
                while got < length and (n := file.readinto(view[got:])):
                    got += n
        except (OSError, ValueError) as error:
            raise os_error(error, self.label(name)) from error
        if got != length:
            raise self.cut_short(name, start, length, got)
        return buffer


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle: reading it says so
        return False


def os_error(error: Exception, label: str) -> RankwiseError:
    """Return the error of ours that tells a user what the operating system refused."""
    if isinstance(error, FileNotFoundError):
        return SourceNotFoundError(f"{label} is not there: no such file, or a link that leads nowhere.")
    number = getattr(error, "errno", None)
    words = getattr(error, "strerror", None) or str(error)
    if isinstance(error, PermissionError):
        return AccessError(f"{label} may not be read: {words}. Ask its owner for read permission.")
    if number in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL) or isinstance(error, ValueError):
        return SourceNotFoundError(f"{printable(label)!r} is no path that can be opened: {words}.")
    return AccessError(f"{label} cannot be read: {words}.")


class RemoteStore(Store):
    """A folder of an fsspec filesystem. Only the bytes asked for are fetched."""

    def __init__(self, filesystem: Any, folder: str, where: str, *, can_list: bool = True) -> None:
        self._fs = filesystem
        self._folder = folder.rstrip("/")
        self.where = without_secrets(where)
        self._can_list = can_list
        self._sizes: dict[str, int | None] | None = None
        self._asked: dict[str, int] = {}
        self._answered = False

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Make a request, again where that may help. A server that never answered is not waited for."""
        found = patiently(call, known=self._answered)
        self._answered = True
        return found

    def _failed(self, error: Exception, label: str) -> RankwiseError:
        return remote_error(error, label, tries=TRIES if passing(error, known=self._answered) else 1)

    def names(self) -> Sequence[str] | None:
        """Return the names of all files, or None for servers that have no listing (http)."""
        if not self._can_list:
            return None
        if self._sizes is None:
            try:
                entries = self._ask(lambda: self._fs.ls(self._folder, detail=True))
            except PermissionError:  # stores may allow reading without listing
                self._can_list = False
                return None
            except Exception as error:
                raise self._failed(error, self.where) from showable(error)
            files = [e for e in entries if e.get("type") != "directory"]
            self._sizes = {str(e["name"]).rstrip("/").rsplit("/", 1)[-1]: e.get("size") for e in files}
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        """Return the size as the listing or the server states it."""
        known = (self._sizes or {}).get(name) or self._asked.get(name)
        if known is not None:
            return known
        try:
            size = self._ask(lambda: self._fs.info(self._path(name))).get("size")
        except Exception as error:
            self.refused = refusal(error) or self.refused
            raise self._failed(error, self.label(name)) from showable(error)
        if not isinstance(size, int):
            raise AccessError(
                f"{self.label(name)} cannot be read in parts: the server does not tell its size. "
                "Download it and give the local path."
            )
        self._asked[name] = size
        return size

    def stamp(self, name: str) -> str:
        """Return the entity tag, the hash or the date that the filesystem gives."""
        try:
            facts = self._ask(lambda: self._fs.info(self._path(name)))
        except Exception as error:
            raise self._failed(error, self.label(name)) from showable(error)
        known = (facts.get(key) for key in ("ETag", "etag", "lfs", "blob_id", "LastModified", "mtime", "created"))
        return next((str(value) for value in known if value), "")

    def read(self, name: str, start: int, length: int) -> Array:
        """Fetch one range."""
        if length == 0:
            return np.empty(0, dtype=np.uint8)
        log.debug("fetching %d bytes from %d of %s", length, start, self.label(name))
        path = self._path(name)
        try:
            found: Array = self._ask(lambda: self._exact(name, self._fetch(path, start, start + length), start, length))
        except Exception as error:
            raise self._failed(error, self.label(name)) from showable(error)
        return found

    def read_many(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[Array]:
        """Fetch several ranges at once where the filesystem can: a kohya file has hundreds of alphas."""
        if not getattr(self._fs, "async_impl", False) or len(ranges) < 2 or any(n == 0 for _, n in ranges):
            return super().read_many(name, ranges)
        path = self._path(name)
        starts, ends = [s for s, _ in ranges], [s + n for s, n in ranges]

        def fetch() -> list[Array]:
            parts = self._fs.cat_ranges([path] * len(ranges), starts, ends, on_error="raise")
            return [self._exact(name, data, s, n) for data, (s, n) in zip(parts, ranges, strict=True)]

        try:
            found: list[Array] = self._ask(fetch)
        except Exception as error:
            raise self._failed(error, self.label(name)) from showable(error)
        return found

    def _exact(self, name: str, data: bytes, start: int, length: int) -> Array:
        if len(data) > length and len(data) == self.size(name):  # a web server that ignores Range headers
            data = data[start : start + length]
        if len(data) != length:
            raise self.cut_short(name, start, length, len(data))  # or the connection was: `patiently` asks again
        return np.frombuffer(data, dtype=np.uint8)

    def _fetch(self, path: str, start: int, end: int) -> bytes:
        if getattr(self._fs, "async_impl", False):
            return bytes(self._fs.cat_file(path, start=start, end=end))
        # others read ahead by megabytes unless told not to
        with self._fs.open(path, "rb", cache_type="none") as file:
            file.seek(start)
            parts: list[bytes] = []
            left = end - start
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
        return b"".join(parts)

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


def refusal(error: BaseException) -> str | None:
    """Return a web server's answer that is no "not found", but may mean it: who may not look is not told what is there.

    None where it is "not found", or where a second try may help.
    """
    status = getattr(error.__cause__, "status", None)
    if not isinstance(status, int) or not 400 <= status < 500 or status in (404, 410) or passing(error, known=True):
        return None
    with contextlib.suppress(ValueError):
        return f"{status} ({http.HTTPStatus(status).phrase})"
    return str(status)


def remote_error(error: Exception, label: str, *, tries: int = 1) -> RankwiseError:
    """Return the error of ours for whatever a filesystem library raised, at the last of so many tries."""
    if isinstance(error, RankwiseError):
        return error
    label = printable(label)
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        # fsspec's http says "not found" whatever went wrong when it asks for a size
        status = refusal(error)
        if status is not None:
            return SourceNotFoundError(f"{label} is not there, or may not be read: the server answers {status}.")
        error = error.__cause__ if passing(error.__cause__, known=True) else error
    if isinstance(error, FileNotFoundError):
        return SourceNotFoundError(
            f"{label} is not there, or its server cannot be reached. Check the spelling, the network and, on the hub, "
            "the revision."
        )
    if isinstance(error, ImportError):
        package = getattr(error, "name", None) or _package_of(str(error))
        if package in ("s3fs", "aiohttp"):  # s3fs brings aiohttp, which http needs
            return MissingDependencyError(package, "s3", f"reading {label}")
        return AccessError(f"reading {label} needs {package}, which is not installed; run: pip install {package}")
    if isinstance(error, PermissionError):
        return AccessError(f"{label} may not be read: {printable(foreign(str(error))) or 'permission denied'}.")
    words = printable(foreign(" ".join(str(error).split())))[:500] or "no reason given"
    tried = f"; tried {tries} times" if tries > 1 else ""
    return AccessError(f"{label} cannot be read ({type(error).__name__}{tried}): {words}")


def _package_of(message: str) -> str:
    known = ("s3fs", "gcsfs", "adlfs", "aiohttp", "paramiko")
    return next((name for name in known if name in message), "the package of that filesystem")
