"""What crosses the wire: bytes counted at the server, connections lost midway, and no secret in any text."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from range_server import CountingProxy, RangeServer
from remote_pairs import header, needed, write_pair

import rankwise
from planting import planted_factors, write_adapter
from rankwise.checkpoints import open_source
from rankwise.checkpoints.patience import TRIES, passing, patiently
from rankwise.errors import AccessError, RankwiseError, SourceNotFoundError, UsageError, without_secrets

HEADER_SLACK = 4096
"""Bytes for headers of answers and listings, beside what is counted exactly."""


def test_one_module_over_http_costs_its_own_bytes(web: RangeServer, rng: np.random.Generator) -> None:
    base, tuned = write_pair(web.folder, rng)
    record = rankwise.inspect(f"{web.url}/tuned", base=f"{web.url}/base", modules=r"layers\.3\.")
    assert [m.module for m in record.modules] == ["model.layers.3.self_attn.q_proj"]
    assert record.modules == rankwise.inspect(tuned, base=base, modules=r"layers\.3\.").modules
    # to the byte: nothing is read twice, read ahead, or of another shard
    assert web.bytes_of() == needed(base, 3) + needed(tuned, 3)


def test_one_module_over_s3_costs_its_own_bytes(
    bucket: tuple[Any, CountingProxy], tmp_path: Path, rng: np.random.Generator
) -> None:
    filesystem, proxy = bucket
    base, tuned = write_pair(tmp_path, rng)
    for folder in (base, tuned):
        filesystem.put(f"{folder}/", f"bucket/{folder.name}/", recursive=True)
    before = proxy.received
    record = rankwise.inspect("s3://bucket/tuned", base="s3://bucket/base", modules=r"layers\.3\.")
    assert record.modules == rankwise.inspect(tuned, base=base, modules=r"layers\.3\.").modules
    least = needed(base, 3) + needed(tuned, 3)
    whole = sum(path.stat().st_size for folder in (base, tuned) for path in folder.iterdir())
    # on the wire, with the headers of 14 answers and two listings in XML of 8 entries each
    assert least <= proxy.received - before <= least + 16 * 1024 + HEADER_SLACK < whole / 2


def test_one_module_of_an_adapter_over_http(web: RangeServer, rng: np.random.Generator) -> None:
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    factors = {name: planted_factors(rng, (64, 48), [2.0, 1.0]) for name in modules}
    folder = write_adapter(web.folder / "a", {n: (a.astype("f4"), b.astype("f4")) for n, (a, b) in factors.items()})
    record = rankwise.inspect(f"{web.url}/a", modules=r"layers\.2\.")
    assert len(record.modules) == 1
    config = (folder / "adapter_config.json").stat().st_size
    assert web.bytes_of() == config + header(folder / "adapter_model.safetensors") + 2 * (64 + 48) * 4


@pytest.mark.usefixtures("no_pauses")
def test_answers_that_end_in_their_middle_are_asked_for_again(web: RangeServer, rng: np.random.Generator) -> None:
    base, tuned = write_pair(web.folder, rng)
    wanted = rankwise.inspect(tuned, base=base)
    web.cuts = TRIES - 1
    assert rankwise.inspect(f"{web.url}/tuned", base=f"{web.url}/base").modules == wanted.modules
    assert web.cuts == 0


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(web: RangeServer, rng: np.random.Generator, status: int) -> None:
    base, _ = write_pair(web.folder, rng)
    with open_source(f"{web.url}/base") as opened:
        web.statuses.extend([status] * (TRIES - 1))
        name = opened.names()[0]
        with open_source(base) as local:
            np.testing.assert_array_equal(opened.read(name), local.read(name))
        assert not web.statuses


@pytest.mark.usefixtures("no_pauses")
def test_a_server_that_stays_away_is_told_with_the_tensor_and_the_file(
    web: RangeServer, rng: np.random.Generator
) -> None:
    write_pair(web.folder, rng)
    with open_source(f"{web.url}/base") as opened:
        name = "model.layers.4.self_attn.q_proj.weight"
        opened.info(name)
        asked = len(web.sent)
        web.cuts = 10**6
        with pytest.raises(AccessError) as raised:
            opened.read(name)
    for part in (name, f"{web.url}/base/model-00005-of-00006.safetensors", f"tried {TRIES} times"):
        assert part in str(raised.value)
    assert len(web.sent) - asked == TRIES, "bounded"


@pytest.mark.usefixtures("no_pauses")
def test_connections_to_s3_that_are_cut(
    bucket: tuple[Any, CountingProxy], tmp_path: Path, rng: np.random.Generator
) -> None:
    filesystem, proxy = bucket
    base, _ = write_pair(tmp_path, rng)
    filesystem.put(f"{base}/", "bucket/base/", recursive=True)
    with open_source("s3://bucket/base") as opened, open_source(base) as local:
        names = [n for n in opened.names() if "q_proj" in n]
        opened.info(names[0])
        proxy.cuts, proxy.cut_after = 2, 20_000  # in the middle of the 72 KiB of a tensor
        for name in names[:2]:
            np.testing.assert_array_equal(opened.read(name), local.read(name))
        assert proxy.cuts == 0


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("lost", [TRIES - 1, TRIES])
def test_a_store_that_is_busy_when_a_source_is_looked_for(
    lost: int, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request of all: whether the URL is a file or a folder."""
    memory = pytest.importorskip("fsspec.implementations.memory")
    a, b = planted_factors(rng, (8, 6), [2.0])
    folder = write_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (a.astype("f4"), b.astype("f4"))})
    filesystem = memory.MemoryFileSystem()
    filesystem.put(f"{folder}/", "/busy/a/", recursive=True)
    real, left = memory.MemoryFileSystem.info, [_Answered(503)] * lost

    def info(self: Any, path: str, **more: Any) -> Any:
        if left:
            raise left.pop()
        return real(self, path, **more)

    monkeypatch.setattr(memory.MemoryFileSystem, "info", info)
    if lost < TRIES:
        assert rankwise.inspect("memory://busy/a").modules == rankwise.inspect(folder).modules
    else:
        with pytest.raises(AccessError, match=f"memory://busy/a cannot be read .*; tried {TRIES} times"):
            open_source("memory://busy/a")
    assert not left
    filesystem.rm("/busy", recursive=True)


