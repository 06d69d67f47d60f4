"""One self-contained page out of a record, or out of several.

In: records of any kind that has a page. Out: one HTML document as text, which opens without a network.

Loaded by `rankwise` itself (see `rankwise.reporting`), so that nothing heavy is imported here before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.report.page import render_page

__all__ = ["render_page"]


def __getattr__(name: str) -> Any:
    if name == "render_page":
        from rankwise.report.page import render_page

        return render_page
    raise AttributeError(f"module 'rankwise.report' has no attribute {name!r}")
