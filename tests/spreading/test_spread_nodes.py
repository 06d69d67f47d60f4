"""The command line on a cluster that runs: two nodes, a bucket, a hub, kills, a node taken away while it works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from range_server import S3_ENVIRONMENT, CountingProxy, RangeServer
from remote_pairs import LAYERS, WIDTH, needed, write_pair

import rankwise
from checkpoints.hub_server import COMMIT, Hub
from rankwise.joining import ENVIRONMENT

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "src"
TENSOR = WIDTH * WIDTH * 2
"""Bytes of a weight of `write_pair`."""


@dataclass
class Running:
    """A cluster of two nodes in a process of its own, and the bucket and the hub that its nodes know."""

    program: subprocess.Popen[str]
    address: str
    environment: dict[str, str]
    filesystem: Any
    proxy: CountingProxy
    hub: Any

    def say(self, word: str) -> str:
        assert self.program.stdin is not None
        assert self.program.stdout is not None
        self.program.stdin.write(word + "\n")
        self.program.stdin.flush()
        return self.program.stdout.readline().strip()

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "rankwise", *words, "--cluster", self.address, "--quiet"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> str:
        program = self.start(*words)
        out, told = program.communicate(timeout=200)
        assert program.returncode == 0, told
        return out


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pytest.importorskip("ray", reason="ray comes with the cluster extra")
    pytest.importorskip("s3fs", reason="s3fs comes with the s3 extra")
    moto = pytest.importorskip("moto.server", reason="moto comes with the dev extra")
    import fsspec

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = CountingProxy(server.get_host_and_port()[1])
    keys = S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": proxy.url}
    hub = type("Known", (Hub,), {"folder": tmp_path_factory.mktemp("hub"), "log": [], "revisions": set()})
    hub_server = ThreadingHTTPServer(("127.0.0.1", 0), hub)
    threading.Thread(target=hub_server.serve_forever, daemon=True).start()
    home = {"HF_ENDPOINT": f"http://127.0.0.1:{hub_server.server_port}", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path_factory.mktemp("home"))}  # fmt: skip
    clean = {n: v for n, v in os.environ.items() if not n.startswith("AWS_") and not n.lower().endswith("_proxy")}
    environment = clean | ENVIRONMENT | keys | home | {"PYTHONPATH": str(SOURCE)}
    program = subprocess.Popen(
        [sys.executable, str(HERE / "two_nodes.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert program.stdout is not None
    try:
        address = next((line.split()[1] for line in program.stdout if line.startswith("address")), None)
        assert address is not None, "the cluster did not start"
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
            filesystem.mkdir("nodes")
            yield Running(program, address, environment, filesystem, proxy, hub)
            type(filesystem).clear_instance_cache()
    finally:
        program.communicate(timeout=60)  # its standard input ends, and so does the cluster
        proxy.close()
        server.stop()
        hub_server.shutdown()
        hub_server.server_close()


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def files(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    record = json.loads(found.pop("extraction.json"))
    found["record"] = {k: v for k, v in record.items() if k not in ("created", "command", "out", "base", "tuned")}
    found.pop("adapter_config.json")  # names the base as it was given
    return found


@pytest.mark.slow
def test_workers_read_their_own_ranges_of_a_bucket(running: Running, tmp_path: Path, rng: np.random.Generator) -> None:
    base, tuned = write_pair(tmp_path, rng)
    for folder in (base, tuned):
        running.filesystem.put(f"{folder}/", f"nodes/{folder.name}/", recursive=True)
    before = running.proxy.received
    out = running.run(
        "inspect", "s3://nodes/tuned", "--base", "s3://nodes/base", "--modules", r"layers\.[23]\.", "--json"
    )
    record = json.loads(out)
    here = json.loads(rankwise.inspect(tuned, base=base, modules=r"layers\.[23]\.").to_json())
    assert record["modules"] == here["modules"]
    assert len(record["modules"]) == 2
    assert "planted" not in out
    tensors = sum(needed(folder, layer) for folder in (base, tuned) for layer in (2, 3))
    # one more listing, index, config and two headers of each checkpoint for this process; XML and headers of answers
    assert running.proxy.received - before <= tensors + 64 * 1024
    whole = sum(path.stat().st_size for folder in (base, tuned) for path in folder.iterdir())
    assert running.proxy.received - before < whole / 2


@pytest.mark.slow
def test_interrupted_from_the_keyboard(
    running: Running, web: RangeServer, rng: np.random.Generator, tmp_path: Path
) -> None:
    base, tuned = write_pair(web.folder, rng)
    rankwise.extract(base, tuned, tmp_path / "here", rank=2)
    web.delay = 0.3
    out = tmp_path / "out"
    words = ("extract", f"{web.url}/base", f"{web.url}/tuned", str(out), "--rank", "2")
    program = running.start(*words)
    until(lambda: sum(n == TENSOR for _, _, n in web.sent) >= 5)
    program.send_signal(signal.SIGINT)
    _, told = program.communicate(timeout=60)
    assert (program.returncode, told) == (130, "rankwise: interrupted\n")
    assert not out.exists()
    web.delay = 0.0
    running.run(*words)  # the cluster is as it was, and what was done is not done again
    assert files(out) == files(tmp_path / "here")


@pytest.mark.slow
def test_killed_and_started_again(running: Running, web: RangeServer, rng: np.random.Generator, tmp_path: Path) -> None:
    base, tuned = write_pair(web.folder, rng)
    rankwise.extract(base, tuned, tmp_path / "here", rank=2)
    web.delay = 0.3
    out = tmp_path / "out"
    words = ("extract", f"{web.url}/base", f"{web.url}/tuned", str(out), "--rank", "2")
    program = running.start(*words)
    parts = tmp_path / ".out.partial" / "parts"
    until(lambda: parts.is_dir() and len(list(parts.iterdir())) >= 2)
    program.kill()
    program.communicate(timeout=60)
    assert not out.exists()
    done = len(list(parts.glob("*.part")))
    web.delay = 0.0
    time.sleep(1.0)  # what was under way at the kill has been read, or never will be
    web.sent.clear()
    running.run(*words)
    assert files(out) == files(tmp_path / "here")
    assert sum(n == TENSOR for _, _, n in web.sent) <= 2 * (LAYERS - done), "what was done is not read again"


@pytest.mark.slow
def test_a_hub_id_is_read_at_one_commit(running: Running, rng: np.random.Generator, tmp_path: Path) -> None:
    """Workers find the hub by themselves, and read the state that the command began with, by their own ranges."""
    base, tuned = write_pair(tmp_path, rng)
    hub = running.hub
    for path in tuned.iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    out = running.run("inspect", "org/name", "--base", str(base), "--modules", r"layers\.[23]\.", "--json")
    here = json.loads(rankwise.inspect(tuned, base=base, modules=r"layers\.[23]\.").to_json())
    assert json.loads(out)["modules"] == here["modules"]
    assert [n for name, n in hub.log if n == TENSOR] == [TENSOR] * 2
    assert hub.revisions == {"main", COMMIT}, "headers by this process, and all else by the commit"
    read = sum(n for _, n in hub.log)
    assert read <= 2 * (needed(tuned, 2) + needed(tuned, 3)), "index and headers here and in a worker, a tensor once"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "extract"])
def test_a_node_taken_away_costs_the_modules_it_was_at(
    running: Running, web: RangeServer, rng: np.random.Generator, tmp_path: Path, command: str
) -> None:
    base, tuned = write_pair(web.folder, rng)
    out = tmp_path / "out"
    words = {
        "inspect": ("inspect", f"{web.url}/tuned", "--base", f"{web.url}/base", "--json"),
        "extract": ("extract", f"{web.url}/base", f"{web.url}/tuned", str(out), "--rank", "2"),
    }[command]
    web.delay = 1.0
    program = running.start(*words)
    try:
        until(lambda: web.at_once >= 2)  # a worker has one request under way, and a node one worker: both are at work
        assert running.say("lose") == "lost"
        web.delay = 0.1
        printed, told = program.communicate(timeout=200)
    finally:
        assert running.say("join") == "joined"
    assert program.returncode == 0, told
    if command == "inspect":
        here = json.loads(rankwise.inspect(tuned, base=base).to_json())
        assert json.loads(printed)["modules"] == here["modules"]
    else:
        rankwise.extract(base, tuned, tmp_path / "here", rank=2)
        assert files(out) == files(tmp_path / "here")
    read = sum(n == TENSOR for _, _, n in web.sent)
    assert 2 * LAYERS <= read <= 2 * LAYERS + 4, "at most the two modules of the lost node are read again"