class _Status(Exception):  # noqa: N818 - as a library names it
    def __init__(self, status: int) -> None:
        self.status = status


class _Answered(OSError):  # noqa: N818 - as below
    """As huggingface_hub's HfHubHTTPError: the status is in the response."""

    def __init__(self, status: int) -> None:
        self.response = SimpleNamespace(status_code=status)


class ServerDisconnectedError(Exception):
    """As aiohttp's; told by the names of its bases."""


class ClientConnectionError(Exception):
    pass


class ClientConnectorError(ClientConnectionError):
    pass


def _caused(cause: Exception) -> FileNotFoundError:
    error = FileNotFoundError("url")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "first", "later"),
    [
        (ConnectionResetError(), True, True),
        (TimeoutError(), True, True),
        (_Status(503), True, True),
        (_Status(404), False, False),
        (_Status(403), False, False),
        (_Answered(429), True, True),
        (_Answered(503), True, True),
        (_Answered(401), False, False),
        (_Answered(404), False, False),
        (_caused(_Answered(502)), True, True),
        (_caused(_Answered(404)), False, False),
        (_caused(_Status(500)), True, True),
        (_caused(_Status(404)), False, False),
        (FileNotFoundError(), False, False),
        (PermissionError(13, "no"), False, False),
        (ConnectionRefusedError(), False, True),  # a server that has answered before is starting again
        (ClientConnectorError(), False, True),
        (ClientConnectionError(), True, True),
        (OSError(5, "input/output error"), True, True),
        (OSError(28, "no space"), False, False),
        (ValueError(), False, False),
        (UsageError("x"), False, False),
    ],
)
def test_what_a_second_try_may_mend(error: Exception, first: bool, later: bool) -> None:
    assert (passing(error, known=False), passing(error, known=True)) == (first, later)


