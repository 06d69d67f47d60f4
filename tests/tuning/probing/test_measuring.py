"""What `probe` says beside its figures: which rows it looked at, and what makes the figures worth less."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch comes with the train extra")

from rankwise.tuning.probing import measuring
from rankwise.tuning.probing.adapting import Look
from rankwise.tuning.probing.bits import Measured, RowBits
from rankwise.tuning.probing.measuring import BLOCK, _form_rank, _sampled
from rankwise.tuning.probing.passes import TokenRow
from rankwise.tuning.probing.recording import Drawn, Form, caveats, findings_of, quantiles

ROWS = tuple(TokenRow((1, i, 5), (-100, -100, 5)) for i in range(20))
FINE = Measured(
    rows=tuple(RowBits(5.0, 4.0, 3.0, 1) for _ in ROWS),
    looks=((Look(0, 5.0), Look(10, 4.0)), (Look(0, 5.0), Look(10, 4.0))),
    steps=(10, 0),
    apart=True,
    related=0,
)


@pytest.mark.parametrize(
    ("changed", "rows", "everything", "codes"),
    [
        ({}, ROWS, ROWS, []),
        ({"apart": False}, ROWS, ROWS, ["halves-not-apart"]),
        ({"looks": (), "steps": ()}, ROWS[:7], ROWS[:7], ["too-few-rows"]),
        ({}, ROWS[:8], ROWS[:8], []),
        ({"steps": (10, 100)}, ROWS, ROWS, ["form-not-learnt"]),
        ({}, ROWS[:10], ROWS, ["sampled-rows"]),
        ({}, (*ROWS, ROWS[3]), (*ROWS, ROWS[3]), ["equal-rows"]),
    ],
)
def test_what_makes_the_figures_worth_less_is_named(
    changed: dict[str, Any], rows: tuple[TokenRow, ...], everything: tuple[TokenRow, ...], codes: list[str]
) -> None:
    fields = {name: getattr(FINE, name) for name in ("rows", "looks", "steps", "apart", "related")} | changed
    found = findings_of(Measured(**fields), rows, len(everything), 100, everything)
    assert [f.code for f in found] == codes


def test_an_adaptation_of_no_steps_is_not_called_cut_short() -> None:
    assert findings_of(Measured(FINE.rows, FINE.looks, (0, 0), True, 0), ROWS, 20, 0, ROWS) == ()


def test_neighbours_are_drawn_together() -> None:
    drawn = _sampled(10 * BLOCK, 3 * BLOCK, 0)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 3 * BLOCK
    assert len({i // BLOCK for i in drawn}) == 3
    assert _sampled(10 * BLOCK, 3 * BLOCK, 1) != drawn


def test_the_adapter_of_the_form_has_no_more_rank_than_there_is() -> None:
    assert _form_rank({"a": (128, 64), "gate": (1, 64)}) == 4
    assert _form_rank({"a": (128, 3), "gate": (1, 64)}) == 3


def test_quantiles_are_those_of_rows() -> None:
    found = quantiles([float(i) for i in range(11)])
    assert found == {"0": 0.0, "0.1": 1.0, "0.25": 2.0, "0.5": 5.0, "0.75": 8.0, "0.9": 9.0, "1": 10.0}


def test_running_text_and_other_models_have_caveats_of_their_own() -> None:
    plain = caveats(tiny=True, form="prompt-completion", job="facts")
    assert len(caveats(tiny=False, form="prompt-completion", job="facts")) == len(plain) + 1
    assert any("--job style" in words for words in caveats(tiny=True, form="text", job="facts"))
    assert not any("--job style" in words for words in caveats(tiny=True, form="text", job="style"))


@pytest.mark.parametrize(("telling", "job", "rank", "rule"), [(7, "facts", 64, "rslora"), (3, "style", 8, "lora")])
def test_facts_in_an_unknown_manner_are_found_by_the_rows_that_hold_them(
    monkeypatch: pytest.MonkeyPatch, telling: int, job: str, rank: int, rule: str
) -> None:
    """7 of 20 rows hold 8 bits of news beside 300 of manner: too few by their sum, 1 %, enough by their number."""
    rows = tuple(RowBits(300.0, 10.0, 8.0 if i < telling else 0.0, 1) for i in range(len(ROWS)))
    measured = Measured(rows=rows, looks=FINE.looks, steps=FINE.steps, apart=True, related=0)
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: measured)
    monkeypatch.setattr(measuring, "pulls", lambda *_, **__: None)
    asked = measuring._Asked(None, None, None, None, False, 0, False)
    drawn = Drawn(ROWS, range(len(ROWS)))
    found, start = measuring._find(None, {"q_proj": (128, 128)}, drawn, Form(4, 1e-3, 10), asked, lambda *_: None)
    assert (found.evidence.job, start.rank, start.scaling) == (job, rank, rule)
