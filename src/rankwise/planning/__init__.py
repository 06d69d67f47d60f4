"""`plan`: from the spectra of an update to a rank and an alpha for every module.

In: a spectra/1 record, or anything `inspect` takes. Out: a plan/1 record.
"""

from rankwise.planning.making import measured, plan

__all__ = ["measured", "plan"]
