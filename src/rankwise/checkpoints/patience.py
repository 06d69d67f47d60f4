"""Requests that are made again: a connection that dropped, a server that is busy.

In: a request. Out: its answer, or the error of the last try. What a second try cannot mend is raised at once.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from rankwise.errors import MalformedFileError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

PAUSES: Final = [0.2, 1.0, 4.0]
"""Seconds before the second try and those after it; each is stretched by up to a half, so that many workers that
lost one server do not come back to it together. S3 and hub clients try by themselves before that."""

TRIES: Final = len(PAUSES) + 1

_NUMBERS: Final = frozenset(
    {errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH,
     errno.ENETRESET, errno.EIO, errno.EAGAIN, errno.EBUSY}
)  # fmt: skip
_NAMES: Final = frozenset(
    {"ClientConnectionError", "ClientPayloadError",  # aiohttp: http, and s3 below botocore
     "TransportError",  # httpx: the hub
     "HTTPClientError", "IncompleteReadError", "ResponseStreamingError"}  # botocore
)  # fmt: skip
"""Classes of libraries that need not be installed, by name."""

_REFUSED: Final = frozenset(
    {"ClientConnectorError", "ConnectionRefusedError", "ConnectError", "EndpointConnectionError"}
)


def status_of(error: BaseException) -> int | None:
    """Return what a server answered: aiohttp keeps it in the error, huggingface_hub (httpx) in the error's response."""
    for holder, name in ((error, "status"), (getattr(error, "response", None), "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) and status:
            return status
    return None


def passing(error: BaseException, *, known: bool) -> bool:
    """Tell whether the same request may well be answered a moment later.

    Args:
        error: what a filesystem raised.
        known: whether the server has answered before: one that has and refuses now is starting again, one that never
            did is not there.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    status = status_of(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if names & _REFUSED:
        return known
    if isinstance(error, FileNotFoundError):  # fsspec's http says so whatever went wrong with a HEAD
        return error.__cause__ is not None and passing(error.__cause__, known=known)
    if isinstance(error, MalformedFileError):  # a short answer
        return True
    if isinstance(error, (ConnectionError, TimeoutError)) or names & _NAMES:
        return True
    return isinstance(error, OSError) and error.errno in _NUMBERS


def patiently(call: Callable[[], Answer], *, known: bool) -> Answer:
    """Make a request, and again after each pause while its error is a passing one."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if not passing(error, known=known):
                raise
            log.info("%s; again in %.1f s", type(error).__name__, pause)
            time.sleep(pause * random.uniform(1.0, 1.5))
    return call()
