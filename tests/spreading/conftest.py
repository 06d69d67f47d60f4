"""A local Ray, a web server and an S3 server for tests of work that is spread; all on loopback."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from range_server import S3_ENVIRONMENT, CountingProxy, RangeServer

from rankwise.checkpoints import patience
from rankwise.joining import ENVIRONMENT

os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="session")
def ray_here(ray_local: Any) -> Any:
    """A Ray that this process has joined: `cluster="auto"` is it."""
    return ray_local


@pytest.fixture
def web(tmp_path: Path) -> Iterator[RangeServer]:
    """A web server on a folder of its own."""
    pytest.importorskip("aiohttp", reason="aiohttp comes with the s3 extra")
    folder = tmp_path / "web"
    folder.mkdir()
    server = RangeServer(folder)
    yield server
    server.close()


def forget(proxy: CountingProxy) -> None:
    """Empty all buckets of a moto server."""
    urllib.request.urlopen(urllib.request.Request(f"{proxy.url}/moto-api/reset", method="POST")).close()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, CountingProxy]]:
    """An S3 server with the bucket `bucket`, behind a proxy that counts: (filesystem to fill it, proxy)."""
    pytest.importorskip("s3fs", reason="s3fs comes with the s3 extra")
    moto = pytest.importorskip("moto.server", reason="moto comes with the dev extra")
    import fsspec

    for name in [n for n in os.environ if n.startswith("AWS_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = CountingProxy(server.get_host_and_port()[1])
    forget(proxy)  # moto keeps what other tests of this process have made
    for name, value in (S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": proxy.url}).items():
        monkeypatch.setenv(name, value)
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
    filesystem.mkdir("bucket")
    type(filesystem).clear_instance_cache()
    yield filesystem, proxy
    forget(proxy)
    type(filesystem).clear_instance_cache()  # it knows the address of this server
    proxy.close()
    server.stop()


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once, in this process."""
    monkeypatch.setattr(patience, "PAUSES", [0.0] * len(patience.PAUSES))
