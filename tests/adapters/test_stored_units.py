"""What an adapter is converted by, and what readers say of the tensors that are no factors."""

import numpy as np
import pytest
from adapter_making import PREFIX, SHAPES, peft_adapter

from checkpoints.making import MAKERS
from rankwise.adapters.stored_units import read_unit, stack_name, ungrouped, units_of
from rankwise.checkpoints import open_source
from rankwise.checkpoints.factors import grouped

ADAPTERS = sorted(MAKERS.keys() - {"checkpoint"})


@pytest.mark.parametrize("form", ADAPTERS)
def test_units_hold_every_module_once_with_its_factors(tmp_path, rng, form) -> None:
    made = MAKERS[form](tmp_path, rng)
    with open_source(made.source, want="adapter") as adapter:
        units = units_of(adapter)
        assert [m.module for unit in units for m in unit.modules] == [m.module for m in adapter.modules]
        for unit in units:
            for module, (a, b) in zip(unit.modules, read_unit(adapter, unit), strict=True):
                assert stack_name(module.module) == unit.name
                assert unit.scaling * (b @ a) == pytest.approx(made.deltas[module.module], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("form", ADAPTERS)
def test_stored_and_others_part_the_file(tmp_path, rng, form) -> None:
    """Every tensor is a factor of some module or one of the others, and never both."""
    made = MAKERS[form](tmp_path, rng)
    with open_source(made.source, want="adapter") as adapter, open_source(made.source) as again:
        factors = {info.name for module in adapter.modules for info in adapter.stored(module)}
        others = {info.name for info in adapter.others()}
        assert not factors & others
        for info in adapter.others():
            assert adapter.read_other(info.name).shape == info.shape
        assert {i.name for m in again.modules for i in again.stored(m)} == factors
        assert isinstance(dict(adapter.metadata), dict)


def test_experts_of_one_stack_are_one_unit_with_the_name_of_the_parameter(tmp_path, rng) -> None:
    path = f"{PREFIX}model.layers.0.mlp.experts"
    held = {
        f"{path}.lora_A.weight": rng.standard_normal((12, 8)).astype(np.float32),
        f"{path}.lora_B.weight": rng.standard_normal((10, 12)).astype(np.float32),
    }
    source = peft_adapter(tmp_path / "a", rng, r=3, extra=held, target_parameters=["mlp.experts.down_proj"])
    with open_source(source, want="adapter") as adapter:
        units = units_of(adapter)
    (unit,) = (u for u in units if u.kind == "expert")
    assert len(units) == len(SHAPES) + 1
    assert (unit.kind, len(unit.modules), unit.r) == ("expert", 4, 3)
    assert (unit.name, unit.key) == ("model.layers.0.mlp.experts.down_proj",) * 2
    assert unit.path == "model.layers.0.mlp.experts"
    assert unit.parameter


def test_a_module_wrapped_twice_keeps_its_path_and_has_a_clean_name(tmp_path, rng) -> None:
    source = peft_adapter(tmp_path / "a", rng, shapes={f"{PREFIX}model.layers.0.q_proj": (6, 5)})
    with open_source(source, want="adapter") as adapter:
        (unit,) = units_of(adapter)
    assert unit.name == "model.layers.0.q_proj"
    assert unit.path == f"{PREFIX}model.layers.0.q_proj"
    assert unit.key == f"{PREFIX}model.layers.0.q_proj"  # PEFT takes one prefix off


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ungrouping_undoes_the_block_diagonal(rng, groups) -> None:
    a, b = rng.standard_normal((8, 5)), rng.standard_normal((12, 8 // groups))
    assert np.array_equal(ungrouped(grouped(a, b, groups=groups)[1], groups), b)
