"""A stand-in for the Hugging Face hub, on loopback: one repository, org/name, out of a local folder."""

import collections
import http.server
import json
import re

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as HfFileSystem uses to list a repository and read ranges."""

    folder = None
    log: list = []  # noqa: RUF012
    revisions: set = set()  # noqa: RUF012 - under which files were read
    statuses: collections.deque = collections.deque()  # noqa: RUF012 - answers when asked about the repository

    def _json(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _entries(self):
        files = sorted(p for p in self.folder.iterdir() if p.is_file())
        return [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]

    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._json([e for e in self._entries() if e["path"] in asked])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if not re.match(r"/(api/models/)?org/name(/|$)", path) or "no-such" in path:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/models/org/name/tree/"):
            self._json(self._entries())
        elif path.startswith("/api/models/org/name") and self.statuses and (status := self.statuses.popleft()) != 200:
            self._json({"error": "busy"}, status)
        elif path.startswith("/api/models/org/name"):
            self._json({"id": "org/name", "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        else:
            self._file(path.rsplit("/", 1)[-1])

    def _file(self, name):
        data = (self.folder / name).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.log.append((name, len(part)))
            self.revisions.add(self.path.partition("/resolve/")[2].partition("/")[0])
            self.wfile.write(part)

    def log_message(self, *args):
        pass
