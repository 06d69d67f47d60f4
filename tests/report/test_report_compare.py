"""Records of one kind beside each other: the table has what differs, the figures each record's own numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import page_samples
import plan_samples
import pytest
import run_samples
import stability_samples
import sweep_samples

from rankwise.records import Record
from rankwise.report.comparing import MOST_COMPARED, compare
from rankwise.report.comparing.common import cut
from rankwise.report.drawing import Figure, Table


def table(part: Any) -> dict[str, tuple[str, ...]]:
    found: Table = part.values["differs"]
    return {row[0]: row[1:] for row in found.rows}


def figure(part: Any, name: str) -> Figure:
    return next(f for f in part.figures if f.name == name)


def test_two_spectra_differ_in_what_was_planted() -> None:
    one = page_samples.record([page_samples.module("a.0.q", [4.0, 3.0]), page_samples.module("a.0.v", [1.0, 1.0])])
    two = page_samples.record([page_samples.module("a.0.q", [5.0, 0.0]), page_samples.module("a.0.o", [1.0])])
    part = compare([(one, "one.json"), (two, "x/two.json")])
    assert part.files == ("one.json", "x/two.json")
    assert "modules that not all have 1" in part.values["same"]  # v here, o there
    energy = figure(part, "compare-energy")
    # shares of 16 / 25 and 1 / 2 have the mean 0.57; a single direction holds all
    assert energy.data[0]["y"] == pytest.approx([0.57, 1.0])
    assert energy.data[1]["y"] == pytest.approx([1.0, 1.0]) or energy.data[1]["y"] == [1]
    assert energy.fallback is not None
    assert energy.fallback.head == ("rank", "mean share, A", "mean share, B")
    values = figure(part, "compare-values")
    assert [choice.label for choice in values.choices] == ["a.0.q"]
    assert [list(t["y"]) for t in values.data] == [[4, 3], [5]]  # a value of zero has no place on a log axis
    assert part.values["tables"][0].rows[0][0] == "a.0.q"


def test_two_plans_name_the_modules_whose_ranks_differ() -> None:
    one, two = plan_samples.RECORDS["budget"], plan_samples.RECORDS["energy"]
    part = compare([(one, "one.json"), (two, "two.json")])
    drawn = figure(part, "compare-ranks")
    ranks = [{m.module: m.r for m in plan.modules} for plan in (one, two)]
    names = list(dict.fromkeys([*ranks[0], *ranks[1]]))
    differing = [n for n in names if ranks[0].get(n) != ranks[1].get(n)]
    assert drawn.fallback is not None
    assert [row[0] for row in drawn.fallback.rows] == differing
    for trace, mine in zip(drawn.data, ranks, strict=True):
        assert dict(zip(trace["x"], trace["y"], strict=True)) == {
            k: mine[name] for k, name in enumerate(names, start=1) if name in mine
        }
    assert f"A has {one.params:,} parameters" in part.verdict


def test_two_runs_have_their_losses_laid_over_each_other_and_no_claim() -> None:
    one = run_samples.run()
    two = msgspec.structs.replace(one, seed=8, loss=0.123, losses=one.losses[::2])
    part = compare([(one, "a/run.json"), (two, "b/run.json")])
    loss = figure(part, "compare-loss")
    assert [len(t["x"]) for t in loss.data] == [len(one.losses), len(one.losses[::2])]
    assert table(part)["last training loss"][1] == "0.123"
    assert table(part)["seed"] == ("7", "8")
    assert "learning rate" not in table(part)
    assert any(word.startswith("learning rate") for word in part.values["same"])
    assert "no interval" in part.verdict


def test_two_checks_have_their_exponents_side_by_side() -> None:
    one = stability_samples.check()
    verdicts = tuple(msgspec.structs.replace(v, exponent=0.5, exponent_ci=(0.4, 0.6)) for v in one.verdicts)
    two = msgspec.structs.replace(one, verdicts=verdicts)
    part = compare([(one, "a.json"), (two, "b.json")])
    drawn = figure(part, "compare-exponents")
    assert drawn.data[1]["y"] == [0.5] * len(one.verdicts)
    assert drawn.data[1]["error_y"]["array"] == pytest.approx([0.1] * len(one.verdicts))
    assert [v.exponent for v in one.verdicts] == pytest.approx(drawn.data[0]["y"], rel=1e-5)
    assert "agree" in part.verdict


def test_records_without_figures_of_their_own_compare_by_their_key_numbers() -> None:
    one = sweep_samples.sweep()
    two = msgspec.structs.replace(one, config=msgspec.structs.replace(one.config, ranks=(4, 16)))
    part = compare([(one, "a"), (two, "b")])
    assert table(part)["ranks"] == ("4 to 64", "4 to 16")
    assert "differ" in part.verdict
    assert part.figures == ()


KINDS: dict[str, Callable[[], Record]] = {
    "spectra": lambda: page_samples.adapter(2),
    "nothing measured": lambda: page_samples.record([]),
    "plan": lambda: plan_samples.RECORDS["uniform"],
    "bare plan": lambda: plan_samples.RECORDS["bare"],
    "run": run_samples.run,
    "failed run": run_samples.failed,
    "recall": lambda: run_samples.RECORDS["recall"],
    "check": stability_samples.check,
    "check of nothing": lambda: stability_samples.RECORDS["check of nothing"],
    "demo": run_samples.demo,
}


@pytest.mark.parametrize("name", KINDS)
def test_equal_records_differ_in_nothing(name: str) -> None:
    """Planted: the same record under two names. As many as hues allow are drawn."""
    record = KINDS[name]()
    for n in (2, MOST_COMPARED):
        part = compare([(record, f"{k}.json") for k in range(n)])
        assert part.values["differs"].rows == ()
        for drawn in part.figures:
            assert len(drawn.data) == n
            names = {str(trace["name"]) for trace in drawn.data}
            assert len(names) == n


def test_long_settings_that_differ_in_their_middle_differ() -> None:
    one = run_samples.run()
    paths = tuple(f"model.layers.{k}.q_proj" for k in range(40))
    swapped = (*paths[:20], "model.layers.99.q_proj", *paths[21:])
    runs = [
        msgspec.structs.replace(one, config=msgspec.structs.replace(one.config, target_modules=modules))
        for modules in (paths, swapped)
    ]
    assert len(cut(", ".join(paths))) <= 60
    assert "target modules" in table(compare([(run, f"{k}") for k, run in enumerate(runs)]))
