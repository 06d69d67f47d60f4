"""One self-contained page out of a record.

In: a spectra/1, simulation/1, run/1, recall/1 or demo/1 record. Out: one HTML document as text, which opens without a
network.
"""

from rankwise.report.page import render_page

__all__ = ["render_page"]
