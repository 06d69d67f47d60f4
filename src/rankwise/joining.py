"""A Ray cluster for the time of a `with`: joined where one runs, or started on this machine.

In: an address. Out: the `ray` module, connected. Ray is imported here, when a cluster is asked for; its users get the
module. A cluster that runs already is only left again, never stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rankwise.errors import ClusterError, MissingDependencyError

LOCAL: Final = "local"
"""The address that starts Ray on this machine, in Ray's own words; "auto" is the cluster that runs on it."""

OBJECT_STORE: Final = 512 * 2**20
"""Bytes of shared memory on a local start; Ray puts on disk what does not fit."""

LOST: Final = 3
"""Times that a call is made again when its worker or its node is lost."""

PATIENCE: Final = 10.0
"""Seconds that the head of a cluster may take to answer."""

LONGEST: Final = 25
"""Characters of a folder under which Ray's sockets still fit into the 107 of an address."""

ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # local nodes use 127.0.0.1, not the machine's own address
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a call without a GPU leaves the variables that name them alone
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else Ray tells of a lost node on our stdout, amid the record of --json
    "RAY_task_oom_retries": str(LOST),  # the default is to try for ever
}

_QUIET: Final[dict[str, Any]] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How a client of HTTP/2, and so of gRPC, begins: the preface and empty SETTINGS (RFC 9113, 3.4)."""

_SETTINGS: Final = 4


@contextlib.contextmanager
def joined(address: str, why: str) -> Iterator[Any]:
    """Connect to a cluster and yield the `ray` module; disconnect at the end.

    A process that has joined a cluster before stays connected to it.

    Args:
        address: HOST:PORT or ray://HOST:PORT of a running cluster, "auto" for the one on this machine, "local" to start
            one here for the time of the `with`.
        why: what needs Ray, for the message where it is not installed.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: nothing answers there, or Ray does not start.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("ray", "cluster", why) from error
    if ray.is_initialized():
        _check_same(ray, address)
        yield ray
        return
    with contextlib.ExitStack() as ending:
        folder = ending.enter_context(_own_folder()) if address == LOCAL else None
        ending.callback(_leave, ray)
        with hushed():
            _start(ray, folder) if folder is not None else _connect(ray, address)
        yield ray


def _leave(ray: Any) -> None:
    with contextlib.suppress(Exception):  # a head that died meanwhile must not hide why the job ended
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        knock(_latest() if address == "auto" else address)
        ray.init(address=address, **_QUIET)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, by the way it is out of reach
        raise ClusterError(
            f"no Ray cluster answers at {address!r}: {_words(error)}. `ray status` on its head node shows whether it "
            f"runs; leave out --cluster to use this machine{_token()}"
        ) from error


def _start(ray: Any, folder: Path) -> None:
    try:
        # without the address, what a killed run has left over would be joined instead
        ray.init(
            address=LOCAL,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
            object_store_memory=OBJECT_STORE,
            **_QUIET,
        )
    except Exception as error:
        raise ClusterError(f"Ray did not start on this machine: {_words(error)}") from error


def _token() -> str:
    """Return what to do where a cluster asks for a token: Ray shows it of itself to the cluster of "auto" alone."""
    if "RAY_AUTH_MODE" in os.environ or not (Path.home() / ".ray" / "auth_token").exists():
        return ""
    return ". If the cluster asks for a token (`ray start` says whether), set RAY_AUTH_MODE=token here"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Make a folder for Ray's sockets and logs, apart from those of a Ray that somebody else runs on this machine."""
    usual = tempfile.gettempdir()
    short = usual if len(usual) <= LONGEST or not os.access("/tmp", os.W_OK) else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="rankwise.", dir=short))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _latest() -> str:
    """Return what Ray takes "auto" for: RAY_ADDRESS, or what the last `ray start` left, be it dead or alive."""
    named = os.environ.get("RAY_ADDRESS", "")
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    with contextlib.suppress(OSError):
        return named or file.read_text(encoding="utf-8").strip() or "auto"
    return "auto"


def _check_same(ray: Any, address: str) -> None:
    """Refuse another cluster than the one that this process has joined before."""
    there = ray.get_runtime_context().gcs_address
    if ray.util.client.ray.is_connected() and there.startswith("127."):  # of the head, which may be another machine
        return
    if address not in ("auto", LOCAL) and not may_be_same(address, there):
        raise ClusterError(
            f"this process has joined the Ray at {there} already, not the one at {address}; give `auto` to use that "
            "one, or call ray.shutdown() first"
        )


def may_be_same(address: str, there: str) -> bool:
    """Tell whether an address may be that of the head at HOST:PORT; True where it cannot be told.

    The port of ray:// is that of Ray's client server on the head, which says nothing about its other port.
    """
    (host, port), (head, gcs_port) = _parts(address), _parts(there)
    if not port.isdigit() or not gcs_port.isdigit():
        return True
    if port != gcs_port and not address.startswith("ray://"):
        return False
    found, known = _machines(host), _machines(head)
    return not found or not known or bool(found & known)


def _parts(address: str) -> tuple[str, str]:
    """Return host and port; the port is empty or no number in forms that only Ray knows."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    return host.strip("[]"), port if separator else ""


def _machines(host: str) -> set[str]:
    """Return the addresses that a name stands for; all that this machine has, loopback among them, are "here"."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return set()
    return {"here" if _own(family, at) else str(at[0]) for family, _, _, _, at in found}


def _own(family: int, at: Any) -> bool:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as asked:
        asked.bind(at)  # only an address of this machine can be bound; nothing is sent
        return True
    return False


def knock(address: str) -> None:
    """See whether a gRPC server answers at an address: Ray itself tries for minutes, and writes on stderr meanwhile.

    Raises:
        OSError: nothing answers in time, or something that is no cluster.
    """
    host, port = _parts(address)
    if not port.isdigit():  # "auto", and forms that only Ray knows
        return
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(_PREFACE)
        answer = b""
        while len(answer) < 9 and (more := connection.recv(9 - len(answer))):
            answer += more
    if len(answer) < 9 or answer[3] != _SETTINGS:
        raise ConnectionError(f"what listens on port {port} is no Ray cluster")


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep Ray's notes off our stderr; what matters is raised."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
