"""Time two things in turns, so that what else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """One comparison: seconds of each repeat, taken in turns."""

    what: str
    peer: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    def row(self) -> str:
        """Return a line of the table: medians, and the ratio with its spread over the pairs."""
        pairs = sorted(t / o for o, t in zip(self.ours, self.theirs, strict=True))
        median = statistics.median(self.theirs) / statistics.median(self.ours)
        return (
            f"| {self.what} | {statistics.median(self.ours):.3f} s | {self.peer} "
            f"| {statistics.median(self.theirs):.3f} s | {median:.1f} ({pairs[0]:.1f} to {pairs[-1]:.1f}) "
            f"| {len(self.ours)} |"
        )


HEAD = "| what | rankwise | peer | peer's time | ratio (pairs) | repeats |\n| --- | --- | --- | --- | --- | --- |"


def seconds(job: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def compare(what: str, ours: Callable[[], object], peer: str, theirs: Callable[[], object], repeats: int) -> Ratio:
    """Run ours, theirs, ours, theirs, ... after one warm-up of each."""
    ours()
    theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return Ratio(what, peer, tuple(t[0] for t in times), tuple(t[1] for t in times))
