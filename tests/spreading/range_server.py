"""Servers on loopback that count bytes and lose connections: what tests of remote reading talk to.

`RangeServer` serves a folder over HTTP. `CountingProxy` stands before any server (here: moto's S3), counts what goes
through and cuts connections.
"""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIDPLANTED",
    "AWS_SECRET_ACCESS_KEY": "secretplanted",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What a client of S3 needs beside the address; no service knows these keys."""


class RangeServer:
    """A web server with range requests and without listings.

    Attributes:
        sent: (file, first byte, bytes of the body) of every answer to a GET.
        cuts: how many answers with a body are to end in their middle, from now on.
        statuses: answered instead of the files, one after another.
        busy: name of a file that is always answered with 503, or None.
        login: "user:password" that is asked for, or None.
        signature: that the query has to hold, or None.
        delay: seconds before the body of an answer to a GET.
        at_once: most answers with a body of 1 KiB or more that were under way at one time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: list[tuple[str, int, int]] = []
        self.cuts = 0
        self.statuses: deque[int] = deque()
        self.busy: str | None = None
        self.login: str | None = None
        self.signature: str | None = None
        self.delay = 0.0
        self.at_once = 0
        self._under_way = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def bytes_of(self, ending: str = "") -> int:
        return sum(n for name, _, n in self.sent if name.endswith(ending))

    def cut_this(self) -> bool:
        with self._lock:
            if not self.cuts:
                return False
            self.cuts -= 1
            return True

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self.at_once = max(self.at_once, self._under_way)
        time.sleep(self.delay)
        yield
        with self._lock:
            self._under_way -= 1

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: RangeServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _refused(self) -> int | None:
        owner = self.owner
        if owner.statuses:
            return owner.statuses.popleft()
        if owner.busy is not None and urlsplit(self.path).path.endswith(f"/{owner.busy}"):
            return 503
        if owner.login is not None:
            wanted = "Basic " + base64.b64encode(owner.login.encode()).decode()
            if self.headers.get("Authorization") != wanted:
                return 401
        asked = parse_qs(urlsplit(self.path).query).get("X-Amz-Signature", [None])[0]
        return 403 if owner.signature is not None and asked != owner.signature else None

    def _answer(self, *, body: bool) -> None:
        status = self._refused()
        file = self.owner.folder / urlsplit(self.path).path.lstrip("/")
        if status is not None or not file.is_file():
            self.send_error(status or 404)
            return
        data = file.read_bytes()
        total, start = len(data), 0
        self.send_response(200 if "Range" not in self.headers else 206)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), int(wanted[2] or total - 1)
            data = data[start : end + 1]
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if len(data) > 1 and self.owner.cut_this():
            data = data[: len(data) // 2]
            self.close_connection = True
        self.owner.sent.append((file.name, start, len(data)))
        with self.owner.answering() if len(data) >= 1024 else contextlib.nullcontext(), contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class CountingProxy:
    """Passes connections on to a server on loopback.

    Attributes:
        received: bytes that came from the server, headers included.
        cut_after: of the next `cuts` connections, so many bytes from the server are passed on before it is cut.
        cuts: connections still to be cut.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.received = 0
        self.cuts = 0
        self.cut_after = 0
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    @staticmethod
    def _up(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                with self._lock:
                    if self.cuts and passed + len(data) > self.cut_after:
                        self.cuts -= 1
                        data = data[: max(0, self.cut_after - passed)]
                        client.sendall(data)
                        break
                    self.received += len(data)
                passed += len(data)
                client.sendall(data)
        for one in (client, server):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self) -> None:
        self._socket.close()
