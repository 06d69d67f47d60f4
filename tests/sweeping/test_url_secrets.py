"""DATA by a URL with a password and a signature, which no file and no word of a sweep holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import stand_ins

from rankwise.errors import UsageError
from rankwise.records import SweepRecord
from rankwise.report import render_page
from rankwise.sweeping import running
from rankwise.sweeping.asking import settle_sweep
from rankwise.sweeping.cells import Ended, Task
from rankwise.sweeping.exports import export
from rankwise.sweeping.running import Standing, _Sweep, run_sweep
from rankwise.sweeping.settings import make_request

URL = "https://ann:pwplanted@host/d.jsonl?X-Amz-Signature=1fplanted"
AGAIN = "https://ann:otherplanted@host/d.jsonl?X-Amz-Signature=2eplanted"
SHOWN = "https://***@host/d.jsonl?***"


def with_secret(folder: Path) -> list[str]:
    """Return the files that hold what was planted."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]


def run(out: Path, work: Any, *, data: str = URL, seen: Any = None, **more: Any) -> SweepRecord:
    lists = {"ranks": (2,), "scaling": ("lora",), "learning_rates": (1e-3,), "device": "cpu", "forgetting_data": data}
    asked = settle_sweep("model", data, lists | more)
    assert asked.request.data == data, "what is fetched is what was asked for"
    return run_sweep(_Sweep(asked, out, work=work, look=stand_ins.look, command=("test",), progress=seen))


def mishaps(task: Task) -> Ended:
    """One run that is done, one whose worker raises, one that tells its error as `train_cell` does."""
    data = task.request.data
    if task.cell.seed == 1:
        raise OSError(f"no answer from {data}\nwhere login=AKID:keyplanted@bucket was sent")
    if task.cell.seed == 2:
        return Ended({}, f"OSError: {data}", f'Traceback:\n  File "a.py", line 1, in get({data!r})\nOSError: {data}')
    return Ended(stand_ins.files_of(stand_ins.run_record(task.cell)))


@pytest.fixture
def by_value(ray_local: Any) -> Any:
    """Let workers have the functions of this file, which they cannot import."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def test_no_file_of_a_sweep_holds_the_secrets_of_a_url(by_value: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = run(out, mishaps, seeds=3)
    assert with_secret(out) == []
    assert [cell.status for cell in record.cells] == ["done", "failed", "failed"]
    assert "no answer from https://***@host/d.jsonl?*** ... " in str(record.cells[1].error)
    assert record.cells[2].error == f"OSError: {SHOWN}"
    (trace,) = out.glob("*/traceback.txt")
    assert trace.read_text().endswith(f"OSError: {SHOWN}")
    assert (record.config.data, record.config.settings["forgetting_data"]) == (SHOWN, SHOWN)
    page = render_page(record)
    assert "planted" not in page
    assert "host/d.jsonl" in page


def test_no_file_of_tunes_does_while_it_works(by_value: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray.tune", reason="ray.tune needs what ray[tune] brings")
    out = tmp_path / "out"
    files: set[str] = set()
    held: set[str] = set()

    def look(_: Standing) -> None:
        files.update(path.name for path in (out / ".sweep" / "work").rglob("*"))
        held.update(with_secret(out))

    record = run(out, mishaps, seeds=3, learning_rates=(1e-3, 3e-3), asha=2, seen=look)
    assert [cell.status for cell in record.cells].count("failed") >= 2
    assert "tuner.pkl" in files, "it was looked at while Tune was at work"
    assert held == set()
    assert with_secret(out) == []


def done(task: Task) -> Ended:
    return Ended(stand_ins.files_of(stand_ins.run_record(task.cell)))


def test_a_link_that_was_signed_anew_goes_on(by_value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = run(out, done, seeds=2)
    monkeypatch.setattr(running, "Engine", lambda *_: pytest.fail("nothing is to do"))
    assert run(out, done, data=AGAIN, seeds=2).cells == first.cells
    with pytest.raises(UsageError, match=r"was run with data .*@host/d\.jsonl") as caught:
        run(out, done, data=AGAIN.replace("d.jsonl", "e.jsonl"), seeds=2)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "data", "texts", "what"),
    [("m", URL, None, "DATA"), ("m", "d", URL, "--forgetting-data"), (URL, "d", None, "MODEL")],
)
def test_an_export_shows_no_secret(model: str, data: str, texts: str | None, what: str) -> None:
    request = make_request(model, data, {"forgetting_data": texts})
    grid = settle_sweep("m", "d", {}).grid
    with pytest.raises(UsageError, match=rf"--export wandb: {what} https://\*\*\*@host/d\.jsonl\?\*\*\* has") as caught:
        export("wandb", request, grid)
    assert "planted" not in str(caught.value)
    written = export("axolotl", request, grid)
    assert "planted" not in written
    assert (SHOWN in written) == (texts is not None)


def test_what_is_asked_for_is_told_apart_by_all_but_the_secrets() -> None:
    one, same, other = (make_request("m", data, {}) for data in (URL, AGAIN, URL.replace("host", "elsewhere")))
    assert one.digest == same.digest != other.digest
    versions = [make_request("m", f"s3://b/d.jsonl?versionId={version}", {}).digest for version in "ab"]
    assert versions[0] != versions[1], "a version is no secret"
