"""The figures of a page as files: PNG and SVG by a browser, CSV without one.

In: a folder, formats, figures. Out: paths and their contents; nothing is written here but the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from rankwise.errors import OutputError, UsageError
from rankwise.files import check_writable
from rankwise.report.drawing import Figure
from rankwise.report.picturing import FORMATS, Format, find_browser, pictures

CSV: Final = "csv"


@dataclass(frozen=True, slots=True)
class Saving:
    """Where figures go, and as what.

    Attributes:
        folder: which is made when there is something to put into it.
        drawn: formats that a browser draws.
        with_csv: whether the numbers are saved too.
        browser: path or name of the browser, or None for the first on the path.
    """

    folder: Path
    drawn: tuple[Format, ...]
    with_csv: bool
    browser: str | PathLike[str] | None

    @classmethod
    def of(
        cls, folder: str | PathLike[str], formats: Sequence[str], browser: str | PathLike[str] | None = None
    ) -> Saving:
        """Return what was asked for.

        Raises:
            UsageError: a format is unknown, or there is none.
        """
        unknown = [name for name in formats if name not in (*FORMATS, CSV)]
        if unknown or not formats:
            got = f"got {', '.join(map(repr, unknown))}" if unknown else "got none"
            raise UsageError(f"figures are saved as {', '.join(FORMATS)} and {CSV}; {got}")
        drawn = tuple(kind for kind in FORMATS if kind in formats)
        return cls(Path(fspath(folder)), drawn, CSV in formats, browser)

    def check(self) -> None:
        """Refuse, before any work, what cannot be done.

        Raises:
            OutputError: the folder is a file, or cannot be made.
            BrowserError: there is no browser.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; a folder for the figures was meant. Nothing was written.")
        if not self.folder.exists() and not self.folder.parent.is_dir():
            raise OutputError(f"{self.folder} cannot be made: there is no folder {self.folder.parent}. Make it first.")
        if self.drawn:
            find_browser(self.browser)

    def files(self, figures: Mapping[str, Figure], *, force: bool) -> dict[Path, str | bytes]:
        """Return the files of the figures, and make their folder.

        Raises:
            OutputExistsError: one is there and `force` is not set.
            BrowserError: the browser did not draw.
        """
        endings = (*self.drawn, *((CSV,) if self.with_csv else ()))
        if self.folder.is_dir():
            for name in figures:
                for ending in endings:
                    check_writable(self.folder / f"{name}.{ending}", force=force)
        found: dict[Path, str | bytes] = {}
        if self.drawn and figures:
            images = pictures(figures, formats=self.drawn, browser=self.browser)
            found |= {self.folder / f"{name}.{kind}": content for (name, kind), content in images.items()}
        if self.with_csv:
            found |= {self.folder / f"{name}.{CSV}": figure.to_csv() for name, figure in figures.items()}
        if found:
            try:
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise OutputError(f"{self.folder} cannot be made: {error.strerror or error}.") from error
        return found