def test_tries_are_bounded_and_other_errors_are_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("rankwise.checkpoints.patience.time.sleep", slept.append)
    calls: list[int] = []

    def fail(error: Exception) -> None:
        calls.append(1)
        raise error

    with pytest.raises(TimeoutError):
        patiently(lambda: fail(TimeoutError()), known=False)
    assert len(calls) == TRIES
    assert 5.2 <= sum(slept) <= 7.8, "0.2 + 1 + 4 s, each stretched by at most a half"
    with pytest.raises(ValueError):
        patiently(lambda: fail(ValueError()), known=True)
    assert len(calls) == TRIES + 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ann:pw@host/m", "https://***@host/m"),
        ("https://ann:p@w@host/m", "https://***@host/m"),
        ("simplecache::https://ann:pw@host/m", "simplecache::https://***@host/m"),
        ("ftp://ann:pw@host/m.bin", "ftp://***@host/m.bin"),
        ("https://host/m.safetensors?X-Amz-Signature=1f&X-Amz-Date=2", "https://host/m.safetensors?***"),
        ("adapter_model.safetensors?sig=1f%2Fb of shape (2, 3)", "adapter_model.safetensors?*** of shape (2, 3)"),
        ("message='Forbidden', url='https://host/a?token=t'", "message='Forbidden', url='https://host/a?***'"),
        ("s3://bucket/m.safetensors?versionId=3a", "s3://bucket/m.safetensors?versionId=3a"),
        ("https://host/m.safetensors?download=true&sig=1", "https://host/m.safetensors?***"),
        ("hf://org/name@v2/folder", "hf://org/name@v2/folder"),
        ("github://org:repo@main/m.safetensors", "github://org:repo@main/m.safetensors"),
        ("http:/ann:pw@host/m", "http:/***@host/m"),  # a Path drops a slash
        ("https://ann:p/w@host/m", "https://***@host/m"),
        ("s3://AKID:se/cret@bucket/m", "s3://***@bucket/m"),
        ("https://ann:pw@host/@scope/m", "https://***@host/@scope/m"),
        ("https://host:8080/a@b/m", "https://host:8080/a@b/m"),
        ("http://[::1]:8080/a@b", "http://[::1]:8080/a@b"),
        ("s3://arn:aws:s3:eu:1:accesspoint/a/m@2", "s3://arn:aws:s3:eu:1:accesspoint/a/m@2"),
        ("C:/ann@home/m", "C:/ann@home/m"),
        ("Is it at https://host/m? Look there.", "Is it at https://host/m? Look there."),
        ("--skip 'embed|lm_head'", "--skip 'embed|lm_head'"),
    ],
)
def test_the_secrets_of_a_url_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(RankwiseError(text)) == shown
    assert without_secrets(shown) == shown


def test_a_login_in_a_url_reads_and_is_nowhere_in_the_record(
    web: RangeServer, rng: np.random.Generator, tmp_path: Path
) -> None:
    base, tuned = write_pair(web.folder, rng)
    web.login = "ann:planted"
    url = f"http://ann:planted@{web.host}"
    record = rankwise.inspect(f"{url}/tuned", base=f"{url}/base")
    assert record.source == f"http://***@{web.host}/tuned"
    out = tmp_path / "adapter"
    made = rankwise.extract(f"{url}/base", f"{url}/tuned", out, rank=2)
    assert made.modules == rankwise.extract(base, tuned, tmp_path / "local", rank=2).modules
    texts = [record.to_json(), *(path.read_text() for path in out.glob("*.json"))]
    assert len(texts) == 3
    assert not any("planted" in text for text in texts)
    copied = rankwise.convert(str(out), tmp_path / "copy", rank=1)
    assert "planted" not in copied.to_json()


