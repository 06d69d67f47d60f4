"""Hub repositories: from the local cache without a network, and through a stand-in for the hub."""

import collections
import http.server
import os
import subprocess
import sys
import threading

import pytest

from checkpoints.hub_server import COMMIT, Hub
from checkpoints.making import MAKERS, normal, write_shards
from rankwise.checkpoints import open_source
from rankwise.checkpoints.locate import everywhere
from rankwise.checkpoints.patience import TRIES
from rankwise.errors import SourceNotFoundError

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache; returns a function that makes the snapshot folder of a repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def snapshot(repo, revision="main"):
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        folder = root / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        reference = root / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(COMMIT)
        return folder

    return snapshot


@pytest.mark.parametrize("form", ["checkpoint", "peft"])
@pytest.mark.parametrize(
    ("revision", "suffix"),
    [("main", ""), ("main", "@main"), ("v1.0", "@v1.0"), ("refs/pr/7", "@refs/pr/7"), ("main", f"@{COMMIT}")],
)
def test_cached_repositories_open_offline(cache, rng, form, revision, suffix):
    made = MAKERS[form](cache("org/name", revision), rng)
    # the cache holds links to blobs
    blob = made.source.parents[1] / "blob"
    made.weights.rename(blob)
    made.weights.symlink_to(blob)
    for spelled in (f"org/name{suffix}", f"hf://org/name{suffix}"):
        with open_source(spelled) as opened:
            assert opened.source == spelled
            if form == "peft":
                a, _ = opened.read_factors(opened.modules[0])
                assert a.shape == (3, 4)


def test_cached_file_and_subfolder(cache, rng):
    folder = cache("org/name")
    (folder / "sub").mkdir()
    MAKERS["peft"](folder / "sub", rng)
    for spelled in ("hf://org/name/sub", "hf://org/name@main/sub/adapter_model.safetensors"):
        with open_source(spelled) as opened:
            assert opened.format == "peft"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("org/name", f"hf://org/name@{COMMIT}"),
        ("hf://org/name@v2/sub", f"hf://org/name@{COMMIT}/sub"),
        (f"org/name@{COMMIT}", f"hf://org/name@{COMMIT}"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("https://ann:pw@host/m.safetensors?sig=1", "https://ann:pw@host/m.safetensors?sig=1"),
    ],
)
def test_a_hub_id_is_sent_to_other_machines_with_its_commit(cache, rng, given, sent):
    """Another machine's cache may hold another state of the branch."""
    folder = cache("org/name")
    cache("org/name", "v2")
    MAKERS["peft"](folder, rng)
    (folder / "sub").mkdir()
    MAKERS["peft"](folder / "sub", rng)
    assert everywhere(given) == sent


def test_not_cached_and_partly_cached(cache, rng):
    with pytest.raises(SourceNotFoundError, match=r"not in the local cache.*hf download org/name"):
        open_source("org/name")
    folder = cache("org/name")
    (folder / "config.json").write_text("{}")  # as a tokenizer's download leaves it
    with pytest.raises(SourceNotFoundError, match="only a part of it"):
        open_source("org/name")
    write_shards(folder, [{"a": normal(rng, 2)}, {"b": normal(rng, 2)}])
    open_source("org/name").close()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceNotFoundError, match="only a part of it"):
        open_source("org/name")


def test_another_revision_is_not_the_cached_one(cache, rng):
    MAKERS["peft"](cache("org/name"), rng)
    with pytest.raises(SourceNotFoundError):
        open_source("org/name@other")


@pytest.fixture
def stand_in(tmp_path):
    """A web server that answers as the hub for org/name; returns (folder, handler, run)."""
    folder = tmp_path / "repo"
    folder.mkdir()
    handler = type("Hub", (Hub,), {"folder": folder, "log": [], "statuses": collections.deque()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }

    def run(code):
        made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert made.returncode == 0, made.stderr[-2000:]
        return made.stdout.strip()

    yield folder, handler, run
    server.shutdown()
    thread.join()
    server.server_close()


def test_ranges_from_the_hub(stand_in, rng):
    """huggingface_hub reads its endpoint when it is imported, so this runs in a process of its own."""
    folder, handler, run = stand_in
    shards = [{f"layers.{i}.w": normal(rng, 64, 64), f"layers.{i}.v": normal(rng, 64, 64)} for i in range(3)]
    index = write_shards(folder, shards)
    code = (
        "from rankwise.checkpoints import open_source\n"
        "with open_source({!r}) as opened: print(float(opened.read('layers.1.w')[0, 0]))"
    )
    for source in ("org/name", "hf://org/name@refs/pr/1"):
        handler.log.clear()
        assert float(run(code.format(source))) == shards[1]["layers.1.w"][0, 0]
        shard = folder / "model-00002-of-00003.safetensors"
        assert {name for name, _ in handler.log} == {index.name, shard.name}
        header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert sum(n for _, n in handler.log) == index.stat().st_size + header + 64 * 64 * 4


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("first", [[], [200]], ids=["when it is opened", "when its commit is asked for"])
def test_a_busy_hub_is_asked_again(stand_in, rng, first, status):
    """The hub's own client does not try again when it asks about a repository."""
    folder, handler, run = stand_in
    MAKERS["peft"](folder, rng)
    handler.statuses.extend([*first, *[status] * (TRIES - 1)])
    code = (
        "from rankwise.checkpoints import patience\n"
        "from rankwise.checkpoints.locate import everywhere\n"
        "patience.PAUSES[:] = [0.0] * len(patience.PAUSES)\n"
        "print(everywhere('org/name'))"
    )
    assert run(code) == f"hf://org/name@{COMMIT}"
    assert not handler.statuses


def test_a_hub_that_stays_busy_is_told_with_the_number_of_tries(stand_in, rng):
    folder, handler, run = stand_in
    MAKERS["peft"](folder, rng)
    handler.statuses.extend([200, *[429] * TRIES, 200])
    code = (
        "from rankwise.checkpoints import patience\n"
        "from rankwise.checkpoints.locate import everywhere\n"
        "from rankwise.errors import AccessError\n"
        "patience.PAUSES[:] = [0.0] * len(patience.PAUSES)\n"
        "try: everywhere('org/name')\n"
        "except AccessError as error: print(error)"
    )
    assert f"HfHubHTTPError; tried {TRIES} times" in run(code)
    assert list(handler.statuses) == [200], "bounded"


def test_a_repository_that_the_hub_does_not_have(stand_in):
    _, _, run = stand_in
    code = (
        "from rankwise.checkpoints import open_source\n"
        "from rankwise.errors import SourceNotFoundError\n"
        "try: open_source('org/no-such')\n"
        "except SourceNotFoundError as error: print(error)"
    )
    assert "no such repository" in run(code)


def test_a_hub_that_cannot_be_reached(stand_in):
    """A local path mistyped looks like a hub id: the message names both."""
    _, _, run = stand_in
    code = (
        "import os; os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'\n"
        "from rankwise.checkpoints import open_source\n"
        "from rankwise.errors import AccessError\n"
        "try: open_source('org/name')\n"
        "except AccessError as error: print(error)"
    )
    assert "'org/name' is no local path, and as a hub repository" in run(code)
