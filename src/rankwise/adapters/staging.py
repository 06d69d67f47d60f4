"""A place beside OUT where an adapter grows, module by module, until it is whole.

In: OUT and a description of the job. Out: OUT, renamed into place when it is complete. What is there already when the
same job is started again is used; another job's is thrown away. A kill at any moment leaves nothing that loads.

    .OUT.partial/job.json     what the job is; another job does not go on with these parts
    .OUT.partial/lock         held while a process writes here
    .OUT.partial/parts/       one file a module
    .OUT.partial/whole/       the finished files, renamed to OUT at the end
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from rankwise.adapters.parts import Array, join_parts, read_facts, write_part
from rankwise.errors import (
    AccessError,
    ClusterError,
    MalformedFileError,
    OutputError,
    OutputExistsError,
    RankwiseError,
    SourceNotFoundError,
)

log = logging.getLogger(__name__)

OURS: Final = frozenset(
    {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "adapters.safetensors",
        "adapter.safetensors",
        "pytorch_lora_weights.safetensors",
        "README.md",
        "extraction.json",
        "conversion.json",
        ".gitattributes",
    }
)
"""What a folder may hold that --force replaces: an adapter and nothing else."""

LATER: Final = (OutputError, ClusterError, AccessError, SourceNotFoundError)
"""Errors from outside, after which the same job may well succeed. A source that went away in the middle of a job was
there when it began; a web server that is down looks like one without the file."""

JOB, LOCK, PARTS, WHOLE = "job.json", "lock", "parts", "whole"


def check_out(out: Path, *, force: bool, folder: bool) -> None:
    """Refuse an OUT before any work is done for it. Nothing is changed.

    Args:
        out: where the adapter goes.
        force: whether an adapter that is there is replaced.
        folder: whether OUT is a folder or a file.

    Raises:
        OutputExistsError: it is taken, and `force` is not set.
        OutputError: it is of the other kind, holds something that is not an adapter, or cannot be written to.
    """
    try:
        taken = out.exists() or out.is_symlink()
        if taken and out.is_dir() != folder:
            kind = "folder" if folder else "file"
            raise OutputError(f"{out} is a {'file' if folder else 'folder'}; a {kind} was meant. Nothing was written.")
        if folder and out.absolute().resolve() == Path.cwd():
            raise OutputError(
                f"{out} is the folder that you are in, and OUT is put in its place as a whole; give it a name of its "
                "own. Nothing was written."
            )
        inside = sorted(p.name for p in out.iterdir()) if taken and folder else []
        if taken and not force and (inside or not folder):
            raise OutputExistsError(str(out))
        strangers = [name for name in inside if name not in OURS]
        if strangers:
            raise OutputError(
                f"{out} holds more than an adapter ({', '.join(strangers[:3])}); --force replaces an adapter and "
                "deletes nothing else. Choose another folder. Nothing was written."
            )
        parent = out.absolute().parent
        if not parent.is_dir():
            raise OutputError(f"{out} cannot be written: there is no folder {parent}. Make it first.")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror or error}. Nothing was written.") from error
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out} cannot be written: no permission to write into {parent}.")


class Staging:
    """The growing adapter. Use as a context manager: it gives the lock back; the parts stay until `finish`."""

    def __init__(self, out: Path, job: Mapping[str, Any], *, force: bool = False, folder: bool = True) -> None:
        """Open the place, or go on where the same job was cut short.

        Args:
            out: a folder, or a file; its parent is there.
            job: everything the result depends on, as JSON: inputs with their sizes and dates, options, version.
            force: replace an adapter that is there.
            folder: whether OUT is a folder or a file.

        Raises:
            OutputExistsError, OutputError: as `check_out`; or another process is writing this OUT.
        """
        check_out(out, force=force, folder=folder)
        self.out, self._folder, self._force = out, folder, force
        self.place = out.absolute().parent / f".{out.name}.partial"
        self._known: dict[str, tuple[Path, dict[str, Any]]] = {}
        try:
            self.place.mkdir(exist_ok=True)
            self._lock = _lock(self.place / LOCK, out)
            self._check_again(force=force)
            if (self.place / "old").is_dir() and not out.exists():  # killed between the two renamings of `finish`
                (self.place / "old").rename(out)
                check_out(out, force=force, folder=folder)
            wanted = json.dumps(job, sort_keys=True)
            if _text(self.place / JOB) != wanted:
                self._clear()
                self._begin(wanted)
            self._find()
            shutil.rmtree(self.place / WHOLE, ignore_errors=True)
            (self.place / WHOLE).mkdir()
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror or error}. Nothing was written.") from error

    @property
    def resumed(self) -> Sequence[str]:
        """The keys of the parts that an earlier run of the same job had left."""
        return self._resumed

    def facts(self, key: str) -> dict[str, Any] | None:
        """Return what was noted with a part, or None where there is no such part yet."""
        found = self._known.get(key)
        return None if found is None else found[1]

    def put(self, key: str, tensors: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Keep the tensors of one module under a key, with facts about it, from now on and over a kill.

        Raises:
            OutputError: the disk is full, or may not be written to.
        """
        path = self.place / PARTS / f"{len(self._known):06d}.part"
        noted = {"key": key, "facts": dict(facts)}
        write_part(path, tensors, noted)
        self._known[key] = (path, noted["facts"])  # type: ignore[assignment]

    def join(self, name: str, keys: Sequence[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file of the result out of parts, in the order of the keys."""
        path = self.place / WHOLE / name
        join_parts([self._known[key][0] for key in keys], path, {"format": "pt", **(metadata or {})})

    def write(self, name: str, text: str) -> None:
        """Write one text file of the result.

        Raises:
            OutputError: the disk is full, or may not be written to.
        """
        try:
            _write(self.place / WHOLE / name, text)
        except OSError as error:
            raise OutputError(f"{self.out} cannot be written: {error.strerror or error}.") from error

    def finish(self) -> None:
        """Rename the result to OUT, and take the place away.

        A folder is renamed as one; an old one is moved aside before and deleted after, so that OUT is at every moment
        the old adapter, the new one, or not there.

        Raises:
            OutputExistsError, OutputError: as `check_out`, for what came there meanwhile; or it cannot be renamed.
        """
        check_out(self.out, force=self._force, folder=self._folder)
        whole, old = self.place / WHOLE, self.place / "old"
        try:
            if self._folder:
                shutil.rmtree(old, ignore_errors=True)
                target = self.out.resolve()
                if target.is_dir():
                    target.rename(old)
                whole.rename(target)
            else:
                (file,) = whole.iterdir()
                file.replace(self.out.resolve())
        except OSError as error:
            if old.is_dir() and not self.out.exists():
                old.rename(self.out)
            raise OutputError(f"{self.out} cannot be written: {error.strerror or error}.") from error
        self._take_away()

    @contextlib.contextmanager
    def cut_short(self, useless: type[RankwiseError]) -> Iterator[None]:
        """Say what became of the parts where the job ends in an error; leave none that are of no use.

        Args:
            useless: class of errors after which the same job would fail again, but for those of `LATER`.
        """
        try:
            yield
        except LATER as error:
            if self._known:
                raise type(error)(
                    f"{error} What was done is kept in {self.place}: the same command goes on from there."
                ) from error
            self.discard()
            if isinstance(error, OutputError) and not str(error).startswith(str(self.out)):
                raise OutputError(f"{self.out} cannot be written: {error} Nothing was written.") from error
            raise
        except useless:
            self.discard()
            raise

    def discard(self) -> None:
        """Take the place away without a result."""
        self._take_away()

    def _check_again(self, *, force: bool) -> None:
        """Another process may have finished OUT since it was looked at."""
        try:
            check_out(self.out, force=force, folder=self._folder)
        except (OutputError, OutputExistsError):
            if not (self.place / JOB).exists():
                self._take_away()
            self.close()
            raise

    def _take_away(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)  # under the lock: nobody else's parts are in there
        self.close()

    def close(self) -> None:
        """Give the lock back; parts stay for the next run of the same job."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, job: str) -> None:
        try:
            (self.place / PARTS).mkdir()
            _write(self.place / JOB, job)
        except OSError:
            self._take_away()  # there is nothing in it to go on with
            raise

    def _clear(self) -> None:
        for path in self.place.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _find(self) -> None:
        """Read what parts are there; drop what is broken, and what comes after a gap."""
        paths = sorted((self.place / PARTS).iterdir())
        for index, path in enumerate(paths):
            try:
                noted = read_facts(path)
                if path.name != f"{index:06d}.part":
                    raise MalformedFileError(path.name)
                self._known[noted["key"]] = (path, noted["facts"])
            except (MalformedFileError, KeyError, TypeError):
                for rest in paths[index:]:
                    rest.unlink()
                break
        self._resumed = tuple(self._known)
        if self._resumed:
            log.info("%s: going on after %d modules", self.out, len(self._resumed))


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _lock(path: Path, out: Path) -> int | None:
    """Take the lock, which a killed process gives back; None where the platform has none of this kind."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(f"another process is writing {out} at this moment. Nothing was written.") from error
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):  # it finished between the two calls
        os.close(handle)
        raise OutputError(f"another process has just written {out}. Nothing was written.")
    return handle
