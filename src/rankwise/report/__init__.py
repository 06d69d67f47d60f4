"""One self-contained page out of a record.

In: a spectra/1 or simulation/1 record. Out: one HTML document as text, which opens without a network.
"""

from rankwise.report.page import render_page

__all__ = ["render_page"]