def test_a_signed_link_reads_and_is_nowhere_in_the_record(
    web: RangeServer, rng: np.random.Generator, tmp_path: Path
) -> None:
    a, b = planted_factors(rng, (24, 16), [2.0, 1.0])
    write_adapter(web.folder, {"model.layers.0.self_attn.q_proj": (a.astype("f4"), b.astype("f4"))})
    web.signature = "planted"
    url = f"{web.url}/adapter_model.safetensors?X-Amz-Signature=planted"
    record = rankwise.inspect(url)
    assert record.modules[0].singular_values == pytest.approx((2.0, 1.0), rel=1e-6)  # factors are float32
    assert "planted" not in record.to_json()
    with pytest.raises(RankwiseError) as raised:
        rankwise.convert(url, tmp_path / "out", rank=1)  # the config is not signed, so the scaling is not known
    assert "planted" not in str(raised.value)
    assert "adapter_model.safetensors" in str(raised.value)


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("how", ["refuses", "is busy", "drops"])
def test_no_error_and_no_traceback_holds_a_secret(
    web: RangeServer, rng: np.random.Generator, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """A traceback shows what an error was raised from, and libraries quote URLs there as they were given."""
    write_pair(web.folder, rng)
    caplog.set_level(logging.DEBUG, "rankwise")
    signed = "model-00001-of-00006.safetensors?X-Amz-Signature=planted"

    def read_first(url: str) -> None:
        with open_source(url) as opened:
            name = opened.names()[0]
            web.cuts = 100 if how == "drops" else 0
            opened.read(name)

    for url in (f"http://ann:planted@{web.host}/base/{signed}", f"http://{web.host}/base/{signed}"):
        if how == "refuses":
            web.login = "ann:other"
        elif how == "is busy":
            web.busy = "model-00001-of-00006.safetensors"
        with pytest.raises(RankwiseError) as raised:
            read_first(url)
        web.cuts = 0
        whole = "".join(traceback.format_exception(raised.value))
        assert "planted" not in whole + caplog.text
        assert f"{web.host}/base/model-00001-of-00006.safetensors?***" in str(raised.value)
        assert {"refuses": "401", "is busy": "503", "drops": "tried 4 times"}[how] in str(raised.value)


@pytest.mark.usefixtures("no_pauses")
def test_a_wrong_login_is_told_apart_from_an_empty_folder(web: RangeServer, rng: np.random.Generator) -> None:
    write_pair(web.folder, rng)
    web.login = "ann:other"
    with pytest.raises(RankwiseError, match=r"gives none of the usual names there \(it answers 401 \(Unauthorized\)\)"):
        open_source(f"http://ann:planted@{web.host}/base")


@pytest.mark.usefixtures("no_pauses")
def test_a_config_that_a_busy_server_holds_back_is_not_taken_as_missing(
    web: RangeServer, rng: np.random.Generator
) -> None:
    """Without its config an adapter would be read at an unknown scale."""
    a, b = planted_factors(rng, (24, 16), [2.0, 1.0])
    write_adapter(web.folder, {"model.layers.0.self_attn.q_proj": (a.astype("f4"), b.astype("f4"))})
    web.busy = "adapter_config.json"
    with pytest.raises(AccessError, match=r"adapter_config\.json cannot be read .*tried 4 times\): 503"):
        open_source(web.url)


def test_a_login_in_the_address_of_a_bucket_is_refused_and_not_repeated() -> None:
    for url in (
        "s3://AKID:planted@bucket/run",
        "s3://AKID:pl/planted@bucket/run",
        "gs://a:planted@bucket/x.safetensors",
    ):
        with pytest.raises(SourceNotFoundError, match="environment, profile, role") as raised:
            open_source(url)
        assert "planted" not in "".join(traceback.format_exception(raised.value))


def test_convert_does_not_go_on_with_another_adapter_of_the_same_address(
    web: RangeServer, rng: np.random.Generator, tmp_path: Path
) -> None:
    def write(scale: float) -> Path:
        factors = {}
        for layer in range(3):
            a, b = planted_factors(rng, (24, 16), [2.0 * scale, scale])
            factors[f"model.layers.{layer}.self_attn.q_proj"] = (a.astype("f4"), b.astype("f4"))
        return write_adapter(web.folder / "a", factors)

    def interrupted(_: str, done: int, __: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    write(1.0)
    url, out = f"{web.url}/a", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        rankwise.convert(url, out, rank=1, progress=interrupted)
    assert len(list((tmp_path / ".out.partial" / "parts").iterdir())) == 2
    local = write(3.0)
    made = rankwise.convert(url, out, rank=1)
    assert made.modules == rankwise.convert(local, tmp_path / "local", rank=1).modules


def test_the_keys_of_a_bucket_are_nowhere(
    bucket: tuple[Any, CountingProxy], tmp_path: Path, rng: np.random.Generator
) -> None:
    filesystem, _ = bucket
    base, tuned = write_pair(tmp_path, rng)
    for folder in (base, tuned):
        filesystem.put(f"{folder}/", f"bucket/{folder.name}/", recursive=True)
    out = tmp_path / "adapter"
    rankwise.extract("s3://bucket/base", "s3://bucket/tuned", out, rank=2)
    with pytest.raises(RankwiseError) as raised:
        open_source("s3://bucket/none")
    texts = [str(raised.value), *(path.read_text() for path in out.glob("*.json"))]
    assert not any("planted" in text.lower() for text in texts)
