"""How many bytes and requests `inspect` takes over S3 and over HTTP: counted at a server on loopback.

    python lab/remote_bytes.py --adapter ADAPTER --pair BASE TUNED --modules REGEX

Every case starts with empty caches. The S3 server is moto's; the web server serves ranges and no listings. Bytes are
those of bodies: of answers to a GET, with S3's listings. Every record is compared with that of the same files on disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

import rankwise

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


@dataclass
class Counted:
    """An application, and what it was asked for."""

    inner: Application
    requests: list[str] = field(default_factory=list)
    sent: int = 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterator[bytes]:
        method = environ["REQUEST_METHOD"]
        self.requests.append(method)
        for part in self.inner(environ, start):
            self.sent += len(part) if method != "HEAD" else 0
            yield part

    def clear(self) -> None:
        self.requests, self.sent = [], 0


def ranges_of(folder: Path) -> Application:
    """Return a web server on a folder, with ranges."""

    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        file = folder / environ["PATH_INFO"].lstrip("/")
        if not file.is_file():
            start("404 Not Found", [("Content-Length", "0")])
            return []
        data = file.read_bytes()
        headers, status, size = [("Accept-Ranges", "bytes")], "200 OK", len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", "")):
            first, last = int(wanted[1]), int(wanted[2])
            data, status = data[first : last + 1], "206 Partial Content"
            headers.append(("Content-Range", f"bytes {first}-{last}/{size}"))
        start(status, [*headers, ("Content-Length", str(len(data)))])
        return [data] if environ["REQUEST_METHOD"] != "HEAD" else []

    return answer


def served(application: Counted) -> str:
    """Start a server in this process and return its address."""
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.port}"


def sources(places: dict[str, Path]) -> tuple[dict[str, Counted], dict[str, dict[str, str]]]:
    """Put the folders into a bucket and behind web servers: what counts, by name, and the URLs of the folders."""
    s3 = Counted(DomainDispatcherApplication(create_backend_app))
    os.environ |= {"AWS_ENDPOINT_URL": served(s3), "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
                   "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip
    filling = fsspec.filesystem("s3", skip_instance_cache=True)
    filling.mkdir("bucket")
    urls: dict[str, dict[str, str]] = {"S3": {}, "HTTP": {}}
    counted = {"S3": s3}
    for name, place in places.items():
        folder = place if place.is_dir() else place.parent
        filling.put(f"{folder}/", f"bucket/{name}/", recursive=True)
        web = Counted(ranges_of(folder))
        end = "" if place.is_dir() else f"/{place.name}"
        urls["S3"][name] = f"s3://bucket/{name}{end}"
        urls["HTTP"][name] = served(web) + end
        counted[name] = web
    return counted, urls


def weights(place: Path) -> int:
    """Return the bytes of the files that are read: weights and their JSON."""
    files = [place] if place.is_file() else [p for p in place.iterdir() if p.suffix in (".safetensors", ".bin")]
    return sum(path.stat().st_size for path in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--pair", type=Path, nargs=2, required=True, metavar=("BASE", "TUNED"))
    parser.add_argument("--modules", required=True)
    asked = parser.parse_args()
    base, tuned = asked.pair
    places = {"adapter": asked.adapter, "base": base, "tuned": tuned}
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    counted, urls = sources(places)
    cases: list[tuple[str, list[str], dict[str, Any]]] = [
        ("adapter", ["adapter"], {}),
        ("adapter, --modules", ["adapter"], {"modules": asked.modules}),
        ("pair", ["tuned", "base"], {}),
        ("pair, --modules", ["tuned", "base"], {"modules": asked.modules}),
    ]
    print("| source | over | modules | bytes of the weights | bytes read | share | requests (HEAD, GET) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for words, names, options in cases:
        local: dict[str, Any] = {"base": places["base"]} if len(names) == 2 else {}
        here = rankwise.inspect(places[names[0]], **local, **options)
        for over in ("S3", "HTTP"):
            watched = [counted["S3"]] if over == "S3" else [counted[name] for name in names]
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            fsspec.get_filesystem_class("http").clear_instance_cache()
            for one in watched:
                one.clear()
            given = {"base": urls[over]["base"]} if len(names) == 2 else {}
            there = rankwise.inspect(urls[over][names[0]], **given, **options)
            assert there.modules == here.modules, "another result than from the disk"
            heads = sum(one.requests.count("HEAD") for one in watched)
            gets = sum(len(one.requests) for one in watched) - heads
            whole, read = sum(weights(places[name]) for name in names), sum(one.sent for one in watched)
            print(f"| {words} | {over} | {len(here.modules)} | {whole:,} | {read:,} | {read / whole:.1%} | "
                  f"{heads}, {gets} |")  # fmt: skip


if __name__ == "__main__":
    main()
