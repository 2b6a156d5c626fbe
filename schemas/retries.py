"""Requests to a bucket that are made again while their errors may pass, and counted; errors that stay are told in words."""

import contextlib
import functools
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

CONNECTIONS = 64
# Seconds to connect, and to wait for the next bytes of an object; and for how long what fails is tried again.
READ_TIMEOUT = (5.0, 8.0)
RETRY_SECONDS = 120.0
# Seconds that the first pause and any pause last at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0
# Statuses of answers that another try may not get.
PASSING = frozenset({408, 429, 500, 502, 503, 504})

_retries = Counter[str]()
_lock = threading.Lock()
Answer = TypeVar("Answer")


def ask(request: Callable[[], Answer], uri: str, name: str | None = None) -> Answer:
    """The answer to a request that does no harm when it is made again.

    Args:
        request: makes it, once.
        uri: the lake.
        name: the object that must be there, None where only the bucket must be.

    Raises:
        FileNotFoundError, PermissionError, TimeoutError: in words; other errors as they come.
    """
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError

    bucket = "/".join(uri.split("/")[:3])
    url = uri if name is None else f"{uri}/{name}"
    try:
        return again(request)()
    except exceptions.NotFound as error:
        missing = f"{uri} lies in no bucket: expected {bucket} to exist; create it, or name another --lake"
        raise FileNotFoundError(missing if name is None else url) from error
    except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as error:
        expected = f"expected an account that may read and write there; grant it roles/storage.objectUser on {bucket}"
        raise PermissionError(f"{url} may not be used: {expected}, or name another --lake ({error})") from error
    except exceptions.RetryError as error:
        expected = f"expected an answer within {RETRY_SECONDS:.0f} s of trying"
        raise TimeoutError(f"{url} cannot be reached: {expected}; run the same command again later ({error.cause})") from error


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What a folder refuses, in words."""
    try:
        yield
    except PermissionError as error:
        if error.errno is None:
            raise
        expected = "expected a user who may read and write there; grant it with chown or chmod, or name another --lake"
        raise PermissionError(f"{error.filename} may not be used: {expected} ({error.strerror})") from error


def again(request: Callable[[], Answer]) -> Callable[[], Answer]:
    """The request, tried again after pauses that grow and are drawn at random, as long as a server or a network may do better next time."""
    from google.api_core.retry import retry_target

    return lambda: retry_target(request, _passing(), pauses(), timeout=RETRY_SECONDS, on_error=_count)


def pauses() -> Iterator[float]:
    """Seconds to wait before each next try."""
    # Never from the generator that all of the process draws from: what a training that is under way drew next would depend on the network.
    chance, longest = random.SystemRandom(), FIRST_PAUSE
    while True:
        yield chance.uniform(0, longest)
        longest = min(2 * longest, LONGEST_PAUSE)


@functools.cache
def _passing() -> Callable[[Exception], bool]:
    import requests
    import urllib3
    from google.auth.exceptions import TransportError
    from google.cloud.storage.exceptions import DataCorruption

    lost = (requests.ConnectionError, requests.Timeout, ConnectionError, TransportError)
    broken = (requests.exceptions.ChunkedEncodingError, urllib3.exceptions.HTTPError, requests.JSONDecodeError, DataCorruption)

    def passes(error: Exception) -> bool:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return status in PASSING or isinstance(error, (*lost, *broken))

    return passes


def _count(_: Exception) -> None:
    with _lock:
        _retries["retries"] += 1


def take_retries() -> Counter[str]:
    """`retries`: how many requests this process has made again since this was last asked; empty where none."""
    with _lock:
        taken = _retries.copy()
        _retries.clear()
    return taken


@functools.cache
def client() -> Any:
    """One storage client a process, with a connection for each fetching thread."""
    from google.cloud import storage  # type: ignore[attr-defined]
    from requests.adapters import HTTPAdapter

    # It would ask for the bucket itself at times, behind our back, to name it in traces that nobody takes.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    client = storage.Client()
    adapter = HTTPAdapter(pool_maxsize=CONNECTIONS, pool_connections=CONNECTIONS)
    client._http.mount("https://", adapter)
    client._http.mount("http://", adapter)
    return client
