"""Sources on fsspec filesystems: only the bytes needed are fetched, and every failure is ours."""

import http.server
import re
import threading

import numpy as np
import pytest

from checkpoints.making import MAKERS, normal, write_shards
from rankwise.checkpoints import open_source
from rankwise.errors import AccessError, MalformedFileError, MissingDependencyError, SourceNotFoundError

fsspec = pytest.importorskip("fsspec")

from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture
def memory(tmp_path):
    """Upload a local folder to memory://; returns a function from folder to URL."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()

    def upload(folder, name="bucket/run"):
        for file in folder.iterdir():
            filesystem.pipe_file(f"/{name}/{file.name}", file.read_bytes())
        return f"memory://{name}"

    yield upload
    filesystem.store.clear()


class CountingFileSystem(MemoryFileSystem):
    """A remote filesystem that notes every range that is fetched from it."""

    protocol = "counting"
    store: dict = {}  # noqa: RUF012 - shared like MemoryFileSystem's
    fetched: list = []  # noqa: RUF012
    async_impl = True  # so that ranges come through cat_file, as from S3

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start=start, end=end)
        self.fetched.append((path.rsplit("/", 1)[-1], start, len(data)))
        return data

    def cat_ranges(self, paths, starts, ends, max_gap=None, on_error="return", **kwargs):
        return [self.cat_file(p, s, e) for p, s, e in zip(paths, starts, ends, strict=True)]


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


@pytest.fixture
def counting():
    filesystem = fsspec.filesystem("counting")
    filesystem.store.clear()
    filesystem.fetched.clear()

    def upload(folder, name="bucket/run"):
        for file in folder.iterdir():
            filesystem.pipe_file(f"/{name}/{file.name}", file.read_bytes())
        filesystem.fetched.clear()
        return f"counting://{name}", filesystem.fetched

    return upload


@pytest.mark.parametrize("form", sorted(MAKERS))
def test_every_format_from_a_remote_folder_and_file(form, tmp_path, rng, memory):
    made = MAKERS[form](tmp_path, rng)
    url = memory(tmp_path)
    for source in (url, f"{url}/", f"{url}/{made.weights.name}"):
        with open_source(source) as opened, open_source(made.source) as local:
            if form == "checkpoint":
                assert set(opened.names()) == set(local.names())
                for name in opened.names():
                    assert opened.read(name).tobytes() == local.read(name).tobytes()
                assert opened.config == local.config
            else:
                assert list(opened.modules) == list(local.modules)
                for module in opened.modules:
                    for mine, theirs in zip(opened.read_factors(module), local.read_factors(module), strict=True):
                        np.testing.assert_array_equal(mine, theirs)


def test_one_module_of_a_sharded_checkpoint_costs_index_header_and_tensor(tmp_path, rng, counting):
    shards = [{f"layers.{i}.w": normal(rng, 64, 64), f"layers.{i}.v": normal(rng, 64, 64)} for i in range(6)]
    index = write_shards(tmp_path, shards)
    url, fetched = counting(tmp_path)
    with open_source(url) as opened:
        np.testing.assert_array_equal(opened.read("layers.3.w"), shards[3]["layers.3.w"])
    shard = tmp_path / "model-00004-of-00006.safetensors"
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    assert {name for name, _, _ in fetched} == {index.name, shard.name}
    # nothing is fetched twice and nothing is read ahead
    assert sum(n for _, _, n in fetched) == index.stat().st_size + header + 64 * 64 * 4


def test_one_module_of_an_adapter_costs_config_header_and_factors(tmp_path, rng, counting):
    made = MAKERS["peft"](tmp_path, rng)
    url, fetched = counting(tmp_path)
    header = 8 + int.from_bytes(made.weights.read_bytes()[:8], "little")
    with open_source(url) as opened:
        a, b = opened.read_factors(opened.modules[0])
    config = (tmp_path / "adapter_config.json").stat().st_size
    assert sum(n for _, _, n in fetched) == header + config + a.nbytes + b.nbytes


def test_torch_files_come_whole(tmp_path, memory):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.arange(4.0)}, tmp_path / "pytorch_model.bin")
    with open_source(memory(tmp_path)) as opened:
        assert opened.read("w").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("url", ["memory://no/such", "memory://no/such.safetensors"])
def test_nothing_there(url, memory):
    with pytest.raises(SourceNotFoundError, match="no/such"):
        open_source(url)


def test_whatever_a_filesystem_raises_becomes_ours(tmp_path, rng, counting, monkeypatch):
    MAKERS["checkpoint"](tmp_path, rng)
    url, _ = counting(tmp_path)
    for error, ours in (
        (RuntimeError("botocore: 503"), AccessError),
        (TimeoutError(), AccessError),
        (PermissionError("403"), AccessError),
        (FileNotFoundError("x"), SourceNotFoundError),
        (ImportError("Install s3fs to access S3"), MissingDependencyError),
        (ImportError("Install gcsfs to access Google Storage"), AccessError),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(CountingFileSystem, "cat_file", fail)
            with pytest.raises(ours):
                open_source(url)


def test_a_short_answer_is_a_cut_file(tmp_path, rng, counting, monkeypatch):
    MAKERS["checkpoint"](tmp_path, rng)
    url, _ = counting(tmp_path)
    real = CountingFileSystem.cat_file
    with open_source(url) as opened:
        monkeypatch.setattr(CountingFileSystem, "cat_file", lambda *a, **k: real(*a, **k)[:-1])
        with pytest.raises(MalformedFileError, match="cut short"):
            opened.read("model.embed.weight")


def test_a_store_that_forbids_listing(tmp_path, rng, counting, monkeypatch):
    MAKERS["peft"](tmp_path, rng)
    url, _ = counting(tmp_path)

    def forbid(*args, **kwargs):
        raise PermissionError("ListBucket")

    monkeypatch.setattr(CountingFileSystem, "ls", forbid)
    monkeypatch.setattr(CountingFileSystem, "info", lambda self, p: _info(self, p))
    with open_source(f"{url}/adapter_model.safetensors") as opened:
        assert opened.config is not None


def _info(filesystem, path):
    path = filesystem._strip_protocol(path)
    if path not in filesystem.store:
        raise FileNotFoundError(path)
    return {"name": path, "size": filesystem.store[path].size, "type": "file"}


class _Handler(http.server.BaseHTTPRequestHandler):
    folder = None
    ranges = True
    log: list = []  # noqa: RUF012

    def _send(self, body):
        file = self.folder / self.path.split("?")[0].lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        data, status = file.read_bytes(), 200
        total = len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.ranges:
            start, end = int(wanted[1]), int(wanted[2] or total - 1)
            data, status = data[start : end + 1], 206
        self.send_response(status)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.log.append((file.name, len(data)))
            self.wfile.write(data)

    def do_GET(self):
        self._send(True)

    def do_HEAD(self):
        self._send(False)

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """A web server on a folder, without listings; returns (folder, url, handler)."""
    pytest.importorskip("aiohttp")
    folder = tmp_path / "web"
    folder.mkdir()
    handler = type("Handler", (_Handler,), {"folder": folder, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_web_servers_with_and_without_ranges(web, rng, ranges):
    folder, url, handler = web
    handler.ranges = ranges
    made = MAKERS["peft"](folder, rng)
    for source in (url, f"{url}/adapter_model.safetensors"):
        with open_source(source) as opened, open_source(made.source) as local:
            assert list(opened.modules) == list(local.modules)
            for module in opened.modules:
                np.testing.assert_array_equal(opened.read_factors(module)[0], local.read_factors(module)[0])
    if ranges:
        assert max(n for name, n in handler.log if name == made.weights.name) < made.weights.stat().st_size


def test_sharded_checkpoint_on_the_web_and_a_missing_shard(web, rng):
    folder, url, _ = web
    shards = [{f"w{i}": normal(rng, 8, 8)} for i in range(3)]
    write_shards(folder, shards)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with open_source(url) as opened:
        np.testing.assert_array_equal(opened.read("w1"), shards[1]["w1"])
        with pytest.raises(MalformedFileError, match="model-00003-of-00003"):
            opened.read("w2")


def test_web_folder_without_weights(web):
    _, url, _ = web
    with pytest.raises(Exception, match="neither a checkpoint nor an adapter"):
        open_source(url)


def test_server_that_is_not_there():
    pytest.importorskip("aiohttp")
    with pytest.raises((AccessError, SourceNotFoundError)):
        open_source("http://127.0.0.1:9/model.safetensors")


def test_s3_reads_ranges_alone(tmp_path, rng, monkeypatch):
    """A real S3 client against a moto server: the same bytes as locally, and only those asked for."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("bucket")
        shards = [{f"layers.{i}.w": normal(rng, 32, 32)} for i in range(3)]
        write_shards(tmp_path, shards)
        for file in tmp_path.iterdir():
            filesystem.put_file(str(file), f"bucket/run/{file.name}")
        fetched = []
        real = type(filesystem)._cat_file

        async def cat_file(self, path, version_id=None, start=None, end=None):
            data = await real(self, path, version_id=version_id, start=start, end=end)
            fetched.append((path.rsplit("/", 1)[-1], len(data)))
            return data

        monkeypatch.setattr(type(filesystem), "_cat_file", cat_file)
        with open_source("s3://bucket/run") as opened:
            np.testing.assert_array_equal(opened.read("layers.1.w"), shards[1]["layers.1.w"])
        assert {name for name, _ in fetched} == {"model.safetensors.index.json", "model-00002-of-00003.safetensors"}
        assert fetched[-1][1] == 32 * 32 * 4
        with pytest.raises(SourceNotFoundError):
            open_source("s3://bucket/no-such")
        with pytest.raises((SourceNotFoundError, AccessError)):
            open_source("s3://no-such-bucket/x")
    finally:
        server.stop()
