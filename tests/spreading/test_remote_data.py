"""DATA over HTTP: asked for again where that may help, and no secret of its URL in a message or in a file of a run."""

from __future__ import annotations

import json
import traceback
from pathlib import Path

import pytest
from range_server import RangeServer

from rankwise.checkpoints import patience
from rankwise.checkpoints.patience import TRIES
from rankwise.errors import AccessError, SourceNotFoundError
from rankwise.tuning.data import read_data

ROWS = [{"prompt": f"The office of {word} is in", "completion": f" {word}."} for word in ("Aldersey", "Brambleport")]


@pytest.fixture
def served(web: RangeServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of two rows, with a password and a signature that the server asks for."""
    monkeypatch.setattr(patience, "PAUSES", [0.0] * (TRIES - 1))
    (web.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    web.login, web.signature = "ann:pwplanted", "1fplanted"
    return f"http://ann:pwplanted@{web.host}/rows.jsonl?X-Amz-Signature=1fplanted"


def test_a_busy_server_and_a_lost_connection_are_asked_again(web: RangeServer, served: str) -> None:
    web.statuses.extend([503, 429])
    web.cuts = 1
    assert read_data(served).rows == tuple(ROWS)
    assert web.cuts == 0
    assert len(web.sent) == 2, "the answer that was cut short, and a whole one"


def test_what_stays_busy_is_given_up_and_what_is_not_there_is_asked_for_once(web: RangeServer, served: str) -> None:
    web.statuses.extend([503] * (TRIES + 1))
    with pytest.raises(AccessError, match=f"tried {TRIES} times") as caught:
        read_data(served)
    assert len(web.statuses) == 1
    assert "planted" not in "".join(traceback.format_exception(caught.value))
    web.statuses.clear()
    web.statuses.extend([404] * TRIES)
    with pytest.raises(SourceNotFoundError) as gone:
        read_data(served)
    assert len(web.statuses) == TRIES - 1
    assert "planted" not in "".join(traceback.format_exception(gone.value))


def test_a_url_that_cannot_be_opened_is_told_without_its_secrets() -> None:
    url = "nope://ann:pw{0}@host/rows.jsonl?X-Amz-Signature=1f{0}".format("planted")
    with pytest.raises(SourceNotFoundError, match="cannot be opened: Protocol not known") as caught:
        read_data(url)
    assert "planted" not in "".join(traceback.format_exception(caught.value))


def test_no_file_of_a_run_holds_the_secrets_of_its_data(
    web: RangeServer, served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="trl comes with the train extra")
    from small_models import make_pico

    import rankwise
    from rankwise.records import RunRecord, read_record
    from rankwise.tuning import training

    model, out = str(make_pico(tmp_path / "pico")), tmp_path / "out"
    flags = {"steps": 1, "batch_size": 2, "rank": 2, "device": "cpu"}

    def with_secret(folder: Path) -> list[Path]:
        return [path for path in folder.rglob("*") if path.is_file() and b"planted" in path.read_bytes()]

    record = rankwise.train(model, served, out=out, forgetting_data=served, **flags)
    shown = f"http://***@{web.host}/rows.jsonl?***"
    assert record.config.data == shown
    assert record.forgetting_detail is not None
    assert shown in str(record.forgetting_detail)
    assert with_secret(out) == []

    def broken(*_: object, **__: object) -> None:
        raise OSError(f"lost {served} and AKID:keyplanted@bucket")

    monkeypatch.setattr(training._Run, "_fit", broken)
    with pytest.raises(OSError, match="lost"):
        rankwise.train(model, served, out=tmp_path / "broken", recall=False, command=("rankwise", served), **flags)
    failed = read_record(tmp_path / "broken" / "run.json", RunRecord)
    assert failed.error == f"OSError: lost {shown} and ***@bucket"
    assert failed.command == ("rankwise", shown)
    assert with_secret(tmp_path / "broken") == []
