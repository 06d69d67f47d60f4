"""Each finding: a case that calls for it, and a near miss that must not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from rankwise.findings import FINDINGS, find
from rankwise.records import Finding, ModuleSpectrum


def adapter(
    name: str = "layers.0.q_proj", sigma: Sequence[float] = (4.0, 2.0, 1.0, 0.5), **changed: Any
) -> ModuleSpectrum:
    fields: dict[str, Any] = {
        "module": name,
        "shape": (64, 48),
        "r": len(sigma),
        "lora_alpha": 8.0,
        "scaling": 2.0,
        "rule": "lora",
        "dtype": "F32",
        "singular_values": tuple(sigma),
        "complete": True,
        "energy": sum(v * v for v in sigma),
        "stable_rank": 1.3,
        "effective_rank": 2.0,
        "rank_90": 2,
        "rank_99": len(sigma) if sigma else None,
        "relative_norm": None,
        "unchanged_share": None,
        "noise_edge": None,
        "signal_rank": None,
        "rounding_limited": False,
    }
    return ModuleSpectrum(**(fields | changed))


def delta(
    name: str = "layers.0.q_proj", sigma: Sequence[float] = (4.0, 2.0, 1.0, 0.5), **changed: Any
) -> ModuleSpectrum:
    fields = {
        "r": None,
        "lora_alpha": None,
        "scaling": None,
        "rule": None,
        "dtype": "BF16",
        "relative_norm": 0.01,
    }
    return adapter(name, sigma, **(fields | changed))


DEAD: dict[str, Any] = {
    "sigma": (0.0,) * 4,
    "effective_rank": None,
    "stable_rank": None,
    "rank_99": 0,
    "rank_90": 0,
}
BROKEN: dict[str, Any] = {
    "sigma": (),
    "energy": None,
    "effective_rank": None,
    "stable_rank": None,
    "rank_90": None,
    "rank_99": None,
    "relative_norm": None,
    "warnings": ("not-finite",),
}
FLAT = (1.0, 0.9, 0.8, 0.7)
STEEP = (9.0, 0.01, 0.01, 0.001)

# rule -> (modules, code and level it must give)
CALLS: dict[str, list[tuple[list[ModuleSpectrum], str, str]]] = {
    "never-trained": [
        ([adapter("a", **DEAD), adapter("b", **DEAD)], "never-trained", "error"),
        ([delta("a", **DEAD), delta("b", **DEAD)], "identical", "error"),
    ],
    "not-finite": [
        ([adapter("a"), adapter("b", **(BROKEN | {"r": 4}))], "not-finite", "error"),
        ([delta("a"), delta("b", **BROKEN)], "not-finite", "error"),
    ],
    "unrelated-checkpoints": [
        (
            [delta("a", relative_norm=1.41), delta("b", relative_norm=1.4), delta("c")],
            "unrelated-checkpoints",
            "error",
        ),
    ],
    "rounding-limited": [
        ([delta("a"), delta("b", rounding_limited=True)], "rounding-limited", "warning"),
    ],
    "dead-modules": [
        ([adapter("a"), adapter("b", **DEAD)], "dead-modules", "warning"),
    ],
    "rank-limited": [
        ([adapter("a", FLAT), adapter("b")], "rank-limited", "warning"),  # half of them
    ],
    "unchanged-modules": [
        ([delta("a"), delta("b", **DEAD)], "unchanged-modules", "info"),
    ],
    "unused-directions": [
        ([adapter("a", STEEP, rank_99=1), adapter("b")], "unused-directions", "info"),
        ([adapter("a", STEEP, rank_99=2)], "unused-directions", "info"),  # exactly half
    ],
}

# rule -> modules that come near and must not be called so
MISSES: dict[str, list[list[ModuleSpectrum]]] = {
    "never-trained": [
        [],
        [adapter("a", **DEAD), adapter("b", (1e-20,) * 4)],
        [delta("a", **DEAD), delta("b")],
        [adapter("a", **DEAD), adapter("b", **(BROKEN | {"r": 4}))],  # not known is not zero
    ],
    "not-finite": [[], [adapter("a")], [adapter("a", **DEAD)]],
    "unrelated-checkpoints": [
        [],
        [delta("a", relative_norm=0.99)],
        [delta("a", relative_norm=5.0), delta("b"), delta("c")],  # one outlier is not the median
        [adapter("a", relative_norm=5.0)],  # a large adapter is an adapter
        [delta("a", relative_norm=None)],
    ],
    "rounding-limited": [[], [delta("a")]],
    "dead-modules": [
        [],
        [adapter("a", **DEAD), adapter("b", **DEAD)],  # that is never-trained
        [adapter("a", (1e-20,) * 4), adapter("b")],
        [delta("a", **DEAD), delta("b")],
        [adapter("a"), adapter("b", **(BROKEN | {"r": 4}))],
    ],
    "rank-limited": [
        [],
        [adapter("a", FLAT), adapter("b"), adapter("c")],  # a third
        [adapter("a", (1.0, 0.9, 0.8, 0.3))],  # at the threshold, not above it
        [adapter("a", FLAT[:3])],  # too few values to show a fall
        [adapter("a", FLAT, shape=(4, 48))],  # the matrix has no higher rank
        [delta("a", FLAT)],
    ],
    "unchanged-modules": [[], [adapter("a"), adapter("b", **DEAD)], [delta("a", **DEAD), delta("b", **DEAD)]],
    "unused-directions": [
        [],
        [adapter("a", STEEP, rank_99=3)],
        [adapter("a", STEEP, rank_99=1), adapter("b"), adapter("c")],
        [adapter("a", STEEP, rank_99=None)],
        [delta("a", STEEP, rank_99=1)],
    ],
}


def test_every_rule_has_a_case_and_a_near_miss() -> None:
    assert sorted(CALLS) == sorted(MISSES) == sorted(FINDINGS)


@pytest.mark.parametrize("rule", sorted(FINDINGS))
def test_the_rule_speaks_where_it_should(rule: str) -> None:
    for modules, code, level in CALLS[rule]:
        hit = FINDINGS[rule](modules)
        assert hit is not None
        found, concerned = hit
        assert (found.code, found.level) == (code, level)
        assert found.text.endswith(".")
        marked, findings = find(modules)
        assert found in findings
        assert concerned
        assert [code in m.warnings for m in marked] == [m in concerned or code in m.warnings for m in modules]


@pytest.mark.parametrize("rule", sorted(FINDINGS))
def test_the_rule_is_silent_where_it_should_be(rule: str) -> None:
    for modules in MISSES[rule]:
        assert FINDINGS[rule](modules) is None


def every_text() -> list[Finding]:
    return [f for cases in CALLS.values() for modules, _, _ in cases for f in find(modules)[1]]


def test_no_finding_ever_advises_a_lower_rank() -> None:
    """A low effective rank is no reason to lower r: starved directions look the same in the file."""
    advice = re.compile(
        r"(smaller|lower(ed)?|less|fewer|reduce[ds]?|decrease[ds]?|shrink|cut)\b[^.;:]{0,20}\b(r|ranks?)\b"
        r"|\b(rank|r)\b[^.;:]{0,20}\b(too (large|high|big)|wasted)|\breduce\b|oversized|overparam",
        re.IGNORECASE,
    )
    assert advice.search("a smaller r would do")
    assert advice.search("try a lower rank")
    assert advice.search("the rank is too high")
    texts = every_text()
    assert {f.code for f in texts} >= set(FINDINGS)
    for finding in texts:
        # "fewer of the r directions hold" states what is there; the sentence about the file is allowed
        said = finding.text.replace("half of the r directions or fewer hold 99 % of the energy", "")
        said = said.replace("the spectrum is cut off at r before it falls", "")
        assert advice.search(said) is None, finding.text


def test_unused_directions_leave_both_readings_open() -> None:
    hit = FINDINGS["unused-directions"]([adapter("a", STEEP, rank_99=1)])
    assert hit is not None
    found = hit[0]
    assert "cannot tell apart" in found.text
    assert "starved by a small scaling or learning rate" in found.text
    assert "rankwise check" in found.text
    assert found.level == "info"


def test_a_low_effective_rank_alone_says_nothing() -> None:
    assert find([adapter("a", effective_rank=1.01, stable_rank=1.0)])[1] == ()


def test_the_counts_and_names_are_right() -> None:
    dead = [adapter(f"layers.{i}.q", **DEAD) for i in range(5)]
    hit = FINDINGS["dead-modules"]([adapter("a"), *dead])
    assert hit is not None
    assert hit[0].text.startswith("5 of 6 modules have a delta of zero (layers.0.q, layers.1.q, layers.2.q and 2 more)")


def test_the_worst_come_first_and_the_readers_findings_are_kept() -> None:
    reader = Finding(code="tied-embeddings", level="info", text="t")
    late = Finding(code="tensors-missing", level="error", text="t")
    marked, found = find(
        [adapter("a", FLAT), adapter("b", **DEAD), adapter("c", **(BROKEN | {"r": 4}))], [reader, late]
    )
    assert [m.warnings for m in marked] == [("rank-limited",), ("dead-modules",), ("not-finite",)]
    assert [f.level for f in found] == sorted((f.level for f in found), key=["error", "warning", "info"].index)
    assert [f.code for f in found] == [
        "tensors-missing",
        "not-finite",
        "dead-modules",
        "rank-limited",
        "tied-embeddings",
    ]


def test_nothing_measured_nothing_said() -> None:
    assert find([]) == ((), ())
