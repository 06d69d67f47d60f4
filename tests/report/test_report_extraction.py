"""The page of an extraction: what calibration brought stands in its key numbers."""

from __future__ import annotations

import re

import extraction_samples as samples
import msgspec
import pytest

from rankwise.report import render_page
from rankwise.report.extraction_contents import calibration_facts


def test_what_calibration_brought_is_said_in_shares() -> None:
    facts = {name: (value, remark) for name, value, remark in calibration_facts(samples.CALIBRATED)}
    value, remark = facts["off the tuned loss"]
    assert value == "0.2"
    assert "without calibration 0.25 at the same ranks: 20 % lower" in remark


@pytest.mark.parametrize(("plain", "said"), [(0.1, "higher"), (None, None), (0.0, None)])
def test_a_loss_that_calibration_made_worse_or_nobody_measured_is_not_praised(
    plain: float | None, said: str | None
) -> None:
    calibration = msgspec.structs.replace(samples.CALIBRATED, loss_difference_plain=plain)
    facts = {name: remark for name, _, remark in calibration_facts(calibration)}
    assert ("off the tuned loss" in facts) == (said is not None)
    assert said is None or said in facts["off the tuned loss"]


def test_the_page_shows_it() -> None:
    assert re.search(r"20\s%\slower", render_page(samples.RECORDS["calibrated extraction"]))
