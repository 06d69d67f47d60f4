"""Files are written whole or not at all.

In: paths and their contents. Out: the files, written beside their places, synced, and renamed into them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rankwise.errors import OutputError, OutputExistsError


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output path before any work is done for it.

    Raises:
        OutputExistsError: the path is taken and `force` is not set.
        OutputError: the folder is not there, or the path is a folder.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; a file was meant. Nothing was written.")
        if (path.exists() or path.is_symlink()) and not force:
            raise OutputExistsError(str(path))
        if path.exists() and not path.is_file():  # renaming into its place would destroy it
            raise OutputError(f"{path} is a device or a pipe; a file was meant (--json writes to stdout).")
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}. Make it first.")
    except OSError as error:  # a parent that may not be looked into, a name too long
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. Nothing was written.") from error
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: no permission to write into {path.parent}.")


def write_texts(texts: Mapping[Path, str | bytes], *, force: bool) -> None:
    """Write files, all or none: each beside its place, synced, then all renamed.

    A killed run leaves old files or new ones, never a part. Symbolic links are followed.

    Args:
        texts: path -> contents; text is written as UTF-8.
        force: whether files that exist are replaced.

    Raises:
        OutputExistsError: a path is taken and `force` is not set.
        OutputError: the disk is full, a folder is not there or may not be written to. Nothing was written.
    """
    for path in texts:
        check_writable(path, force=force)
    parts: list[tuple[Path, Path, Path]] = []
    try:
        for path, text in texts.items():
            parts.append((path, *_write_part(path, text)))
        for path, part, target in parts:
            try:
                part.replace(target)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        for _, part, _ in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _write_part(path: Path, text: str | bytes) -> tuple[Path, Path]:
    """Write contents beside its place and return (the part, the place)."""
    try:
        target = path.resolve()
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:40]}.", suffix=".part", dir=target.parent)
    except RuntimeError as error:  # Python before 3.13: a loop of symbolic links
        raise OutputError(f"{path} cannot be written: it is a loop of symbolic links.") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. Nothing was written.") from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8") if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(f"{path} cannot be written: {error.strerror or error}. Nothing was written.") from error
        raise
    return part, target


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write one text file; see `write_texts`."""
    write_texts({path: text}, force=force)
