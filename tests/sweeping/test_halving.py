"""ASHA over seeds, by Ray Tune itself."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import stand_ins

from rankwise.errors import UsageError
from rankwise.joining import LOST
from rankwise.records import SweepRecord
from rankwise.sweeping import running
from rankwise.sweeping.asking import settle_sweep
from rankwise.sweeping.halving import ENVIRONMENT
from rankwise.sweeping.running import _Sweep, run_sweep

pytest.importorskip("ray", reason="ray comes with the cluster extra")
pytest.importorskip("ray.tune", reason="ray.tune needs what ray[tune] brings")

RATES = (1e-4, 3e-4, 1e-3, 3e-3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


def run(data: Path, out: Path, *, force: bool = False, **more: Any) -> SweepRecord:
    lists = {"ranks": (2, 4), "scaling": ("lora",), "learning_rates": RATES, "seeds": 4, "device": "cpu", "asha": 2}
    asked = settle_sweep("model", str(data), lists | more)
    under_way = _Sweep(asked, out, work=stand_ins.peaked, look=stand_ins.look, command=("test",), anew=force)
    return run_sweep(under_way)


def test_worse_rates_get_fewer_seeds_and_no_rank_is_dropped(
    ray_local: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Recall is highest at 1e-3 for every seed, and that rate begins: what Tune decides needs no luck."""
    from ray import tune

    fits = []
    fit = tune.Tuner.fit
    monkeypatch.setattr(tune.Tuner, "fit", lambda self: fits.append(self) or fit(self))
    record = run(data, tmp_path / "out")
    assert len(fits) == 1, "it is Tune that runs them"
    seeds = Counter((c.rank, c.learning_rate) for c in record.cells)
    assert {rank: seeds[rank, 1e-3] for rank in (2, 4)} == {2: 4, 4: 4}, "the best rate of every rank has all seeds"
    assert {seeds[rank, 1e-4] for rank in (2, 4)} <= {1, 2}, "the worst has not"
    assert [(b.rank, b.learning_rate) for b in record.best] == [(2, 1e-3), (4, 1e-3)]
    (finding,) = (f for f in record.findings if f.code == "settings-ended-early")
    assert "rank 2, lora, 0.0001 after 1" in finding.text
    assert "seeds are missing at 0.0001" in str(record.exponents[0].left_out), "its seeds' own best rate is not known"
    assert set(stand_ins.starts(data).values()) == {1}
    assert capfd.readouterr() == ("", ""), "Tune says nothing on our streams"
    assert sorted(path.name for path in (tmp_path / "out" / ".sweep").iterdir()) == ["asha.json", "lock"]
    monkeypatch.setattr(running, "Engine", lambda *_: pytest.fail("the same again has nothing to do"))
    assert run(data, tmp_path / "out").cells == record.cells


def test_what_is_over_is_not_run_again_and_mishaps_cost_their_cells(ray_local: Any, data: Path, tmp_path: Path) -> None:
    """A worker lost once is made again, one lost always fails its cell, a setting that diverges gets no more seeds."""
    out = tmp_path / "out"
    one = {"ranks": (2,), "learning_rates": (1e-3,)}
    for path in ("crash-1", "die-3"):
        (data / path).touch()
    run(data, out, **one, seeds=1, asha=None)
    record = run(data, out, ranks=(2,), learning_rates=(1e-3, 3e-3))
    counted = stand_ins.starts(data)
    name = "rank=2,scaling=lora,lr=0.001,seed={}"
    assert counted[name.format(0)] == 1, "it was over"
    assert counted[name.format(1)] + counted["rank=2,scaling=lora,lr=0.003,seed=1"] in (2, 3), "one of them was lost"
    assert counted[name.format(2)] == 1
    assert counted[name.format(3)] == LOST + 1
    status = {(c.learning_rate, c.seed): c.status for c in record.cells}
    assert [status[1e-3, seed] for seed in range(4)] == ["done", "done", "done", "failed"]
    (failed,) = (c for c in record.cells if c.status == "failed")
    assert f"worker was lost {LOST + 1} times" in str(failed.error)
    (data / "die-3").unlink()
    assert run(data, out, ranks=(2,), learning_rates=(1e-3, 3e-3)).best[0].score.n == 4, "the failed one is run again"


def test_begun_anew_nothing_is_left_of_what_was_not_wanted(ray_local: Any, data: Path, tmp_path: Path) -> None:
    """A rate that was ended is the best one now. One at a time: the one in the middle is over before others."""
    lists = {"ranks": (2,), "learning_rates": (1e-4, 1e-3, 1e-2), "jobs": 1}
    seeds = Counter(c.learning_rate for c in run(data, tmp_path / "out", **lists).cells)
    assert seeds == {1e-3: 4, 1e-4: 1, 1e-2: 1}
    (data / "peak").write_text("1e-2")
    seeds = Counter(c.learning_rate for c in run(data, tmp_path / "out", **lists, force=True).cells)
    assert seeds == {1e-3: 4, 1e-4: 1, 1e-2: 4}


def test_a_setting_that_diverges_gets_no_more_seeds(
    ray_local: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "1")
    monkeypatch.delenv("TUNE_DISABLE_SIGINT_HANDLER", raising=False)
    before = dict(os.environ)
    (data / "diverge-0").touch()
    record = run(data, tmp_path / "out", ranks=(2,), learning_rates=(1e-3, 3e-3), seeds=2)
    assert [(c.seed, c.status) for c in record.cells] == [(0, "diverged")] * 2
    assert not [f for f in record.findings if f.code == "settings-ended-early"], "that is said as runs-diverged"
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == {name: before.get(name) for name in ENVIRONMENT}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"asha": 1}, "--asha must be above 1, such as 2"),
        ({"asha": float("nan")}, "--asha must be above 1"),
        ({"asha": 2, "seeds": 1}, "takes two rates and two seeds, and there are 4 and 1"),
        ({"asha": 2, "learning_rates": (1e-3,)}, "and there are 1 and 3"),
        ({"asha": 2, "cluster": "ray://head:10001"}, "not through ray://"),
    ],
)
def test_what_asha_cannot_do(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        settle_sweep("m", "d", {"learning_rates": RATES} | given)
