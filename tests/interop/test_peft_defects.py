"""The two scaling defects of PEFT that lint's rules claim, kept reproduced: when PEFT mends one, this says so."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType

import pytest

from rankwise.linting.rules.starts import _FAMILIES

pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

LAB = Path(__file__).resolve().parents[2] / "lab" / "peft_scaling_defects.py"

MENDED = (
    f"PEFT {peft.__version__} keeps the scale here: the rule in rankwise.linting.rules.starts and its page have to go"
)

# scales are products of two small whole numbers and a square root; the merged ones pass through float32 sums
CLOSE = 1e-5


@pytest.fixture(scope="module")
def lab() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peft_scaling_defects", LAB)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_keeps_alpha_over_r_alone(lab: ModuleType, use_rslora: bool) -> None:
    cases = list(lab.eva(use_rslora=use_rslora))
    assert cases, "EVA moved no rank: the data of the lab script does not show the defect any more"
    for case in cases:
        old, new = map(int, re.findall(r"r (\d+) -> (\d+)", case.name)[0])
        wanted = math.sqrt(new / old) if use_rslora else 1.0
        assert case.off_by == pytest.approx(wanted, rel=CLOSE), MENDED


@pytest.mark.parametrize("use_rslora", [False, True])
def test_eva_misses_anchored_keys(lab: ModuleType, use_rslora: bool) -> None:
    plain, anchored = lab.eva_anchored_key(use_rslora=use_rslora)
    assert plain.off_by == pytest.approx(1.0, rel=CLOSE)
    assert anchored.off_by == pytest.approx(16 / 4, rel=CLOSE), MENDED


@pytest.mark.parametrize("use_rslora", [False, True])
def test_fused_experts_get_sqrt_2_under_rslora(lab: ModuleType, use_rslora: bool) -> None:
    cases = list(lab.moe(use_rslora=use_rslora))
    assert len(cases) == 6
    for case in cases:
        fused = case.name.endswith("gate_up_proj")
        wanted = math.sqrt(2) if fused and use_rslora else 1.0
        assert case.off_by == pytest.approx(wanted, rel=CLOSE), MENDED


def test_families_are_those_for_which_peft_joins_the_pair() -> None:
    """The rule moe-with-rslora names no model that PEFT with this transformers leaves alone."""
    weights = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for pair, families in _FAMILIES.items():
        for family in families.split():
            base = weights._MODEL_TO_CONVERSION_PATTERN[family]
            assert weights._MOE_FUSED_TARGETS[base] == {"gate_up_proj": list(pair)}
